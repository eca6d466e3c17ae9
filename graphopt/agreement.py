"""How far a model's outputs are from the original's on calibration rows: what pruning and repair are judged by, without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.data import Dataset
from graphopt.feeds import fixed_batch, padded, row_count
from graphopt.model import Model
from graphopt.runtime import run, session
from graphopt.walk import Values

_THROUGH = frozenset({"Identity", "Squeeze", "Unsqueeze", "Cast"})
_BATCH = 16
HELD = 4  # every so many rows is kept from fits, and judges them


@dataclass(frozen=True)
class Score:
    """A tensor by which outputs are compared; `logits`: a softmax follows, so that only differences within the last axis count."""

    tensor: str
    logits: bool


def scores(model: Model) -> list[Score]:
    """For each floating-point output: itself, or what goes into the Softmax that makes it."""
    found = []
    for output in model.graph.outputs:
        tensor = output
        while len(tensor.inputs) == 1 and tensor.inputs[0].op in _THROUGH and not tensor.inputs[0].domain:
            tensor = tensor.inputs[0].inputs[0]
        before = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if before is not None and before.op in ("Softmax", "LogSoftmax") and not isinstance(before.inputs[0], gs.Constant):
            found.append(Score(before.inputs[0].name, True))
        elif output.dtype is None or np.dtype(output.dtype).kind == "f":
            found.append(Score(output.name, False))
    return found


def centred(score: Score, values: np.ndarray) -> np.ndarray:
    """float64; what a softmax cannot see taken away."""
    wide = values.astype(np.float64)
    return wide - wide.mean(-1, keepdims=True) if score.logits else wide


@dataclass
class Answers:
    """The original's scored tensors on rows, batch by batch, and the spread that errors are relative to."""

    feeds: list[Values]
    rows: list[int]
    values: list[list[np.ndarray]]
    scored: list[Score]


def is_held(rows: np.ndarray | int) -> np.ndarray:
    """Whether rows of these numbers are kept from fits."""
    found: np.ndarray = np.asarray(rows) % HELD == HELD - 1
    return found


def answers(model: Model, dataset: Dataset, *, held: bool = False, limit: int | None = None) -> Answers:
    """Run the original once. `held`: only the rows that are kept from fits; `limit`: at most so many rows."""
    scored = scores(model)
    runner = session(with_outputs(model, [s.tensor for s in scored]))
    fixed = fixed_batch(dataset.inputs)
    feeds: list[Values] = []
    rows: list[int] = []
    values: list[list[np.ndarray]] = []
    first = 0
    for feed in dataset.batches(_BATCH):
        count = row_count(feed) or 1
        chosen = np.flatnonzero(is_held(first + np.arange(count))) if held else np.arange(count)
        first += count
        if not chosen.size:
            continue
        part = {n: v[chosen] for n, v in feed.items()} if row_count(feed) else dict(feed)
        whole = dict(padded(part, fixed)) if fixed else part
        feeds.append(whole)
        rows.append(len(chosen))
        values.append([np.asarray(v) for v in run(runner, whole, [s.tensor for s in scored])])
        if limit is not None and sum(rows) >= limit:
            break
    if held and not feeds:  # fewer rows than one in HELD
        return answers(model, dataset, limit=limit)
    return Answers(feeds, rows, values, scored)


def with_outputs(model: Model, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of the model with these tensors as its outputs."""
    proto = model.proto()
    del proto.graph.output[:]
    for name in dict.fromkeys(names):
        proto.graph.output.add(name=name)
    return proto


def token_mask(feed: Mapping[str, np.ndarray], value: np.ndarray) -> np.ndarray | None:
    """Which positions of a value [rows, tokens, ...] an attention mask counts; None where there is no such mask."""
    mask = feed.get("attention_mask")
    fits = mask is not None and value.ndim == mask.ndim + 1 and value.shape[: mask.ndim] == mask.shape
    return mask.astype(bool) if mask is not None and fits else None


def error(truth: Answers, found: Sequence[Sequence[np.ndarray]]) -> float:
    """Squared error of each scored tensor relative to its variance over rows; the mean of them. Padded tokens are left out."""
    totals = []
    for index, score in enumerate(truth.scored):
        wrong = total = 0.0
        shift: np.ndarray | float | None = None
        for feed, rows, old, new in zip(truth.feeds, truth.rows, truth.values, found, strict=True):
            a, b, mask = centred(score, old[index]), centred(score, new[index]), token_mask(feed, old[index])
            a, b = (a[mask], b[mask]) if mask is not None else (a[:rows], b[:rows])
            shift = a.mean(0) if shift is None and a.ndim > 1 else (0.0 if shift is None else shift)
            wrong += float(np.square(a - b).sum())
            total += float(np.square(a - shift).sum())
        totals.append(wrong / max(total, 1e-30))
    return float(np.mean(totals)) if totals else 0.0


def spreads(truth: Answers) -> list[tuple[Score, float]]:
    """The standard deviation of each scored tensor."""
    return [
        (score, float(np.std(np.concatenate([centred(score, batch[i]).ravel() for batch in truth.values]))))
        for i, score in enumerate(truth.scored)
    ]


def outputs_of(model: Model, truth: Answers) -> list[list[np.ndarray]]:
    """The model's scored tensors on the same feeds."""
    names = [s.tensor for s in truth.scored]
    runner = session(with_outputs(model, names))
    return [[np.asarray(v) for v in run(runner, feed, names)] for feed in truth.feeds]
