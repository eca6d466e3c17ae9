"""Calibration: run a model over data and keep statistics of chosen tensors, in memory independent of the number of rows."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphopt.data import Dataset
from graphopt.errors import DataError, ModelError
from graphopt.feeds import Feed, fixed_batch, padded, row_count
from graphopt.observers import HISTOGRAM_METHODS, Statistics, merge, observe
from graphopt.runtime import run, session

Progress = Callable[[str, int, int], None]  # what, rows done, rows in all (0 where unknown)
_BUDGET = 32 << 20  # bytes of observed activations that one worker may hold


@dataclass(frozen=True)
class _Observer:
    """What a worker needs to turn feeds into statistics; onnxruntime sessions may run in several threads at once."""

    runner: Any
    computed: tuple[str, ...]  # observed tensors that the model computes
    fed: tuple[str, ...]  # observed tensors that are inputs
    fixed: int | None  # the model's fixed batch
    histogram: bool
    drop_nonfinite: bool

    def values(self, feed: Feed) -> dict[str, np.ndarray]:
        """The observed tensors of a feed, padded where the batch is fixed."""
        whole = padded(feed, self.fixed) if self.fixed else feed
        found = run(self.runner, whole, list(self.computed)) if self.computed else []
        values = {**dict(zip(self.computed, found, strict=True)), **{name: whole[name] for name in self.fed}}
        for name, value in values.items():
            if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
                kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
                raise ModelError(f"calibrate: tensor '{name}' is {kind}; only floats have a range to quantise")
        return values

    def __call__(self, feed: Feed, first_row: int) -> dict[str, Statistics]:
        """Statistics of one feed; its activations are dropped on return."""
        rows = row_count(feed) or 1
        ran = max(rows, self.fixed or 1)
        statistics = {}
        for name, value in self.values(feed).items():
            mine = rows
            if row_count({name: value}) == ran:
                value = value[:rows]
            elif value.size % ran == 0 and value.ndim and value.shape[0] % ran == 0:  # batch times heads, windows ...
                value = value.reshape(ran, -1)[:rows]
            else:  # rows cannot be told apart
                mine = 1
            where = f"calibrate: tensor '{name}'"
            try:
                statistics[name] = observe(value, rows=mine, histogram=self.histogram, where=where, first_row=first_row)
            except DataError:
                if not self.drop_nonfinite:
                    raise
        return statistics


def calibrate(
    model: onnx.ModelProto | bytes | str | Path,
    dataset: Dataset,
    tensors: Sequence[str],
    *,
    method: str = "minmax",
    histogram: bool = False,
    batch: int | None = None,
    threads: int | None = None,
    drop_nonfinite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Statistics]:
    """Statistics of float tensors of the main graph over all rows of the dataset, in the order of `tensors`.

    The tensors become outputs of the model, which runs with onnxruntime's usual optimisations. Each of `threads` workers (default:
    one a CPU) runs batches of its own; statistics merge exactly, so the result does not depend on threads or batches. `batch`
    defaults to as many rows as keep a worker's observed activations under 32 MB, measured on the first row.
    A histogram is kept where the method needs one, or with `histogram`. `drop_nonfinite` leaves out tensors that ever hold NaN or
    Inf (attention masks add -Inf on purpose) instead of raising. Raises DataError for data that does not fit, or that makes NaN or
    Inf (naming tensor and row), and ModelError for a tensor that the graph does not compute, or one that is not float.
    """
    names = tuple(dict.fromkeys(tensors))
    if not names:
        return {}
    fed = tuple(name for name in names if name in {spec.name for spec in dataset.inputs})
    computed = tuple(name for name in names if name not in fed)
    kept = histogram or method in HISTOGRAM_METHODS
    observer = _Observer(_runner(model, computed), computed, fed, fixed_batch(dataset.inputs), kept, drop_nonfinite)
    if batch is None:
        batch = _batch(observer, dataset, one_row=method == "moving-average")
    workers = threads or os.cpu_count() or 1
    done, total = 0, dataset.rows or 0
    merged = dict.fromkeys(names, Statistics())
    for rows, statistics in _observed(observer, dataset.batches(batch), workers):
        merged = {name: merge(merged[name], found) for name, found in statistics.items() if name in merged}
        done += rows
        if progress is not None:
            progress("calibrate", done, total)
    return {name: merged[name] for name in names if name in merged}


def _observed(observer: _Observer, feeds: Iterator[Feed], workers: int) -> Iterator[tuple[int, dict[str, Statistics]]]:
    """(rows, statistics) of each feed in order, with at most one feed more than `workers` in flight."""
    waiting: deque[tuple[int, Future[dict[str, Statistics]]]] = deque()
    first_row = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="calibrate") as pool:
        try:
            for feed in feeds:
                rows = row_count(feed) or 1
                waiting.append((rows, pool.submit(observer, feed, first_row)))
                first_row += rows
                if len(waiting) > workers:
                    rows, future = waiting.popleft()
                    yield rows, future.result()
            for rows, future in waiting:
                yield rows, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _batch(observer: _Observer, dataset: Dataset, *, one_row: bool) -> int:
    """Rows whose observed activations fit the budget. `one_row`: the extremes of each row count, so it is 1 where rows of a tensor
    do not lie along its first axis."""
    if observer.fixed:
        return observer.fixed
    feed = next(iter(dataset.batches(1)))
    values = observer.values(feed)
    rows = row_count(feed) or 1
    if one_row and any(value.shape[:1] != (rows,) for value in values.values()):
        return 1
    each = sum(value.nbytes for value in values.values()) // rows + sum(value.nbytes for value in feed.values()) // rows
    return max(1, _BUDGET // max(1, each))


def _runner(model: onnx.ModelProto | bytes | str | Path, names: Sequence[str]) -> Any:
    """A session of the model with the tensors as outputs: one thread each run, since batches run side by side.

    The outputs are appended to the serialised model as a fragment: protobuf merges concatenated messages, so that the
    caller's model is neither changed nor copied.
    """
    folder = None
    if isinstance(model, onnx.ModelProto):
        proto, content = model, model.SerializeToString()
    else:
        folder = None if isinstance(model, bytes) else Path(model).resolve().parent
        try:
            content = model if isinstance(model, bytes) else Path(model).read_bytes()
            proto = onnx.ModelProto.FromString(content)
        except Exception as error:
            raise ModelError(f"calibrate: cannot read the model: {' '.join(str(error).split())}") from error
    known = {output for node in proto.graph.node for output in node.output}
    missing = [name for name in names if name not in known]
    if missing:
        raise ModelError(f"calibrate: tensor '{missing[0]}' is not computed by the model's main graph")
    existing = {output.name for output in proto.graph.output}
    extra = [onnx.ValueInfoProto(name=name) for name in names if name not in existing]
    content += onnx.ModelProto(graph=onnx.GraphProto(output=extra)).SerializeToString()
    return session(content, threads=1, external=folder)
