"""Sums over sampled rows from which least squares, ridge and per-output moments of a linear layer follow in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.layers import Layer

Fit = tuple[np.ndarray, np.ndarray]  # matrix (groups, features, outputs) and bias (groups, outputs), float64
_FLOOR = 1e-10  # ridge that keeps the equations of all-dead features solvable
_STEPS = 200  # conjugate gradients, at most
_PRECISION = 1e-5  # of their residual
_GAIN = 4.0  # moments are matched by at most this factor


class Gram:
    """First and second moments of inputs (rows, groups, features) and targets (rows, groups, outputs).

    Products are summed in float64 about the mean of the first rows, so that nothing cancels.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """More rows; both float32."""
        if not len(x):
            return
        if not self.count:
            self.x0, self.y0 = x.mean(0), y.mean(0)
            groups, features, outputs = x.shape[1], x.shape[2], y.shape[2]
            self.sx, self.sy = np.zeros((groups, features)), np.zeros((groups, outputs))
            self.xx, self.xy = np.zeros((groups, features, features)), np.zeros((groups, features, outputs))
            self.yy = np.zeros((groups, outputs))
        x, y = x - self.x0, y - self.y0
        self.sx += x.sum(0, dtype=np.float64)
        self.sy += y.sum(0, dtype=np.float64)
        self.yy += np.square(y, dtype=np.float64).sum(0)
        self.count += len(x)
        if x.shape[1] == 1:  # two-dimensional and contiguous: numpy gives other products not to BLAS
            x, y = x[:, 0], y[:, 0]
            self.xx[0] += x.T @ x
            self.xy[0] += x.T @ y
            return
        turned = np.ascontiguousarray(x.transpose(1, 2, 0))
        self.xx += turned @ np.ascontiguousarray(x.transpose(1, 0, 2))
        self.xy += turned @ np.ascontiguousarray(y.transpose(1, 0, 2))

    def moments(self) -> Moments:
        """Means and covariances."""
        n = self.count
        mx, my = self.sx / n, self.sy / n
        cov = self.xx / n - mx[:, :, None] * mx[:, None, :]
        cross = self.xy / n - mx[:, :, None] * my[:, None, :]
        return Moments(n, mx + self.x0, my + self.y0, cov, cross, np.maximum(self.yy / n - my * my, 0))


@dataclass(frozen=True)
class Moments:
    """Means of inputs and targets, covariances of inputs with each other and with targets, variances of targets."""

    count: int
    mean_x: np.ndarray
    mean_y: np.ndarray
    cov: np.ndarray
    cross: np.ndarray
    var_y: np.ndarray

    def joined(self, other: Moments, weight: float = 1.0) -> Moments:
        """Of both sets of rows together, those of `other` counted `weight` times."""
        a, b = self.count, other.count * weight
        wa, wb = a / (a + b), b / (a + b)
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        return Moments(
            int(a + b),
            wa * self.mean_x + wb * other.mean_x,
            wa * self.mean_y + wb * other.mean_y,
            wa * self.cov + wb * other.cov + wa * wb * dx[:, :, None] * dx[:, None, :],
            wa * self.cross + wb * other.cross + wa * wb * dx[:, :, None] * dy[:, None, :],
            wa * self.var_y + wb * other.var_y + wa * wb * dy * dy,
        )

    def about_zero(self) -> Moments:
        """The same sums about zero: fits by them have no bias."""
        mx, my = self.mean_x, self.mean_y
        cov = self.cov + mx[:, :, None] * mx[:, None, :]
        cross = self.cross + mx[:, :, None] * my[:, None, :]
        return Moments(self.count, np.zeros_like(mx), np.zeros_like(my), cov, cross, self.var_y + my * my)

    def centred(self, fit: Fit) -> Fit:
        """The same matrix with the bias that makes the mean right."""
        matrix = fit[0]
        return matrix, self.mean_y - np.einsum("gf,gfo->go", self.mean_x, matrix)

    def ridge(self, start: np.ndarray, alpha: float) -> Fit:
        """argmin E|y - xM - b|^2 + lambda |M - start|^2, with lambda = alpha times the mean variance of the features.

        Hoerl and Kennard 1970, drawn towards the weights that were there and not towards zero.
        """
        features = self.cov.shape[1]
        strength = alpha * np.trace(self.cov, axis1=1, axis2=2) / features + _FLOOR
        system = self.cov + strength[:, None, None] * np.eye(features)
        return self.centred((start + np.linalg.solve(system, self.cross - self.cov @ start), self.mean_y))

    def supported(self, start: np.ndarray, alpha: float) -> Fit:
        """`ridge` for a sparse `start` (one group): each output keeps to the features it has."""
        strength = alpha * np.trace(self.cov[0]) / self.cov.shape[1] + _FLOOR
        system = self.cov[0] + strength * np.eye(self.cov.shape[1])
        change = on_support(system, self.cross[0] - self.cov[0] @ start[0], start[0] != 0)
        return self.centred((start + change, self.mean_y))

    def matched(self, fit: Fit) -> Fit:
        """Every output scaled and shifted to the mean and variance of its target: least squares shrinks what it predicts badly."""
        matrix, _ = fit
        have = np.sqrt(np.maximum((matrix * (self.cov @ matrix)).sum(1), 0))
        want = np.sqrt(self.var_y)
        gain = np.clip(want / np.maximum(have, 1e-3 * want + 1e-12), 0, _GAIN)
        return self.centred((matrix * gain[:, None, :], self.mean_y))

    def error(self, fit: Fit) -> float:
        """E|y - xM - b|^2 over the variance of y."""
        matrix, bias = fit
        offset = self.mean_y - np.einsum("gf,gfo->go", self.mean_x, matrix) - bias
        quadratic = (matrix * (self.cov @ matrix)).sum()
        wrong = self.var_y.sum() - 2 * (matrix * self.cross).sum() + quadratic + np.square(offset).sum()
        return float(max(wrong, 0) / max(self.var_y.sum(), 1e-30))


