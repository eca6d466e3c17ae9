"""`graphopt monitor`: whether the rows that a model meets are still like those it was calibrated on.

A sentinel keeps, of each input and of some tensors inside, how each calibration row fills the bins of the calibration histogram,
and three figures a row: mean, standard deviation, and roughness (the mean step between neighbours along the last axis, which noise
and blur change). Rows met later are compared as a set:

- PSI, the population stability index of values over bins: sum (p - q) ln(p / q);
- KS, the largest distance between the distributions of each figure over rows;
- overflow, the share of values outside the range that calibration saw.

How large PSI and KS become by chance depends on the model, the data and the number of rows: values of one row belong together. So
their limits come from the calibration rows: sets of as many rows are drawn from them, and the factor over the usual value that the
worst of all figures exceeds in 1 of 200 sets is the limit of all. Of overflow it is known without drawing: where n rows are like R
rows of calibration, k of them or more lie above all R with probability n/(R+n) (n-1)/(R+n-1) ... (k factors), whatever they hold.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from graphopt.errors import DataError, ModelError
from graphopt.observers import Statistics
from graphopt.report import Row, Versioned

BINS = 16  # within the range; one more on each side
FIGURES = ("mean", "std", "roughness")
OVERFLOW = 0.001  # share of values outside the calibrated range from which there is an alarm
CHANCE = 0.005  # of a false alarm, of all figures together
MIN_ROWS = 8
_RESAMPLES = 1000
_VERSION = 1


class TensorDrift(Row):
    """One tensor; limits are those for this number of rows."""

    name: str
    psi: float
    psi_limit: float
    ks: dict[str, float] = Field(description="by figure of a row: mean, std, roughness")
    ks_limits: dict[str, float]
    overflow: float = Field(description="share of values outside the range of calibration")
    alarms: list[str]


class DriftReport(Versioned):
    """One set of rows against calibration."""

    rows: int
    calibration_rows: int
    drifted: bool
    tensors: list[TensorDrift]
    advice: str


@dataclass(frozen=True, eq=False)
class Watched:
    """What is kept of one tensor: bin edges, and of each row the counts [rows, BINS + 2] and figures [rows, 3] (NaN: none)."""

    edges: np.ndarray
    counts: np.ndarray
    figures: np.ndarray


@dataclass(frozen=True)
class Sentinel:
    """Made by `make`; compares rows with those of calibration. The same rows always give the same report."""

    tensors: Mapping[str, Watched]
    inputs: tuple[str, ...]
    chance: float = CHANCE
    _limits: dict[int, tuple[dict[str, np.ndarray], float]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rows(self) -> int:
        """Of calibration."""
        return len(next(iter(self.tensors.values())).counts)

    def check(self, values: Mapping[str, np.ndarray]) -> DriftReport:
        """Compare a set of rows, arrays by tensor name, rows first; tensors that are not given are left out.

        DataError where a tensor is not watched, or there are under 8 rows: so few say nothing.
        """
        unknown = sorted(set(values) - set(self.tensors))
        if unknown:
            raise DataError(f"monitor: '{unknown[0]}' is not watched; watched are {', '.join(self.tensors)}")
        return self._report({name: _summary(np.asarray(v), self.tensors[name].edges) for name, v in values.items()})

    def check_rows(self, model: str | Path, data: Any, *, window: int | None = None) -> Iterator[DriftReport]:
        """Run the model on rows and compare all watched tensors: each `window` rows by themselves, or all together."""
        held: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        count = 0
        for batch in _observed(model, data, tuple(self.tensors)):
            size = len(next(iter(batch.values())))
            for name, values in batch.items():
                held.setdefault(name, []).append(_summary(values, self.tensors[name].edges))
            count += size
            if window is not None and count >= window:
                yield self._report(_joined(held))
                held, count = {}, 0
        if count >= MIN_ROWS or window is None:
            yield self._report(_joined(held))

    def _report(self, found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> DriftReport:
        if not found:
            raise DataError("monitor: no tensor that is watched was given")
        rows = len(next(iter(found.values()))[0])
        if rows < MIN_ROWS:
            raise DataError(f"monitor: {rows} rows; {MIN_ROWS} or more are needed to say anything")
        usual, factor = self._limit(rows)
        tensors = []
        for name, (counts, figures) in found.items():
            watched = self.tensors[name]
            distances = _distances(watched, watched.counts.sum(0), counts.sum(0), figures)
            limits = factor * usual[name]
            unlikely = 2 * len(found) * _beyond(counts, self.rows) < self.chance
            tensors.append(_drift(name, distances, limits, _overflow(counts), unlikely))
        drifted = any(t.alarms for t in tensors)
        overflowing = any("overflow" in t.alarms for t in tensors)
        advice = "nothing to do: these rows are like those of calibration"
        if drifted:
            advice = "look at these rows; if they are what the model is to run on, calibrate again with some of them"
        if overflowing:
            advice += "; values are cut off at the calibrated range"
        return DriftReport(rows=rows, calibration_rows=self.rows, drifted=drifted, tensors=tensors, advice=advice)

    def _limit(self, rows: int) -> tuple[dict[str, np.ndarray], float]:
        """(usual distances by tensor, factor that all of them stay under) for sets of so many rows like those of calibration."""
        if rows in self._limits:
            return self._limits[rows]
        random = np.random.default_rng(0)
        drawn: dict[str, np.ndarray] = {n: np.empty((_RESAMPLES, 1 + len(FIGURES))) for n in self.tensors}
        for k in range(_RESAMPLES):
            reference, mine = random.integers(0, self.rows, self.rows), random.integers(0, self.rows, rows)
            for name, w in self.tensors.items():
                sample = Watched(w.edges, w.counts, w.figures[reference])
                drawn[name][k] = _distances(sample, w.counts[reference].sum(0), w.counts[mine].sum(0), w.figures[mine])
        usual = {name: np.maximum(np.median(d, 0), 1e-6) for name, d in drawn.items()}
        worst = np.max([(drawn[name] / usual[name]).max(1) for name in drawn], axis=0)
        self._limits[rows] = usual, float(np.quantile(worst, 1 - self.chance))
        return self._limits[rows]

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write to a .npz of plain arrays, atomically."""
        from graphopt import emit

        target = Path(path)
        emit.check_target(target, overwrite=overwrite)
        header = {"version": _VERSION, "names": list(self.tensors), "inputs": list(self.inputs), "chance": self.chance}
        arrays = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
        for i, w in enumerate(self.tensors.values()):
            arrays |= {f"edges{i}": w.edges, f"counts{i}": w.counts, f"figures{i}": w.figures}
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
        emit.write_bytes(target, content.getvalue())

    @staticmethod
    def load(path: str | Path) -> Sentinel:
        """Read what `save` wrote; DataError where the file is something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(file["header"].tobytes())
                parts = [Watched(*(file[f"{k}{i}"] for k in ("edges", "counts", "figures"))) for i in range(len(header["names"]))]
            return Sentinel(dict(zip(header["names"], parts, strict=True)), tuple(header["inputs"]), header["chance"])
        except Exception as error:  # numpy, zipfile and json raise many kinds
            raise DataError(f"sentinel '{Path(path).name}': cannot be read: {' '.join(str(error).split())}") from error


def make(model: str | Path, data: Any, *, watch: Sequence[str] | None = None, chance: float = CHANCE) -> Sentinel:
    """A sentinel of a model from calibration rows. watch: tensors inside; by default three between first layer and output.

    Raises ModelError for a tensor that is not there or not float, DataError for under 32 rows.
    """
    from graphopt.calibrate import calibrate
    from graphopt.data import open_dataset
    from graphopt.feeds import input_specs
    from graphopt.model import load

    loaded = load(model)
    specs = input_specs(loaded.interface())
    dataset = open_dataset(data, specs)
    inputs = tuple(s.name for s in specs if s.dtype.kind == "f")
    chosen = tuple(dict.fromkeys([*inputs, *(_between(loaded) if watch is None else watch)]))
    if not chosen:
        raise ModelError("monitor: the model has no float input, and no tensor inside is named to be watched")
    statistics = calibrate(Path(model), dataset, chosen, method="percentile", drop_nonfinite=watch is None)
    edges = {name: _edges(s) for name, s in statistics.items()}
    kept: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for batch in _observed(model, dataset, tuple(edges)):
        for name, values in batch.items():
            kept.setdefault(name, []).append(_summary(values, edges[name]))
    tensors = {name: Watched(edges[name], *parts) for name, parts in _joined(kept).items()}
    sentinel = Sentinel(tensors, inputs, chance)
    if sentinel.rows < 32:
        raise DataError(f"monitor: {sentinel.rows} calibration rows; 32 or more are needed to know what is usual")
    return sentinel


# ---- what is kept of rows


def _between(model: Any) -> list[str]:
    """Outputs of the first, the middle and the last convolution or matrix product of the main graph."""
    heavy = [n.outputs[0].name for n in model.graph.nodes if n.op in ("Conv", "Gemm", "MatMul") and not n.domain]
    return [heavy[i] for i in sorted({0, len(heavy) // 2, len(heavy) - 1})] if heavy else []


def _observed(model: str | Path, data: Any, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """The tensors of each batch, cut to its rows."""
    from graphopt.calibrate import _runner
    from graphopt.data import open_dataset
    from graphopt.feeds import fixed_batch, input_specs, padded, row_count
    from graphopt.model import load
    from graphopt.runtime import run

    specs = input_specs(load(model).interface())
    dataset = open_dataset(data, specs)
    fed = {s.name for s in specs}
    computed = [n for n in names if n not in fed]
    session = _runner(Path(model), computed)
    fixed = fixed_batch(specs)
    for feed in dataset.batches(_BATCH):
        rows = row_count(feed) or 1
        given = padded(feed, fixed) if fixed else feed
        found = dict(zip(computed, run(session, given, computed), strict=True)) if computed else {}
        values = {n: np.asarray(found[n] if n in found else given[n]) for n in names}
        ran = row_count(given) or 1
        yield {n: v.reshape(ran, -1, v.shape[-1])[:rows] if v.ndim > 1 else v.reshape(ran, 1, -1)[:rows] for n, v in values.items()}


_BATCH = 16


def _edges(statistics: Statistics) -> np.ndarray:
    """BINS + 1 edges from the lowest to the highest value, as many values between any two as can be (strictly increasing)."""
    from graphopt.kernels.reference import SIDE

    low, high = float(statistics.low), float(statistics.high)
    counts = statistics.counts
    assert counts is not None  # calibrated with a histogram
    cumulative = np.cumsum(counts) / max(int(counts.sum()), 1)
    bins = np.searchsorted(cumulative, np.arange(1, BINS) / BINS)
    inner = (bins + 1.0 - SIDE) * 2.0**statistics.exponent
    edges = np.unique(np.clip(np.concatenate([[low], inner, [high]]), low, high))
    while len(edges) < BINS + 1:  # few distinct values: the widest gap is split
        gap = int(np.argmax(np.diff(edges))) if len(edges) > 1 else 0
        middle = (edges[gap] + edges[gap + 1]) / 2 if len(edges) > 1 else edges[0] + 1.0
        edges = np.unique(np.append(edges, middle))
    return np.asarray(edges, np.float64)


def _summary(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(counts [rows, BINS + 2], figures [rows, 3]) of values [rows, ...]. DataError for NaN and Inf."""
    rows = len(values)
    table = values.reshape(rows, -1).astype(np.float64)
    if not np.isfinite(table).all():
        raise DataError(f"monitor: row {int(np.argwhere(~np.isfinite(table))[0][0])} holds NaN or Inf")
    place = np.where(table > edges[-1], BINS + 1, np.clip(np.searchsorted(edges, table, side="right"), 0, BINS))
    counts = np.stack([np.bincount(p, minlength=BINS + 2) for p in place])
    last = values.shape[-1] if values.ndim > 1 else 1
    steps = np.abs(np.diff(table.reshape(rows, -1, last), axis=-1)).reshape(rows, -1) if last > 1 else np.full((rows, 1), np.nan)
    return counts, np.stack([table.mean(1), table.std(1), steps.mean(1)], 1)


