"""Quality on labelled rows: metrics, and a paired comparison of two models."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import DataError, OptionError
from graphopt.feeds import fixed_batch, padded, row_count
from graphopt.registry import suggest
from graphopt.runtime import run

if TYPE_CHECKING:
    from graphopt.context import Progress
    from graphopt.data import Dataset

Metric = Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]  # (outputs, labels) of a batch -> one score a row, higher better


def top1(outputs: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """1 where the largest of the first output's last axis is the label; shapes [N, classes] and [N]."""
    return np.asarray(_scores(outputs, labels).argmax(-1) == labels)


def top5(outputs: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """1 where the label is among the five largest of the first output's last axis."""
    scores = _scores(outputs, labels)
    best = np.argsort(-scores, axis=-1)[..., :5]
    return np.asarray((best == labels[..., None]).any(-1))


def binary(outputs: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """1 where the first output, one probability a row, is over 0.5 exactly for label 1."""
    probability = outputs[0].reshape(len(labels), -1)
    if probability.shape[1] != 1:
        raise DataError(f"metric binary: the first output has shape {list(outputs[0].shape)}, expected one value a row; try top1")
    if labels.size != len(labels) or not np.isin(labels, (0, 1)).all():
        raise DataError("metric binary: the labels must be one 0 or 1 a row")
    return np.asarray((probability[:, 0] > 0.5) == (labels.reshape(-1) == 1))


def negative_mse(outputs: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Minus the mean squared error of the first output against labels of its shape, a row."""
    if outputs[0].shape != labels.shape:
        raise DataError(f"metric negative-mse: output {list(outputs[0].shape)} and labels {list(labels.shape)} differ in shape")
    if labels.dtype.kind not in "biuf":
        raise DataError(f"metric negative-mse: the labels are {labels.dtype}, expected numbers")
    error = (outputs[0].astype(np.float64) - labels) ** 2
    return np.asarray(-error.reshape(len(labels), -1).mean(-1))


def _scores(outputs: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    scores = np.asarray(outputs[0])
    if scores.ndim < 2 or scores.shape[:-1] != labels.shape or scores.shape[-1] < 2:
        raise DataError(
            f"metric: the first output has shape {list(scores.shape)} and the labels {list(labels.shape)}; "
            "expected [..., classes] and [...]; another metric, or module:function, may fit"
        )
    if labels.dtype.kind not in "biuf" or not np.isin(labels, np.arange(scores.shape[-1])).all():
        raise DataError(f"metric: the labels ({labels.dtype}) must be numbers from 0 to {scores.shape[-1] - 1}, one a row")
    return scores


METRICS: dict[str, Metric] = {"top1": top1, "top5": top5, "binary": binary, "negative-mse": negative_mse}


def metric(name: str) -> Metric:
    """The metric of that name, or `module:function`."""
    if name in METRICS:
        return METRICS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise OptionError(f"unknown metric '{name}'; {suggest(name, METRICS)}, or module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # somebody else's module: anything can happen in it
        raise OptionError(f"metric '{name}' cannot be loaded: {error}") from error
    if not callable(found):
        raise OptionError(f"metric '{name}' is a {type(found).__name__}, not a function (outputs, labels) -> scores")
    made: Metric = found
    return made


def score(runner: Any, dataset: Dataset, name: str, *, batch: int = 16, progress: Progress | None = None) -> np.ndarray:
    """One score a row. Memory is one batch's outputs. Raises DataError without labels."""
    labels, judge = dataset.labels, metric(name)
    if labels is None:
        raise DataError(f"{dataset.where} has no 'labels'; add them to the .npz, or leave --eval out")
    fixed = fixed_batch(dataset.inputs)
    rows: list[np.ndarray] = []
    done = 0
    for feed in dataset.batches(batch):
        count = row_count(feed) or 0
        outputs = run(runner, padded(feed, fixed) if fixed and count < fixed else feed)
        rows.append(_judged(name, judge, [np.asarray(o)[:count] for o in outputs], labels[done : done + count]))
        done += count
        if progress:
            progress("evaluate", done, len(labels))
    if done != len(labels):
        raise DataError(f"{dataset.where} has {done} rows and {len(labels)} labels")
    return np.concatenate(rows)


def _judged(name: str, judge: Metric, outputs: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """The scores of a batch; DataError where the metric, which may be the user's, fails or gives anything but one number a row."""
    try:
        found = np.asarray(judge(outputs, labels))
    except DataError:
        raise
    except Exception as error:  # somebody else's function: anything can happen in it
        raise DataError(f"metric '{name}' raised {type(error).__name__}: {error}") from error
    if found.shape[:1] != (len(labels),) or found.dtype.kind not in "biuf":
        raise DataError(
            f"metric '{name}' gave {found.dtype} {list(found.shape)}, expected one number for each of {len(labels)} rows"
        )
    return found if found.ndim == 1 else found.reshape(len(labels), -1).mean(-1)  # several positions a row


@dataclass(frozen=True)
class Paired:
    """Two models on the same rows. For metrics of right and wrong: rows lost, won and the exact two-sided sign test."""

    rows: int
    original: float
    optimized: float
    lost: int
    won: int
    p_value: float


def paired(before: np.ndarray, after: np.ndarray) -> Paired:
    """Compare per-row scores; p is the probability of so uneven a split of the differing rows by chance alone."""
    lost, won = int((after < before).sum()), int((after > before).sum())
    n, k = lost + won, min(lost, won)
    p_value = min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0
    return Paired(len(before), float(np.mean(before)), float(np.mean(after)), lost, won, p_value)
