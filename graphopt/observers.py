"""What calibration keeps of a tensor, and the range that each method reads from it.

`Statistics` merge exactly: extremes, integer sums of the extremes of each row, and a histogram whose bins are powers of two
wide, aligned at zero. Any split of the rows over batches, threads or machines, in any order, gives the same statistics.

Two times 4096 bins: the side with the larger magnitude fills at least 2048, so that data of one sign (after ReLU) still has 8
bins to each of 256 levels, which is what TensorRT uses for both signs together, and a window may shrink to 1/8 of the range
before a bin is as wide as a level.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from graphopt.errors import DataError, OptionError
from graphopt.kernels.reference import MIN_EXPONENT, SIDE, widen

METHODS = ("minmax", "moving-average", "percentile", "entropy", "mse")
HISTOGRAM_METHODS = frozenset(METHODS[2:])
_UNIT = 149  # float32 values are multiples of 2**-149: their sums are exact as integers of that unit
_TINY = float(np.finfo(np.float32).tiny)
_COARSE, _FINE = {1: (32, 33), 2: (9, 9)}, 2  # grid points an axis by free ends of the window, and rounds of refinement


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of one tensor over `rows` rows; `counts` is None where only extremes were kept.

    `low` and `high` are inf and -inf where there are no elements. A value x is counted in bin SIDE + k where x >= 0 and
    SIDE - 1 - k where x < 0, with k = trunc(|x| / 2**exponent).
    """

    rows: int = 0
    elements: int = 0
    low: float = math.inf
    high: float = -math.inf
    low_sum: int = 0  # of the lowest value of each row, in units of 2**-149
    high_sum: int = 0
    exponent: int = MIN_EXPONENT
    counts: np.ndarray | None = None

    def range(
        self, method: str = "minmax", *, levels: int = 256, symmetric: bool = False, percentile: float = 99.99
    ) -> tuple[np.float32, np.float32]:
        """(low, high) to quantise to `levels` levels: low <= 0 <= high, and -low == high where `symmetric`.

        minmax: the extremes. moving-average: the mean over rows of each row's extremes. percentile: that share of the
        elements lies inside, half of the rest outside on each side. entropy: least Kullback-Leibler divergence between the
        clipped and the quantised histogram (Migacz, "8-bit inference with TensorRT", GTC 2017), searched on both sides.
        mse: least mean squared error of quantising, zero point included.
        (0, 0) where there is nothing to quantise: no elements, all zero, or steps below the smallest normal float32.
        """
        if method not in METHODS:
            raise OptionError(f"unknown calibration method '{method}'; choose from {', '.join(METHODS)}")
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if method == "moving-average" and self.rows:
            low = min(0.0, float(Fraction(self.low_sum, self.rows << _UNIT)))
            high = max(0.0, float(Fraction(self.high_sum, self.rows << _UNIT)))
        elif method in HISTOGRAM_METHODS and low < high:
            low, high = _histogram_range(self, method, levels, symmetric, percentile)
        if symmetric:
            low, high = -max(-low, high), max(-low, high)
        if (high - low) / (levels - 1) < _TINY:
            return np.float32(0), np.float32(0)
        return np.float32(low), np.float32(high)


def observe(values: np.ndarray, *, rows: int = 1, histogram: bool = False, where: str = "tensor", first_row: int = 0) -> Statistics:
    """The statistics of `rows` rows, laid out one after the other in `values` (any float dtype, counted as float32).

    DataError naming `where` and the row (counted from `first_row`) that holds NaN or Inf.
    """
    with np.errstate(over="ignore"):
        table = np.ascontiguousarray(values, np.float32).reshape(rows, -1) if values.size else np.empty((0, 0), np.float32)
    if not table.size:
        return Statistics(counts=np.zeros(2 * SIDE, np.int64) if histogram else None)
    counts, exponent = None, MIN_EXPONENT
    if histogram:
        from graphopt.kernels.histogram import scan  # Numba: imported when the first histogram is wanted

        counts = np.zeros(2 * SIDE, np.int64)
        low, high, bad = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, np.int64)
        exponent = int(scan(table, counts, exponent, low, high, bad))
        broken = bad > 0
    else:
        low, high = table.min(1), table.max(1)
        broken = ~(np.isfinite(low) & np.isfinite(high))
    if broken.any():
        row = first_row + int(np.argmax(broken))
        raise DataError(f"{where}: row {row} makes NaN or Inf; remove the row, or repair the model")
    sums = [sum(int(math.ldexp(float(v), _UNIT)) for v in extremes) for extremes in (low, high)]
    return Statistics(rows, table.size, float(low.min()), float(high.max()), sums[0], sums[1], exponent, counts)


