"""What each kernel computes, in plain numpy and float64: the tests compare the kernels with these."""

from __future__ import annotations

import numpy as np

SIDE = 4096  # histogram bins on each side of zero
MIN_EXPONENT = -126  # log2 of the finest bin width: 2**126 is the largest scale float32 can hold


def exponent_of(magnitude: float) -> int:
    """The smallest exponent >= MIN_EXPONENT with magnitude < SIDE * 2**exponent."""
    return max(int(np.frexp(magnitude)[1]) - 12, MIN_EXPONENT) if magnitude else MIN_EXPONENT


def widen(counts: np.ndarray, shift: int) -> np.ndarray:
    """The histogram with bins 2**shift times as wide; the same array where shift is 0."""
    if shift == 0:
        return counts
    bins = np.arange(-SIDE, SIDE) >> min(shift, 62)  # arithmetic: -1 stays -1
    wide = np.zeros_like(counts)
    np.add.at(wide, bins + SIDE, counts)
    return wide


def scan(rows: np.ndarray) -> tuple[np.ndarray, int, np.ndarray, np.ndarray, np.ndarray]:
    """(counts int64 [2 * SIDE], exponent, low, high, non-finite count of each row) of float32 [rows, elements].

    With k = trunc(|x| / 2**exponent), x is counted in bin SIDE + k where x >= 0 and in bin SIDE - 1 - k where x < 0.
    """
    finite = np.isfinite(rows)
    low = np.where(finite, rows, np.inf).min(1, initial=np.inf)
    high = np.where(finite, rows, -np.inf).max(1, initial=-np.inf)
    values = rows[finite].astype(np.float64)
    exponent = exponent_of(float(np.abs(values).max(initial=0)))
    k = np.trunc(np.abs(values) * 2.0**-exponent).astype(np.int64)
    counts = np.bincount(np.where(values < 0, SIDE - 1 - k, SIDE + k), minlength=2 * SIDE).astype(np.int64)
    return counts, exponent, low.astype(np.float32), high.astype(np.float32), (~finite).sum(1)


def requantise(acc: np.ndarray, scale: np.ndarray, zero: int) -> np.ndarray:
    """int32 [..., N] times float32 [N], rounded half to even, plus zero, as u8."""
    return np.clip(np.rint(acc.astype(np.float32) * scale) + zero, 0, 255).astype(np.uint8)


def add_residual(q: np.ndarray, r: np.ndarray, ra: np.float32, rb: np.float32, fx: np.float32) -> np.ndarray:
    """u8 of rint(fma(r, rb, fma(q, ra, fx))): each fma in extended precision, rounded once."""
    wide = np.longdouble
    inner = (q.astype(wide) * wide(ra) + wide(fx)).astype(np.float32)
    return np.clip(np.rint((r.astype(wide) * wide(rb) + inner.astype(wide)).astype(np.float32)), 0, 255).astype(np.uint8)


def dense(x: np.ndarray, w: np.ndarray, comp: np.ndarray) -> np.ndarray:
    """int32 [M, N] = comp [N] + u8 [M, K] times s8 [N, K]."""
    return (comp + x.astype(np.int64) @ w.astype(np.int64).T).astype(np.int32)


def depthwise(x: np.ndarray, w: np.ndarray, comp: np.ndarray, strides: tuple[int, int]) -> np.ndarray:
    """int32 [OH, OW, C] = comp [C] + windows of u8 [H, W, C] (padded already) times s8 [C, k, k]."""
    k = w.shape[1]
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.int32), (k, k), (0, 1))[:: strides[0], :: strides[1]]
    return comp + np.einsum("hwckl,ckl->hwc", windows, w.astype(np.int32), dtype=np.int32)


def nbits(x: np.ndarray, weight: np.ndarray, scale: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    """float64 [M, N] = x [M, K] times 4-bit weights u8 [N, blocks, block / 2], scale [N, blocks], zero u8 [N, (blocks + 1) / 2]."""

    def nibbles(packed: np.ndarray) -> np.ndarray:
        return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1).astype(np.float64)

    n, blocks, _ = weight.shape
    zeros = np.full((n, blocks), 8.0) if zero is None else nibbles(zero.reshape(n, -1))[:, :blocks]
    w = (nibbles(weight) - zeros[..., None]) * scale.reshape(n, blocks, 1)
    return np.asarray(x.astype(np.float64) @ w.reshape(n, -1)[:, : x.shape[1]].T)
