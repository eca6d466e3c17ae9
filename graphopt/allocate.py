"""How many units each group gives up: uniform or global, down to a ratio or a budget, in multiples that kernels like.

Nothing here looks at a graph: costs are sums of products of axis sizes (`graphopt.cost.Term`), and a group says how many indices of
which axis each of its units holds. A plan is recounted in time proportional to the axes that shrink.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np

from graphopt.cost import Axis, Term

_LEVELS = 1 << 12  # ratios a uniform plan is searched among: finer than any group


@dataclass(frozen=True)
class Candidate:
    """A group that may lose units; `order` lists its units (0 .. n-1), the least important first.

    `lost[axis][k]`: indices the axis loses with the first k units of the order. How many units stay is a multiple of `step` and at
    least `minimum`. `priority`: of each unit in that order, comparable between groups, never falling.
    """

    order: np.ndarray
    priority: np.ndarray
    lost: Mapping[Axis, np.ndarray]
    step: int = 1
    minimum: int = 1

    def removable(self, wanted: int) -> int:
        """The most units up to `wanted` that can go: rounding keeps units, it never removes more than was asked for."""
        size = len(self.order)
        kept = ceil(max(size - wanted, self.minimum, 1) / self.step) * self.step
        return max(size - kept, 0)


Plan = tuple[int, ...]  # units removed, by candidate


def candidate(
    score: np.ndarray,
    holds: Mapping[Axis, np.ndarray],
    *,
    step: int = 1,
    minimum: int = 1,
    priority: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Candidate:
    """Order the units by score, ties by position; `holds[axis]`: how many indices of the axis each unit has.

    `priority` makes of the order what its units are worth, never falling; without it that is `lamp` of the scores.
    """
    order = np.argsort(score, kind="stable")
    worth = lamp(score[order]) if priority is None else priority(order)
    lost = {axis: np.concatenate([[0], np.cumsum(counts[order])]) for axis, counts in holds.items()}
    return Candidate(order, worth, lost, step, minimum)


def lamp(ascending: np.ndarray) -> np.ndarray:
    """The energy of each unit relative to what is left of the group once all weaker ones are gone (LAMP, Lee et al. 2021).

    arXiv:2010.07611. The last unit has 1, so no group empties before others; dead units have 0. Dividing by the MACs a unit frees,
    and scores divided by the group's mean instead, were measured on three networks and gained nothing.
    """
    energy = np.square(np.asarray(ascending, np.float64))
    rest = np.cumsum(energy[::-1])[::-1]
    return np.maximum.accumulate(np.divide(energy, rest, out=np.zeros_like(energy), where=rest > 0))


def slopes(counts: Sequence[int] | np.ndarray, errors: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
    """For each of `size` units in order, what it adds to the error, by the convex hull under the measured points; never falling.

    Under the hull, because a group that costs much for its first units and little for the next is best taken in one go. Units
    beyond the last point come after all others.
    """
    hull = [(0, 0.0)]
    for count, value in zip(counts, errors, strict=True):
        if count <= hull[-1][0]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (count, value)):
            hull.pop()
        hull.append((int(count), float(value)))
    found = np.full(size, np.inf)
    for start, end in pairwise(hull):
        found[start[0] : end[0]] = max(_slope(start, end), 0.0)
    return found


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


@dataclass(frozen=True)
class Meter:
    """A sum of terms of which some axes may shrink; see `meter`."""

    fixed: int
    terms: tuple[tuple[int, tuple[Axis, ...]], ...]  # product of what does not shrink, axes that may
    sizes: Mapping[Axis, int]

    def read(self, candidates: Sequence[Candidate], plan: Sequence[int]) -> int:
        """The sum once the plan is carried out."""
        gone: Counter[Axis] = Counter()
        for choice, removed in zip(candidates, plan, strict=True):
            if removed:
                for axis, lost in choice.lost.items():
                    gone[axis] += int(lost[removed])
        total = self.fixed
        for factor, axes in self.terms:
            for axis in axes:
                factor *= self.sizes[axis] - gone[axis]
            total += factor
        return total


def meter(terms: Iterable[Term], sizes: Mapping[Axis, int], candidates: Iterable[Candidate]) -> Meter:
    """Split every term into what the candidates cannot change and what they can."""
    shrinking = {axis for choice in candidates for axis in choice.lost}
    fixed, moving = 0, []
    for term in terms:
        factor, axes = term.factor, tuple(a for a in term.axes if a in shrinking)
        for axis in term.axes:
            factor *= 1 if axis in shrinking else sizes[axis]
        if axes:
            moving.append((factor, axes))
        else:
            fixed += factor
    return Meter(fixed, tuple(moving), {a: sizes[a] for _, axes in moving for a in axes})


def uniform(candidates: Sequence[Candidate], ratio: float) -> Plan:
    """Every group gives up the same fraction of its units."""
    return tuple(c.removable(int(len(c.order) * ratio + 1e-9)) for c in candidates)


def ranked(candidates: Sequence[Candidate]) -> Callable[[int], Plan]:
    """A function of m: the plan that removes the m units of lowest priority over all groups."""
    groups = np.concatenate([np.full(len(c.order), i) for i, c in enumerate(candidates)])
    groups = groups[np.argsort(np.concatenate([c.priority for c in candidates]), kind="stable")]

    def plan(count: int) -> Plan:
        wanted = np.bincount(groups[:count], minlength=len(candidates))
        return tuple(c.removable(int(w)) for c, w in zip(candidates, wanted, strict=True))

    return plan


def by_ratio(candidates: Sequence[Candidate], ratio: float, *, scope: str) -> Plan:
    """Remove this fraction of the units: of every group (uniform), or of all together (global)."""
    if scope == "uniform":
        return uniform(candidates, ratio)
    return ranked(candidates)(int(sum(len(c.order) for c in candidates) * ratio + 1e-9))


def _plans(candidates: Sequence[Candidate], scope: str) -> tuple[Callable[[int], Plan], int]:
    """Plans by level, each removing no less than the one before, and the last level."""

    def level_plan(level: int) -> Plan:
        return uniform(candidates, level / _LEVELS)

    return (level_plan, _LEVELS) if scope == "uniform" else (ranked(candidates), sum(len(c.order) for c in candidates))


def by_budget(candidates: Sequence[Candidate], gauge: Meter, budget: float, *, scope: str) -> Plan | None:
    """The plan that removes least and brings the gauge to at most `budget`; None where even the largest does not."""
    plans, last = _plans(candidates, scope)
    if gauge.read(candidates, plans(last)) > budget:
        return None
    low, high = -1, last  # plans only grow with the level, so the gauge only falls
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gauge.read(candidates, plans(middle)) <= budget else (middle, high)
    return plans(high) if low < 0 else _partial(candidates, gauge, budget, plans(low), plans(high))


def _partial(candidates: Sequence[Candidate], gauge: Meter, budget: float, low: Plan, high: Plan) -> Plan:
    """Of the groups that differ between two neighbouring plans, as few as are needed: rounding makes many jump at once."""
    plan = list(low)
    for i in range(len(plan)):
        plan[i] = high[i]
        if low[i] != high[i] and gauge.read(candidates, plan) <= budget:
            break
    return tuple(plan)
