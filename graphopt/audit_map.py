"""Which kernel each node of a model ended in.

onnxruntime keeps the names of tensors that survive fusion. Each node of the fused graph stands for the original nodes between its
outputs and what other fused nodes write; tensors with new names tie a fused node to its readers. Layout changes rename tensors but
keep node names, up to a suffix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from graphopt.audit_profile import CONVERSIONS, LAYOUTS, Kernel, Profile

_SUFFIX = re.compile(r"(_token_\d+|_nchwc)+$")
# kernels that stand for an op under another name
FAMILIES: Mapping[str, frozenset[str]] = {
    "Conv": frozenset("Conv FusedConv QLinearConv ConvInteger".split()),
    "Gemm": frozenset("Gemm FusedGemm QGemm MatMulIntegerToFloat QLinearMatMul MatMulNBits".split()),
    "MatMul": frozenset(
        "MatMul FusedMatMul QLinearMatMul QGemm MatMulIntegerToFloat MatMulInteger DynamicQuantizeMatMul MatMulNBits Gemm".split()
    ),
    "MaxPool": frozenset("MaxPool NhwcMaxPool".split()),
}


@dataclass(frozen=True)
class Placed:
    """Where a node went. `kernel` is None where none runs for it: `how` says why."""

    kernel: Kernel | None
    how: str  # "own": the kernel computes this node; "part": it is part of that kernel; "constant", "gone", "merged"


@dataclass(frozen=True)
class Placement:
    """Where the nodes of the main graph went, by name, and the kernels that belong to none of them."""

    nodes: Mapping[str, Placed]
    added: tuple[Kernel, ...]


def place(nodes: Iterable[gs.Node], profile: Profile) -> Placement:
    """Map the nodes of the original main graph (unique names) to kernels of the profile."""
    originals = list(nodes)
    writer = {t.name: n for n in originals for t in n.outputs if t.name}
    running = _running(profile)
    found: dict[str, Placed] = {}
    used: set[str] = set()
    for members, tensors in _groups(profile.fused, writer):
        absorbed = _between(tensors, writer, profile.fused)
        kernels = [(m, running[m.name]) for m in members if m.name in running]
        used.update(k.name for _, k in kernels)
        for node in absorbed:
            placed = _placed(node, kernels)
            if placed.how == "part" and str(node.op) not in CONVERSIONS and _constant(node, writer):
                placed = Placed(None, "constant")
            found.setdefault(node.name, placed)
    for node in originals:
        if node.name not in found:
            found[node.name] = Placed(None, "constant" if _constant(node, writer) else "gone")
    added = [k for k in profile.kernels.values() if k.name not in used and k.name not in profile.inner]
    return Placement(found, tuple(added))


def _running(profile: Profile) -> dict[str, Kernel]:
    """Kernels by the name of the fused node that they run."""
    names = {n.name for n in profile.fused.node}
    writers = {o: n.name for n in profile.fused.node for o in n.output if o}
    found: dict[str, Kernel] = {}
    for kernel in profile.kernels.values():
        plain = _SUFFIX.sub("", kernel.name)
        for name in (kernel.name, plain, writers.get(plain, "")):
            if name in names:
                found.setdefault(name, kernel)
                break
    return found


Group = tuple[list[onnx.NodeProto], list[str]]  # fused nodes, and the tensors of the original that they write


def _groups(fused: onnx.GraphProto, known: Mapping[str, gs.Node]) -> list[Group]:
    carried: dict[str, dict[str, onnx.NodeProto]] = {}
    groups: list[Group] = []
    for node in fused.node:
        members = {node.name: node}
        for name in node.input:
            members.update(carried.get(name, {}))
        written = [o for o in node.output if o in known]
        if written:
            groups.append((list(members.values()), written))
        else:
            carried.update(dict.fromkeys((o for o in node.output if o), members))
    return groups


def _between(tensors: Iterable[str], writer: Mapping[str, gs.Node], fused: onnx.GraphProto) -> list[gs.Node]:
    """The original nodes behind the tensors, up to what fused nodes write."""
    given = {o for n in fused.node for o in n.output}
    found: dict[int, gs.Node] = {}
    stack = [writer[t] for t in tensors]
    while stack:
        node = stack.pop()
        if id(node) in found:
            continue
        found[id(node)] = node
        stack += [writer[t.name] for t in node.inputs if t.name in writer and t.name not in given]
    return list(found.values())


def _placed(node: gs.Node, kernels: list[tuple[onnx.NodeProto, Kernel]]) -> Placed:
    if not kernels:
        return Placed(None, "merged")
    alike = FAMILIES.get(str(node.op), frozenset({str(node.op)}))
    for fits in (
        lambda m, k: k.op in alike and m.name.startswith(node.name),
        lambda m, k: k.op in alike,
        lambda m, k: m.name == node.name,
    ):
        found = [k for m, k in kernels if fits(m, k)]
        if found:
            return Placed(found[0], "own")
    computing = [k for _, k in kernels if k.op not in CONVERSIONS | LAYOUTS]
    if computing:
        return Placed(computing[-1], "part")
    return Placed(kernels[-1][1], "part") if str(node.op) in CONVERSIONS | LAYOUTS else Placed(None, "gone")


def _constant(node: gs.Node, writer: Mapping[str, gs.Node]) -> bool:
    """Whether it depends on no input of the model: onnxruntime computed it when it loaded."""
    seen: set[int] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if id(n) in seen:
            continue
        seen.add(id(n))
        for t in n.inputs:
            if t.name in writer:
                stack.append(writer[t.name])
            elif t.name and not isinstance(t, gs.Constant):
                return False
    return True
