"""`sparsify` by measured criteria: layer after layer on what the layers before it, already sparse, give, towards the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graphopt.agreement import answers
from graphopt.allocate import slopes
from graphopt.baseline import snapshot
from graphopt.context import Context
from graphopt.edit import peek
from graphopt.errors import PassError
from graphopt.gram import Fit, Moments
from graphopt.layers import find_layers, from_matrix, to_matrix
from graphopt.model import Model
from graphopt.readers import Reader, input_moments
from graphopt.recovery import Fitter, apply, repair, targets
from graphopt.sensitivity import Trial, bias_name
from graphopt.sparse_layers import Layer as Sparsified
from graphopt.sparsity import Criterion, Pattern, Task, sparse
from graphopt.walk import mirrorable

DAMPINGS = (1e-3, 1e-2, 1e-1)
SHARES = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TRIAL_ROWS = 64


@dataclass(frozen=True)
class Work:
    """What is done to which model; `measured`: whether the criterion wants statistics."""

    model: Model
    context: Context
    judge: Criterion
    measured: bool
    pattern: Pattern


def write_fits(work: Work, tasks: Mapping[str, Task]) -> dict[str, dict[str, float]]:
    """Make the layers of these tasks (by node) sparse, one after the other; errors of each on held rows, before and after.

    They are squared, and relative to the variance of what the layer should give. Held-out rows choose the damping of each layer and
    then take part. DataError where an activation is not finite.
    """
    model, context = work.model, work.context
    baseline = context.baseline or snapshot(model)
    found = [t for t in targets(model, baseline, tasks) if t.now.node in tasks]
    fitters = {node: fitter(work.judge, task) for node, task in tasks.items()}
    mirror = mirrorable(context.calibration)
    patch = repair(model, baseline, context, found, "sequential", mirrored=mirror, fitters=fitters)
    apply(model, patch)
    return {layer.layer: {"error_dense": layer.before, "error_sparse": layer.after} for layer in patch.layers}


def fitter(judge: Criterion, task: Task) -> Fitter:
    """How repair makes the layer sparse: by the damping that is best on held rows, then with them."""

    def fit(fitted: Moments, held: Moments, old: Fit) -> tuple[Fit, str, float, float]:
        made = {damping: _judged(judge, replace(task, damping=damping), fitted, old) for damping in DAMPINGS}
        errors = {damping: held.error(found) for damping, found in made.items()}
        best = min(DAMPINGS, key=lambda d: errors[d])
        whole = _judged(judge, replace(task, damping=best), fitted.joined(held), old)
        return whole, f"damping {best:g}", held.error(old), errors[best]

    return fit


def _judged(judge: Criterion, task: Task, moments: Moments, old: Fit) -> Fit:
    """The criterion's weights, with the bias that makes the mean of the output right."""
    statistics = {"mean": moments.mean_x[0], "covariance": moments.cov[0], "cross": moments.cross[0]}
    weight = np.ascontiguousarray(old[0][0].T, dtype=np.float32)
    values = sparse(weight, judge, replace(task, statistics=statistics))
    return moments.centred((values.T[None].astype(np.float64), old[1]))


# ---- how much of each layer


def sensitive_ratios(work: Work, layers: Sequence[Sparsified], ratio: float) -> list[float]:
    """The share that each layer loses, so that `ratio` of all weights go where the outputs miss them least.

    Each layer alone is made sparse by a few ratios, on the inputs of the original, and the error at the outputs measured on some
    rows; weights are then taken along the lower convex hulls of these curves, the flattest piece first.
    """
    rows = work.context.calibration
    if rows is None:
        raise PassError("sparsify", "scope=sensitivity needs calibration data: give --calib PATH (or calibration=...)")
    readers = _readers(work, [layer.name for layer in layers])
    trial = Trial(work.model, list(readers.values()), answers(work.model, rows, limit=TRIAL_ROWS))
    blocks = [layer.matrix().size // (work.pattern.rows * work.pattern.columns) for layer in layers]
    worth = []
    for number, (layer, size) in enumerate(zip(layers, blocks, strict=True)):
        errors: list[float] = []
        for share in SHARES:
            changed = _alone(work, readers[layer.name], trial, Task(layer.name, work.pattern, share))
            errors.append(max(trial.error(changed), *errors, 0.0))
        worth.append(slopes([round(s * size) for s in SHARES], errors, size))
        work.context.progress("measure layers", number + 1, len(layers))
    owner = np.repeat(np.arange(len(blocks)), blocks)[np.argsort(np.concatenate(worth), kind="stable")]
    gone = np.bincount(owner[: round(ratio * sum(blocks))], minlength=len(blocks))
    return [float(g / size) for g, size in zip(gone, blocks, strict=True)]


def _readers(work: Work, names: Sequence[str]) -> dict[str, Reader]:
    wanted = [layer for layer in find_layers(work.model)[0] if layer.node in set(names)]
    moments = input_moments(work.model, work.context, wanted)
    weights = {c.name: c for c in work.model.constants()}
    none = np.zeros(0, np.int64)
    return {
        layer.node: Reader(layer, none, 1, to_matrix(layer, peek(weights[layer.weight]))[0], moments[layer.node])
        for layer in wanted
        if layer.node in moments
    }


def _alone(work: Work, reader: Reader, trial: Trial, task: Task) -> dict[str, np.ndarray]:
    """The layer's weight and bias, made sparse on what it reads in the original."""
    layer, moments = reader.layer, reader.moments
    if bias_name(reader) is None:
        moments = moments.about_zero()
    dense = reader.matrix.astype(np.float64)
    statistics = {"mean": moments.mean_x[0], "covariance": moments.cov[0], "cross": moments.cov[0] @ dense}
    weight = np.ascontiguousarray(reader.matrix.T, dtype=np.float32)
    values = sparse(weight, work.judge, replace(task, statistics=statistics if work.measured else {})).T
    found = {layer.weight: from_matrix(layer, values[None], trial.value(layer.weight))}
    name = bias_name(reader)
    if name is not None and work.measured:
        old = trial.value(name)
        found[name] = (old + (moments.mean_x[0] @ (dense - values)).reshape(old.shape)).astype(np.float32)
    return found
