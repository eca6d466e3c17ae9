"""Calibration histograms as a report shows them: a few bins, the range that was chosen, and what share of values it cuts off."""

from __future__ import annotations

import math

import numpy as np

from graphopt.kernels.reference import SIDE
from graphopt.observers import Statistics

BINS = 48


def summary(found: Statistics, low: float, high: float) -> dict[str, object] | None:
    """The fields of a report's RangeRow but the tensor's name; None where no histogram was kept.

    Counts are exact to a bin of the calibration's histogram, which is a 2048th of the largest magnitude or less.
    """
    if found.counts is None or not found.elements:
        return None
    edges = np.arange(-SIDE, SIDE + 1) * math.ldexp(1.0, found.exponent)
    mass = np.append(0, np.cumsum(found.counts))
    total = int(mass[-1])
    inner = np.interp(np.linspace(found.low, found.high, BINS + 1)[1:-1], edges, mass)
    counts = np.diff(np.rint([0, *inner, total]).astype(np.int64))
    below = float(np.interp(low, edges, mass)) if low > found.low else 0.0
    above = total - float(np.interp(high, edges, mass)) if high < found.high else 0.0
    return {
        "low": float(low),
        "high": float(high),
        "seen_low": found.low,
        "seen_high": found.high,
        "saturated": max(0.0, below + above) / total,
        "counts": counts.tolist(),
    }