def on_support(system: np.ndarray, right: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """argmin over M of tr(M' system M) / 2 - tr(M' right), M being zero outside `mask`; all but `system` [features, outputs].

    Outputs with equal support are solved together. Many wide systems are solved by conjugate gradients instead, all at once.
    """
    features, outputs = mask.shape
    found = np.zeros_like(right)
    packed = np.packbits(mask, axis=0)
    kinds, which = np.unique(packed, axis=1, return_inverse=True)
    which = which.reshape(-1)
    sizes = mask.sum(0)
    direct = float((sizes.astype(np.float64) ** 3).mean()) * kinds.shape[1] / 3
    if kinds.shape[1] > 1 and direct > _STEPS * features**2 * outputs * 2:
        return _conjugate(system, right, mask)
    for kind in range(kinds.shape[1]):
        columns = np.flatnonzero(which == kind)
        own = np.flatnonzero(mask[:, columns[0]])
        if own.size:
            found[np.ix_(own, columns)] = np.linalg.solve(system[np.ix_(own, own)], right[np.ix_(own, columns)])
    return found


def _conjugate(system: np.ndarray, right: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Conjugate gradients with the diagonal for preconditioner, on every output's own support."""
    weight = 1 / np.diag(system)[:, None]
    found = np.zeros_like(right)
    residual = np.where(mask, right, 0)
    goal = _PRECISION**2 * np.square(residual).sum(0)
    towards = weight * residual
    power = (residual * towards).sum(0)
    for _ in range(_STEPS):
        image = np.where(mask, system @ towards, 0)
        bend = (towards * image).sum(0)
        step = np.divide(power, bend, out=np.zeros_like(power), where=bend > 0)
        found += step * towards
        residual -= step * image
        if (np.square(residual).sum(0) <= goal).all():
            break
        scaled = weight * residual
        fresh = (residual * scaled).sum(0)
        towards = scaled + np.divide(fresh, power, out=np.zeros_like(power), where=power > 0) * towards
        power = fresh
    return found


# ---- rows of a layer: which positions, and what lies there


def positions(layer: Layer, shape: tuple[int, ...], wanted: int, seed: int) -> np.ndarray:
    """Flat positions (row, *spatial) of an output of that shape, at most `wanted`, drawn without replacement, in order."""
    total = int(np.prod(spread(layer, shape), dtype=np.int64))
    if wanted >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, wanted, replace=False))


def spread(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of an output other than its channels."""
    return (shape[0], *shape[2:]) if layer.window is not None else shape[:-1]


def outputs_at(layer: Layer, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(positions, groups, outputs a group) of a tensor like the layer's output."""
    flat = np.moveaxis(y, layer.channel_axis, -1)
    flat = flat.reshape(-1, flat.shape[-1])[at] if layer.window is None else flat[np.unravel_index(at, flat.shape[:-1])]
    return np.asarray(flat.reshape(len(at), -1, 1) if layer.groups > 1 else flat[:, None, :])


def inputs_at(layer: Layer, x: np.ndarray, out: tuple[int, ...], at: np.ndarray) -> np.ndarray:
    """(positions, groups, features) that the layer reads to make its output, `out` being that output's `spread`."""
    if layer.window is None:
        return np.asarray(x.reshape(-1, x.shape[-1])[at][:, None, :])
    window = layer.window
    row, *places = np.unravel_index(at, out)
    padding = window.padding(x.shape[2:])
    if any(a or b for a, b in padding):
        x = np.pad(x, ((0, 0), (0, 0), *padding))
    starts = (p * s for p, s in zip(places, window.strides, strict=True))
    where: Any = (row, slice(None), *starts)
    if set(window.kernel) == {1}:
        found = x[where]
    else:
        seen = np.lib.stride_tricks.sliding_window_view(x, window.extents, axis=tuple(range(2, x.ndim)))
        spaced: Any = (..., *(slice(None, None, d) for d in window.dilations))
        found = seen[where][spaced]
    return np.asarray(found.reshape(len(at), x.shape[1], -1) if layer.groups > 1 else found.reshape(len(at), 1, -1))
