"""What reads the units of a group, with the covariance of its inputs: the ground on which data-driven criteria stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.context import Context
from graphopt.dims import Group, couple
from graphopt.edit import peek
from graphopt.errors import PassError
from graphopt.gram import Gram, Moments, inputs_at, spread
from graphopt.layers import Layer, find_layers, to_matrix
from graphopt.model import Model
from graphopt.sampling import Batch, chosen_rows, fill
from graphopt.shapes import shapes
from graphopt.walk import Store, Walk, finite


@dataclass(frozen=True)
class Reader:
    """A layer that mixes units of groups: `labels` of its input channels, each of `each` features; its matrix and moments."""

    layer: Layer
    labels: np.ndarray
    each: int
    matrix: np.ndarray  # (features, outputs)
    moments: Moments  # of inputs alone

    def features(self, units: np.ndarray) -> np.ndarray:
        """(units, features a unit): the features that hold each unit, -1 where it has fewer than others."""
        order = np.argsort(self.labels, kind="stable")
        sorted_ = self.labels[order]
        first, last = np.searchsorted(sorted_, units, "left"), np.searchsorted(sorted_, units, "right")
        width = int((last - first).max(initial=0))
        found = np.full((len(units), width * self.each), -1)
        for i, (a, b) in enumerate(zip(first, last, strict=True)):
            mine = (order[a:b, None] * self.each + np.arange(self.each)).ravel()
            found[i, : mine.size] = mine
        return found

    @property
    def spread(self) -> float:
        """The variance of all outputs together."""
        return float((self.matrix * (self.moments.cov[0] @ self.matrix)).sum())


def readers(model: Model, context: Context) -> list[Reader]:
    """The layers that read removable units, measured on the calibration rows, once a state of the model. PassError without data."""
    if context.calibration is None:
        raise PassError("prune", "this criterion needs calibration data: give --calib PATH (or calibration=...)")
    return context.cached("readers", lambda: _readers(model, context))


def _readers(model: Model, context: Context) -> list[Reader]:
    dims = context.get(couple, model)
    wanted = []
    for layer in find_layers(model)[0]:
        axes = dims.labels(layer.weight)
        if layer.groups == 1 and axes is not None and axes[layer.in_axis].any():
            wanted.append((layer, axes[layer.in_axis]))
    measured = input_moments(model, context, [layer for layer, _ in wanted])
    result = []
    weights = {c.name: c for c in model.constants()}
    for layer, labels in wanted:
        if layer.node in measured:
            matrix = to_matrix(layer, peek(weights[layer.weight]))[0].astype(np.float64)
            result.append(Reader(layer, labels, matrix.shape[0] // len(labels), matrix, measured[layer.node]))
    return result


def of_group(found: Sequence[Reader], group: Group) -> list[Reader]:
    """Those that read units of the group."""
    return [r for r in found if np.isin(r.labels, group.units).any()]


def input_moments(model: Model, context: Context, layers: Sequence[Layer]) -> dict[str, Moments]:
    """Moments of the inputs of each layer, by node; DataError where an activation is not finite."""
    assert context.calibration is not None
    stages = list(dict.fromkeys(layer.x for layer in layers))
    by_input = {x: [layer for layer in layers if layer.x == x] for x in stages}
    found: dict[str, Moments] = {}
    with Store() as store:
        batches = fill(context.calibration, [store])
        walk = Walk(model, context.get(shapes, model).dtypes, [[x] for x in stages], store)
        total = sum(b.rows for b in batches)
        for stage, name in enumerate(stages):
            grams = {key: Gram() for key in {(layer.window, layer.channel_axis) for layer in by_input[name]}}
            for number, batch in enumerate(batches):
                value = finite(walk.run(stage, number))[name]
                for key, gram in grams.items():
                    layer = next(lay for lay in by_input[name] if (lay.window, lay.channel_axis) == key)
                    _add(gram, layer, value, batch, total, stage * 10007 + number)
            for layer in by_input[name]:
                gram = grams[layer.window, layer.channel_axis]
                if gram.count:
                    found[layer.node] = gram.moments()
            context.progress("measure inputs", stage + 1, len(stages))
    return found


def _add(gram: Gram, layer: Layer, x: np.ndarray, batch: Batch, total: int, seed: int) -> None:
    window = layer.window
    features = x.shape[layer.channel_axis] * (int(np.prod(window.kernel)) if window else 1)
    if window is None:
        shape: tuple[int, ...] = x.shape
    else:
        padding = window.padding(x.shape[2:])
        sizes = [
            (n + a + b - e) // s + 1 for n, (a, b), e, s in zip(x.shape[2:], padding, window.extents, window.strides, strict=True)
        ]
        shape = (x.shape[0], 1, *sizes)
    at, _ = chosen_rows(layer, shape, batch, total, features, seed)
    found = inputs_at(layer, x, spread(layer, shape), at)
    gram.add(found, np.zeros((len(at), 1, 1), np.float32))
