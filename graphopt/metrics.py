"""Metrics of a whole evaluation set: what is kept of each row, and the figure that all rows make together.

`graphopt.evaluate` has the metrics that are a mean of one score a row; these are the others. Labels are those of the data, one
entry along the first axis for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from graphopt.errors import DataError, OptionError
from graphopt.evaluate import METRICS as ROW_METRICS
from graphopt.evaluate import metric as row_metric
from graphopt.feeds import Feed
from graphopt.registry import suggest


@dataclass(frozen=True)
class Batch:
    """Outputs of the model for some rows, their labels, and what was fed."""

    outputs: Sequence[np.ndarray]
    labels: np.ndarray
    feed: Feed

    @property
    def rows(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Metric:
    """`keep`: what is kept of a batch, [rows, ...]; `total`: the figure of (kept, labels); `score`: one number a row, higher is
    better, for the paired comparison, or None where rows cannot be told better or worse one by one."""

    name: str
    keep: Callable[[Batch], np.ndarray]
    total: Callable[[np.ndarray, np.ndarray], float]
    score: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
    higher_is_better: bool = True
    pairs: bool = False  # two consecutive rows make one
    whole: bool = False  # the user's own function of all rows: called once, and not on resamples


def find_metric(name: str) -> Metric:
    """The metric of that name, or `module:function` (outputs, labels) -> one score a row; where the function has a true attribute
    `whole` it is called once with all rows, and gives one number. OptionError with the valid names."""
    if name in METRICS:
        return METRICS[name]
    if name not in ROW_METRICS and ":" not in name:
        raise OptionError(f"unknown metric '{name}'; {suggest(name, [*ROW_METRICS, *METRICS])}, or module:function")
    judge = row_metric(name)
    if getattr(judge, "whole", False):
        return Metric(name, _all_outputs, lambda kept, labels: float(np.asarray(judge(_restored(kept), labels))), None, whole=True)

    def keep(batch: Batch) -> np.ndarray:
        from graphopt.evaluate import _judged

        return _judged(name, judge, batch.outputs, batch.labels)

    return Metric(name, keep, lambda kept, labels: float(np.mean(kept)), lambda kept, labels: kept)


def names() -> list[str]:
    """All metrics that are built in."""
    return sorted({*ROW_METRICS, *METRICS})


def _all_outputs(batch: Batch) -> np.ndarray:
    """One tuple a row of what every output holds for it; outputs without rows are left out."""
    rows = np.empty(batch.rows, object)
    whole = [o for o in batch.outputs if o.ndim and len(o) == batch.rows]
    rows[:] = [tuple(o[i] for o in whole) for i in range(batch.rows)]
    return rows


def _restored(kept: np.ndarray) -> list[np.ndarray]:
    """The outputs over all rows; one whose rows differ in shape from batch to batch becomes an array of objects."""
    outputs = []
    for parts in zip(*kept, strict=True):
        if len({np.shape(p) for p in parts}) == 1:
            outputs.append(np.stack(parts))
            continue
        ragged = np.empty(len(parts), object)
        ragged[:] = list(parts)
        outputs.append(ragged)
    return outputs


# ---- numbers against numbers


def _squared(batch: Batch) -> np.ndarray:
    """Mean squared error of a row of the first output against labels of its shape."""
    output = batch.outputs[0]
    if output.shape != batch.labels.shape and output.size == batch.labels.size:
        output = output.reshape(batch.labels.shape)
    if output.shape != batch.labels.shape or batch.labels.dtype.kind not in "biuf":
        raise DataError(f"metric: output {list(output.shape)} and labels {list(batch.labels.shape)} must be numbers of one shape")
    return np.asarray(((output.astype(np.float64) - batch.labels) ** 2).reshape(batch.rows, -1).mean(-1))


def _psnr(kept: np.ndarray, labels: np.ndarray) -> float:
    """Mean over rows of 10 log10(peak**2 / error), the peak being the range of all labels; rows without error count as 100 dB."""
    peak = float(labels.max()) - float(labels.min())
    return float(np.mean(np.minimum(100.0, 10 * np.log10(np.maximum(peak, 1e-30) ** 2 / np.maximum(kept, 1e-30)))))


def _cosine(batch: Batch) -> np.ndarray:
    a, b = (np.asarray(v, np.float64).reshape(batch.rows, -1) for v in (batch.outputs[0], batch.labels))
    if a.shape != b.shape:
        raise DataError(
            f"metric cosine: output {list(batch.outputs[0].shape)} and labels {list(batch.labels.shape)} differ in size"
        )
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(1) / np.maximum(norms, 1e-30))


def _one_number(batch: Batch) -> np.ndarray:
    values = np.asarray(batch.outputs[0], np.float64).reshape(batch.rows, -1)
    if values.shape[1] == 2:
        return np.asarray(values[:, 1] - values[:, 0])
    if values.shape[1] != 1:
        raise DataError(
            f"metric: the first output has shape {list(batch.outputs[0].shape)}, expected one number a row, or two classes"
        )
    return values[:, 0]


def _auc(kept: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, as the share of (positive, negative) pairs in order; ties count half."""
    positive = labels.reshape(-1) == 1
    if not np.isin(labels, (0, 1)).all() or positive.all() or not positive.any():
        raise DataError("metric auc: the labels must be 0 and 1, and both must occur")
    ranks = _ranks(kept)
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(kept) - count)))


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse.reshape(-1)])


