"""Criteria of `sparsify` that know what a layer reads: Wanda, SparseGPT, and alternating directions (ALPS).

All minimise, or estimate, the error at the layer's own output: with C the covariance of its inputs and W* the dense weights that
fit the wanted output best, that error is (W - W*) C (W - W*)' for each output. Here weights are [outputs, inputs] and float64.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm

import numpy as np

from graphopt.gram import on_support
from graphopt.sparsity import Task, choose, criterion

_FLOOR = 1e-10  # variance that keeps the equations of dead inputs solvable
_PANEL = 64  # columns that SparseGPT chooses among at once
_ROUNDS = 300  # of alternating directions, at most
_SETTLED = 1e-4  # share of the kept weights that may still change
_GROW = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the kept weights that changed -> factor of the penalty (ALPS, section 3)


def _dense(weight: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """The damped covariance, and the dense weights that fit the wanted output best, drawn towards those there were."""
    covariance, start = task.statistics["covariance"], weight.astype(np.float64)
    strength = task.damping * np.trace(covariance) / len(covariance) + _FLOOR
    system = covariance + strength * np.eye(len(covariance))
    return system, start + np.linalg.solve(system, task.statistics["cross"] - covariance @ start.T).T


def _refitted(system: np.ndarray, dense: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The best weights where the mask allows any."""
    return np.asarray(on_support(system, system @ dense.T, np.ascontiguousarray(mask.T)).T)


@criterion("wanda", measured=True)
def wanda(weight: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """|weight| times the root mean square of its input, compared within each output (Sun et al. 2024, arXiv:2306.11695).

    Blocks of several outputs are compared within the layer. The weights that stay keep their values.
    """
    power = np.diag(task.statistics["covariance"]) + np.square(task.statistics["mean"])
    scores = np.square(weight, dtype=np.float64) * np.maximum(power, 0)
    if task.pattern.rows > 1 or task.pattern.of:
        return choose(scores, task), weight
    return np.concatenate([choose(row[None], task) for row in scores]), weight


@criterion("obs", measured=True)
@criterion("sparsegpt", measured=True)
def sparsegpt(weight: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Column by column, what goes is made up for by the columns that follow (Frantar and Alistarh 2023, arXiv:2301.00774).

    Weights go by w^2 / d^2, 1 / d^2 being what is left of the input's variance once later inputs are known: within panels of 64
    columns, or the next m of n:m. Blocks go by the sum over them. In the end all weights that stay are fitted once more.
    """
    system, dense = _dense(weight, task)
    mask = _swept(dense, system, task)
    return mask, _refitted(system, dense, mask)


def _swept(dense: np.ndarray, system: np.ndarray, task: Task) -> np.ndarray:
    """The mask that SparseGPT's sweep leaves."""
    upper = np.linalg.cholesky(np.linalg.inv(system)).T
    scale, left = np.diag(upper), dense.copy()
    mask = np.ones(dense.shape, bool)
    width, unit = dense.shape[1], lcm(task.pattern.columns, max(task.pattern.of, 1))
    panel = unit if task.pattern.of else max(_PANEL // unit, 1) * unit
    outer = max(_PANEL // panel, 1) * panel
    for start in range(0, width, outer):
        end = min(start + outer, width)
        wrong = np.zeros((len(dense), end - start))
        for column in range(start, end):
            if (column - start) % panel == 0:
                seen = slice(column, min(column + panel, end))
                mask[:, seen] = choose(np.square(left[:, seen] / scale[seen]), _share(task, len(dense), seen))
            lost = np.where(mask[:, column], 0, left[:, column]) / scale[column]
            left[:, column:end] -= lost[:, None] * upper[column, column:end]
            wrong[:, column - start] = lost
        left[:, end:] -= wrong @ upper[start:end, end:]
    return mask


def _share(task: Task, outputs: int, seen: slice) -> Task:
    """The task for some columns, rounded so that all of them together lose what they should."""
    blocks = outputs // task.pattern.rows / task.pattern.columns
    first, last = (round(task.ratio * blocks * end) for end in (seen.start, seen.stop))
    return replace(task, ratio=(last - first) / (blocks * (seen.stop - seen.start)))


@criterion("alps", measured=True)
def alps(weight: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """The mask and the weights together, by alternating directions (Meng et al. 2024, arXiv:2406.07831).

    Dense weights that fit, and sparse weights near them, approach each other under a growing penalty until the mask settles. It
    serves every pattern, because only the nearest sparse matrix has to be known. In the end the weights that stay are refitted.
    """
    system, dense = _dense(weight, task)
    return (mask := _settled(dense, system, task)), _refitted(system, dense, mask)


def _settled(dense: np.ndarray, system: np.ndarray, task: Task) -> np.ndarray:
    """The mask on which both agree; float32 will do, because weights are fitted afterwards."""
    scale = np.sqrt(np.diag(system))
    values, vectors = (a.astype(np.float32) for a in np.linalg.eigh(system / scale / scale[:, None]))
    back = np.ascontiguousarray(vectors.T)
    aim = (dense * scale).astype(np.float32)
    wanted = ((dense @ system) / scale).astype(np.float32)
    mask = last = choose(np.square(aim), task)
    near, pull, penalty = np.where(mask, aim, 0), np.zeros_like(aim), np.float32(0.1)
    for turn in range(1, _ROUNDS + 1):
        full = ((wanted + penalty * near - pull) @ vectors / (values + penalty)) @ back
        moved = full + pull / penalty
        mask = choose(np.square(moved), task)
        near = np.where(mask, moved, 0)
        pull += penalty * (full - near)
        if turn % 3 == 0:
            changed = np.count_nonzero(mask != last) / 2 / max(int(mask.sum()), 1)
            if changed <= _SETTLED:
                break
            penalty *= np.float32(next(factor for share, factor in _GROW if changed >= share))
            last = mask
    return mask
