"""Reshapes that make one axis of several, or several of one: at the end, when all else is known, one part is left free.

Of C = H x D, removing index h of H takes all (h, d) from C, and removing d takes all (h, d) too: with both free everything would go
together. So one part stays free and the others are pinned.
"""

from __future__ import annotations

import numpy as np

from graphopt.dim_labels import Classes, Dims, Fold


def resolve(dims: Dims) -> None:
    """Decide every fold, in the order of the nodes."""
    for fold in dims.folds:
        _resolve(dims.classes, fold)


def _resolve(classes: Classes, fold: Fold) -> None:
    """The outermost part of which at least two units remain: heads rather than what is inside them.

    Where two folds and a grouped convolution between them (a channel shuffle) leave the outermost part one unit, the next is it.
    """
    grid = fold.whole.reshape([part.size for part in fold.parts])
    for axis, part in enumerate(fold.parts):
        rows = np.moveaxis(grid, axis, 0).reshape(part.size, -1)
        if not classes.is_pinned(part) and _remaining(classes, rows, part) >= 2:
            classes.union(rows, part[:, None])
            for other in (*fold.parts[:axis], *fold.parts[axis + 1 :]):
                classes.pin(other, "folded into one axis with one that is free", fold.node)
            return
    pinned = next((part for part in fold.parts if classes.is_pinned(part)), None)
    if pinned is not None:
        classes.union(fold.whole, pinned[:1])  # for its cause
    for labels in (fold.whole, *fold.parts):
        classes.pin(labels, "folded so that no part is free", fold.node)


def _remaining(classes: Classes, rows: np.ndarray, part: np.ndarray) -> int:
    """Free classes among the indices of `part`, were each tied to all of its row."""
    roots, places = np.unique(classes.find(np.concatenate([part[:, None], rows], axis=1)), return_inverse=True)
    trial = Classes()
    labels = trial.fresh(roots.size)
    held = roots[classes.cause(roots) < len(classes.causes)]
    trial.pin(labels[np.searchsorted(roots, held)], "", "")
    table = labels[places.reshape(part.size, -1)]
    trial.union(table[:, 1:], table[:, :1])
    return int(np.count_nonzero(np.unique(trial.roots()[table[:, 0]])))
