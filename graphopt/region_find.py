"""Finds the regions: sets of units that one node can replace, as large as can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import onnx_graphsurgeon as gs

from graphopt.context import Context
from graphopt.cost import costs
from graphopt.kernels.plan import MAX_REGIONS, ROWS
from graphopt.model import Model
from graphopt.operands import Names
from graphopt.proto import walk
from graphopt.region_rules import RULES
from graphopt.region_units import HEAVY, Site, Unit, units
from graphopt.region_views import View, Views, fit
from graphopt.shapes import shapes


@dataclass(eq=False)
class Region:
    """`fits`: the views of each unit's inputs and outputs, by its id. `macs`: of one row, 0 where they are not known."""

    graph: gs.Graph
    site: Site
    units: list[Unit]
    fits: dict[int, Views]
    macs: int = 0
    name: str = ""
    mask: int = 0  # its nodes, as bits
    outer: dict[int, gs.Tensor] = field(default_factory=dict)  # what it reads, in integers
    inner: dict[int, View] = field(default_factory=dict)  # what its units write, by the id of the tensor
    rows: bool = False
    batch: object = None

    def ops(self) -> Counter[str]:
        """The operators it replaces, QuantizeLinear and DequantizeLinear not counted."""
        return Counter(n.op for u in self.units for n in u.nodes if n.op not in ("QuantizeLinear", "DequantizeLinear"))


@dataclass
class Found:
    """The regions to compile, and why other nodes that have to do with INT8 are in none of them."""

    regions: list[Region]
    reasons: list[tuple[gs.Node, str]] = field(default_factory=list)
    macs: int | None = None  # of the whole model, one row
    each: dict[str, int] = field(default_factory=dict)  # MACs of a node, by name


def search(model: Model, context: Context, exclude: Sequence[str] = ()) -> Found:
    """All regions that hold a convolution or a matrix product; the MAX_REGIONS with the most MACs where there are more.

    `exclude`: patterns (* and ?) of names of nodes that are in none. Numbered by the names of their operators.
    """
    known = context.get(shapes, model)
    counted = costs(model, known)
    macs = {n.name: n.macs for n in counted.nodes}
    names = Names(model)
    wiring = model.wiring()
    regions: list[Region] = []
    reasons: list[tuple[gs.Node, str]] = []
    for graph in walk(model.graph):
        site = Site(model, known, wiring, names)
        found = _grow(graph, site, macs, exclude)
        regions += found
        reasons += _left(graph, site, found)
    taken = {n.op for n in model.nodes() if n.domain == "graphopt"}
    free = [f"Int8Region{i}" for i in range(MAX_REGIONS) if f"Int8Region{i}" not in taken]
    kept = {id(r) for r in sorted(regions, key=lambda r: -r.macs)[: len(free)]}
    for region in regions:
        if id(region) not in kept:
            reasons += [(u.node, f"there are {MAX_REGIONS} larger regions") for u in region.units if u.heavy]
    result = [r for r in regions if id(r) in kept]
    for region, name in zip(result, free, strict=False):
        region.name = name
    return Found(result, reasons, counted.macs, macs)


def _left(graph: gs.Graph, site: Site, regions: Sequence[Region]) -> list[tuple[gs.Node, str]]:
    inside = {id(n) for r in regions for u in r.units for n in u.nodes}
    reasons = {key: value for key, value in site.reasons.items() if key not in inside}
    for node in graph.nodes:
        if id(node) not in inside and id(node) not in reasons and node.op in HEAVY and not node.domain:
            reasons[id(node)] = node, "its input or its weight is not quantised"
    return list(reasons.values())


# ---- growing


@dataclass
class _Graph:
    """`bit` of each node and `before`: all nodes that a node depends on, as bits."""

    bit: dict[int, int]
    before: dict[int, int]

    @staticmethod
    def of(graph: gs.Graph) -> _Graph:
        bit = {id(n): 1 << i for i, n in enumerate(graph.nodes)}
        before: dict[int, int] = {}
        for node in graph.nodes:
            mask = 0
            for tensor in _reads(node):
                for writer in tensor.inputs:
                    if id(writer) in bit:
                        mask |= bit[id(writer)] | before.get(id(writer), 0)
            before[id(node)] = mask
        return _Graph(bit, before)

    def up_to(self, tensor: gs.Tensor) -> int:
        """The nodes that the tensor depends on."""
        mask = 0
        for writer in tensor.inputs:
            if id(writer) in self.bit:
                mask |= self.bit[id(writer)] | self.before[id(writer)]
        return mask

    def mask(self, nodes: Iterable[gs.Node]) -> int:
        mask = 0
        for node in nodes:
            mask |= self.bit[id(node)]
        return mask


