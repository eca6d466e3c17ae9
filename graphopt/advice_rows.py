"""Which rows `graphopt advise` calibrates its trials with, and which others it judges them by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.data import LABELS, Dataset, generated, open_dataset
from graphopt.errors import DataError
from graphopt.feeds import Feed, InputSpec, row_count

CALIBRATION, JUDGED, GENERATED = 64, 200, 8  # rows at most
FEWEST = 16  # rows to judge by


@dataclass(frozen=True)
class Rows:
    """Rows to calibrate with, other rows to judge by, and in words what they are."""

    calibration: Dataset
    judged: Dataset | None
    said: str
    given: bool = True  # not generated

    @property
    def labelled(self) -> bool:
        return self.judged is not None and self.judged.labels is not None


def rows_for(data: Any, evaluation: Any, specs: Sequence[InputSpec], limit: int) -> Rows:
    """Rows of each kind, `limit` at most, spread evenly over what there is; every second one of `data` is held back where there are
    no others to judge by. DataError for rows that do not fit, and for an evaluation set without labels."""
    if data is None and evaluation is None:
        return Rows(generated(specs, GENERATED), None, f"{GENERATED} generated rows: they say nothing about quality", False)
    judged = None if evaluation is None else open_dataset(evaluation, specs)
    if judged is not None and judged.labels is None:
        raise DataError(f"{judged.where} has no 'labels'; give rows without labels as data (--data)")
    first = judged if data is None else open_dataset(data, specs)
    assert first is not None
    separate = data is not None and judged is not None
    feeds = _spread(first, CALIBRATION if separate else CALIBRATION + JUDGED, limit if separate else 2 * limit)
    mine = feeds if separate else feeds[::2][:CALIBRATION]
    others = _spread(judged, JUDGED, limit) if separate and judged is not None else feeds[1::2][:JUDGED]
    calibration = open_dataset([{k: v for k, v in f.items() if k != LABELS} for f in mine], specs)
    held = open_dataset(others, specs) if len(others) >= FEWEST else None
    labels = "labelled rows" if held is not None and held.labels is not None else "rows"
    where = f"{len(mine)} rows of {first.where} to calibrate"
    return Rows(calibration, held, f"{where}, {len(others)} other {labels} to judge by" if held is not None else where)


def _spread(dataset: Dataset, most: int, limit: int) -> list[Feed]:
    """Feeds of one row (or of the model's fixed batch) with their labels, at even steps: neighbours may be of one class."""
    most, labels = min(most, max(limit, 2)), dataset.labels
    rows = dataset.rows or most
    wanted = {int(i) for i in np.linspace(0, rows - 1, min(most, rows))}
    found: list[Feed] = []
    at = 0
    for feed in dataset.batches(1):
        count = row_count(feed) or 1
        if not wanted.isdisjoint(range(at, at + count)):
            found.append(feed if labels is None else {**feed, LABELS: labels[at : at + count]})
        at += count
        if at > max(wanted):
            break
    return found
