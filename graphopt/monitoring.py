"""`graphopt monitor`: whether the rows that a model meets are still like those it was calibrated on.

A sentinel keeps, of each input and of some tensors inside, how each calibration row fills the bins of the calibration histogram,
and three figures a row: mean, standard deviation, and roughness (the mean step between neighbours along the last axis, which noise
and blur change). Rows met later are compared as a set:

- PSI, the population stability index of values over bins: sum (p - q) ln(p / q);
- KS, the largest distance between the distributions of each figure over rows;
- overflow, the share of values outside the range that calibration saw.

How large PSI and KS become by chance depends on the model, the data and the numbers of rows: values of one row belong together. So
their limits come from a permutation test (Good, "Permutation, Parametric, and Bootstrap Tests of Hypotheses", 2005): the rows at
hand and those of calibration are put together and dealt out anew many times. If both are alike, every deal is as likely as the real
one. The factor over the usual value that the worst of all PSI exceeds by chance is the limit of all PSI, and the same of KS by
itself, since the tails of PSI are much longer. Of overflow it is known without drawing: where n rows are like R of calibration, k
of them or more lie above all R with probability n/(R+n) (n-1)/(R+n-1) ... (k factors), whatever they hold.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
_DEALS = 2000
_HELD = 1 << 22  # rows of all deals that are looked at together: bounds memory
_KINDS = (slice(0, 1), slice(1, None))  # of distances: PSI, KS; each kind has its share of the chance, and so has overflow
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
        share = self.chance / (len(_KINDS) + 1)
        dealt = _dealt({n: self.tensors[n] for n in found}, found)
        limits = _limits(dealt, share)
        tensors = []
        for name, (counts, _) in found.items():
            unlikely = 2 * len(found) * _beyond(counts, self.rows) < share
            tensors.append(_drift(name, dealt[name][0], limits[name], _overflow(counts), unlikely))
        drifted = any(t.alarms for t in tensors)
        overflowing = any("overflow" in t.alarms for t in tensors)
        advice = "nothing to do: these rows are like those of calibration"
        if drifted:
            advice = "look at these rows; if they are what the model is to run on, calibrate again with some of them"
        if overflowing:
            advice += "; values are cut off at the calibrated range"
        return DriftReport(rows=rows, calibration_rows=self.rows, drifted=drifted, tensors=tensors, advice=advice)

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


def _dealt(calibration: Mapping[str, Watched], found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """[1 + deals, PSI and the KS of each figure] of each tensor; first as the rows really are, then as they are dealt out anew."""
    old, new = (len(next(iter(s))) for s in ((w.counts for w in calibration.values()), (c for c, _ in found.values())))
    random, total = np.random.default_rng(0), old + new
    real = np.arange(total) >= old
    each = max(1, _HELD // total)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in found}
    for first in range(0, 1 + _DEALS, each):
        mine = np.stack([real if k == 0 else random.permutation(real) for k in range(first, min(first + each, 1 + _DEALS))])
        for name, (counts, figures) in found.items():
            watched = calibration[name]
            both = np.concatenate([watched.counts, counts]), np.concatenate([watched.figures, figures])
            parts[name].append(_distances(*both, mine))
    return {name: np.concatenate(p) for name, p in parts.items()}


def _limits(dealt: Mapping[str, np.ndarray], chance: float) -> dict[str, np.ndarray]:
    """Of each tensor's distances, such that any of one kind exceeds its limit with probability `chance` at most."""
    usual = {name: np.maximum(np.median(d, 0), 1e-6) for name, d in dealt.items()}
    found = {name: np.empty(d.shape[1]) for name, d in dealt.items()}
    for kind in _KINDS:
        worst = np.max([(d / usual[name])[:, kind].max(1) for name, d in dealt.items()], axis=0)
        factor = np.quantile(worst, 1 - chance, method="higher")
        for name in dealt:
            found[name][kind] = factor * usual[name][kind]
    return found


def _distances(counts: np.ndarray, figures: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """[deals, PSI and the KS of each figure] of the rows that are mine, bool [deals, rows], against the others.

    KS is 0 for a figure that the tensor does not have.
    """
    inside = counts[:, 1:-1].astype(np.float64)  # what lies outside counts at the ends: overflow is judged by itself
    inside[:, 0] += counts[:, 0]
    inside[:, -1] += counts[:, -1]
    q = mine @ inside
    p = inside.sum(0) - q
    p, q = ((side + 0.5) / (side + 0.5).sum(1, keepdims=True) for side in (p, q))
    psi = ((p - q) * np.log(p / q)).sum(1)
    return np.stack([psi, *(_ks(figures[:, i], mine) for i in range(len(FIGURES)))], 1)


def _ks(values: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """The largest distance between the empirical distributions of values [rows] that are mine, [deals, rows], and of the others."""
    if np.isnan(values).any():
        return np.zeros(len(mine))
    order = np.argsort(values, kind="stable")
    steps = mine[:, order].cumsum(1, dtype=np.int32)
    last = np.append(np.diff(values[order]) > 0, True)  # of equal values: distributions step at all of them at once
    others = (np.arange(1, len(values) + 1) - steps)[:, last]
    steps = steps[:, last]
    found: np.ndarray = np.abs(steps / steps[:, -1:] - others / others[:, -1:]).max(1)
    return found


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
