"""Moments of gradients of a model's outputs by channel, over calibration rows (`graphopt.gradients` makes them)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from graphopt.context import Context
from graphopt.cost import Axis
from graphopt.gradients import Scalar, Spot, program
from graphopt.model import Model


@dataclass(frozen=True, eq=False)
class Moments:
    """Of one tensor's channels, over rows and draws; y: its values, g: their gradient. Float64 arrays of one number a channel.

    `square`: mean of g^2 over rows, draws and positions (of which a row has `positions`). `mask_square`: mean of (sum over
    positions of y g)^2, the Fisher information of a mask that multiplies the channel. `mask_magnitude`: mean of |sum over positions
    of y g|.
    """

    square: np.ndarray
    mask_square: np.ndarray
    mask_magnitude: np.ndarray
    positions: float
    rows: int


def moments(
    model: Model,
    context: Context,
    tensors: Collection[Axis],
    *,
    draws: int = 2,
    seed: int = 0,
    scalar: Scalar = "projections",
) -> dict[Axis, Moments]:
    """Moments of the gradient of the model's outputs (`program` says of which scalar) for each (tensor, axis) over the calibration
    rows; (tensor, axis) of which no gradient is known are missing. The same for the same seed, whatever the batches.
    """
    spots = {Spot(*place): place for place in tensors}
    ready = program(model, context, spots, scalar=scalar, seed=seed)
    totals: dict[Spot, np.ndarray] = {}
    counts: Counter[Spot] = Counter()
    for part in ready.sums(draws):
        for spot, (mask, _, square, positions) in part.spots.items():
            parts = np.stack([square.sum(0), positions.sum(0), np.square(mask).sum(0), np.abs(mask).sum(0)])
            totals[spot] = totals[spot] + parts if spot in totals else parts
            counts[spot] += len(mask)
    result = {}
    for spot, (square, positions, mask_square, mask_magnitude) in totals.items():
        n = counts[spot]
        result[spots[spot]] = Moments(square / positions, mask_square / n, mask_magnitude / n, float(positions[0]) / n, n)
    return result
