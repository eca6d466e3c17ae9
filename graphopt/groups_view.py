"""What can be removed from a model, what that is worth, and what cannot and why: the data behind `graphopt groups`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import onnx_graphsurgeon as gs

from graphopt.cost import costs, weights
from graphopt.dims import Dims, Group, couple, groups
from graphopt.kinds import kind_of
from graphopt.model import Model
from graphopt.shapes import shapes
from graphopt.units import Freed, holdings, mac_terms, step_of, weight_terms

_FILTERS = frozenset({"Conv", "ConvInteger", "ConvTranspose", "DeformConv", "FusedConv", "QLinearConv"})
_NAMED, _LONG = 3, 60  # weights and nodes that a line of text names, and characters of each


@dataclass(frozen=True)
class GroupView:
    """One group of units that are removed together or not at all."""

    index: int
    kind: str  # heads, neurons or channels: which passes take it
    units: int
    step: int  # prune-channels with the given round_to leaves a multiple of this
    removable: int  # the most units it would remove then
    parameters_per_unit: int  # freed by the first unit
    macs_per_unit: int
    parameters: int  # freed by all of them
    macs: int
    weights: tuple[str, ...]  # 'name[axis]' of every constant that shrinks, matrices first
    nodes: tuple[str, ...]  # that read those constants or exchange the units' activations

    @property
    def name(self) -> str:
        """The first weights, as text."""
        return _few([short(w) for w in self.weights])


@dataclass(frozen=True)
class PinnedView:
    """An axis of a weight that cannot shrink (as a whole or in part)."""

    weight: str
    axis: int
    size: int
    pinned: int  # indices that cannot go
    reason: str
    where: str  # the node or tensor at which that was found

    def text(self) -> str:
        part = f"{self.size}" if self.pinned == self.size else f"{self.pinned} of {self.size}"
        return f"{short(self.weight)} axis {self.axis} ({part})"


@dataclass(frozen=True)
class GroupsView:
    """All groups, largest first, and what is pinned."""

    HEADER: ClassVar[tuple[str, ...]] = (
        "group",
        "kind",
        "units",
        "removable",
        "params/unit",
        "MACs/unit",
        "of params",
        "of MACs",
    )
    parameters: int  # of the whole model
    macs: int
    round_to: int
    groups: tuple[GroupView, ...]
    pinned: tuple[PinnedView, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """One a group, as HEADER says."""
        return [
            (
                str(g.index),
                g.kind,
                f"{g.units:,}",
                f"{g.removable:,}",
                f"{g.parameters_per_unit:,}",
                f"{g.macs_per_unit:,}",
                _share(g.parameters, self.parameters),
                _share(g.macs, self.macs),
            )
            for g in self.groups
        ]

    def held_rows(self) -> list[str]:
        """One line a group: the weights that shrink, and the nodes they belong to."""
        return [f"{g.index}: weights {g.name}; nodes {_few([short(n) for n in g.nodes])}" for g in self.groups]

    def pinned_rows(self) -> list[str]:
        """One line a reason and place, with the axes it pins."""
        return summarized(self.pinned)


def view(model: Model, *, round_to: int = 8) -> GroupsView:
    """Analyse the model; MACs are those of `graphopt.cost.costs`."""
    dims = couple(model)
    found = groups(model, dims)
    counted = costs(model, shapes(model))
    held, _, sizes = weight_terms(model)
    parameters, macs = Freed(held, sizes), Freed(mac_terms(counted), counted.sizes)
    tensors = model.tensors()
    holds = holdings(found, dims, {**sizes, **counted.sizes})
    rows = []
    for group, mine in zip(found, holds, strict=True):
        first = {axis: int(h[0]) for axis, h in mine.items()}
        whole = {axis: int(h.sum()) for axis, h in mine.items()}
        step = step_of(mine, sizes, round_to)
        rows.append(
            GroupView(
                group.index,
                kind_of(group, dims, tensors),
                len(group.units),
                step,
                max(len(group.units) - step, 0),
                parameters.by(first),
                macs.by(first),
                parameters.by(whole),
                macs.by(whole),
                names_of(group, tensors),
                tuple(n.name for n in nodes_of(group, tensors)),
            )
        )
    rows.sort(key=lambda g: (-g.parameters, g.index))
    return GroupsView(parameters.total, macs.total, round_to, tuple(rows), tuple(pinned(model, dims)))


def summarized(pinned: Sequence[PinnedView]) -> list[str]:
    """'weight axis 0 (64), ...: reason at node', one line a reason and node."""
    lines: dict[str, list[str]] = {}
    for p in pinned:
        lines.setdefault(p.reason + (f" at '{short(p.where)}'" if p.where else ""), []).append(p.text())
    return [f"{_few(axes)}: {reason}" for reason, axes in lines.items()]


def short(name: str) -> str:
    """A name that fits a table: exporters write some of hundreds of characters."""
    return name if len(name) <= _LONG else f"{name[: _LONG // 2 - 2]}...{name[-_LONG // 2 + 1 :]}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def names_of(group: Group, tensors: Mapping[str, gs.Tensor]) -> tuple[str, ...]:
    """'name[axis]' of every constant the group shrinks, those of most axes first."""
    held = [(s.tensor, s.axis) for s in group.slices if isinstance(tensors.get(s.tensor), gs.Constant)]
    held.sort(key=lambda place: -len(tensors[place[0]].shape))
    return tuple(f"{name}[{axis}]" for name, axis in held)


def nodes_of(group: Group, tensors: Mapping[str, gs.Tensor]) -> list[gs.Node]:
    """The nodes that read the group's constants, write or read its activations; each once."""
    held = [tensors[s.tensor] for s in (*group.slices, *group.activations) if s.tensor in tensors]
    return list({id(n): n for t in held for n in (*t.inputs, *t.outputs)}.values())


def pinned(model: Model, dims: Dims) -> list[PinnedView]:
    """Axes of matrices and filters of which some index cannot go, in the order of the model; windows of filters are left out."""
    tensors = model.tensors()
    matrices = {c.name for c in weights(model) if len(c.shape) > 1}
    reasons: dict[tuple[str, int], dict[str, str]] = {}
    for pin in dims.pins:
        if pin.tensor in matrices and not _is_window(tensors[pin.tensor], pin.axis):
            reasons.setdefault((pin.tensor, pin.axis), {}).setdefault(pin.reason, pin.node)
    rows = []
    for (name, axis), found in reasons.items():
        labels = (dims.labels(name) or [])[axis]
        where = next(iter(found.values())) if len(found) == 1 else ""
        rows.append(PinnedView(name, axis, len(labels), int((labels == 0).sum()), "; ".join(found), where))
    return rows


def _is_window(tensor: gs.Tensor, axis: int) -> bool:
    """Height, width ... of a filter: no group could hold them."""
    return axis >= 2 and any(node.op in _FILTERS for node in tensor.outputs)
