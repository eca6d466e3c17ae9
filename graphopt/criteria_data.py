"""Criteria that ask what a unit does on calibration rows, and what the model's outputs make of it; no labels are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from graphopt.context import Context
from graphopt.criteria import Scores, criterion, l2, need_data, per_unit, reads, weigh_reads
from graphopt.dims import Group
from graphopt.errors import ModelError
from graphopt.gradients import Scalar, Spot, program
from graphopt.model import Model
from graphopt.probes import variances

Facts = dict[str, object]
DRAWS = 2  # random projections of the outputs a row


@criterion("fluctuation")
def fluctuation(model: Model, context: Context, groups: Sequence[Group]) -> Scores:
    """Variance of a unit on calibration rows times the squared norm of the weights that read it (FLAP, arXiv:2312.11983).

    What does not vary can be replaced by a bias. The root of it, so that scores are norms. Groups that no Conv, ConvTranspose,
    Gemm, MatMul or recurrent op reads fall back on l2. PassError without data.
    """
    need_data(context, "fluctuation")
    return weigh_reads(model, context, groups, variances, 2)


@criterion("first-order")
def first_order(model: Model, context: Context, groups: Sequence[Group]) -> Scores:
    """How far the log-likelihood of what the model predicts moves, to first order, without the unit.

    After Molchanov et al. 2017 (arXiv:1611.06440), with predictions for labels. The root of the mean over rows of
    |sum of y g| over all places where weights read the unit. Outputs that are no classifier's count by random projections. Groups
    without a gradient fall back on l2. PassError without data.
    """
    need_data(context, "first-order")
    return _masked(model, context, groups, "likelihood", np.abs)


@criterion("fisher")
def fisher(model: Model, context: Context, groups: Sequence[Group]) -> Scores:
    """How far the outputs move, to first order, without the unit: the Fisher information of a mask that multiplies it.

    After Theis et al. 2018 (arXiv:1801.05787), without labels. The root of the mean over rows of (sum of y g)^2 over all
    places where weights read the unit, g being the gradient of random projections of the outputs. Groups without a gradient fall
    back on l2. PassError without data.
    """
    need_data(context, "fisher")
    return _masked(model, context, groups, "projections", np.square)


def _masked(
    model: Model, context: Context, groups: Sequence[Group], scalar: Scalar, size: Callable[[np.ndarray], np.ndarray]
) -> Scores:
    """The root of the mean of `size` of what the scalar loses, to first order, with each unit.

    That is the sum of y g over all indices by which weights read the unit, g being the gradient by way of that reading alone.
    Measured once a state of the model and choice of groups.
    """
    known: dict[object, tuple[Scores, Facts]] = context.cached("masked", dict)
    key = (scalar, size.__name__, tuple(int(g.units[0]) for g in groups))
    if key not in known:
        known[key] = _measured(model, context, groups, scalar, size)
    scores, facts = known[key]
    context.facts.update(facts)
    return list(scores)


def _measured(
    model: Model, context: Context, groups: Sequence[Group], scalar: Scalar, size: Callable[[np.ndarray], np.ndarray]
) -> tuple[Scores, Facts]:
    """The scores, and what the report should say."""
    tensors, scores = model.tensors(), l2(model, context, groups)
    found = [
        [(Spot(r.data.name, r.axis, r.node.outputs[0].name, r.input), r.part.labels) for r in reads(tensors, g)] for g in groups
    ]
    try:
        ready = program(model, context, {spot for mine in found for spot, _ in mine}, scalar=scalar)
    except ModelError as error:  # too old an opset, and onnx cannot convert it
        return scores, {"groups_without_gradients": len(groups), "gradients_stop": [str(error)]}
    known = set(ready.spots)
    whole = [i for i, mine in enumerate(found) if mine and all(spot in known for spot, _ in mine)]
    totals = {i: np.zeros(len(groups[i].units)) for i in whole}
    rows: Counter[int] = Counter()
    for part in ready.sums(DRAWS):
        for i in whole:
            lost = _lost(groups[i], [(labels, part.spots[spot][0]) for spot, labels in found[i]])
            totals[i] += size(lost).sum(0)
            rows[i] += len(lost)
    for i in whole:
        scores[i] = np.sqrt(totals[i] / rows[i])
    stops = sorted({f"{stop.op}: {stop.why}" for stop in ready.stops})
    return scores, {"groups_without_gradients": len(groups) - len(whole), "gradients_stop": stops}


def _lost(group: Group, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """[rows, units]: of (labels of an axis, [rows, indices]) the sum over the indices of each unit; one row where rows differ."""
    if len({len(values) for _, values in parts}) > 1:
        parts = [(labels, values.sum(0, keepdims=True)) for labels, values in parts]
    rows = zip(*([per_unit(group, labels, row) for row in values] for labels, values in parts), strict=True)
    return np.array([np.sum(row, axis=0) for row in rows])
