"""Minimum, maximum, non-finite count and a mergeable histogram of float32 rows, in one pass over memory.

Bins are powers of two wide, aligned at zero and symmetric: with `k = trunc(|x| / 2**exponent)`, x lies in bin `SIDE + k`
where x >= 0 and in bin `SIDE - 1 - k` where x < 0. Doubling the width maps k to k >> 1 exactly, so histograms of any split
of the data merge to the histogram of the whole. The exponent is the smallest that keeps k below `SIDE`.

All comparisons are made on the bits as integers: LLVM vectorises integer minima, while float minima need fastmath, which would
lose NaN and Inf.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from graphopt.kernels.reference import MIN_EXPONENT, SIDE

_BLOCK = 4096  # floats of a block that stay in the L1 cache between the two loops over them
_SIGN_OFF = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)


@njit("void(int64[::1], int64)", cache=True, nogil=True)
def widen(counts: np.ndarray, shift: int) -> None:
    """Merge bins in place: the bin width grows by 2**shift, shift >= 0."""
    for k in range(SIDE):
        target = k >> shift if shift < 63 else 0
        if target != k:
            for source, bin_ in ((SIDE + k, SIDE + target), (SIDE - 1 - k, SIDE - 1 - target)):
                counts[bin_] += counts[source]
                counts[source] = 0


@njit("UniTuple(int32, 3)(int32[::1])", cache=True, nogil=True)
def _extremes(bits: np.ndarray) -> tuple[int, int, int]:
    """(lowest key, highest key, magnitude bits); keys are int32 that sort as the floats do."""
    low, high, magnitude = np.int32(0x7FFFFFFF), np.int32(-0x80000000), np.int32(0)
    for i in range(bits.size):
        key = bits[i] ^ ((bits[i] >> np.int32(31)) & _SIGN_OFF)
        low, high = min(low, key), max(high, key)
        magnitude = max(magnitude, bits[i] & _SIGN_OFF)
    return low, high, magnitude


@njit("UniTuple(int32, 4)(int32[::1])", cache=True, nogil=True)
def _finite_extremes(bits: np.ndarray) -> tuple[int, int, int, int]:
    """As `_extremes` over the finite elements, and the number of the others."""
    low, high, magnitude, bad = np.int32(0x7FFFFFFF), np.int32(-0x80000000), np.int32(0), np.int32(0)
    for i in range(bits.size):
        absolute = bits[i] & _SIGN_OFF
        if absolute >= _INFINITY:
            bad += np.int32(1)
        else:
            key = bits[i] ^ ((bits[i] >> np.int32(31)) & _SIGN_OFF)
            low, high = min(low, key), max(high, key)
            magnitude = max(magnitude, absolute)
    return low, high, magnitude, bad


@njit("int64(int32)", cache=True, nogil=True)
def _exponent(magnitude: int) -> int:
    """The smallest exponent whose bins hold a float of these magnitude bits."""
    exponent: int = max(np.int64(magnitude >> np.int32(23)) - 126 - 12, MIN_EXPONENT)
    return exponent


@njit("void(float32[::1], int32[::1], int64[::1], int64[::1], int64)", cache=True, nogil=True)
def _count(values: np.ndarray, index: np.ndarray, even: np.ndarray, odd: np.ndarray, exponent: int) -> None:
    """Add finite values to the bins; `index` is scratch as long as `values`, so that the arithmetic runs in SIMD.

    Neighbours go to two histograms: after ReLU they often hit the same bin, and would wait for each other's store.
    """
    scale = np.float32(2.0) ** np.float32(-exponent)
    for i in range(values.size):
        index[i] = np.int32(values[i] * scale) - np.int32(values[i] < 0) + np.int32(SIDE)
    for i in range(0, values.size - 1, 2):
        even[index[i]] += 1
        odd[index[i + 1]] += 1
    if values.size % 2:
        even[index[values.size - 1]] += 1


@njit("int64(float32[:, ::1], int64[::1], int64, float32[::1], float32[::1], int64[::1])", cache=True, nogil=True)
def scan(rows: np.ndarray, counts: np.ndarray, exponent: int, low: np.ndarray, high: np.ndarray, bad: np.ndarray) -> int:
    """Add rows to a histogram in place and return its exponent; see `reference.scan`.

    Parameters
    ----------
    rows : float32 [rows, elements]
    counts : int64 [2 * SIDE], the histogram so far
    exponent : its bin width is 2**exponent; MIN_EXPONENT where it is empty
    low, high : float32 [rows], out: extremes of the finite elements; +inf and -inf where there are none
    bad : int64 [rows], out: elements that are NaN or infinite, which no bin counts
    """
    index = np.empty(_BLOCK, np.int32)
    finite = np.empty(_BLOCK, np.float32)
    odd = np.zeros(2 * SIDE, np.int64)
    keys = np.empty(2, np.int32)
    for r in range(rows.shape[0]):
        keys[0], keys[1] = np.int32(0x7F800000), np.int32(-0x7F800001)
        bad[r] = 0
        for start in range(0, rows.shape[1], _BLOCK):
            block = rows[r, start : start + _BLOCK]
            bits = block.view(np.int32)
            least, most, magnitude = _extremes(bits)
            if magnitude >= _INFINITY:
                least, most, magnitude, others = _finite_extremes(bits)
                bad[r] += others
                kept = 0
                for i in range(block.size):
                    if np.isfinite(block[i]):
                        finite[kept] = block[i]
                        kept += 1
                block = finite[:kept]
            wanted = _exponent(magnitude)
            if wanted > exponent:
                widen(counts, wanted - exponent)
                widen(odd, wanted - exponent)
                exponent = wanted
            _count(block, index[: block.size], counts, odd, exponent)
            keys[0], keys[1] = min(keys[0], least), max(keys[1], most)
        for i in range(2):
            keys[i] ^= (keys[i] >> np.int32(31)) & _SIGN_OFF
        low[r], high[r] = keys.view(np.float32)
    counts += odd
    return exponent
