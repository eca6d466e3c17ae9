"""From ranges to scales and zero points, and from float constants to integers (ONNX operators QuantizeLinear, DequantizeLinear)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SMALLEST = np.float32(2.0**-100)  # far above denormals, so that products of two scales stay normal
_BIAS_LIMIT = 2.0**30  # half of int32: the other half is the sum of products


@dataclass(frozen=True)
class Parameters:
    """real = (quantised - zero) * scale, for one tensor."""

    scale: np.float32
    zero: int
    dtype: np.dtype

    @property
    def low(self) -> float:
        """The least value that can be represented."""
        return float(self.scale) * (int(np.iinfo(self.dtype).min) - self.zero)

    @property
    def high(self) -> float:
        """The greatest value that can be represented."""
        return float(self.scale) * (int(np.iinfo(self.dtype).max) - self.zero)

    def quantise(self, values: np.ndarray) -> np.ndarray:
        """Integers as QuantizeLinear gives them: round half to even, saturate."""
        info = np.iinfo(self.dtype)
        integers = np.clip(np.rint(values / self.scale) + self.zero, info.min, info.max).astype(self.dtype)
        return np.asarray(integers)


def parameters(low: float, high: float, dtype: np.dtype, *, symmetric: bool) -> Parameters:
    """Scale and zero point that cover [low, high] and represent zero exactly; scale 1 where the range is empty.

    >>> parameters(-1.0, 3.0, np.dtype(np.uint8), symmetric=False).zero
    64
    >>> parameters(-1.0, 3.0, np.dtype(np.int8), symmetric=True).zero
    0
    """
    low, high = min(low, 0.0), max(high, 0.0)
    info = np.iinfo(dtype)
    if symmetric:
        zero = (int(info.min) + int(info.max) + 1) // 2
        scale = np.float32(max(-low, high) / (int(info.max) - zero))
        return Parameters(max(scale, SMALLEST) if scale else np.float32(1), zero, dtype)
    scale = np.float32((high - low) / (int(info.max) - int(info.min)))
    if not scale:
        return Parameters(np.float32(1), int(info.min), dtype)
    scale = max(scale, SMALLEST)
    return Parameters(scale, int(info.min) + round(-low / float(scale)), dtype)


@dataclass(frozen=True, eq=False)
class Weight:
    """int8 values and one scale a channel (or one for all, of shape ()); the zero point is 0."""

    values: np.ndarray
    scales: np.ndarray

    def error(self, original: np.ndarray, axis: int) -> np.ndarray:
        """Dequantised minus original."""
        shape = [1] * original.ndim
        if self.scales.ndim:
            shape[axis] = -1
        difference: np.ndarray = self.values * self.scales.reshape(shape) - original
        return difference


def quantise_weight(values: np.ndarray, axis: int | None, *, bits: int, least: np.ndarray | None = None) -> Weight:
    """Symmetric int8 weights, one scale for each index of `axis` (None: one for all); `least`: no scale is smaller.

    A channel of zeros takes its least scale, or 1: it has nothing to represent.
    """
    limit = 2 ** (bits - 1) - 1
    others = tuple(i for i in range(values.ndim) if i != axis) if axis is not None else None
    largest = np.maximum(values.max(axis=others, initial=0), -values.min(axis=others, initial=0))
    scales = (largest / np.float32(limit)).astype(np.float32)
    if least is not None:
        scales = np.maximum(scales, least if axis is not None else least.max(initial=0)).astype(np.float32)
    scales = np.where(scales > 0, np.maximum(scales, SMALLEST), np.float32(1)).astype(np.float32)
    shape = [1] * values.ndim
    if axis is not None:
        shape[axis] = -1
    quantised = np.clip(np.rint(values / scales.reshape(shape)), -limit, limit).astype(np.int8)
    return Weight(quantised, scales)


def least_scales(bias: np.ndarray, input_scale: np.float32) -> np.ndarray:
    """The smallest weight scale of each channel with which its bias still fits int32 at scale input x weight."""
    least: np.ndarray = (np.abs(bias.astype(np.float64)) / (float(input_scale) * _BIAS_LIMIT)).astype(np.float32)
    return least


def quantise_bias(bias: np.ndarray, input_scale: np.float32, weight_scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int32 values, float32 scales): the scale must be the float32 product of the two, which is what runtimes check."""
    scales = np.asarray(np.float32(input_scale) * weight_scales, np.float32)
    limit = 2.0**31 - 1
    return np.clip(np.rint(bias.astype(np.float64) / scales), -limit, limit).astype(np.int32), scales
