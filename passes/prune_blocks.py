"""`prune-blocks`: leave out whole residual blocks, those that the outputs miss least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from graphopt.blocks import Block, bypass_block, bypassed, find_blocks
from graphopt.compare import differences
from graphopt.context import Context
from graphopt.cost import costs
from graphopt.errors import OptionError, PassError
from graphopt.feeds import fixed_batch, padded, row_count
from graphopt.liveness import remove_dead
from graphopt.model import Model
from graphopt.registry import register
from graphopt.runtime import Feed, run, runnable, session
from graphopt.shapes import shapes

NAME = "prune-blocks"
BATCH = 16


@register(NAME, needs_data=True)
def prune_blocks(
    model: Model,
    context: Context,
    *,
    blocks: int | None = None,
    macs: float | None = None,
    rows: int = 64,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> int:
    """Residual blocks x + f(x) that contribute least become x, one after the other.

    - blocks, macs: give exactly one. blocks: how many go; macs: the share of the model's MACs that stays, as blocks go.
    - rows: how many calibration rows (--calib) a block's contribution is measured on.
    - include, exclude: patterns (* and ?) of names of nodes; a block matches by its sum or any node inside.

    A block is an Add of a tensor and of what Conv, MatMul and the like make of it, with the same shape: the block of a ResNet, the
    attention or the MLP of a transformer layer, or several of them in one. Its contribution is the error of the outputs without it,
    relative to their size (no labels are needed); it is measured again after each block that goes. Returns the number of blocks
    removed. Not exact: evaluate the result.
    """
    _check(blocks, macs, rows)
    feeds = _feeds(context, rows)
    target = macs * (costs(model, context.get(shapes, model)).macs or 0) if macs is not None else None
    if target == 0:
        raise PassError(NAME, f"macs={macs:g} cannot be aimed at: none could be counted; use blocks=")
    before = costs(model, context.get(shapes, model)).counted_macs
    names = [t.name for t in model.graph.outputs]
    wanted = _answers(model, feeds, names)
    removed: list[dict[str, Any]] = []
    while not _reached(model, blocks, target, len(removed)):
        found = _choose(model, context if not removed else None, include, exclude)
        scores = [_score(model, context, f"block {len(removed) + 1}", i, found, feeds, names, wanted) for i in range(len(found))]
        if not removed:
            context.facts["contributions"] = {b.name: _short(s) for b, s in zip(found, scores, strict=True)}
        best = min(range(len(found)), key=lambda i: scores[i], default=None)
        if best is None or not math.isfinite(scores[best]):
            raise PassError(NAME, _unreachable(blocks, macs, model, before, len(removed)))
        removed.append({"block": found[best].name, "score": _short(scores[best]), "nodes": len(found[best].inner) + 1})
        context.remember(model)
        bypass_block(found[best])
        remove_dead(model)
    context.facts.update({"removed": removed, "macs": [before, costs(model).counted_macs]})
    return len(removed)


def _check(blocks: int | None, macs: float | None, rows: int) -> None:
    if (blocks is None) == (macs is None):
        raise OptionError(f"{NAME}: give exactly one of blocks= and macs=")
    if blocks is not None and blocks < 0:
        raise OptionError(f"{NAME}: blocks={blocks} is how many go: at least 0")
    if macs is not None and not 0 < macs <= 1:
        raise OptionError(f"{NAME}: macs={macs:g} is the share that stays: above 0, at most 1")
    if rows < 1:
        raise OptionError(f"{NAME}: rows must be at least 1, not {rows}")


def _feeds(context: Context, rows: int) -> list[Feed]:
    """The first calibration rows. PassError without data."""
    if context.calibration is None:
        raise PassError(NAME, "contributions are measured on calibration data: give --calib PATH (or calibration=...)")
    fixed, feeds, seen = fixed_batch(context.calibration.inputs), list[Feed](), 0
    for feed in context.calibration.batches(min(BATCH, rows)):
        feeds.append(padded(feed, fixed) if fixed else feed)
        seen += row_count(feed) or 1
        if seen >= rows:
            break
    return feeds


def _answers(model: Model, feeds: Sequence[Feed], names: Sequence[str]) -> list[list[np.ndarray]]:
    with runnable(model) as content:
        runner = session(content)
        return [run(runner, feed, names) for feed in feeds]


def _reached(model: Model, blocks: int | None, target: float | None, removed: int) -> bool:
    return removed == blocks if target is None else costs(model).counted_macs <= target


def _choose(model: Model, context: Context | None, include: Sequence[str], exclude: Sequence[str]) -> list[Block]:
    found = find_blocks(model, shapes(model), context.reject) if context else find_blocks(model, shapes(model))
    chosen = []
    for block in found:
        names = [block.name, *(n.name for n in block.inner)]
        if (not include or _matches(names, include)) and not _matches(names, exclude):
            chosen.append(block)
        elif context:
            context.reject(block.node, "excluded" if _matches(names, exclude) else "not included")
    return chosen


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _score(
    model: Model,
    context: Context,
    what: str,
    index: int,
    found: Sequence[Block],
    feeds: Sequence[Feed],
    names: Sequence[str],
    wanted: Sequence[list[np.ndarray]],
) -> float:
    """The mean over the outputs of their relative root mean square error without the block; infinite where a shape changes."""
    with bypassed(found[index]):
        given = _answers(model, feeds, names)
    context.progress(f"measure {what}", index + 1, len(found))
    rows = differences(names, zip(wanted, given, strict=True))
    errors = [10 ** (-d.sqnr_db / 20) if d.same_shape and math.isfinite(d.max_error) else math.inf for d in rows]
    return float(np.mean(errors))


def _short(score: float) -> float:
    return float(f"{score:.4g}")


def _unreachable(blocks: int | None, macs: float | None, model: Model, before: int, removed: int) -> str:
    if macs is None:
        return f"blocks={blocks} cannot be reached: {removed} blocks could go"
    return f"macs={macs:g} cannot be reached: with every block gone, {costs(model).counted_macs / max(before, 1):.3g} stay"
