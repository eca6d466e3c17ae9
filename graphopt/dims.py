"""Coupled dimensions: which slices of which tensors must be removed together.

Every index of every axis of every tensor carries an integer label. A rule by op does to the labels what the op does to the data, so
the classes of the union-find are exactly what goes together. Unknown op, rank or size: pinned, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphopt import (  # noqa: F401 (they fill the table)
    dim_rules_attention,
    dim_rules_layout,
    dim_rules_linear,
    dim_rules_norm,
    dim_rules_reshape,
)
from graphopt.dim_folds import resolve
from graphopt.dim_labels import NO_LABELS, ONE, Dims, Labels, Pin, is_one
from graphopt.dim_rules import DIM_RULES, Axes, PinError, Site
from graphopt.errors import ModelError
from graphopt.model import Model
from graphopt.proto import subgraphs, walk
from graphopt.shapes import Shapes, shapes

__all__ = ["Dims", "Group", "Pin", "Slice", "couple", "groups"]


MALFORMED = (ArithmeticError, LookupError, ModelError, StopIteration, TypeError, ValueError)  # what rules meet in damaged nodes
MAX_AXIS = 1 << 24  # indices of an axis that carry labels; the largest vocabularies have a million


@dataclass(frozen=True)
class Slice:
    """An axis that holds indices of a group: the root label of every index (those of other groups too, 0 where pinned)."""

    tensor: str
    axis: int
    labels: np.ndarray


@dataclass(frozen=True)
class Group:
    """Units that can be removed each on its own and are alike: they lie in the same axes of the same tensors.

    `units` are root labels, in order: what `removal.remove` takes. `slices` are the constants, `activations` all other tensors.
    """

    index: int
    units: np.ndarray
    slices: tuple[Slice, ...]
    activations: tuple[Slice, ...]


def couple(model: Model, *, residual: bool = False) -> Dims:
    """The labels of every axis of every tensor, and their classes; near linear in the size of the graph.

    Graph inputs and outputs stay. Bodies of control flow take part; what goes into and out of them stays. `residual`: features
    that a LayerNormalization or the like takes its mean and norm of may go too, which is not exact (`Dims.is_exact`).
    """
    dims = Dims(_bounded(shapes(model)), residual=residual)
    for graph in model.graphs():
        for tensor in graph.inputs:
            dims.pin_tensor(tensor.name, f"graph input '{tensor.name}'")
        for node in graph.nodes:
            _apply(node, dims, model.opset)
        for tensor in graph.outputs:
            dims.pin_tensor(tensor.name, f"graph output '{tensor.name}'")
    resolve(dims)
    _pin_whole_axes(dims)
    dims.freeze()
    dims.pins.extend(_explain(model, dims))
    return dims


def _bounded(known: Shapes) -> Shapes:
    """Axes too long for labels, as damaged models declare them, count as unknown."""
    far = {name: shape for name, shape in known.shapes.items() if any(isinstance(d, int) and d > MAX_AXIS for d in shape)}
    cut = {n: tuple(f"?{n}:{i}" if isinstance(d, int) and d > MAX_AXIS else d for i, d in enumerate(s)) for n, s in far.items()}
    return Shapes({**known.shapes, **cut}, known.dtypes, known.values)


def _apply(node: gs.Node, dims: Dims, opset: int) -> None:
    site = Site(node, dims, opset)
    try:
        results = _results(site)
    except (PinError, *MALFORMED) as error:
        results, reason = [], str(error) if isinstance(error, PinError) else f"{site.op} is not as its rule expects"
        for tensor in (*node.inputs, *node.outputs, *_captured(node, dims)):
            if tensor.name:
                dims.pin_tensor(tensor.name, reason, node.name)
    for index in site.given():
        if index not in site.looked:
            dims.pin_tensor(node.inputs[index].name, f"a parameter of {site.op}", node.name)
    for tensor, axes in zip(node.outputs, results, strict=False):
        if tensor.name:
            _record(site, tensor.name, axes)
    if dim_rules_linear.vanishing(site):
        dims.vanishing.update(t.name for t in node.outputs)


def _results(site: Site) -> list[Axes | None]:
    if site.op not in DIM_RULES:
        raise PinError(f"op '{site.op}' has no dimension rule")
    results = list(DIM_RULES[site.op](site))
    if any(t.name for t in site.node.outputs[len(results) :]):
        raise PinError(f"{site.op} with several outputs")
    return results


def _captured(node: gs.Node, dims: Dims) -> list[gs.Tensor]:
    """What the node's bodies read from outside; constants there take part as everywhere else."""
    read = (t for body in subgraphs(node) for g in walk(body) for n in g.nodes for t in (*n.inputs, *g.outputs))
    return [t for t in read if t.name in dims.axes and not isinstance(t, gs.Constant)]


