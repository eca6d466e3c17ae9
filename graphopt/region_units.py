"""The units of a QDQ graph: one operator with the QuantizeLinear behind it, as one or a few steps of a region plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import op_key
from graphopt.edit import Wiring, only_user, producer
from graphopt.model import Model
from graphopt.operands import Names
from graphopt.quant import BOUNDS
from graphopt.region_values import Bias, Given, Numbers, Weight, constant, numbers, quantised
from graphopt.shapes import Shapes

INTEGERS = (np.dtype(np.uint8), np.dtype(np.int8))
FULL = (-np.inf, np.inf)


@dataclass(frozen=True, eq=False)
class Unit:
    """`inputs`, `outputs`: activations in integers (`real`: the output is float). `nodes` go when the unit is compiled; `helpers`
    (DequantizeLinear nodes) are copied, and go where nothing else reads them.

    `kind` is a key of FITS (region_views) and LOWERINGS (region_lower); `fields` are what the steps of the kind have.
    """

    kind: str
    node: gs.Node
    inputs: tuple[gs.Tensor, ...]
    outputs: tuple[gs.Tensor, ...]
    nodes: tuple[gs.Node, ...]
    helpers: tuple[gs.Node, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    bounds: tuple[float, float] = FULL
    weight: Weight | None = None
    bias: Bias | None = None
    real: bool = False
    heavy: bool = False


@dataclass(frozen=True)
class Tail:
    """What stands behind an operator: the tensors it gives in integers, and the nodes up to them."""

    outputs: tuple[gs.Tensor, ...]
    nodes: tuple[gs.Node, ...]
    bounds: tuple[float, float] = FULL
    bias: tuple[gs.Node, gs.Tensor] | None = None  # the Add behind a MatMul, and what it adds
    real: bool = False


@dataclass
class Site:
    """One graph being read. `numbers`: of every activation in integers; `reasons`: why a node is in no unit."""

    model: Model
    shapes: Shapes
    wiring: Wiring
    names: Names
    numbers: dict[int, Numbers] = field(default_factory=dict)
    reasons: dict[int, tuple[gs.Node, str]] = field(default_factory=dict)
    weights: dict[int, Given] = field(default_factory=dict)  # id of a weight in integers -> what a node is given for it
    readers: dict[int, list[Unit]] = field(default_factory=dict)  # id of an activation in integers -> units that read it

    def refuse(self, node: gs.Node, reason: str) -> None:
        self.reasons.setdefault(id(node), (node, reason))

    def read(self, tensor: gs.Tensor) -> Numbers | str:
        """The numbers of an activation in integers, from what wrote it or else from what reads it."""
        if id(tensor) not in self.numbers:
            written = producer(tensor, "QuantizeLinear")
            readers = [n for n in tensor.outputs if n.op == "DequantizeLinear" and not n.domain and n.inputs[0] is tensor]
            node = written or (readers[0] if readers else None)
            found = numbers(node) if node is not None else "its scale is not known"
            if isinstance(found, str):
                return found
            self.numbers[id(tensor)] = found
        return self.numbers[id(tensor)]

    def activation(self, tensor: gs.Tensor) -> tuple[gs.Tensor, gs.Node] | str:
        """The integers behind a float tensor, and the DequantizeLinear between."""
        inner = quantised(tensor)
        if inner is None:
            return "its input is not quantised" if constant(tensor) is None else "one input is a constant"
        node = tensor.inputs[0]
        found, read = self.read(inner), numbers(node)
        for answer in (found, read):
            if isinstance(answer, str):
                return answer
        return (inner, node) if found == read else "its input is read with other numbers than it is written with"


Rule = Callable[[Site, gs.Node, Tail], "Unit | str"]


def units(site: Site, graph: gs.Graph, rules: Mapping[str, Rule]) -> list[Unit]:
    """Every unit of the graph, in order."""
    found: list[Unit] = []
    done: set[int] = set()
    for node in graph.nodes:
        if id(node) in done:
            continue
        unit = _unit(site, node, rules)
        if isinstance(unit, Unit):
            found.append(unit)
            done |= {id(n) for n in unit.nodes}
    inside = {id(n) for u in found for n in u.nodes}
    site.reasons = {key: value for key, value in site.reasons.items() if key not in inside}
    position = {id(n): i for i, n in enumerate(graph.nodes)}
    for unit in found:
        for tensor in unit.inputs:
            site.readers.setdefault(id(tensor), []).append(unit)
    return sorted(found, key=lambda u: max(position[id(n)] for n in u.nodes))


def _unit(site: Site, node: gs.Node, rules: Mapping[str, Rule]) -> Unit | None:
    key = op_key(node)
    if key == "QuantizeLinear":
        return None if constant(node.inputs[0]) is not None else _before(site, node, rules)
    if key not in rules or not node.inputs:
        return None
    first = site.shapes.dtype(node.inputs[0].name)
    if first in INTEGERS and constant(node.inputs[0]) is None and key in ON_INTEGERS:
        return _said(site, node, rules[key](site, node, Tail(tuple(node.outputs), (node,))))
    if key in MATRIX and not _quantises(node, site):
        return _float_end(site, node, rules)
    return None


ON_INTEGERS = frozenset(
    "Pad Reshape Flatten Squeeze Unsqueeze Transpose Slice Split Concat MaxPool Resize DepthToSpace SpaceToDepth".split()
)
MATRIX = frozenset({"MatMul", "Gemm"})
HEAVY = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})


def _said(site: Site, node: gs.Node, answer: Unit | str) -> Unit | None:
    if isinstance(answer, str):
        site.refuse(node, answer)
        return None
    return answer


def _quantises(node: gs.Node, site: Site) -> bool:
    """Whether the node's output goes to a QuantizeLinear, behind a bias, Relu or Clip perhaps: that unit is read from there."""
    reader = only_user(node.outputs[0], site.wiring)
    for _ in range(3):
        if reader is None or op_key(reader) == "QuantizeLinear":
            return reader is not None
        if op_key(reader) not in BOUNDS and not (op_key(reader) == "Add" and _addend(reader, node) is not None):
            return False
        node, reader = reader, only_user(reader.outputs[0], site.wiring)
    return False


