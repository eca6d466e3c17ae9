"""The last step of a repair: scale and shift of every channel, by damped Gauss-Newton on the model's own outputs.

Layer by layer, least squares aims at what each layer computed; what it leaves adds up at the outputs. How the outputs move with a
factor and an addend on each output channel of each linear layer follows from one backward pass a row and projection
(`graphopt.gradients`): a linear system, solved once (Levenberg 1944, Marquardt 1963). No labels, no learning rate, no epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.agreement import error, is_held, outputs_of, spreads, with_outputs
from graphopt.baseline import Baseline
from graphopt.context import Context
from graphopt.cost import costs
from graphopt.data import Dataset
from graphopt.edit import peek
from graphopt.errors import ModelError
from graphopt.gradients import Program, Spot, Sums, View, heads, program, same
from graphopt.layers import Layer, find_layers
from graphopt.model import Model, from_proto
from graphopt.runtime import run, session
from graphopt.shapes import shapes
from graphopt.walk import mirrorable, mirrored

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
DRAWS = 16  # projections of the outputs a row, at most
_EXACT = 1e-8  # relative error at the outputs below which nothing is left to win
_NUMBERS = 128 << 20  # of the Jacobian, which is held in memory
_MACS = 3e12  # of all passes; beyond, models are too large to be tuned in a minute


@dataclass(frozen=True)
class Equations:
    """jacobian @ change = wanted, an equation a row and projection; a change is (factor - 1, addend) of the layers' channels."""

    layers: tuple[Layer, ...]
    jacobian: np.ndarray  # float32 [equations, 2 * channels]
    wanted: np.ndarray  # float64 [equations]
    held: np.ndarray  # bool [equations]


@dataclass(frozen=True)
class Tuned:
    """New values of weights and biases, the strength of the damping, errors at the outputs on held-out rows before and after.

    Nothing is new where no strength helped, or the model could not be tuned; `why` says so.
    """

    weights: dict[str, np.ndarray]
    strength: float | None
    before: float
    after: float
    why: str = ""

    def facts(self) -> dict[str, object]:
        """For reports."""
        return {"error_after": self.after, "tuning": {"strength": self.strength, "error_before": self.before, "why": self.why}}


def tune(model: Model, baseline: Baseline, context: Context) -> Tuned:
    """What brings the outputs nearest to the baseline's on rows that the fit has not seen; the model is not touched."""
    data = context.calibration
    assert data is not None
    truth = baseline.held(data)
    before = error(truth, outputs_of(model, truth))
    found = equations(model, baseline, context) if before > _EXACT else "the outputs are those of the original"
    if isinstance(found, str):
        return Tuned({}, None, before, before, found)
    fitted = Equations(found.layers, found.jacobian[~found.held], found.wanted[~found.held], found.held[~found.held])
    changes = solved(fitted, STRENGTHS)
    after, best, weights = before, None, dict[str, np.ndarray]()
    for strength, change in zip(STRENGTHS, changes, strict=True):
        found_weights = changed(model, found.layers, change)
        copy = from_proto(model.proto())
        put(copy, found_weights)
        wrong = error(truth, outputs_of(copy, truth))
        if wrong < after:
            after, best, weights = wrong, strength, found_weights
    return Tuned(weights, best, before, after, "" if best is not None else "no strength brought the outputs nearer")


def retune(model: Model, baseline: Baseline, context: Context, tuned: Tuned) -> None:
    """Change the model by the strength that `tune` has found, fitted on all rows."""
    found = equations(model, baseline, context) if tuned.strength is not None else ""
    if tuned.strength is not None and not isinstance(found, str):
        put(model, changed(model, found.layers, solved(found, (tuned.strength,))[0]))


def put(model: Model, weights: dict[str, np.ndarray]) -> None:
    """Change these constants."""
    constants = {c.name: c for c in model.constants()}
    for name, values in weights.items():
        constants[name].values = values


# ---- the equations


def equations(model: Model, baseline: Baseline, context: Context) -> Equations | str:
    """Of the calibration rows, for images also mirrored; else why not: gradients are not known, or would take too long."""
    data = context.calibration
    assert data is not None
    layers = tuple(layer for layer in find_layers(model)[0] if layer.bias is not None)
    views: list[View] = [same, lambda feed: mirrored(data, feed)] if mirrorable(data) else [same]
    draws = _draws(model, layers, (data.rows or 0) * len(views))
    if not draws:
        return "the model is too large for its gradients to be measured in a minute"
    spots = [Spot(layer.y, layer.channel_axis) for layer in layers]
    try:
        ready = program(model, context, spots)
    except ModelError as reason:
        return str(reason)
    layers = tuple(layer for layer, spot in zip(layers, spots, strict=True) if spot in ready.spots)
    if not layers:
        return "; ".join(sorted({f"{s.op}: {s.why}" for s in ready.stops})) or "no layer has a bias"
    return _gathered(ready, model, baseline, data, layers, draws, views)