def _record(site: Site, name: str, axes: Axes | None) -> None:
    """Store an output's labels, checked against its shape: where they disagree, all of it stays."""
    dims, known, node = site.dims, site.dims.shapes.shape(name), site.node.name
    if axes is None:
        dims.pin_tensor(name, f"made by {site.op}", node)
        return
    if known is not None and len(known) != len(axes):
        site.pin_axes(axes, "the rank is not what the rule expects")
        dims.pin_tensor(name, "the rank is not what the rule expects", node)
        return
    if dims.shapes.dtype(name) == np.int64:
        site.pin_axes(axes, NO_LABELS)
    dims.axes[name] = [_fit(site, x, size) for x, size in zip(axes, known or [None] * len(axes), strict=True)]


def _fit(site: Site, labels: Labels, size: int | str | None) -> Labels:
    """The labels as an axis of that size has them."""
    if not isinstance(size, int):
        return site.pinned(None, "the size is not known") if size is not None and is_one(labels) else labels
    if size == 1:
        if not is_one(labels):
            site.pin(labels, "an axis of size 1")
        return ONE
    if labels.size == 1 and not is_one(labels):
        return np.broadcast_to(labels, size)
    if labels.size != size:
        site.pin(labels, "the size is not what the rule expects")
        return site.pinned(size, "the size is not what the rule expects")
    return labels


def _pin_whole_axes(dims: Dims) -> None:
    """A class that is all of some axis would leave an empty tensor."""
    roots, seen = dims.classes.roots(), set[int]()
    for axes in dims.axes.values():
        for labels in axes or ():
            if id(labels) not in seen and labels.size > 1:
                seen.add(id(labels))
                found = roots[labels]
                if found[0] and (found == found[0]).all():
                    dims.classes.pin(labels[:1], "the whole axis would go", "")


def _explain(model: Model, dims: Dims) -> list[Pin]:
    """For every axis of a constant that is not free, why: its first causes."""
    pins = []
    for constant in (c for c in model.constants() if np.dtype(c.dtype) not in (np.int64, object)):
        for axis, labels in enumerate(dims.axes.get(constant.name) or ()):
            if is_one(labels) or labels.size == 0:
                continue
            causes = np.unique(dims.classes.cause(labels))
            for cause in causes[causes < len(dims.classes.causes)]:
                pins.append(Pin(constant.name, axis, *dims.classes.causes[int(cause)]))
    return pins


def groups(model: Model, dims: Dims) -> list[Group]:
    """The removable units, those that lie in the same axes of the same tensors together; in order of their first constant.

    Only units of both constants and activations are found, and only groups of two units and more: one must stay.
    """
    constants = {c.name for c in model.constants()}
    places = [
        Slice(name, axis, roots)
        for name in dims.axes
        for axis, roots in enumerate(dims.labels(name) or ())
        if roots.size > 1 and roots.strides != (0,) and roots.any()
    ]
    members = [np.unique(place.labels[place.labels > 0]) for place in places]
    signature, held = np.zeros(dims.root_count(), np.uint64), np.zeros((2, dims.root_count()), bool)
    draw = np.random.default_rng(0).integers(1, 2**63, len(places), dtype=np.uint64)
    for place, mine, number in zip(places, members, draw, strict=True):
        signature[mine] += number  # a set of places as the sum of their random numbers
        held[int(place.tensor in constants), mine] = True
    units = np.flatnonzero(held.all(axis=0))
    of_group: dict[int, list[int]] = {}
    for unit in units.tolist():
        of_group.setdefault(int(signature[unit]), []).append(unit)
    found = {s: (list[Slice](), list[Slice]()) for s, u in of_group.items() if len(u) > 1}
    for place, mine in zip(places, members, strict=True):
        for key in np.unique(signature[mine]).tolist():
            if key in found:
                found[key][0 if place.tensor in constants else 1].append(place)
    return [Group(i, np.array(of_group[s]), *map(tuple, lists)) for i, (s, lists) in enumerate(found.items())]
