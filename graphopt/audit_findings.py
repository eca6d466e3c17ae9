"""What an audit finds wrong, and where the difference to the float model comes from."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.audit_profile import CONVERSIONS, LAYOUTS, Kernel
from graphopt.audit_reasons import DQ, WEIGHTED, Q, dequantizer, is_op, on_activation, weight_shape
from graphopt.audit_report import Finding, NodeAudit
from graphopt.edit import constant_value
from graphopt.gains import DOT_PRODUCTS, environment
from graphopt.model import OWN
from graphopt.report import Category

if TYPE_CHECKING:
    from graphopt.auditing import Audited

SLOWER = 1.15  # a node is called slower in INT8 from this ratio on, and
SAME = 0.97  # ratios of latencies from here to its inverse are called as fast
_LEAST_US = 2.0  # from this difference on: the profile counts whole microseconds
SPARSE = 0.5  # share of zeros in a weight from which they are worth naming
_CONVERSION_TIME, _LAYOUT_TIME = "QuantizeLinear, DequantizeLinear, Cast", "layout: Reorder, Transpose"


def findings(found: Audited, base: Audited | None, rows: Sequence[NodeAudit]) -> list[Finding]:
    """All findings, the most expensive first."""
    nodes = {str(n.name): n for n in found.model.graph.nodes}
    made = [
        *_fallbacks(found, rows, nodes),
        *_without_operators(found, rows),
        *_slow(rows, nodes, found),
        *_weights(found, rows),
        *_islands(found, rows),
        *_sparse(found),
    ]
    return sorted(made, key=lambda f: -f.us)


def _own_us(found: Audited, node: gs.Node) -> float:
    """The time of a conversion that really runs."""
    placed = found.placement.nodes.get(str(node.name))
    own = placed is not None and placed.kernel is not None and placed.kernel.op in CONVERSIONS
    return found.us.get(str(node.name), 0.0) if own else 0.0


def _around(node: gs.Node) -> list[gs.Node]:
    """The conversions in front of a node and behind it."""
    front = [d for t in node.inputs if (d := dequantizer(t)) is not None]
    return [*front, *(r for t in node.outputs for r in t.outputs if is_op(r, Q))]


def _fallbacks(found: Audited, rows: Sequence[NodeAudit], nodes: dict[str, gs.Node]) -> Iterator[Finding]:
    for row in rows:
        if row.reason is not None and row.fix is not None:
            cost = sum(_own_us(found, n) for n in _around(nodes[row.name]))
            detail = f"its conversions take {cost:.0f} us"
            yield Finding(kind="fallback", nodes=[row.name], op=row.op, why=row.reason, detail=detail, fix=row.fix, us=cost)


def _without_operators(found: Audited, rows: Sequence[NodeAudit]) -> Iterator[Finding]:
    if found.profile.operators.kind == "functions":
        names = [str(n.name) for n in found.model.graph.nodes if n.domain == OWN]
        why = f"graphopt's operators are not there, so onnxruntime runs the functions ({found.profile.operators.reason})"
        fix = "put the library beside the model, or install numba"
        us = sum(r.us for r in rows if r.name in names)
        yield Finding(kind="operators", nodes=names, op="Int8Region", why=why, detail=f"{us:.0f} us", fix=fix, us=us)


# ---- INT8 that is slower than float


def _depthwise(node: gs.Node) -> bool:
    return node.op == "Conv" and int(node.attrs.get("group", 1)) > 1 and weight_shape(node)[1:2] == (1,)


def _thin(node: gs.Node) -> bool:
    return node.op == "Conv" and int(node.attrs.get("group", 1)) == 1 and weight_shape(node)[1:2] in ((1,), (2,), (3,))


def _signed(node: gs.Node, kernel: Kernel) -> str:
    types = [t for t, _ in kernel.inputs if t in ("int8", "uint8")]
    if not types or types[0] != "int8":
        return ""
    return "its activation is int8: onnxruntime's x86 kernels are made for uint8 activations"


def _unsigned_weight(node: gs.Node, kernel: Kernel) -> str:
    if str(node.op).removeprefix("QLinear") not in WEIGHTED:
        return ""
    weights = [t for t, shape in kernel.inputs if t in ("int8", "uint8") and prod(shape) > 1 and len(shape) > 1]
    return "its weight is uint8: onnxruntime's x86 kernels are made for int8 weights" if weights[1:2] == ["uint8"] else ""


def _is_thin(node: gs.Node, kernel: Kernel) -> str:
    return "few input channels: the INT8 kernel gathers patches byte by byte, the float one has a kernel for them" * _thin(node)


def _is_depthwise(node: gs.Node, kernel: Kernel) -> str:
    return "depthwise: nothing to sum over channels, where INT8 gains; the float kernel works on blocks of channels" * _depthwise(
        node
    )


_SLOW: tuple[tuple[Callable[[gs.Node, Kernel], str], str], ...] = (
    (_signed, "quantise activations to uint8"),
    (_unsigned_weight, "quantise weights to int8"),
    (_is_thin, "leave it in float"),
    (_is_depthwise, "compile-int8 runs it with graphopt's kernels; or leave the model in float"),
)


def _slow(rows: Sequence[NodeAudit], nodes: dict[str, gs.Node], found: Audited) -> Iterator[Finding]:
    for row in rows:
        kernel = found.placement.nodes[row.name].kernel
        if not row.int8 or kernel is None or row.how != "own" or nodes[row.name].domain == OWN:
            continue
        if not row.base_us:
            yield from _badly_typed(row, nodes[row.name], kernel)
            continue
        lost = row.us - row.base_us
        if row.us < SLOWER * row.base_us or lost < _LEAST_US:
            continue
        known = [(why, fix) for test, fix in _SLOW if (why := test(nodes[row.name], kernel))]
        why, fix = known[0] if known else ("its INT8 kernel is slower than the float one on this CPU", "leave it in float")
        detail = f"{row.us:.0f} us in INT8, {row.base_us:.0f} us in float"
        yield Finding(kind="slow", nodes=[row.name], op=row.op, why=why, detail=detail, fix=fix, us=lost)


def _badly_typed(row: NodeAudit, node: gs.Node, kernel: Kernel) -> Iterator[Finding]:
    """Types that are known to be slow, where there is no float model to measure against."""
    if platform.machine().lower() not in ("x86_64", "amd64") or str(node.op).removeprefix("QLinear") not in (*WEIGHTED, "QGemm"):
        return
    for test, fix in _SLOW[:2]:
        if why := test(node, kernel):
            yield Finding(kind="slow", nodes=[row.name], op=row.op, why=why, detail=f"{row.us:.0f} us", fix=fix, us=row.us)
            return


# ---- conversions, weights and zeros


def _weights(found: Audited, rows: Sequence[NodeAudit]) -> Iterator[Finding]:
    """Weights that are dequantised at every run, of nodes that were never asked to run in INT8."""
    asked = {r.name for r in rows if r.quantized}
    for node in found.model.graph.nodes:
        cost = _own_us(found, node) if is_op(node, DQ) and not on_activation(node) else 0.0
        readers = [str(r.name) for r in node.outputs[0].outputs] if cost else []
        if cost and readers and not asked & set(readers):
            why = "a constant it reads is stored in INT8 and dequantised at every run: what it computes with is float"
            op, fix = str(node.outputs[0].outputs[0].op), "quantise its activation too"
            yield Finding(kind="weight", nodes=readers, op=op, why=why, detail=f"{cost:.0f} us", fix=fix, us=cost)


def _islands(found: Audited, rows: Sequence[NodeAudit]) -> Iterator[Finding]:
    """INT8 parts that save less than the conversions at their border cost."""
    ran = {r.name: r for r in rows if r.int8 and r.base_us is not None}
    nodes = {str(n.name): n for n in found.model.graph.nodes}
    left = set(ran)
    while left:
        part, stack, border = [], [min(left)], {}
        left.discard(stack[0])
        while stack:
            name = stack.pop()
            part.append(name)
            for other in _neighbours(nodes[name]):
                key = str(other.name)
                if key in left:
                    left.discard(key)
                    stack.append(key)
                elif (is_op(other, Q) or is_op(other, DQ)) and _own_us(found, other):
                    border[key] = _own_us(found, other)
        saved = sum((ran[n].base_us or 0.0) - ran[n].us for n in part)
        cost = sum(border.values())
        if cost > saved + max(_LEAST_US, 0.01 * found.profile.us) and border:
            names = [r.name for r in rows if r.name in set(part)]
            gain = f"saves {saved:.0f} us" if saved >= 0 else f"takes {-saved:.0f} us more than in float"
            detail = f"{len(part)} nodes: INT8 {gain}, the conversions cost {cost:.0f} us"
            why = "INT8 saves less here than the conversions around it cost"
            fix = "leave the part in float"
            yield Finding(kind="conversion", nodes=names, op="", why=why, detail=detail, fix=fix, us=cost - max(saved, 0.0))


def _neighbours(node: gs.Node) -> Iterator[gs.Node]:
    """Nodes next to it, through pairs of conversions: the conversions themselves too."""
    for tensor in node.inputs:
        for d in tensor.inputs:
            yield d
            if is_op(d, DQ):
                for q in d.inputs[0].inputs:
                    yield q
                    yield from q.inputs[0].inputs if is_op(q, Q) else ()
    for tensor in node.outputs:
        for q in tensor.outputs:
            yield q
            if is_op(q, Q):
                for d in q.outputs[0].outputs:
                    yield d
                    yield from d.outputs[0].outputs if is_op(d, DQ) else ()


def _sparse(found: Audited) -> Iterator[Finding]:
    """Zeros that no kernel skips."""
    for node in found.model.graph.nodes:
        if node.op not in WEIGHTED or node.domain or len(node.inputs) < 2:
            continue
        d = dequantizer(node.inputs[1])
        values = constant_value(d.inputs[0] if d is not None else node.inputs[1])
        zero = constant_value(d.inputs[2]) if d is not None and len(d.inputs) > 2 and d.inputs[2].name else None
        if values is None or values.size < 64:
            continue
        point = zero.ravel()[0] if zero is not None and zero.size else 0
        share = float(np.mean(values == point))
        if share >= SPARSE:
            why, fix = (
                "no kernel of onnxruntime's CPU provider skips the zeros of a weight",
                "remove whole channels (prune-channels)",
            )
            detail = f"{100 * share:.0f} % zeros"
            yield Finding(kind="sparse", nodes=[str(node.name)], op=str(node.op), why=why, detail=detail, fix=fix, us=0.0)


# ---- where the difference comes from


def explain(
    found: Audited, base: Audited | None, rows: Sequence[NodeAudit], speedup: float | None
) -> tuple[list[Category], list[str]]:
    """Times by category on both sides, and the difference in words. `speedup`: as measured without the profiler."""
    if base is None:
        return [], []
    mine, theirs = _by_category(found), _by_category(base)
    names = sorted({*mine, *theirs}, key=lambda n: -abs(mine.get(n, 0.0) - theirs.get(n, 0.0)))
    categories = [Category(name=n, base_us=theirs.get(n, 0.0), us=mine.get(n, 0.0)) for n in names]
    total, before = found.profile.us, base.profile.us
    ratio = speedup if speedup is not None else before / total if total else 1.0
    verdict = "SLOWER than" if ratio < SAME else "faster than" if ratio > 1 / SAME else "as fast as"
    said = [f"{verdict} the base: {ratio:.2f}x; profiled: {total:.0f} us against {before:.0f} us"]
    for c in categories:
        change = c.us - c.base_us
        if abs(change) >= max(0.02 * before, 1.0):
            said.append(f"{change:+.0f} us: {c.name} ({c.base_us:.0f} -> {c.us:.0f})")
    features = environment().cpu_features
    if any(r.int8 for r in rows) and ratio < 1 and features and not DOT_PRODUCTS & set(features):
        said.append("this CPU has no INT8 dot products, which onnxruntime's INT8 kernels are built around")
    return categories, said


def _by_category(found: Audited) -> dict[str, float]:
    nodes = {str(n.name): n for n in found.model.graph.nodes}
    times: dict[str, float] = defaultdict(float)
    for name, us in found.us.items():
        kernel = found.placement.nodes[name].kernel
        op = kernel.op if kernel else ""
        times[_CONVERSION_TIME if op in CONVERSIONS else category(nodes[name])] += us
    for kernel in found.placement.added:
        known = _CONVERSION_TIME if kernel.op in CONVERSIONS else _LAYOUT_TIME if kernel.op in LAYOUTS else f"added {kernel.op}"
        times[known] += kernel.us
    return dict(times)


def category(node: gs.Node) -> str:
    if node.domain == OWN:
        return "graphopt's regions"
    if node.op in ("Conv", "QLinearConv"):
        weight = weight_shape(node) if node.op == "Conv" else tuple(node.inputs[3].shape or ())
        if _depthwise(node) or (node.op == "QLinearConv" and int(node.attrs.get("group", 1)) > 1 and weight and weight[1] == 1):
            return "depthwise convolutions"
        if _thin(node):
            return "convolutions of few input channels"
        return "1x1 convolutions" if weight and prod(weight[2:]) == 1 else "dense convolutions"
    if node.op in ("Gemm", "MatMul", "QGemm", "QLinearMatMul"):
        return "matrix products"
    return f"{node.op}".removeprefix("QLinear")