def _joined(held: Mapping[str, list[tuple[np.ndarray, np.ndarray]]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {n: (np.concatenate([c for c, _ in parts]), np.concatenate([f for _, f in parts])) for n, parts in held.items()}


# ---- distances


def _distances(reference: Watched, first: np.ndarray, second: np.ndarray, figures: np.ndarray) -> np.ndarray:
    """[PSI, KS of each figure]; 0 for a figure that the tensor does not have."""
    p, q = (((c + 0.5) / (c.sum() + 0.5 * len(c))) for c in (first.astype(np.float64), second.astype(np.float64)))
    psi = float(((p - q) * np.log(p / q)).sum())
    return np.array([psi, *(_ks(reference.figures[:, i], figures[:, i]) for i in range(len(FIGURES)))])


def _ks(first: np.ndarray, second: np.ndarray) -> float:
    """The largest distance between two empirical distributions."""
    if np.isnan(first).any() or np.isnan(second).any():
        return 0.0
    a, b = np.sort(first), np.sort(second)
    points = np.concatenate([a, b])
    return float(np.max(np.abs(np.searchsorted(a, points, "right") / len(a) - np.searchsorted(b, points, "right") / len(b))))


def _overflow(counts: np.ndarray) -> float:
    return float((counts[:, 0].sum() + counts[:, -1].sum()) / max(int(counts.sum()), 1))


def _beyond(counts: np.ndarray, calibration: int) -> float:
    """The probability that as many rows reach beyond one end of the range if they are like the calibration rows."""
    rows = len(counts)
    reaching = int(max((counts[:, 0] > 0).sum(), (counts[:, -1] > 0).sum()))
    return float(np.prod([(rows - i) / (calibration + rows - i) for i in range(reaching)]))


def _drift(name: str, distances: np.ndarray, limits: np.ndarray, overflow: float, unlikely: bool) -> TensorDrift:
    labels = ("psi", *(f"ks {f}" for f in FIGURES))
    alarms = [label for label, d, limit in zip(labels, distances, limits, strict=True) if d > limit]
    alarms += ["overflow"] * (overflow > OVERFLOW and unlikely)
    return TensorDrift(
        name=name,
        psi=float(distances[0]),
        psi_limit=float(limits[0]),
        ks={f: float(d) for f, d in zip(FIGURES, distances[1:], strict=True)},
        ks_limits={f: min(1.0, float(v)) for f, v in zip(FIGURES, limits[1:], strict=True)},
        overflow=overflow,
        alarms=alarms,
    )
