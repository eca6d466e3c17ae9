"""Groups seen as costs see them: how many indices of which axis each unit holds, and what goes when it goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import gcd, lcm, prod

import numpy as np

from graphopt.cost import Axis, Costs, Term, weights
from graphopt.dims import Dims, Group
from graphopt.model import Model

Holds = dict[Axis, np.ndarray]  # how many indices of the axis each unit of a group has


def weight_terms(model: Model) -> tuple[list[Term], list[Term], dict[Axis, int]]:
    """The number of parameters as a sum of terms, one a weight; their bytes likewise; and the sizes of their axes."""
    held = weights(model)
    terms = [Term(tuple((c.name, i) for i in range(len(c.shape)))) for c in held]
    wide = [Term(term.axes, np.dtype(c.dtype).itemsize) for term, c in zip(terms, held, strict=True)]
    return terms, wide, {(c.name, i): int(size) for c in held for i, size in enumerate(c.shape)}


def mac_terms(costs: Costs) -> list[Term]:
    """The MACs of all counted nodes as a sum of terms."""
    return [term for node in costs.nodes for term in node.terms]


def holdings(groups: Sequence[Group], dims: Dims, sizes: Mapping[Axis, int]) -> list[Holds]:
    """For each group, those of the axes of these sizes it has indices of, and how many each of its units holds.

    The labels of a dynamic axis repeat (12*batch has 12): there the size says how often.
    """
    found: list[Holds] = [{} for _ in groups]
    if not groups:
        return found
    units = np.concatenate([g.units for g in groups])
    order = np.argsort(units)
    group_of = np.concatenate([np.full(len(g.units), i) for i, g in enumerate(groups)])[order]
    position_of = np.concatenate([np.arange(len(g.units)) for g in groups])[order]
    units = units[order]
    for (tensor, axis), size in sizes.items():
        labels = dims.labels(tensor)
        if labels is None:
            continue
        places = np.minimum(np.searchsorted(units, labels[axis]), len(units) - 1)
        places = places[units[places] == labels[axis]]
        for index in np.unique(group_of[places]):
            mine = position_of[places[group_of[places] == index]]
            times = max(size // len(labels[axis]), 1)
            found[index][tensor, axis] = times * np.bincount(mine, minlength=len(groups[index].units))
    return found


def step_of(holds: Holds, weight_axes: Mapping[Axis, int], round_to: int) -> int:
    """The number of units of which a multiple must stay for every axis of a weight to shrink by multiples of `round_to`.

    A unit that holds 4 indices of every axis (a head of width 4) needs multiples of 2 for axes of multiples of 8.
    """
    counts = {int(c) for axis, held in holds.items() if axis in weight_axes for c in np.unique(held) if c}
    return lcm(*(round_to // gcd(round_to, count) for count in counts)) if counts else round_to


class Freed:
    """How much a sum of terms falls when units go, one group at a time; terms the group does not touch are not looked at."""

    def __init__(self, terms: Sequence[Term], sizes: Mapping[Axis, int]) -> None:
        self.terms, self.sizes = terms, sizes
        self.total = sum(term.factor * prod(sizes[a] for a in term.axes) for term in terms)
        self._by_axis: dict[Axis, list[int]] = defaultdict(list)
        for i, term in enumerate(terms):
            for axis in term.axes:
                self._by_axis[axis].append(i)

    def by(self, lost: Mapping[Axis, int]) -> int:
        """What the sum falls by when the axes lose so many indices."""
        touched = {i for axis in lost for i in self._by_axis.get(axis, ())}
        freed = 0
        for i in touched:
            term = self.terms[i]
            before = prod(self.sizes[a] for a in term.axes)
            freed += term.factor * (before - prod(self.sizes[a] - lost.get(a, 0) for a in term.axes))
        return freed
