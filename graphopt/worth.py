"""What units are worth across groups: the error at the outputs that their removal brings, by MAC or parameter that it frees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from graphopt.agreement import Answers, answers
from graphopt.allocate import slopes
from graphopt.context import Context
from graphopt.dims import Group
from graphopt.errors import PassError
from graphopt.model import Model
from graphopt.readers import Reader, of_group, readers
from graphopt.sensitivity import SHARES, Curve, Trial, curve
from graphopt.units import Freed, Holds

Priority = Callable[[np.ndarray], np.ndarray]  # the order of a group's units -> their worth, never falling
ABSOLUTE = frozenset({"fisher", "first-order", "obs"})  # criteria whose scores of different groups are in the same unit
Curves = dict[tuple[int, bytes], Curve]  # by the group's first unit and the order in which its units go
ROWS = 64  # calibration rows on which sensitivity is measured, at most
FEWEST = 4  # and at least: below, measuring is not worth it
EFFORT = 3e12  # MACs that measuring the sensitivity of all groups may take: a minute or two on one core


def per_unit_freed(freed: Freed, holds: Holds) -> float:
    """What one unit of the group frees, the others being whole."""
    return max(float(freed.by({axis: int(counts.max()) for axis, counts in holds.items()})), 1.0)


def by_score(score: np.ndarray, each: float) -> Priority:
    """Squared scores as errors that add up."""

    def priority(order: np.ndarray) -> np.ndarray:
        errors = np.cumsum(np.square(score[order]))
        return slopes(np.arange(1, len(order) + 1), errors, len(order)) / each

    return priority


def by_trial(group: Group, found: Sequence[Reader], trial: Trial, each: float, known: Curves) -> Priority:
    """Measured errors at the outputs with more and more of the group gone; those in `known` are not measured again."""

    def priority(order: np.ndarray) -> np.ndarray:
        key = (int(group.units[0]), order.tobytes())
        if key not in known:
            known[key] = curve(group, order, found, trial)
        counts, errors = known[key]
        return slopes(counts, errors, len(order)) / each

    return priority


def rows_for(groups: int, macs: float) -> int:
    """On how many rows the sensitivity of so many groups is measured; 0 where even a few would take too long."""
    rows = int(min(ROWS, EFFORT / max(len(SHARES) * groups * macs, 1.0)))
    return rows if rows >= FEWEST else 0


def truth(model: Model, context: Context, rows: int) -> Answers:
    """The model's own outputs on some calibration rows, once a state of the model."""
    data = context.calibration
    if data is None:
        raise PassError("prune", "scope=sensitivity needs calibration data: give --calib PATH (or calibration=...)")
    return context.cached(f"truth {rows}", lambda: answers(model, data, limit=rows))


def measured(
    model: Model, context: Context, groups: Sequence[Group], each: Mapping[int, float], macs: float
) -> list[Priority | None]:
    """For each group its measured worth; None for those whose units something else than a linear layer reads.

    PassError where the model, of so many MACs a row, is too large to be run that often.
    """
    rows = rows_for(len(groups), macs)
    if not rows:
        raise PassError("prune", f"scope=sensitivity: {len(groups)} groups of a model of {macs:.3g} MACs take too long; use global")
    all_readers = readers(model, context)
    trial = context.cached(f"trial {rows}", lambda: Trial(model, all_readers, truth(model, context, rows)))
    known: Curves = context.cached(f"curves {rows}", dict)
    found: list[Priority | None] = []
    for i, group in enumerate(groups):
        mine = of_group(all_readers, group)
        found.append(by_trial(group, mine, trial, each[i], known) if mine else None)
    return found
