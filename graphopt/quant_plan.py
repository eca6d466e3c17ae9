"""What to quantise, decided before anything is changed: which nodes, which tensors, and which of these share a scale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import networkx as nx
import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import op_key
from graphopt.edit import Wiring, only_user
from graphopt.model import Model
from graphopt.operands import has_input
from graphopt.quant import BIAS, BOUNDS, QOPS, UNLISTED, QOp
from graphopt.shapes import Shapes
from graphopt.targets import Support, Target

FLOAT = np.dtype(np.float32)


@dataclass(frozen=True, eq=False)
class Unit:
    """A node that will run in INT8, with what onnxruntime fuses into it: its output is quantised behind these.

    `bias`: the Add of a constant behind a MatMul. `activation`: the Relu or Clip behind it all.
    """

    node: gs.Node
    row: QOp
    support: Support
    bias: gs.Node | None = None
    activation: gs.Node | None = None

    @property
    def last(self) -> gs.Node:
        """The node that writes the unit's outputs."""
        return self.activation or self.bias or self.node

    @property
    def outputs(self) -> list[gs.Tensor]:
        """The tensors that the unit gives to others."""
        return list(self.last.outputs)

    def bias_input(self) -> tuple[gs.Node, int] | None:
        """The node and input that hold the constant bias; None where there is none."""
        if self.bias is not None:
            return self.bias, next(i for i, t in enumerate(self.bias.inputs) if isinstance(t, gs.Constant))
        return (self.node, 2) if self.row.row(2) == BIAS and has_input(self.node, 2) else None

    def activations(self) -> list[gs.Tensor]:
        """Its inputs that become the target's activation type: constants among them (an Add of a constant) too."""
        return [
            t
            for i, t in enumerate(self.node.inputs)
            if t.name and (row := self.row.row(i)) is not None and (row.dtype == "activation")
        ]


@dataclass(frozen=True)
class Selection:
    """What the user allows: glob patterns on node names, and op types. An empty `include` or `include_ops` allows all."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    include_ops: tuple[str, ...] = ()
    exclude_ops: tuple[str, ...] = ()

    def refuses(self, node: gs.Node) -> str:
        """The reason why the node stays float, or ""."""
        if self.include and not any(fnmatchcase(node.name, p) for p in self.include):
            return "not among the included names"
        if self.include_ops and node.op not in self.include_ops:
            return "not among the included ops"
        if any(fnmatchcase(node.name, p) for p in self.exclude):
            return "excluded by name"
        return "excluded by op" if node.op in self.exclude_ops else ""


@dataclass
class Plan:
    """`tensors`: what becomes INT8, by id; `classes`: sets of names with one scale; `floats`: (reason, op) -> nodes."""

    units: list[Unit]
    tensors: dict[int, gs.Tensor] = field(default_factory=dict)
    written: dict[int, Unit] = field(default_factory=dict)  # id of a tensor -> the unit that gives it
    classes: list[list[gs.Tensor]] = field(default_factory=list)
    floats: Counter[tuple[str, str]] = field(default_factory=Counter)

    def sources(self) -> list[gs.Tensor]:
        """The tensors whose range must be observed: those that hold no values of another one of their class."""
        return [
            t
            for t in self.tensors.values()
            if not isinstance(t, gs.Constant) and not (id(t) in self.written and self.written[id(t)].row.shares)
        ]


Reject = Callable[[gs.Node, str], None]


def plan(model: Model, shapes: Shapes, target: Target, selection: Selection, reject: Reject) -> Plan:
    """Choose the units of the main graph (nodes in subgraphs stay float) and the tensors that become INT8."""
    wiring = model.wiring()
    result = Plan([])
    chosen: list[Unit] = []
    refused: list[tuple[gs.Node, str]] = []
    for node in model.graph.nodes:
        reason = _refusal(node, model.opset, shapes, target, selection)
        if reason:
            refused.append((node, reason))
        else:
            chosen.append(Unit(node, QOPS[node.op], target.support(node.op)))
    units = _absorb(chosen, wiring, shapes)
    inside = {id(n) for u in units for n in (u.bias, u.activation)}
    for node, reason in refused:
        if id(node) not in inside:
            _leave(result, node, reason, reject)
    result.units = units = _without_islands(units, wiring, result, reject)
    result.written = {id(t): u for u in units for t in u.outputs}
    wanted = {id(t) for u in units for t in u.activations()}
    for unit in units:
        given = [t for t in unit.outputs if t.name and (id(t) in wanted or not unit.support.float_output)]
        for tensor in (*unit.activations(), *given):
            result.tensors.setdefault(id(tensor), tensor)
    result.classes = _classes(result)
    for graph in model.graphs()[1:]:
        for node in graph.nodes:
            if node.op in QOPS and QOPS[node.op].heavy:
                _leave(result, node, "it lies in the body of If, Loop or Scan", reject)
    return result


def _leave(result: Plan, node: gs.Node, reason: str, reject: Reject) -> None:
    result.floats[reason, op_key(node)] += 1
    if node.op in QOPS:
        reject(node, reason)


def _refusal(node: gs.Node, opset: int, shapes: Shapes, target: Target, selection: Selection) -> str:
    """Why the node is no unit of its own; "" for a unit."""
    key = op_key(node)
    row = QOPS.get(key)
    if row is None:
        listed = target.support(key)
        return listed.reason if key in target.ops else UNLISTED
    support = target.support(key)
    if not support.int8:
        return support.reason
    reason = selection.refuses(node) or row.misfit(node, opset) or support.misfit(node)
    if reason:
        return reason
    if row.absorbed:
        return "no INT8 op before it that could do what it does"
    unit = Unit(node, row, support)
    kinds = {shapes.dtype(t.name) for t in (*unit.activations(), *node.outputs) if t.name}
    if kinds != {FLOAT}:
        return "its tensors are not float32"
    if all(isinstance(t, gs.Constant) for t in unit.activations()):
        return "its data is constant"
    return ""


def _absorb(units: list[Unit], wiring: Wiring, shapes: Shapes) -> list[Unit]:
    """A bias, then a Relu or Clip, that alone read a unit's output join the unit; not where it shares its input's scale."""
    joined = []
    for unit in units:
        if not unit.row.shares and len(unit.node.outputs) == 1:
            follower = only_user(unit.outputs[0], wiring)
            if follower is not None and _is_bias(follower, unit, shapes):
                unit = replace(unit, bias=follower)
                follower = only_user(unit.outputs[0], wiring)
            if follower is not None and follower.op in BOUNDS and not follower.domain:
                unit = replace(unit, activation=follower)
        joined.append(unit)
    taken = {id(u.bias) for u in joined if u.bias is not None}
    return [u for u in joined if id(u.node) not in taken]


def _is_bias(node: gs.Node, unit: Unit, shapes: Shapes) -> bool:
    """Whether the node adds one constant a column to a MatMul's output."""
    if op_key(node) != "Add" or unit.node.op != "MatMul":
        return False
    columns = unit.node.inputs[1].shape[-1]
    constants = [t for t in node.inputs if isinstance(t, gs.Constant)]
    if len(constants) != 1 or np.prod(constants[0].shape) != columns or tuple(constants[0].shape[-1:]) != (columns,):
        return False
    axes = len(constants[0].shape)  # more than the product has would add axes to the sum
    return axes == 1 or axes <= (shapes.rank(unit.node.inputs[0].name) or 0)