def _addend(add: gs.Node, node: gs.Node) -> gs.Tensor | None:
    """The constant that `add` adds to the node's output."""
    others = [t for t in add.inputs if t is not node.outputs[0]]
    return others[0] if len(others) == 1 and constant(others[0]) is not None else None


def _float_end(site: Site, node: gs.Node, rules: Mapping[str, Rule]) -> Unit | None:
    """A matrix product whose output stays float, with the bias behind it."""
    reader = only_user(node.outputs[0], site.wiring)
    bias = None
    nodes: tuple[gs.Node, ...] = (node,)
    if reader is not None and op_key(reader) == "Add" and op_key(node) == "MatMul" and _columns(site, reader, node):
        other = _addend(reader, node)
        assert other is not None
        bias, nodes = (reader, other), (node, reader)
    return _said(site, node, rules[node.op](site, node, Tail(tuple(nodes[-1].outputs), nodes, FULL, bias, True)))


def _columns(site: Site, add: gs.Node, node: gs.Node) -> bool:
    """Whether the Add behind a MatMul adds one constant a column and leaves the rank alone."""
    other = _addend(add, node)
    value = None if other is None else constant(other)
    shape = site.shapes.shape(node.outputs[0].name)
    return value is not None and shape is not None and value.ndim <= len(shape) and value.shape[-1:] == (value.size,) == shape[-1:]


