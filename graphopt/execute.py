"""`graphopt run`: all rows through a model, with what ran and how fast."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import DataError, ModelError
from graphopt.operators import Library, opened, regions
from graphopt.runtime import run


@dataclass(frozen=True)
class Run:
    """What was run. Latencies are those of one call of `batch` rows; the first call, which warms up, is not among them."""

    outputs: dict[str, np.ndarray]
    rows: int
    batch: int
    threads: int
    p50_ms: float
    p95_ms: float
    rows_per_second: float
    operators: str  # how the regions ran
    kind: str
    rung: str
    regions: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything but the outputs' values."""
        shapes = {name: list(value.shape) for name, value in self.outputs.items()}
        return {k: v for k, v in vars(self).items() if k != "outputs"} | {"outputs": shapes}


def run_rows(model: Path, data: Any, *, threads: int = 1, batch: int = 1, library: Library = None, fallback: bool = False) -> Run:
    """Run the rows of a dataset in batches (the model's own size where it is fixed). Raises GraphoptError."""
    from graphopt.data import open_dataset
    from graphopt.feeds import fixed_batch, input_specs, padded, row_count
    from graphopt.model import load

    proto = load(model).proto()
    dataset = open_dataset(data, input_specs(proto))
    session, how = opened(model, threads=threads, library=library, fallback=fallback)
    names = [o.name for o in session.get_outputs()]
    fixed = fixed_batch(dataset.inputs)
    parts: list[list[np.ndarray]] = []
    taken: list[float] = []
    counts: list[int] = []
    for feed in dataset.batches(batch):
        rows = row_count(feed) or 1
        given = padded(feed, fixed) if fixed else feed
        if not parts:
            run(session, given)
        began = time.perf_counter()
        results = run(session, given, names)
        taken.append(time.perf_counter() - began)
        counts.append(rows)
        parts.append([_rows(name, value, rows, row_count(given) or 1) for name, value in zip(names, results, strict=True)])
    return Run(
        outputs={name: _joined(name, [p[i] for p in parts]) for i, name in enumerate(names)},
        rows=sum(counts),
        batch=fixed or batch,
        threads=threads,
        p50_ms=float(np.median(taken)) * 1e3,
        p95_ms=float(np.percentile(taken, 95)) * 1e3,
        rows_per_second=sum(counts) / sum(taken),
        operators=str(how),
        kind=how.kind,
        rung=how.rung,
        regions=len(regions(proto)),
    )


def _rows(name: str, value: Any, rows: int, fed: int) -> np.ndarray:
    """The rows asked for of an output; padding is cut off where the first axis is the batch."""
    if not isinstance(value, np.ndarray):
        raise ModelError(f"output '{name}' is a {type(value).__name__}, not a tensor: it cannot be written to a .npz")
    return value[:rows] if value.ndim and value.shape[0] == fed else value


def _joined(name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    if not parts[0].ndim:
        return np.stack(parts)
    if len({p.shape[1:] for p in parts}) > 1:
        raise DataError(f"output '{name}' has another shape in each batch; give rows of one size, or run without -o")
    return np.concatenate(parts)