def _without_islands(units: list[Unit], wiring: Wiring, result: Plan, reject: Reject) -> list[Unit]:
    """Drop light units that convert more than they save: see `_pays`. In rounds, so that the order of nodes cannot matter."""
    kept = units
    while True:
        connected = _near_heavy(kept)
        state = _State({id(t): u for u in kept for t in u.outputs}, _readers(kept), wiring)
        good = [u for u in kept if u.row.heavy or (id(u) in connected and _pays(u, state))]
        if len(good) == len(kept):
            return kept
        remaining = {id(u) for u in good}
        for unit in kept:
            if id(unit) not in remaining:
                _leave(result, unit.node, "an INT8 island: its neighbours are float", reject)
        kept = good


@dataclass(frozen=True)
class _State:
    written: dict[int, Unit]
    readers: dict[int, list[Unit]]
    wiring: Wiring


def _readers(units: Iterable[Unit]) -> dict[int, list[Unit]]:
    readers: dict[int, list[Unit]] = {}
    for unit in units:
        for tensor in unit.activations():
            readers.setdefault(id(tensor), []).append(unit)
    return readers


def _pays(unit: Unit, state: _State) -> bool:
    """Whether at least as many of its tensors are INT8 anyway as must be converted for it.

    What a producer can write as float for free counts for neither side.
    """
    saved = costs = 0
    for tensor in unit.activations():
        if isinstance(tensor, gs.Constant):
            continue
        writer = state.written.get(id(tensor))
        if writer is None:
            costs += all(reader is unit for reader in state.readers[id(tensor)])
        else:
            saved += not writer.support.float_output
    for tensor in unit.outputs:
        read = bool(state.readers.get(id(tensor)))
        saved += read
        costs += not read or id(tensor) in state.wiring.outputs
    return saved >= costs


def _near_heavy(units: list[Unit]) -> set[int]:
    """ids of the units that are connected with a heavy one through tensors that are INT8 for it: not what it can write as float."""
    web: nx.Graph[tuple[str, int]] = nx.Graph()
    for unit in units:
        given = () if unit.row.heavy and unit.support.float_output else unit.outputs
        for tensor in (*unit.activations(), *given):
            web.add_edge(("unit", id(unit)), ("tensor", id(tensor)))
    heavy = {id(u) for u in units if u.row.heavy}
    near: set[int] = set()
    for part in nx.connected_components(web):
        members = {number for kind, number in part if kind == "unit"}
        near |= members if members & heavy else set()
    return near


def _classes(result: Plan) -> list[list[gs.Tensor]]:
    """Tensors joined by the ops that share a scale between them (union-find, so that the order of nodes cannot matter)."""
    sets: nx.utils.UnionFind = nx.utils.UnionFind(result.tensors)
    for unit in result.units:
        if unit.row.shares:
            sets.union(*(id(t) for t in (*unit.activations(), *unit.outputs) if id(t) in result.tensors))
    return [[result.tensors[i] for i in members] for members in sets.to_sets()]
