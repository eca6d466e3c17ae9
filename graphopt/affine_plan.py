"""Where an affine map is best moved: the cheapest way in nodes, planned first, applied only if it saves at least one.

A map walks over the edges of the graph, forward or backward, one node at a time: it meets another affine node and joins it, a
linear operator that absorbs it, an operator that it passes, or it stops and is written down as Mul and Add. Every stop is legal,
so the only question is the number of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import onnx_graphsurgeon as gs

from graphopt.affine import Affine, Scene, Source, source
from graphopt.affine_absorb import ABSORB, take_constant
from graphopt.affine_moves import Edit, Move, Site
from graphopt.affine_through import pass_through
from graphopt.attributes import op_key

Use = tuple[gs.Node, int]  # a node and one of its inputs
STEPS = 48  # nodes one walk may look at: keeps a pass linear, and is many times what real models need
IMPOSSIBLE = 1 << 20


@dataclass(frozen=True)
class Insert:
    """Write the map down between `tensor` and input `slot` of `reader`."""

    tensor: gs.Tensor
    reader: gs.Node
    slot: int
    affine: Affine


@dataclass(frozen=True)
class Plan:
    """What to do and what it costs in nodes; `why` it went no further."""

    cost: int = 0
    edits: tuple[Edit, ...] = ()
    drops: tuple[tuple[gs.Node, int], ...] = ()  # affine nodes that go, with the input that replaces them
    inserts: tuple[Insert, ...] = ()
    why: str = ""

    def plus(self, other: Plan) -> Plan:
        return Plan(
            self.cost + other.cost,
            self.edits + other.edits,
            self.drops + other.drops,
            self.inserts + other.inserts,
            self.why or other.why,
        )


@dataclass
class Walk:
    """One search. `seen`: a node takes part in a plan once. `sources` is shared by all walks of a pass."""

    scene: Scene
    sources: dict[int, Source | str | None]
    seen: set[int] = field(default_factory=set)
    steps: int = STEPS

    def enter(self, node: gs.Node) -> bool:
        """Whether this walk may look at the node: not twice, not too far."""
        if id(node) in self.seen or self.steps <= 0:
            return False
        self.seen.add(id(node))
        self.steps -= 1
        return True

    def source(self, node: gs.Node) -> Source | str | None:
        if id(node) not in self.sources:
            self.sources[id(node)] = source(node, self.scene)
        return self.sources[id(node)]


def nodes_needed(a: Affine, rank: int | None) -> int:
    """How many nodes it takes to write the map down on a tensor of that rank."""
    wanted = int(a.has_scale) + int(a.has_shift)
    if wanted and a.axis is not None and (rank is None or a.axis >= rank):
        return IMPOSSIBLE
    return 1 if wanted == 2 and as_bn(a) else wanted


def as_bn(a: Affine) -> bool:
    """A BatchNormalization, which can be one again."""
    return a.bn and a.axis == 1 and a.has_scale and a.has_shift


def stop(walk: Walk, tensor: gs.Tensor, reader: gs.Node, slot: int, a: Affine, why: str) -> Plan:
    """Write the map down here."""
    cost = nodes_needed(a, walk.scene.rank(tensor))
    return Plan(cost, inserts=(Insert(tensor, reader, slot, a),), why=why) if cost else Plan(why=why)


def backward(walk: Walk, reader: gs.Node, slot: int, a: Affine) -> Plan:
    """The cheapest plan after which `reader` gets a(t) at `slot`, where it gets t now."""
    tensor = reader.inputs[slot]
    if not (a.has_scale or a.has_shift):
        return Plan()
    if isinstance(tensor, gs.Constant):
        move = take_constant(Site(reader, slot, False, a, walk.scene))
        return stop(walk, tensor, reader, slot, a, move) if isinstance(move, str) else Plan(edits=move.edits)
    why = _shared(walk.scene, tensor, reader)
    if why:
        return stop(walk, tensor, reader, slot, a, why)
    node = tensor.inputs[0]
    if not walk.enter(node):
        return stop(walk, tensor, reader, slot, a, "too far from anything that could take it")
    if isinstance(walk.source(node), Source):
        run, total = chain(walk, node, ahead=False)
        joined = total.then(a)
        if joined is None:
            return stop(walk, tensor, reader, slot, a, "two affine nodes along different axes")
        return _without(walk, run, total).plus(backward(walk, *run[0], joined))
    site = Site(node, next(i for i, t in enumerate(node.outputs) if t is tensor), False, a, walk.scene)
    return _past(walk, site, (tensor, reader, slot), lambda at, onward: backward(walk, node, at, onward))


def forward(walk: Walk, tensor: gs.Tensor, a: Affine) -> Plan:
    """The cheapest plan after which all that reads `tensor` gets a(t), where it gets t now."""
    if not (a.has_scale or a.has_shift):
        return Plan()
    if walk.scene.is_output(tensor):
        return Plan(IMPOSSIBLE, why="the result is a graph output")
    plan = Plan()
    for node, slot in walk.scene.readers(tensor):
        if not tensor.inputs or walk.scene.home(tensor.inputs[0]) != walk.scene.home(node):
            return Plan(IMPOSSIBLE, why="the result is read in another graph")
        plan = plan.plus(_into(walk, node, slot, a))
    return plan


def _into(walk: Walk, node: gs.Node, slot: int, a: Affine) -> Plan:
    """`forward` for one reader."""
    tensor = node.inputs[slot]
    if not walk.enter(node):
        return stop(walk, tensor, node, slot, a, "too far from anything that could take it")
    if isinstance(walk.source(node), Source):
        run, total = chain(walk, node)
        joined = a.then(total)
        if joined is None:
            return stop(walk, tensor, node, slot, a, "two affine nodes along different axes")
        here = stop(walk, tensor, node, slot, joined, "")
        return _without(walk, run, total).plus(_cheapest([here, forward(walk, run[-1][0].outputs[0], joined)]))
    site = Site(node, slot, True, a, walk.scene)
    return _past(walk, site, (tensor, node, slot), lambda at, onward: forward(walk, node.outputs[at], onward))


def _past(walk: Walk, site: Site, edge: tuple[gs.Tensor, gs.Node, int], go: Callable[[int, Affine], Plan]) -> Plan:
    """Into the node's weights or past it (`go` on from a slot of its far side), or written down on the `edge` before it."""
    plans = [stop(walk, *edge, site.affine, "")]
    for move in _moves(site):
        if isinstance(move, str):
            plans[0] = replace(plans[0], why=plans[0].why or move)
            continue
        plan = Plan(edits=move.edits)
        if move.rest is not None:
            plan = plan.plus(stop(walk, *edge, move.rest, f"a shift does not pass {site.node.op}"))
        for slot, onward in move.onward:
            plan = plan.plus(go(slot, onward))
        plans.append(plan)
    return _cheapest(plans)


