"""Which rows of a layer are looked at: calibration batches, mirrored or not, and positions drawn from a layer's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.agreement import is_held
from graphopt.data import Dataset
from graphopt.gram import positions, spread
from graphopt.layers import Layer
from graphopt.walk import Store, feeds_of
from graphopt.walk import mirrored as mirrored_feed

_ROWS = 16384  # sampled rows of a layer, at least
_PER_FEATURE = 8  # sampled rows by feature


@dataclass(frozen=True)
class Batch:
    """Rows before this batch, rows that count, and which tokens of them do (an attention mask), by batch number."""

    first: int
    rows: int
    mask: np.ndarray | None


def fill(dataset: Dataset, stores: Sequence[Store], *, mirror: bool = False) -> list[Batch]:
    """Put the feeds into every store; with `mirror`, each once more with its images mirrored."""
    batches: list[Batch] = []
    first = 0
    for feed, rows in feeds_of(dataset):
        mask = feed.get("attention_mask")
        usable = mask is not None and mask.ndim == 2 and bool(np.isin(mask, (0, 1)).all())
        batch = Batch(first, rows, mask.astype(bool) if usable and mask is not None else None)
        first += rows
        for version in (feed, mirrored_feed(dataset, feed)) if mirror else (feed,):
            for store in stores:
                store[len(batches)] = dict(version)
            batches.append(batch)
    return batches


def chosen_rows(
    layer: Layer, shape: tuple[int, ...], batch: Batch, total: int, features: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the layer's output to look at, and whether each is of a held row."""
    wanted = max(_ROWS, _PER_FEATURE * features)
    at = positions(layer, shape, -(-wanted * batch.rows // max(total, 1)), seed)
    lead = spread(layer, shape)
    size, first = int(np.prod(lead, dtype=np.int64)), lead[0]
    if batch.mask is not None and lead == batch.mask.shape:
        at = at[batch.mask.ravel()[at]]
    whole = len(batch.mask) if batch.mask is not None else first
    rows = at // max(1, size // max(1, whole)) if whole and size % whole == 0 else at
    at, rows = at[rows < batch.rows], rows[rows < batch.rows]
    return at, is_held(batch.first + rows)