def merge(first: Statistics, second: Statistics) -> Statistics:
    """The statistics of both sets of rows together; associative and commutative, exactly."""
    for empty, other in ((first, second), (second, first)):
        if not empty.elements:
            return other
    exponent = max(first.exponent, second.exponent)
    counts = None
    if first.counts is not None and second.counts is not None:
        counts = widen(first.counts, exponent - first.exponent) + widen(second.counts, exponent - second.exponent)
    return Statistics(
        first.rows + second.rows,
        first.elements + second.elements,
        min(first.low, second.low),
        max(first.high, second.high),
        first.low_sum + second.low_sum,
        first.high_sum + second.high_sum,
        exponent,
        counts,
    )


def merge_all(shards: Iterable[Mapping[str, Statistics]]) -> dict[str, Statistics]:
    """Reduce the statistics of shards, tensor by tensor. DataError where shards observed different tensors."""

    total: dict[str, Statistics] | None = None
    for shard in shards:
        different = (shard if total is None else total).keys() ^ shard.keys()
        if different:
            raise DataError(f"statistics: tensor '{min(different)}' is in one shard only; calibrate all with the same model")
        total = dict(shard) if total is None else {name: merge(total[name], statistics) for name, statistics in shard.items()}
    return total or {}


def save(path: str | Path, statistics: Mapping[str, Statistics]) -> None:
    """Write to a .npz of plain arrays, for `load`."""
    plain = [replace(s, counts=None).__dict__ | {"counts": s.counts is not None} for s in statistics.values()]
    text = json.dumps({"version": 1, "names": list(statistics), "statistics": plain})
    counts = [s.counts for s in statistics.values() if s.counts is not None]
    with Path(path).open("wb") as file:
        np.savez_compressed(
            file, header=np.frombuffer(text.encode(), np.uint8), counts=np.array(counts, np.int64).reshape(len(counts), 2 * SIDE)
        )


