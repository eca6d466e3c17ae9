"""Replaces a region by one node and a function that holds what was there, for runtimes without the library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.edit import producer, remove_nodes
from graphopt.kernels.plan import DOMAIN, Plan
from graphopt.model import Model
from graphopt.proto import Exporter, encode_inline
from graphopt.region_find import Region
from graphopt.region_lower import Lowering, lower
from graphopt.region_pack import pack_weights
from graphopt.region_values import Given, constant

SMALL = 1024  # elements of a constant that only the body reads and that lies in it; larger ones stay initializers
IR = 8  # the first IR version with functions


@dataclass(frozen=True)
class _Border:
    """Where a region ends. `fused`: QuantizeLinear nodes it takes over, by the id of what they write; `given`: what it gives to
    others, and the DequantizeLinear to take over, if any."""

    inside: frozenset[int]
    fused: dict[int, gs.Node]
    given: list[tuple[gs.Tensor, gs.Node | None]]


def emit_region(model: Model, region: Region) -> Plan:
    """Put one node `graphopt.Int8Region<n>` in the place of the region's nodes, and its function in the model; returns the plan.

    The graph must be sorted afterwards.
    """
    border = _border(model, region)
    work = Lowering(region, border.fused)
    lower(work)
    views = region.inner
    for tensor, dequantize in border.given:
        work.give(tensor, views[id(tensor)], None if dequantize is None else dequantize.outputs[0])
    nodes = _nodes(region, border)
    plan, constants = work.plan({t.name for n in nodes for t in n.inputs} | _made(work.constants.values(), nodes))
    plan, constants = pack_weights(plan, constants, region.site.names)
    made = {o for g in constants for n in g.prologue for o in n.output}
    constants += _large(nodes, made | {g.name for g in constants})
    function = _function(model, region, work, nodes, constants)
    plan = replace(plan, constants=len(constants))
    _replace(model, region, border, work, plan, constants)
    model.shell.functions.append(function)
    model.shell.ir_version = max(model.shell.ir_version, IR)
    return plan


def _made(constants: Iterable[Given], nodes: Sequence[gs.Node]) -> set[str]:
    """Formal names from which a prologue makes what the nodes read."""
    read = {t.name for n in nodes for t in n.inputs}
    return {g.name for g in constants if any(out in read for n in g.prologue for out in n.output)}


# ---- the border


def _border(model: Model, region: Region) -> _Border:
    inside = frozenset(id(n) for u in region.units for n in u.nodes)
    wiring = model.wiring()
    fused = {}
    for key, tensor in region.outer.items():
        node = producer(tensor, "QuantizeLinear")
        own = node is not None and wiring.home.get(id(node)) == id(region.graph) and constant(node.inputs[0]) is None
        if node is not None and own and not _outside(tensor, inside, wiring.outputs):
            fused[key] = node
    given: list[tuple[gs.Tensor, gs.Node | None]] = []
    for unit in region.units:
        for tensor in () if unit.real else unit.outputs:
            outside = _outside(tensor, inside, wiring.outputs)
            if not outside:
                continue
            floats = [n for n in outside if n is not None and _becomes_float(n, inside, wiring.outputs, wiring.home, region)]
            if len(floats) == len(outside):
                given += [(tensor, n) for n in floats]
            else:
                given.append((tensor, None))
    return _Border(inside, fused, given)


def _outside(tensor: gs.Tensor, inside: frozenset[int], outputs: frozenset[int]) -> list[gs.Node | None]:
    """What reads the integers outside, perhaps behind a DequantizeLinear; None stands for the graph itself."""
    found: list[gs.Node | None] = [None] if id(tensor) in outputs else []
    for node in {id(n): n for n in tensor.outputs}.values():
        if id(node) in inside:
            continue
        if node.op == "DequantizeLinear" and not node.domain and id(node.outputs[0]) not in outputs:
            if node.outputs[0].outputs and all(id(n) in inside for n in node.outputs[0].outputs):
                continue
        found.append(node)
    return found


def _becomes_float(node: gs.Node, inside: frozenset[int], outputs: frozenset[int], home: dict[int, int], region: Region) -> bool:
    """Whether the region may dequantise here: not in front of what onnxruntime itself runs in INT8."""
    if node.op != "DequantizeLinear" or node.domain or home.get(id(node)) != id(region.graph):
        return False
    readers = [n for n in node.outputs[0].outputs if id(n) not in inside]
    return bool(readers or id(node.outputs[0]) in outputs) and not any(_quantised(n) for n in readers)


def _quantised(node: gs.Node) -> bool:
    """Whether the node has DequantizeLinear before and QuantizeLinear behind it."""
    ends = [n for t in node.outputs for n in t.outputs]
    return bool(ends) and all(n.op == "QuantizeLinear" for n in ends)


# ---- the function


def _nodes(region: Region, border: _Border) -> list[gs.Node]:
    """What the function holds, in order."""
    wanted = {id(n) for u in region.units for n in (*u.nodes, *u.helpers)}
    wanted |= {id(n) for n in border.fused.values()} | {id(n) for _, n in border.given if n is not None}
    return [n for n in region.graph.nodes if id(n) in wanted]


def _large(nodes: Sequence[gs.Node], known: set[str]) -> list[Given]:
    """Constants that only the body reads, too large to be stored in it."""
    tensors = {t.name: t for n in nodes for t in n.inputs if isinstance(t, gs.Constant) and t.name not in known}
    return [Given(t, t.name) for t in tensors.values() if np.prod(t.shape, dtype=np.int64) > SMALL]


def _function(
    model: Model, region: Region, work: Lowering, nodes: Sequence[gs.Node], constants: Sequence[Given]
) -> onnx.FunctionProto:
    exporter = Exporter(gs.Graph([], [], []), model.leftovers, encode_inline)
    formal = [*(t.name for t in work.activations), *(g.name for g in constants)]
    prologue = [n for g in constants for n in g.prologue]
    known = {*formal, *(o for n in prologue for o in n.output)}
    held = {t.name: t for n in nodes for t in n.inputs if isinstance(t, gs.Constant) and t.name not in known}
    stored = [onnx.helper.make_node("Constant", [], [name], value=encode_inline(t)) for name, t in held.items()]
    body = [*prologue, *stored, *(exporter.node(n) for n in nodes)]
    domains = {"", *(n.domain for n in body)}
    function = onnx.helper.make_function(
        DOMAIN,
        region.name,
        formal,
        [t.name for t in work.results],
        body,
        [o for o in model.shell.opset_import if o.domain in domains],
        ["plan", "scales"],
    )
    function.doc_string = "an INT8 region: what its node computes where the graphopt library is not loaded"
    return function


def _replace(model: Model, region: Region, border: _Border, work: Lowering, plan: Plan, constants: Sequence[Given]) -> None:
    site = region.site
    helpers = {id(n): n for u in region.units for n in u.helpers}
    gone = [n for u in region.units for n in u.nodes]
    gone += [*border.fused.values(), *(n for _, n in border.given if n is not None)]
    dead = {id(n): n for n in gone}
    weights = {id(w): w for u in region.units if u.weight for t in u.weight.dequantize.inputs for w in t.inputs}
    remove_nodes(region.graph, list(dead.values()))
    for layer in (helpers, weights):
        remove_nodes(region.graph, [n for key, n in layer.items() if key not in dead and _unread(model, n)])
    for tensor in work.results:
        shape, dtype = site.shapes.shape(tensor.name), site.shapes.dtype(tensor.name)
        tensor.dtype = tensor.dtype or dtype
        if tensor.shape is None and shape is not None:
            tensor.shape = [d if isinstance(d, int) else None for d in shape]
    inputs = [*work.activations, *(g.tensor for g in constants)]
    attributes = {"plan": plan.encode(), "scales": list(plan.scales)}
    region.graph.nodes.append(gs.Node(region.name, site.names.fresh(region.name), attributes, inputs, work.results, DOMAIN))


def _unread(model: Model, node: gs.Node) -> bool:
    outputs = {id(t) for g in model.graphs() for t in g.outputs}
    return bool(node.outputs) and all(not t.outputs and id(t) not in outputs for t in node.outputs)