def _reads(node: gs.Node) -> list[gs.Tensor]:
    bodies = [g for value in node.attrs.values() if isinstance(value, gs.Graph) for g in walk(value)]
    return [*node.inputs, *(t for g in bodies for n in g.nodes for t in n.inputs), *(t for g in bodies for t in g.outputs)]


def _grow(graph: gs.Graph, site: Site, macs: dict[str, int], exclude: Sequence[str]) -> list[Region]:
    """Each unit, in order, joins the regions that write or also read its inputs, as far as one node could replace them all."""
    growth = _Growth(graph, site, _Graph.of(graph))
    readers: dict[int, list[Region]] = {}
    for unit in units(site, graph, RULES):
        if any(fnmatchcase(n.name, pattern) for n in unit.nodes for pattern in exclude):
            site.refuse(unit.node, "excluded by name")
            continue
        near = {id(r): r for t in unit.inputs for r in (*growth.writer(t), *readers.get(id(t), ()))}
        chosen: list[Region] = []
        best = growth.joined(chosen, unit)
        for region in sorted(near.values(), key=lambda r: -r.macs):
            grown = growth.joined([*chosen, region], unit)
            if not isinstance(grown, str):
                chosen, best = [*chosen, region], grown
        if isinstance(best, str):
            site.refuse(unit.node, best)
            continue
        best.macs += macs.get(unit.node.name, 0)
        growth.replace(chosen, best)
        for tensor in best.outer.values():
            others = [r for r in readers.get(id(tensor), []) if id(r) in growth.regions and r is not best]
            readers[id(tensor)] = [*others, best]
    whole = [r for r in growth.regions.values() if any(u.heavy for u in r.units)]
    kept = {id(r) for r in whole}
    for region in growth.regions.values():
        for unit in region.units if id(region) not in kept else ():
            site.refuse(unit.node, "no convolution or matrix product next to it")
    return whole


@dataclass
class _Growth:
    """The regions so far, by id. `home`: id of an activation in integers -> id of the region that writes it."""

    graph: gs.Graph
    site: Site
    order: _Graph
    regions: dict[int, Region] = field(default_factory=dict)
    home: dict[int, int] = field(default_factory=dict)

    def writer(self, tensor: gs.Tensor) -> list[Region]:
        """The region that writes the tensor."""
        return [self.regions[self.home[id(tensor)]]] if id(tensor) in self.home else []

    def replace(self, old: Sequence[Region], new: Region) -> None:
        for region in old:
            del self.regions[id(region)]
        self.regions[id(new)] = new
        self.home.update((id(t), id(new)) for u in new.units for t in u.outputs)

    def joined(self, parts: Sequence[Region], unit: Unit) -> Region | str:
        """One region of all these and the unit, or why there is none."""
        inner = {key: view for r in parts for key, view in r.inner.items()}
        found = fit(unit, [inner.get(id(t)) for t in unit.inputs], self.site)
        if isinstance(found, str):
            return found
        inner.update((id(t), v) for t, v in zip(unit.outputs, found[1], strict=True))
        mask = self.order.mask(unit.nodes)
        for part in parts:
            mask |= part.mask
        pairs = [*(pair for r in parts for pair in r.outer.items()), *((id(t), t) for t in unit.inputs)]
        outer = {key: t for key, t in pairs if key not in inner}
        layouts = {r.rows for r in parts} | {v.layout == ROWS for v in found[0]}
        if len(layouts) > 1:
            return "rows and images do not mix in a region"
        batches = {r.batch for r in parts if not r.rows} | {self._batch(t, v) for t, v in zip(unit.inputs, found[0], strict=True)}
        if len(batches) > 1:
            return "its batch differs from its neighbours'"
        if parts and self._comes_back(outer, mask, parts):
            return "a path leaves its region and comes back"
        members = [u for r in parts for u in r.units]
        if len(parts) > 1:
            members.sort(key=lambda u: self.order.before[id(u.nodes[-1])].bit_count())
        fits = {key: views for r in parts for key, views in r.fits.items()}
        fits[id(unit)] = found
        total = sum(r.macs for r in parts)
        return Region(self.graph, self.site, [*members, unit], fits, total, "", mask, outer, inner, layouts.pop(), batches.pop())

    def _batch(self, tensor: gs.Tensor, view: View) -> object:
        return None if view.layout == ROWS else (self.site.shapes.shape(tensor.name) or (None,))[0]

    def _comes_back(self, outer: dict[int, gs.Tensor], mask: int, parts: Sequence[Region]) -> bool:
        """Whether something outside that the region reads depends on it, with every other region taken as one node."""
        needed = 0
        for tensor in outer.values():
            needed |= self.order.up_to(tensor)
        others = [r for r in self.regions.values() if r not in parts]
        while others and not needed & mask:
            hit = [r for r in others if r.mask & needed]
            if not hit:
                break
            for region in hit:
                others.remove(region)
                for tensor in region.outer.values():
                    needed |= self.order.up_to(tensor)
        return bool(needed & mask)
