"""onnxruntime's products with 4-bit weights become graphopt's, where they are faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.context import Context
from graphopt.kernels.plan import DOMAIN, NBITS
from graphopt.measure import Paired, paired
from graphopt.model import Model
from graphopt.region_choose import ALONE, SLOWER, Timer, cannot_time, why_no_operators
from graphopt.registry import register
from graphopt.runtime import session

MICROSOFT = "com.microsoft"
BLOCKS = (16, 32, 64, 128, 256)
SECONDS = 1.0  # for each kind of product


@dataclass(frozen=True)
class Kind:
    """What decides how long a product takes; all of one kind are timed once."""

    k: int
    n: int
    block: int
    zeros: bool

    @property
    def op(self) -> str:
        return NBITS[self.zeros]

    def attributes(self) -> dict[str, Any]:
        return {"K": self.k, "N": self.n, "block_size": self.block}


@register("compile-nbits", exact=True)
def compile_nbits(model: Model, context: Context, *, measure: bool = True, exclude: tuple[str, ...] = ()) -> int:
    """4-bit MatMulNBits that computes in float32 becomes graphopt.NBitsGemm where that is faster for one row; returns their number.

    The node carries a function of the same name that holds MatMulNBits: without graphopt's library onnxruntime computes what it did
    before. Nodes of accuracy_level 2 to 4 stay: they compute with activations of lower precision, which is faster.

    - measure: time each kind of product here against onnxruntime's; where that cannot be done, nothing is changed. false: take all.
    - exclude: patterns (* and ?) of names of nodes that stay as they are.
    """
    return compile_products(model, context, measure, exclude)


def compile_products(model: Model, context: Context, measure: bool, exclude: tuple[str, ...] = (), timer: Timer = paired) -> int:
    """`compile_nbits`; `timer` is what times two sessions against each other."""
    found: dict[Kind, list[gs.Node]] = {}
    for node in model.nodes():
        if node.op == "MatMulNBits" and node.domain == MICROSOFT:
            kind = _kind(node, exclude)
            if isinstance(kind, str):
                context.reject(node, kind)
            else:
                found.setdefault(kind, []).append(node)
    if not found:
        return 0
    taken, rows, why = _chosen(found, context, timer) if measure else (list(found), [], "asked for")
    left = [node for kind, nodes in found.items() if kind not in taken for node in nodes]
    for node in left:
        context.reject(node, ALONE if rows else why)
    names = [*exclude, *(n.name for n in left)]
    recipe = "compile-nbits measure=false" + (f" exclude='{','.join(names)}'" if names else "")
    context.facts["products"] = {"why": why, "recipe": recipe, "kinds": rows}
    for kind in taken:
        for node in found[kind]:
            _replace(node, kind)
    for zeros in sorted({kind.zeros for kind in taken}):
        if not any(f.domain == DOMAIN and f.name == NBITS[zeros] for f in model.shell.functions):
            model.shell.functions.append(function(zeros))
    return sum(len(found[kind]) for kind in taken)


def _kind(node: gs.Node, exclude: Sequence[str]) -> Kind | str:
    """Its kind, or why it stays."""
    attrs = node.attrs
    inputs: list[Any] = [t if t.name else None for t in node.inputs]
    if any(fnmatchcase(node.name, pattern) for pattern in exclude):
        return "excluded by name"
    if attrs.get("bits", 4) != 4 or attrs.get("block_size") not in BLOCKS:
        return "its weights are not of 4 bits in blocks of 16 to 256"
    if attrs.get("accuracy_level", 0) not in (0, 1):
        return "it computes with activations of lower precision"
    zero = inputs[3] if len(inputs) > 3 else None
    if any(t is not None for t in inputs[4:]):
        return "it reorders its weights, or adds a bias"
    weight, scale = inputs[1:3]
    if not all(isinstance(t, gs.Constant) for t in (weight, scale)) or not (zero is None or isinstance(zero, gs.Constant)):
        return "its weights are not constants"
    if scale.dtype != np.float32 or (zero is not None and zero.dtype != np.uint8):
        return "its scales, and so its input, are not float32, or its zero points are not packed"
    return Kind(int(attrs["K"]), int(attrs["N"]), int(attrs["block_size"]), zero is not None)


def _replace(node: gs.Node, kind: Kind) -> None:
    node.op, node.domain, node.attrs = kind.op, DOMAIN, kind.attributes()
    node.inputs = list(node.inputs)[: 4 if kind.zeros else 3]
    node.outputs[0].dtype = np.dtype(np.float32)


def function(zeros: bool) -> onnx.FunctionProto:
    """What the node computes where the graphopt library is not loaded."""
    inputs = ["x", "weight", "scale", *(["zero"] if zeros else [])]
    body = onnx.helper.make_node("MatMulNBits", inputs, ["y"], domain=MICROSOFT, bits=4)
    for name in ("K", "N", "block_size"):
        body.attribute.append(onnx.AttributeProto(name=name, ref_attr_name=name, type=onnx.AttributeProto.INT))
    made = onnx.helper.make_function(
        DOMAIN, NBITS[zeros], inputs, ["y"], [body], [onnx.helper.make_opsetid(MICROSOFT, 1)], ["K", "N", "block_size"]
    )
    made.doc_string = "a product with 4-bit weights: what its node computes where the graphopt library is not loaded"
    return made


# ---- timing


def _chosen(found: dict[Kind, list[gs.Node]], context: Context, timer: Timer) -> tuple[list[Kind], list[dict[str, Any]], str]:
    """The kinds that graphopt is faster at, the figures of all, and how they were found or why there are none."""
    why = cannot_time(context) or why_no_operators(trial(next(iter(found))))
    if why:
        return [], [], f"not timed: {why}"
    taken, rows = [], []
    for done, (kind, nodes) in enumerate(found.items()):
        context.progress("time products", done, len(found))
        time = _time(kind, timer)
        if time.low > 1 / SLOWER:
            taken.append(kind)
        rows.append(
            {**kind.attributes(), "zeros": kind.zeros, "count": len(nodes), "taken": kind in taken, "speed": round(time.speed, 3),
             "onnxruntime_ms": round(time.first_ms, 4), "graphopt_ms": round(time.second_ms, 4)}
        )  # fmt: skip
    return taken, rows, "timed on one row"


def _time(kind: Kind, timer: Timer) -> Paired:
    model = trial(kind)
    x = np.random.default_rng(0).standard_normal((1, kind.k)).astype(np.float32)
    return timer(session(model, operators=False), session(model), {"x": x}, border=1 / SLOWER, seconds=SECONDS)


def trial(kind: Kind) -> onnx.ModelProto:
    """A model of one product with drawn weights."""
    random, blocks = np.random.default_rng(0), -(-kind.k // kind.block)
    arrays: dict[str, np.ndarray] = {
        "weight": random.integers(0, 256, (kind.n, blocks, kind.block // 2), dtype=np.uint8),
        "scale": random.uniform(0.01, 0.02, kind.n * blocks).astype(np.float32),
        **({"zero": random.integers(0, 256, kind.n * ((blocks + 1) // 2), dtype=np.uint8)} if kind.zeros else {}),
    }
    node = onnx.helper.make_node(kind.op, ["x", *arrays], ["y"], None, None, DOMAIN, **kind.attributes())
    infos = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["M", size]) for n, size in (("x", kind.k), ("y", kind.n))
    ]
    weights = [onnx.numpy_helper.from_array(v, name) for name, v in arrays.items()]
    graph = onnx.helper.make_graph([node], "product", infos[:1], infos[1:], weights)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in (("", 17), (MICROSOFT, 1), (DOMAIN, 1))]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[function(kind.zeros)])
