"""Which weights become zero: patterns, criteria by name, and the place where plugins add theirs.

A criterion is a function `(weight, task) -> (mask, weight)` of one layer: weight float32 [outputs, inputs], mask bool of that
shape, True where a weight stays, and the weights to keep, which may have been updated to make up for those that go. `choose` makes
the mask of any scores; measured criteria find what the layer reads in `task.statistics`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphopt.errors import OptionError, PassError
from graphopt.registry import REGISTRY, suggest


@dataclass(frozen=True)
class Pattern:
    """Blocks of `rows` x `columns` that go or stay as one; with `keep` and `of` those that stay of so many inputs side by side."""

    rows: int = 1
    columns: int = 1
    keep: int = 0
    of: int = 0

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.of else f"{self.rows}x{self.columns}"

    def misfit(self, shape: Sequence[int]) -> str:
        """Why the pattern does not fit a matrix, or ""."""
        if self.of and shape[1] % self.of:
            return f"its {shape[1]} inputs are no multiple of {self.of}"
        if shape[0] % self.rows or shape[1] % self.columns:
            return f"blocks of {self.rows} x {self.columns} do not cover its weights exactly"
        return ""


@dataclass(frozen=True)
class Task:
    """What is asked of one layer. `ratio`: the share of weights (or blocks) to remove; n:m patterns have their own.

    `statistics`, for measured criteria, float64: `mean` [inputs] and `covariance` [inputs, inputs] of what the layer reads, `cross`
    [inputs, outputs] the covariance of that with what the layer should give. `damping`: the ridge, relative to the mean variance.
    """

    name: str
    pattern: Pattern
    ratio: float
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)
    damping: float = 1e-2


Criterion = Callable[[np.ndarray, Task], tuple[np.ndarray, np.ndarray]]
CRITERIA: dict[str, Criterion] = {}
MEASURED: set[str] = set()  # the criteria that want statistics


def criterion(name: str, *, measured: bool = False) -> Callable[[Criterion], Criterion]:
    """Decorator: make a function a criterion of that name; `measured`: one that wants `Task.statistics`.

    OptionError where another module already has the name.
    """

    def add(fn: Criterion) -> Criterion:
        if measured:
            MEASURED.add(name)
        known = CRITERIA.setdefault(name, fn)
        if known.__module__ != fn.__module__:
            raise OptionError(f"two criteria are named '{name}': one in {known.__module__}, one in {fn.__module__}; rename one")
        CRITERIA[name] = fn
        return fn

    return add


def find_criterion(name: str) -> Criterion:
    """The criterion of that name, built in or from a plugin; OptionError with the valid names."""
    from graphopt import sparsity_data  # noqa: F401 (fills the table)

    if name not in CRITERIA:
        REGISTRY.load_entry_points()  # a packaged plugin may bring it
    if name not in CRITERIA:
        raise OptionError(f"sparsify: unknown criterion '{name}'; {suggest(name, CRITERIA)}")
    return CRITERIA[name]


def parse_pattern(text: str) -> Pattern:
    """`unstructured`, blocks as `4x1` (outputs x inputs), or n:m as `2:4`. Raises OptionError.

    >>> parse_pattern("4x1"), str(parse_pattern("2:4"))
    (Pattern(rows=4, columns=1, keep=0, of=0), '2:4')
    """
    if text == "unstructured":
        return Pattern()
    found = re.fullmatch(r"(\d{1,3})([x:])(\d{1,3})", text)
    if not found:
        raise OptionError(f"sparsify: pattern={text}: expected unstructured, blocks as 4x1, or n:m as 2:4")
    one, two = int(found[1]), int(found[3])
    if found[2] == "x":
        if not (one and two):
            raise OptionError(f"sparsify: pattern={text}: a block has at least one row and one column")
        return Pattern(one, two)
    if not 0 < one < two:
        raise OptionError(f"sparsify: pattern={text}: of m weights fewer than m stay, and at least one")
    return Pattern(keep=one, of=two)


def block_scores(scores: np.ndarray, pattern: Pattern) -> np.ndarray:
    """The mean over each block, float64 [outputs / rows, inputs / columns]."""
    (n, k), rows, columns = scores.shape, pattern.rows, pattern.columns
    return np.asarray(scores.reshape(n // rows, rows, k // columns, columns).mean((1, 3), dtype=np.float64))


def _lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """True for all but the `count` lowest of the last axis; of equals, the first go."""
    keep = np.ones(scores.shape, bool)
    if scores.ndim == 1 and count:
        limit = np.partition(scores, count - 1)[count - 1]
        keep = np.asarray(scores > limit)
        keep[np.flatnonzero(scores == limit)[count - np.count_nonzero(scores < limit) :]] = True
        return keep
    gone = np.argsort(scores, axis=-1, kind="stable")[..., :count]
    np.put_along_axis(keep, gone, False, axis=-1)
    return keep


def choose(scores: np.ndarray, task: Task) -> np.ndarray:
    """The mask that removes the lowest scores as the task says; scores have the shape of the weight."""
    pattern = task.pattern
    if pattern.of:
        cut = scores.reshape(scores.shape[0], -1, pattern.of)
        return _lowest(cut, pattern.of - pattern.keep).reshape(scores.shape)
    blocks = block_scores(scores, pattern)
    keep = _lowest(blocks.reshape(-1), round(task.ratio * blocks.size)).reshape(blocks.shape)
    return np.repeat(np.repeat(keep, pattern.rows, 0), pattern.columns, 1)


@criterion("magnitude")
def magnitude(weight: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """The smallest weights go, or the blocks of smallest mean square."""
    return choose(np.square(weight, dtype=np.float64), task), weight


def sparse(weight: np.ndarray, judge: Criterion, task: Task) -> np.ndarray:
    """The weights that the criterion leaves, zeros where it removed some; PassError where it gives anything else."""
    mask, values = judge(weight, task)
    if mask.shape != weight.shape or values.shape != weight.shape or not np.isfinite(values).all():
        raise PassError("sparsify", f"'{task.name}': the criterion did not give a mask and finite weights of shape {weight.shape}")
    return np.asarray(np.where(mask, values, 0))


def global_ratios(weights: Sequence[np.ndarray], pattern: Pattern, ratio: float) -> list[float]:
    """The share that each matrix loses where all blocks are ranked together, by LAMP (Lee et al. 2021, arXiv:2010.07611).

    A block's score is its mean square over the sum of all of its layer that are not smaller: scales do not matter, and the largest
    block of a layer has score 1, so that no layer vanishes.
    """
    scores = []
    for weight in weights:
        blocks = np.sort(block_scores(np.square(weight, dtype=np.float64), pattern).reshape(-1))
        tail = np.cumsum(blocks[::-1])[::-1]
        scores.append(np.divide(blocks, tail, out=np.zeros_like(blocks), where=tail > 0))
    sizes = [s.size for s in scores]
    # a block stands for rows x columns weights in every layer, so blocks count alike
    order = np.argsort(np.concatenate(scores), kind="stable")
    owner = np.repeat(np.arange(len(sizes)), sizes)
    gone = np.bincount(owner[order[: round(ratio * sum(sizes))]], minlength=len(sizes))
    return [float(g / s) for g, s in zip(gone, sizes, strict=True)]