def _moves(site: Site) -> list[Move | str]:
    """What the node offers: its weights, else a way past it."""
    if op_key(site.node) not in ABSORB:
        return [pass_through(site)]
    taken = ABSORB[op_key(site.node)](site)
    return [taken] if isinstance(taken, Move) else [taken, pass_through(site)]


def _cheapest(plans: Sequence[Plan]) -> Plan:
    """The first of the cheapest; where the search stops at once, why all the others were no better."""
    best = min(plans, key=lambda p: p.cost)
    why = next((p.why for p in (best, *plans) if p.why), "")
    return replace(best, why=why)


def _shared(scene: Scene, tensor: gs.Tensor, reader: gs.Node) -> str:
    """Why the values of `tensor` must not change for `reader` alone; empty where it is the only one that reads them."""
    if scene.is_output(tensor):
        return "its input is a graph output"
    if len(tensor.inputs) != 1:
        return "its input is a graph input"
    if scene.home(tensor.inputs[0]) != scene.home(reader):
        return "its input is made in another graph"
    return "" if len(scene.readers(tensor)) == 1 else "its input is used elsewhere"


def chain(walk: Walk, node: gs.Node, *, ahead: bool = True) -> tuple[list[Use], Affine]:
    """The longest run of affine nodes that starts (`ahead`) or ends at `node`, in order, and the map it is in all."""
    found = walk.source(node)
    assert isinstance(found, Source)
    run, total = [(node, found.slot)], found.affine
    while (following := _neighbour(walk, *run[-1], ahead)) is not None:
        other, found = following
        joined = total.then(found.affine) if ahead else found.affine.then(total)
        if joined is None:
            break
        run.append((other, found.slot))
        total = joined
    return run if ahead else run[::-1], total


def _neighbour(walk: Walk, node: gs.Node, slot: int, ahead: bool) -> tuple[gs.Node, Source] | None:
    """The affine node that alone reads this one's result, or that wrote its input for it alone."""
    tensor = node.outputs[0] if ahead else node.inputs[slot]
    readers = walk.scene.readers(tensor)
    if len(readers) != 1 or _shared(walk.scene, tensor, readers[0][0]):
        return None
    other = readers[0][0] if ahead else tensor.inputs[0]
    found = walk.source(other)
    return (other, found) if isinstance(found, Source) else None


def _without(walk: Walk, run: list[Use], total: Affine) -> Plan:
    """The run is dropped: this saves what it would still cost after merging it where it is."""
    walk.seen.update(id(n) for n, _ in run)
    rank = walk.scene.rank(run[0][0].outputs[0])
    return Plan(-min(len(run), nodes_needed(total, rank)), drops=tuple(run))


def best_plan(scene: Scene, sources: dict[int, Source | str | None], run: list[Use], total: Affine) -> Plan:
    """The cheapest plan for a run of affine nodes; its cost is negative if it is worth doing."""
    first, slot = run[0]
    nodes = {id(n) for n, _ in run}
    drops = Plan(-len(run), drops=tuple(run))
    behind = backward(Walk(scene, sources, set(nodes)), first, slot, total)
    ahead = forward(Walk(scene, sources, set(nodes)), run[-1][0].outputs[0], total)
    best = ahead if ahead.cost < behind.cost else behind
    why = f"before: {behind.why or 'nothing takes it'}; after: {ahead.why or 'nothing takes it'}"
    return replace(drops.plus(replace(best, why="")), why=why)