def _before(site: Site, quantize: gs.Node, rules: Mapping[str, Rule]) -> Unit | None:
    """The unit that ends in this QuantizeLinear; None where it quantises what float operators give."""
    own = site.read(quantize.outputs[0])
    if isinstance(own, str):
        node = producer(quantize.inputs[0])
        site.refuse(node or quantize, own)
        return None
    cone = _cone(site, quantize)
    if cone is not None:
        return cone
    node, bounds = producer(quantize.inputs[0]), FULL
    nodes: tuple[gs.Node, ...] = (quantize,)
    bias: tuple[gs.Node, gs.Tensor] | None = None
    if node is not None and op_key(node) in BOUNDS and producer(node.inputs[0]) is not None:
        found = BOUNDS[node.op](node)
        if found is None:
            site.refuse(node, "its bounds are not constants")
            return None
        nodes, bounds, node = (node, *nodes), found, producer(node.inputs[0])
    if node is not None and op_key(node) == "Add":
        matrix = next((m for t in node.inputs if (m := producer(t, "MatMul")) is not None and _columns(site, node, m)), None)
        if matrix is not None and (other := _addend(node, matrix)) is not None:
            nodes, bias, node = (node, *nodes), (node, other), matrix
    if node is None or op_key(node) not in rules:
        if node is not None and any(quantised(t) is not None for t in node.inputs if t.name):
            site.refuse(node, "no step of a region computes it")
        return None
    return _said(site, node, _joined(site, node, nodes, bounds, bias, rules[op_key(node)]))


def _joined(
    site: Site,
    node: gs.Node,
    nodes: tuple[gs.Node, ...],
    bounds: tuple[float, float],
    bias: tuple[gs.Node, gs.Tensor] | None,
    rule: Rule,
) -> Unit | str:
    """The unit of a node whose first output goes through `nodes`; all other outputs must be quantised too."""
    for inner in (node, *nodes[:-1]):
        if inner is not node or len(node.outputs) == 1:
            if only_user(inner.outputs[0], site.wiring) is None:
                return "its float output is read elsewhere too"
    if len(node.outputs) == 1 or not any(t.name for t in node.outputs[1:]):
        return rule(site, node, Tail(tuple(nodes[-1].outputs), (node, *nodes), bounds, bias))
    readers = [only_user(t, site.wiring) for t in node.outputs]
    if any(r is None or op_key(r) != "QuantizeLinear" or isinstance(site.read(r.outputs[0]), str) for r in readers):
        return "not all of its outputs are quantised"
    ends = [r for r in readers if r is not None]
    return rule(site, node, Tail(tuple(r.outputs[0] for r in ends), (node, *ends)))


# ---- functions of one activation

FUNCTIONS = frozenset(
    "Relu Clip Sigmoid HardSigmoid HardSwish Tanh LeakyRelu Elu Selu Celu Softplus Softsign ThresholdedRelu Erf Gelu Mish Abs Neg "
    "Exp Floor Ceil Round Pow Add Sub Mul Div Max Min PRelu Identity com.microsoft::Gelu com.microsoft::QuickGelu "
    "com.microsoft::FastGelu".split()
)


def _cone(site: Site, quantize: gs.Node) -> Unit | None:
    """The unit of a QuantizeLinear whose input is a function of one activation, element by element; else None."""
    sources: dict[int, gs.Tensor] = {}
    nodes: dict[int, gs.Node] = {id(quantize): quantize}
    helpers: dict[int, gs.Node] = {}
    stack = [quantize.inputs[0]]
    while stack:
        tensor = stack.pop()
        if not tensor.name or (value := constant(tensor)) is not None:
            if tensor.name and value is not None and value.size != 1:
                return None
            continue
        if quantised(tensor) is not None:
            answer = site.activation(tensor)
            if isinstance(answer, str):
                return None
            sources[id(answer[0])], helpers[id(answer[1])] = answer
            continue
        node = producer(tensor)
        if node is None or op_key(node) not in FUNCTIONS or len(sources) > 1:
            return None
        if id(node) not in nodes:
            nodes[id(node)] = node
            stack += node.inputs
    if len(sources) != 1 or not _closed(site, list(nodes.values())):
        return None
    (source,) = sources.values()
    ordered = tuple(reversed(nodes.values()))
    node = producer(quantize.inputs[0]) if len(nodes) > 1 else quantize
    return Unit("table", node or quantize, (source,), (quantize.outputs[0],), ordered, tuple(helpers.values()))


def _closed(site: Site, nodes: Sequence[gs.Node]) -> bool:
    """Whether nothing else reads what lies between."""
    inside = {id(n) for n in nodes}
    between = [n.outputs[0] for n in nodes if op_key(n) != "QuantizeLinear"]
    return all(id(t) not in site.wiring.outputs and all(id(r) in inside for r in t.outputs) for t in between)