def load(path: str | Path) -> dict[str, Statistics]:
    """Read what `save` wrote; DataError where the file is something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            header, counts = json.loads(file["header"].tobytes()), iter(file["counts"])
            return {
                name: Statistics(**{**fields, "counts": next(counts) if fields["counts"] else None})
                for name, fields in zip(header["names"], header["statistics"], strict=True)
            }
    except Exception as error:
        raise DataError(f"statistics '{Path(path).name}': cannot be read: {' '.join(str(error).split())}") from error


# ---- ranges from the histogram, in units of bins: a window is [-left, right)


def _histogram_range(statistics: Statistics, method: str, levels: int, symmetric: bool, percentile: float) -> tuple[float, float]:
    if statistics.counts is None:
        raise DataError(f"method '{method}' needs a histogram; calibrate with it, not with minmax")
    counts, low, high = statistics.counts.astype(np.float64), min(statistics.low, 0.0), max(statistics.high, 0.0)
    if symmetric:  # magnitudes only
        counts[SIDE:] += counts[SIDE - 1 :: -1]
        counts[:SIDE] = 0
        low, high, levels = 0.0, max(-low, high), (levels + 1) // 2
    if method == "percentile":
        left, right = _percentile(counts, percentile, sides=1 if symmetric else 2)
    else:
        occupied = np.flatnonzero(counts)
        ends = max(0, SIDE - int(occupied[0])), max(0, int(occupied[-1]) + 1 - SIDE)
        left, right = _search({"entropy": _entropy, "mse": _squared_error}[method](counts, levels), *ends, levels)
    width = math.ldexp(1.0, statistics.exponent)
    return max(low, -left * width), min(high, right * width)


def _percentile(counts: np.ndarray, percentile: float, *, sides: int) -> tuple[float, float]:
    """Interpolated linearly within bins."""
    cumulative = np.cumsum(counts)
    cut = cumulative[-1] * (1 - percentile / 100) / sides

    def position(rank: float) -> float:
        bin_ = int(np.searchsorted(cumulative, rank))
        return bin_ + 1 - SIDE - (cumulative[bin_] - rank) / counts[bin_] if counts[bin_] else float(bin_ - SIDE)

    left = -position(cut) if sides == 2 else 0.0
    return max(0.0, left), max(0.0, position(cumulative[-1] - cut))


Cost = Callable[[np.ndarray, np.ndarray], np.ndarray]  # windows (left, right) -> what is to be least


def _search(cost: Cost, left: int, right: int, levels: int) -> tuple[float, float]:
    """The cheapest window inside [-left, right): a geometric grid over the ends, refined twice around its best point.

    Windows of fewer bins than levels are not tried: the histogram cannot tell their quantised values apart.
    """
    if left + right <= levels:
        return left, right
    coarse, fine = _COARSE[1 + (min(left, right) > 0)]
    shrink = np.geomspace(1, levels / (left + right), coarse)
    axes = [np.unique(np.ceil(end * shrink)) for end in (left, right)]
    best = (float(left), float(right))
    for _ in range(1 + _FINE):
        lefts, rights = (grid.ravel() for grid in np.meshgrid(*axes))
        wide = lefts + rights >= levels
        lefts, rights = lefts[wide], rights[wide]
        costs = cost(lefts, rights)
        equal = costs <= costs.min() + 1e-9 * (1 + abs(costs.min()))  # of windows that rounding cannot tell apart, the widest
        chosen = int(np.argmax(np.where(equal, lefts + rights, -1)))
        best = (float(lefts[chosen]), float(rights[chosen]))
        axes = [_around(axis, value, fine) for axis, value in zip(axes, best, strict=True)]
    return best


def _around(axis: np.ndarray, value: float, points: int) -> np.ndarray:
    """Whole numbers between the neighbours of `value` on the axis, `value` among them."""
    place = int(np.searchsorted(axis, value))
    ends = axis[max(0, place - 1)], axis[min(len(axis) - 1, place + 1)]
    return np.unique(np.append(np.round(np.linspace(*ends, points)), value))


def _entropy(counts: np.ndarray, levels: int) -> Cost:
    """KL(P || Q): P the window with what lies outside added to its end bins, Q its mass spread evenly over the non-empty bins of
    each of `levels` segments.

    The bins at zero count as their neighbours: exact zeros (ReLU, padding) are represented without error in any window.
    """
    counts = counts.copy()
    counts[SIDE] = min(counts[SIDE], counts[SIDE + 1])
    counts[SIDE - 1] = min(counts[SIDE - 1], counts[SIDE - 2])
    mass, filled, logs = (np.append(0, np.cumsum(a)) for a in (counts, counts > 0, _xlogx(counts)))
    segments = np.arange(levels + 1)

    def cost(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        start, stop = (SIDE - left).astype(np.int64), (SIDE + right).astype(np.int64)
        edges = start[:, None] + segments * (stop - start)[:, None] // levels
        inside, number = np.diff(mass[edges]), np.diff(filled[edges])
        below, above, total = mass[start], mass[-1] - mass[stop], mass[-1]
        first, last = counts[start], counts[stop - 1]
        own = logs[stop] - logs[start] + _xlogx(first + below) - _xlogx(first) + _xlogx(last + above) - _xlogx(last)
        each = np.log(np.maximum(inside, 1e-4) / np.maximum(number, 1))
        crossed = (inside * each).sum(1) + below * each[:, 0] + above * each[:, -1]
        kept = mass[stop] - mass[start]
        divergence = (own - crossed) / max(total, 1) + np.log(np.maximum(kept, 1) / max(total, 1))
        result: np.ndarray = np.where(kept > 0, divergence, np.finfo(np.float64).max)
        return result

    return cost


def _xlogx(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = x * np.log(np.maximum(x, 1))
    return result


def _squared_error(counts: np.ndarray, levels: int) -> Cost:
    """The squared error of rounding each bin's centre to the nearest level, clipped; up to a constant that no window changes."""
    centres = np.arange(-SIDE, SIDE) + 0.5
    centres[SIDE - 1 : SIDE + 1] = 0  # mostly exact zeros
    mass, moment = (np.append(0, np.cumsum(a)) for a in (counts, counts * centres))

    def cost(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        step = ((left + right) / (levels - 1))[:, None]
        level = (np.arange(levels) - np.round(left[:, None] / step)) * step
        edges = np.zeros((len(left), levels + 1), np.int64)
        edges[:, 1:-1] = np.clip(np.ceil(level[:, 1:] - step / 2 - 0.5) + SIDE, 0, 2 * SIDE)
        edges[:, -1] = 2 * SIDE
        result: np.ndarray = (level * (level * np.diff(mass[edges]) - 2 * np.diff(moment[edges]))).sum(1)
        return result

    return cost
