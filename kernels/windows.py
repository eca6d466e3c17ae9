"""Weights for vpmaddubsw, in an order in which it cannot saturate; templates over addresses.

vpmaddubsw adds two products u8 x s8 as int16. That is exact for any input where |a + b| <= 128 for the two weights: weights of one
sign reach at most 255 * 128 = 32640, of two signs less. So the taps of a window of 16 input bytes are paired, for each panel of 16
channels, such that this holds in every channel: a matching in the graph of pairs that are safe. A tap without a partner is paired
with none; one that no channel uses is left out. Two pairs make a group of 4 taps, which vpshufb picks from the window.
"""

from __future__ import annotations

from graphopt.kernels.abi import stack64
from graphopt.kernels.engine_state import get, put
from graphopt.kernels.memory import lds8, st32, stu8

WINDOW = 16  # input bytes of a window
MOST_GROUPS = 8  # of a window: every tap without a partner
NONE = 128  # vpshufb writes 0 for this index


def count_bits(x: int) -> int:
    """Of 16."""
    x -= x >> 1 & 0x5555
    x = (x & 0x3333) + (x >> 2 & 0x3333)
    x = x + (x >> 4) & 0x0F0F
    return x + (x >> 8) & 31


def safe_taps(rows: int, width: int, safe: int) -> int:
    """Fill int64 safe[16] with the partners of each tap, as bits; returns the taps that are used. rows: s8 [16][width]."""
    live = 0
    for a in range(WINDOW):
        put(safe, a, 0)
        for n in range(16):
            if lds8(rows + n * width + a) != 0:
                live |= 1 << a
                break
    for a in range(WINDOW):
        for b in range(a):
            if (live >> a & live >> b & 1) == 0:
                continue
            fits = True
            for n in range(16):
                total = lds8(rows + n * width + a) + lds8(rows + n * width + b)
                if total < -128 or total > 128:
                    fits = False
                    break
            if fits:
                put(safe, a, get(safe, a) | 1 << b)
                put(safe, b, get(safe, b) | 1 << a)
    return live


def fewest(safe: int, among: int, left: int) -> int:
    """The tap of `among` that has the fewest partners left."""
    best, least = -1, 99
    for a in range(WINDOW):
        if among >> a & 1:
            degree = count_bits(get(safe, a) & left)
            if degree < least:
                best, least = a, degree
    return best


def match_taps(safe: int, left: int, pairs: int) -> int:
    """Fill int64 pairs[][2] with taps, those with few partners first; returns how many pairs."""
    count = 0
    while left != 0:
        a = fewest(safe, left, left)
        left &= ~(1 << a)
        partners = get(safe, a) & left
        b = NONE
        if partners != 0:
            b = fewest(safe, partners, left)
            left &= ~(1 << b)
        put(pairs, 2 * count, a)
        put(pairs, 2 * count + 1, b)
        count += 1
    if count % 2 == 1:
        put(pairs, 2 * count, NONE)
        put(pairs, 2 * count + 1, NONE)
        count += 1
    return count


def pack_windows(wk: int, windows: int, panels: int, weights: int, entries: int, firsts: int) -> int:
    """Returns the number of groups of all panels, at most panels * windows * MOST_GROUPS.

    wk: s8 [panels * 16][windows * 16]; weights: s8 [groups][16][4]; entries: int32 [groups][2], the window and the four indices of
    vpshufb; firsts: int32 [panels + 1], the first group of each panel.
    """
    safe, pairs = stack64(16), stack64(36)
    width = windows * WINDOW
    count = 0
    for panel in range(panels):
        st32(firsts + 4 * panel, count)
        for window in range(windows):
            rows = wk + panel * 16 * width + window * WINDOW
            live = safe_taps(rows, width, safe)
            for first in range(0, match_taps(safe, live, pairs), 2):
                st32(entries + 8 * count, window)
                for k in range(4):
                    tap = get(pairs, 2 * first + k)
                    stu8(entries + 8 * count + 4 + k, tap)
                    for n in range(16):
                        stu8(weights + (count * 16 + n) * 4 + k, 0 if tap == NONE else lds8(rows + n * width + tap))
                count += 1
    st32(firsts + 4 * panels, count)
    return count


TEMPLATES = (count_bits, safe_taps, fewest, match_taps, pack_windows)
