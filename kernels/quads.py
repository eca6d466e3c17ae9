"""Weights with many zeros for vpmaddubsw: panels of 4 channels, as fewer taps are used by any of these than by any of 16.

Groups are made as in `windows`, but all in one section, each widened for itself. Templates over addresses.
"""

from __future__ import annotations

from graphopt.kernels.abi import stack64
from graphopt.kernels.engine_state import get
from graphopt.kernels.memory import lds8, st32, stu8
from graphopt.kernels.windows import NONE, WINDOW, count_bits, match_pairs, pack_windows, tap_sums

QUAD = 4  # channels of a panel
WIDE_COST, QUAD_COST = 19, 10  # of a group, in time, as instructions were counted
DENSE = 0.6  # share of taps used by a panel of 4 channels above which it is not tried


def pack_quads(wk: int, windows: int, panels: int, weights: int, entries: int, firsts: int) -> int:
    """Returns the number of groups of all panels, at most panels * windows * windows.MOST_GROUPS.

    wk: s8 [panels * 4][windows * 16]; weights: s8 [groups][4][4]; entries: int32 [groups][2], the window and the four indices of
    vpshufb; firsts: int32 [panels + 1], the first group of each panel.
    """
    sums, pairs = stack64(64), stack64(36)  # 64: WINDOW * SUMS bytes
    width, count = windows * WINDOW, 0
    for panel in range(panels):
        st32(firsts + 4 * panel, count)
        for window in range(windows):
            rows = wk + panel * QUAD * width + window * WINDOW
            live = tap_sums(rows, width, QUAD, sums)
            for first in range(0, match_pairs(sums, live, pairs), 2):
                st32(entries + 8 * count, window)
                for k in range(4):
                    tap = get(pairs, 2 * first + k)
                    stu8(entries + 8 * count + 4 + k, tap)
                    for n in range(QUAD):
                        stu8(weights + (count * QUAD + n) * 4 + k, 0 if tap == NONE else lds8(rows + n * width + tap))
                count += 1
    st32(firsts + 4 * panels, count)
    return count


def used_taps(wk: int, windows: int, panels: int) -> int:
    """Taps that one of the channels of its panel of 4 uses, of all panels."""
    sums = stack64(64)
    live, width = 0, windows * WINDOW
    for panel in range(panels):
        for window in range(windows):
            live += count_bits(tap_sums(wk + panel * QUAD * width + window * WINDOW, width, QUAD, sums))
    return live


def pack_best(wk: int, windows: int, panels: int, weights: int, entries: int, firsts: int, matched: int) -> int:
    """As `pack_windows`; or, where that runs faster, `pack_quads` of 4 * panels, and then minus the number of groups."""
    count = pack_windows(wk, windows, panels, weights, entries, firsts, matched)
    if used_taps(wk, windows, 4 * panels) > DENSE * (4 * panels * windows * WINDOW):
        return count
    quads = pack_quads(wk, windows, 4 * panels, weights, entries, firsts)
    if quads * QUAD_COST < count * WIDE_COST:
        return -quads
    return pack_windows(wk, windows, panels, weights, entries, firsts, matched)


TEMPLATES = (pack_quads, used_taps, pack_best)