def _pearson(kept: np.ndarray, labels: np.ndarray) -> float:
    a, b = (np.asarray(v, np.float64).reshape(-1) for v in (kept, labels))
    if a.size < 2 or not a.std() or not b.std():
        raise DataError("metric: a correlation needs two rows or more that are not all equal")
    return float(np.corrcoef(a, b)[0, 1])


def _spearman(kept: np.ndarray, labels: np.ndarray) -> float:
    return _pearson(_ranks(np.asarray(kept).reshape(-1)), _ranks(np.asarray(labels).reshape(-1)))


def _embedding(batch: Batch) -> np.ndarray:
    """One unit vector a row: the first float output of two axes, else the mean over attended positions of the first of three."""
    floats = [np.asarray(o) for o in batch.outputs if np.asarray(o).dtype.kind == "f" and len(o) == batch.rows]
    found = next((o for o in floats if o.ndim == 2), None)
    if found is None:
        tokens = next((o for o in floats if o.ndim == 3), None)
        if tokens is None:
            raise DataError("metric: no output is an embedding, [rows, size] or [rows, positions, size]")
        given = batch.feed.get("attention_mask")
        mask = np.ones(tokens.shape[:2]) if given is None else np.asarray(given)[: batch.rows]
        found = (tokens * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    found = found.astype(np.float64)
    return np.asarray(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-30))


def _pair_cosines(total: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    """`total` of the cosines of rows 0 and 1, 2 and 3 ... against the label of the first of each."""

    def figure(kept: np.ndarray, labels: np.ndarray) -> float:
        if len(kept) % 2:
            raise DataError(f"metric: {len(kept)} rows are no pairs; rows 0 and 1, 2 and 3 ... belong together")
        return total((kept[::2] * kept[1::2]).sum(1), labels[::2])

    return figure


# ---- classes


def _predicted(batch: Batch) -> np.ndarray:
    """The class of each row: the largest of several scores, or one probability over 0.5."""
    scores = np.asarray(batch.outputs[0]).reshape(batch.rows, -1)
    if batch.labels.shape != (batch.rows,) or batch.labels.dtype.kind not in "biuf":
        raise DataError(f"metric f1: labels {list(batch.labels.shape)} must be one class a row")
    return np.asarray(scores.argmax(1) if scores.shape[1] > 1 else scores[:, 0] > 0.5, np.int64)


def _f1(kept: np.ndarray, labels: np.ndarray) -> float:
    """Mean of the F1 of each class that occurs in labels or predictions; of class 1 alone where there are only 0 and 1."""
    classes = np.union1d(kept, labels)
    wanted = [1] if set(classes.tolist()) <= {0, 1} else classes.tolist()
    found = []
    for c in wanted:
        hit, given, true = ((kept == c) & (labels == c)).sum(), (kept == c).sum(), (labels == c).sum()
        found.append(2 * hit / max(given + true, 1))
    return float(np.mean(found))


def _right(kept: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.asarray(kept == labels)


# ---- sequences


def _sequences(values: Any, rows: int) -> list[list[Any]]:
    """Words of each row: of text split at blanks, of integers (negative ones are padding), or of scores by their largest."""
    array = np.asarray(values)
    if array.dtype.kind in "OUS":
        return [str(v).split() for v in array.reshape(rows, -1)[:, 0]]
    if array.dtype.kind == "f":
        array = array.argmax(-1)
    return [[int(v) for v in row if v >= 0] for row in array.reshape(rows, -1)]


def _edits(batch: Batch) -> np.ndarray:
    """[rows, 2]: words to insert, delete or replace, and words of the label."""
    pairs = zip(_sequences(batch.outputs[0], batch.rows), _sequences(batch.labels, batch.rows), strict=True)
    return np.array([(_distance(a, b), len(b)) for a, b in pairs], np.float64)


def _distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Levenshtein."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def _exact(batch: Batch) -> np.ndarray:
    pairs = zip(_sequences(batch.outputs[0], batch.rows), _sequences(batch.labels, batch.rows), strict=True)
    return np.array([a == b for a, b in pairs], np.float64)


def _mean(kept: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(kept))


def _same(kept: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return kept


def _less(kept: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.asarray(-kept)


_PAIR = Metric("pair-spearman", _embedding, _pair_cosines(_spearman), None, pairs=True)
METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("f1", _predicted, _f1, _right),
        Metric("auc", _one_number, _auc, None),
        Metric("mse", _squared, _mean, _less, higher_is_better=False),
        Metric("psnr", _squared, _psnr, _less),
        Metric("cosine", _cosine, _mean, _same),
        Metric("pearson", _one_number, _pearson, None),
        Metric("spearman", _one_number, _spearman, None),
        Metric("exact", _exact, _mean, _same),
        Metric(
            "wer",
            _edits,
            lambda kept, labels: float(kept[:, 0].sum() / max(kept[:, 1].sum(), 1)),
            lambda kept, labels: np.asarray(-kept[:, 0]),
            higher_is_better=False,
        ),
        _PAIR,
        replace(_PAIR, name="pair-pearson", total=_pair_cosines(_pearson)),
    )
}
