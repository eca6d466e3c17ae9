"""Greedy least squares: remove next what the layers that read it can best do without, and say what each removal costs.

Optimal Brain Surgeon (Hassibi and Stork 1993) with whole units (Kurtic et al. 2022, arXiv:2203.07259; OSSCAR, arXiv:2403.12983):
after each removal the remaining weights of all readers are, implicitly, the ridge solution on what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.context import Context
from graphopt.criteria import Scores, criterion, l2
from graphopt.dims import Group
from graphopt.model import Model
from graphopt.readers import Reader, of_group, readers

ALPHA = 1e-3
_DEPTH = 0.95  # share of a group's units that are ordered by removal; the rest keep the order they then have
_STEPS = 96  # wide groups lose several units at a time


@dataclass(frozen=True)
class Order:
    """Positions of units, the first to go first, and the summed cost when so many have gone (index 0: none)."""

    order: np.ndarray
    cost: np.ndarray


@dataclass
class _State:
    """One reader's inverse covariance and matrix, rows by unit of the group first."""

    inverse: np.ndarray
    matrix: np.ndarray
    rows: np.ndarray  # (units, features a unit)


def order(group: Group, readers: Sequence[Reader]) -> Order | None:
    """The order of removal of a group; None where nothing that was measured reads it.

    Costs are squared errors at the readers' outputs, each relative to the variance of all of them. (Outputs weighted by the
    gradient of the model's outputs were measured too, and chose worse.)
    """
    states = [s for s in (_state(r, group.units) for r in readers) if s is not None]
    if not states:
        return None
    size = len(group.units)
    alive = np.arange(size)
    gone: list[int] = []
    costs: list[float] = []
    chunk = max(1, size // _STEPS)
    while len(gone) < int(size * _DEPTH) and len(alive) > 1:
        cost = np.sum([_costs(s, alive) for s in states], axis=0)
        picked = np.argsort(cost, kind="stable")[: min(chunk, len(alive) - 1)]
        for place in picked:
            gone.append(int(alive[place]))
            costs.append(float(cost[place]))
        for state in states:
            _eliminate(state, alive[picked])
        alive = np.delete(alive, picked)
    rest = np.sum([_costs(s, alive) for s in states], axis=0)
    tail = np.argsort(rest, kind="stable")
    gone += alive[tail].tolist()
    costs += np.maximum.accumulate(rest[tail]).tolist()
    return Order(np.array(gone), np.concatenate([[0.0], np.cumsum(np.maximum(costs, 0))]))


def _state(reader: Reader, units: np.ndarray) -> _State | None:
    rows = reader.features(units)
    if not rows.size:
        return None
    covariance = reader.moments.cov[0]
    size = len(covariance)
    strength = ALPHA * np.trace(covariance) / size + 1e-10
    inverse = np.linalg.inv(covariance + strength * np.eye(size))
    return _State(inverse, reader.matrix / np.sqrt(reader.spread + 1e-30), rows)


def _costs(state: _State, alive: np.ndarray) -> np.ndarray:
    """What the least squares fit loses when each unit goes: m' (H^-1 of its features)^-1 m."""
    rows = state.rows[alive]
    if rows.shape[1] == 1:
        diagonal = state.inverse[rows[:, 0], rows[:, 0]]
        found: np.ndarray = np.square(state.matrix[rows[:, 0]]).sum(1) / np.maximum(diagonal, 1e-30)
        return np.where(rows[:, 0] >= 0, found, 0.0)
    if (rows >= 0).all():
        blocks = state.inverse[rows[:, :, None], rows[:, None, :]]
        mine = state.matrix[rows]
        return np.asarray((mine * np.linalg.solve(blocks, mine)).sum((1, 2)))
    return np.array([_cost_of(state, r[r >= 0]) for r in rows])


def _cost_of(state: _State, rows: np.ndarray) -> float:
    mine = state.matrix[rows]
    return float((mine * np.linalg.solve(state.inverse[np.ix_(rows, rows)], mine)).sum()) if rows.size else 0.0


def _eliminate(state: _State, units: np.ndarray) -> None:
    """Take the units' features out: the others' weights and the inverse become those of the smaller problem."""
    rows = state.rows[units].ravel()
    rows = rows[rows >= 0]
    if not rows.size:
        return
    columns = state.inverse[:, rows].copy()
    solved = np.linalg.solve(state.inverse[np.ix_(rows, rows)], np.concatenate([state.inverse[rows], state.matrix[rows]], 1))
    size = len(state.inverse)
    state.matrix -= columns @ solved[:, size:]
    state.inverse -= columns @ solved[:, :size]
    state.inverse[rows], state.inverse[:, rows] = 0, 0
    state.inverse[rows, rows] = 1
    state.matrix[rows] = 0


@criterion("obs")
def obs(model: Model, context: Context, groups: Sequence[Group]) -> Scores:
    """What the layers that read a unit lose without it once refitted to the rest, the units removed before it gone.

    The root of it, so that scores are norms. Groups that no Conv, Gemm or MatMul of the main graph reads fall back on l2.
    """
    measured = readers(model, context)
    known: dict[int, Order | None] = context.cached("surgeon", dict)
    scores = l2(model, context, groups)
    fallbacks = 0
    for i, group in enumerate(groups):
        key = int(group.units[0])
        if key not in known:
            known[key] = order(group, of_group(measured, group))
        context.progress("weigh units", i + 1, len(groups))
        found = known[key]
        fallbacks += found is None
        if found is not None:
            steps = np.maximum.accumulate(np.diff(found.cost))
            tie = np.arange(len(steps)) * (1e-12 * (steps[-1] + 1e-30))  # equal costs keep the order of removal
            scores[i] = np.empty(len(group.units))
            scores[i][found.order] = np.sqrt(steps + tie)
    context.facts["groups_without_readers"] = fallbacks
    return scores