def _draws(model: Model, layers: Sequence[Layer], rows: int) -> int:
    """How many projections of each row fit the budgets."""
    channels = max(sum(_channels(model, layers)), 1)
    passes = 3.0 * max(costs(model).counted_macs, 1) * max(rows, 1)
    return int(min(DRAWS, _MACS / passes, _NUMBERS / (2 * channels * max(rows, 1))))


def _channels(model: Model, layers: Sequence[Layer]) -> list[int]:
    constants = {c.name: c for c in model.constants()}
    return [int(np.prod(constants[layer.bias or ""].shape)) for layer in layers]


def _gathered(
    ready: Program, model: Model, baseline: Baseline, data: Dataset, layers: tuple[Layer, ...], draws: int, views: Sequence[View]
) -> Equations | str:
    scale = {score.tensor: 1 / max(spread, 1e-6) for score, spread in spreads(baseline.held(data))}
    names = [head.tensor for head in heads(model, shapes(model))]
    now, was = (session(with_outputs(m, names)) for m in (model, baseline.model))
    jacobian, wanted, held = [], [], []
    for view in views:
        first, gaps = -1, dict[str, np.ndarray]()
        for part in ready.sums(draws, scale, view):
            if part.first != first:
                first = part.first
                old, new = (dict(zip(names, run(s, part.feed, names), strict=True)) for s in (was, now))
                gaps = {n: old[n].astype(np.float64) - new[n] for n in names}
            columns = [part.spots[Spot(layer.y, layer.channel_axis)] for layer in layers]
            gap = _projected(part, gaps)
            if gap is None or any(c.shape[1] != part.rows for c in columns):
                return "rows cannot be told apart in its tensors"
            jacobian.append(np.concatenate([c[i] for c in columns for i in (0, 1)], 1).astype(np.float32))
            wanted.append(gap)
            held.append(is_held(first + np.arange(part.rows)))
    return Equations(layers, np.concatenate(jacobian), np.concatenate(wanted), np.concatenate(held))


def _projected(part: Sums, gaps: dict[str, np.ndarray]) -> np.ndarray | None:
    """What each row's projection should move by; None where rows cannot be told apart."""
    total = np.zeros(part.rows)
    for name, signs in part.projections.items():
        product = signs * gaps[name]
        ran = len(next(iter(part.feed.values())))
        if product.shape[0] % ran:
            return None
        total += product.reshape(ran, -1).sum(1)[: part.rows]
    return total


# ---- the solution


def solved(found: Equations, strengths: Sequence[float]) -> list[np.ndarray]:
    """Changes that least squares gives for each strength; large ones are penalised, the more the more the outputs feel them."""
    a, b = found.jacobian, found.wanted
    felt = np.einsum("ij,ij->j", a, a, dtype=np.float64)
    weight = 0.5 * felt + 0.5 * felt.mean() + 1e-30  # of the penalty; half by itself, half alike, so that dead channels stay put
    scaled = (a / np.sqrt(weight)).astype(np.float32)
    wide = scaled.shape[1] > scaled.shape[0]
    square = (scaled @ scaled.T if wide else scaled.T @ scaled).astype(np.float64)
    right = b if wide else scaled.T.astype(np.float64) @ b
    values, vectors = np.linalg.eigh(square)
    turned = vectors.T @ right
    changes = []
    for strength in strengths:
        found_ = vectors @ (turned / (np.maximum(values, 0) + strength))
        changes.append((scaled.T.astype(np.float64) @ found_ if wide else found_) / np.sqrt(weight))
    return changes


def changed(model: Model, layers: Sequence[Layer], change: np.ndarray) -> dict[str, np.ndarray]:
    """Weights and biases with the change applied, by name."""
    constants = {c.name: peek(c) for c in model.constants()}
    found, at = {}, 0
    for layer, size in zip(layers, _channels(model, layers), strict=True):
        factor, addend = 1 + change[at : at + size], change[at + size : at + 2 * size]
        at += 2 * size
        weight, bias = constants[layer.weight], constants[layer.bias or ""]
        along = [1] * weight.ndim
        along[layer.out_axis] = size
        found[layer.weight] = (weight * factor.reshape(along)).astype(weight.dtype)
        found[layer.bias or ""] = (bias * factor.reshape(bias.shape) + addend.reshape(bias.shape)).astype(bias.dtype)
    return found
