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
from graphopt.sensitivity import Trial, curve
from graphopt.units import Freed, Holds

Priority = Callable[[np.ndarray], np.ndarray]  # the order of a group's units -> their worth, never falling
ABSOLUTE = frozenset({"fisher", "first-order", "obs"})  # criteria whose scores of different groups are in the same unit
ROWS = 64  # calibration rows on which sensitivity is measured


def per_unit_freed(freed: Freed, holds: Holds) -> float:
    """What one unit of the group frees, the others being whole."""
    return max(float(freed.by({axis: int(counts.max()) for axis, counts in holds.items()})), 1.0)


def by_score(score: np.ndarray, each: float) -> Priority:
    """Squared scores as errors that add up."""

    def priority(order: np.ndarray) -> np.ndarray:
        errors = np.cumsum(np.square(score[order]))
        return slopes(np.arange(1, len(order) + 1), errors, len(order)) / each

    return priority


def by_trial(group: Group, found: Sequence[Reader], trial: Trial, each: float) -> Priority:
    """Measured errors at the outputs with more and more of the group gone."""

    def priority(order: np.ndarray) -> np.ndarray:
        counts, errors = curve(group, order, found, trial)
        return slopes(counts, errors, len(order)) / each

    return priority


def truth(model: Model, context: Context) -> Answers:
    """The model's own outputs on some calibration rows, once a state of the model."""
    data = context.calibration
    if data is None:
        raise PassError("prune", "scope=sensitivity needs calibration data: give --calib PATH (or calibration=...)")
    return context.cached("truth", lambda: answers(model, data, limit=ROWS))


def measured(model: Model, context: Context, groups: Sequence[Group], each: Mapping[int, float]) -> list[Priority | None]:
    """For each group its measured worth; None for those whose units something else than a linear layer reads."""
    all_readers = readers(model, context)
    trial = Trial(model, all_readers, truth(model, context))
    found: list[Priority | None] = []
    for i, group in enumerate(groups):
        mine = of_group(all_readers, group)
        found.append(by_trial(group, mine, trial, each[i]) if mine else None)
    return found
