"""Weights for vpmaddubsw, in an order in which it cannot saturate; templates over addresses.

vpmaddubsw adds two products u8 x s8 as int16. That is exact for any input where the weights above zero add up to at most 128, and
those below to at least -128: 255 * 128 = 32640. So the taps of a window of 16 input bytes are put into pairs, for each panel of 16
channels, such that this holds in every channel. Where it even holds for four taps, the int16 sums of two pairs are added before
they are widened: half the instructions that widen. Two pairs make a group of 4 taps, which vpshufb picks from the window.

The groups of a panel come in three sections, by what the kernel does with them:

* chains: two groups of one window, whose int16 sums are added;
* twins: two groups of one window, each widened for itself;
* lone groups.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from graphopt.kernels.abi import stack64
from graphopt.kernels.engine_state import get, put
from graphopt.kernels.memory import I1, I8, at, emit, fill, function, lds8, ldu8, st32, stu8

WINDOW = 16  # input bytes of a window
MOST_GROUPS = 8  # of a window: every tap without a partner
MATCHED = 8 * (1 + 4 * MOST_GROUPS)  # bytes of what match_window finds
NONE = 128  # vpshufb writes 0 for this index
SECTIONS = 3
SUMS = 32  # bytes of what a set of taps adds up to: in each of 16 channels the weights above zero, then those below
REACH = 128
_SUMS = ir.VectorType(I8, SUMS)


def _added(b: ir.IRBuilder, one: ir.Value, two: ir.Value) -> ir.Value:
    left, right = (b.load(at(b, address, _SUMS), align=1) for address in (one, two))
    return b.call(function(b, "llvm.uadd.sat.v32i8", _SUMS, [_SUMS] * 2), [left, right])


@emit(types.boolean(types.int64, types.int64))
def fits(b: ir.IRBuilder, one: ir.Value, two: ir.Value) -> ir.Value:
    """Whether two sets of taps may be summed."""
    above = b.icmp_unsigned(">", _added(b, one, two), ir.Constant(_SUMS, [REACH] * SUMS))
    bits = b.bitcast(above, ir.IntType(SUMS))
    return b.select(b.icmp_unsigned("==", bits, ir.Constant(bits.type, 0)), I1(1), I1(0))


@emit(types.void(types.int64, types.int64, types.int64))
def join(b: ir.IRBuilder, target: ir.Value, one: ir.Value, two: ir.Value) -> None:
    """The sums of both sets; 255 stands for more."""
    b.store(_added(b, one, two), at(b, target, _SUMS), align=1)


def count_bits(x: int) -> int:
    """Of 16."""
    x -= x >> 1 & 0x5555
    x = (x & 0x3333) + (x >> 2 & 0x3333)
    x = x + (x >> 4) & 0x0F0F
    return x + (x >> 8) & 31


def tap_sums(rows: int, width: int, channels: int, sums: int) -> int:
    """Fill u8 sums[16][SUMS], each tap for itself; returns the taps that a channel uses, as bits. rows: s8 [channels][width]."""
    live = 0
    fill(sums, 0, WINDOW * SUMS)
    for tap in range(WINDOW):
        for n in range(channels):
            weight = lds8(rows + n * width + tap)
            stu8(sums + SUMS * tap + n, max(weight, 0))
            stu8(sums + SUMS * tap + 16 + n, max(-weight, 0))
            if weight != 0:
                live |= 1 << tap
    return live


def largest(sums: int, among: int) -> int:
    """The tap of `among` with the largest weight."""
    best, most = -1, -1
    for tap in range(WINDOW):
        if among >> tap & 1:
            for n in range(SUMS):
                if ldu8(sums + SUMS * tap + n) > most:
                    best, most = tap, ldu8(sums + SUMS * tap + n)
    return best


def find_four(sums: int, order: int, first: int, count: int, left: int, found: int) -> bool:
    """Fill int64 found[4]: tap order[first], and the first three of `left` behind it that may be summed with it."""
    two, three = stack64(4), stack64(4)
    a = get(order, first)
    for i in range(first + 1, count):
        b = get(order, i)
        if (left >> b & 1) == 0 or not fits(sums + SUMS * a, sums + SUMS * b):
            continue
        join(two, sums + SUMS * a, sums + SUMS * b)
        for j in range(i + 1, count):
            c = get(order, j)
            if (left >> c & 1) == 0 or not fits(two, sums + SUMS * c):
                continue
            join(three, two, sums + SUMS * c)
            for k in range(j + 1, count):
                d = get(order, k)
                if (left >> d & 1) != 0 and fits(three, sums + SUMS * d):
                    put(found, 0, a)
                    put(found, 1, b)
                    put(found, 2, c)
                    put(found, 3, d)
                    return True
    return False


def match_fours(sums: int, live: int, fours: int) -> int:
    """Fill int64 fours[][4] with taps that may be summed, large weights first; returns an even number of them."""
    order = stack64(16)
    count, left = 0, live
    while left != 0:
        tap = largest(sums, left)
        left &= ~(1 << tap)
        put(order, count, tap)
        count += 1
    found, left = 0, live
    for first in range(count):
        if left >> get(order, first) & 1 and find_four(sums, order, first, count, left, fours + 32 * found):
            for k in range(4):
                left &= ~(1 << get(fours, 4 * found + k))
            found += 1
    return found // 2 * 2


def fewest(safe: int, among: int, left: int) -> int:
    """The tap of `among` that has the fewest partners left."""
    best, least = -1, 99
    for a in range(WINDOW):
        if among >> a & 1:
            degree = count_bits(get(safe, a) & left)
            if degree < least:
                best, least = a, degree
    return best


def match_pairs(sums: int, left: int, pairs: int) -> int:
    """Fill int64 pairs[][2] with taps, those with few partners first; returns how many, an even number."""
    safe = stack64(16)
    for a in range(WINDOW):
        put(safe, a, 0)
        for b in range(WINDOW):
            if a != b and fits(sums + SUMS * a, sums + SUMS * b):
                put(safe, a, get(safe, a) | 1 << b)
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


def match_window(rows: int, width: int, groups: int) -> int:
    """Fill int64 groups[][4] with the taps of each group, chains first; returns chains * 16 + all groups."""
    sums, fours, pairs = stack64(64), stack64(16), stack64(36)  # 64: WINDOW * SUMS bytes
    live = tap_sums(rows, width, 16, sums)
    count = match_fours(sums, live, fours)
    for chain in range(0, count, 2):
        for k in range(8):
            one = get(fours, 4 * chain + 4 * (k // 2 % 2) + k // 4 * 2 + k % 2)
            live &= ~(1 << one)
            put(groups, 4 * chain + k, one)
    more = match_pairs(sums, live, pairs)
    for k in range(2 * more):
        put(groups, 4 * count + k, get(pairs, k))
    return count // 2 * 16 + count + more // 2


def put_group(rows: int, width: int, window: int, taps: int, weights: int, entry: int) -> None:
    """Weights s8 [16][4] of the int64 taps [4], and the entry of the group."""
    st32(entry, window)
    for k in range(4):
        tap = get(taps, k)
        stu8(entry + 4 + k, tap)
        for n in range(16):
            stu8(weights + n * 4 + k, 0 if tap == NONE else lds8(rows + n * width + tap))


def pack_section(wk: int, windows: int, section: int, count: int, weights: int, entries: int, matched: int) -> int:
    """Append one section of a panel, behind `count` groups; returns their new number. matched: what match_window found."""
    width = windows * WINDOW
    for window in range(windows):
        found = matched + MATCHED * window
        chained, total = get(found, 0) // 16 * 2, get(found, 0) % 16
        even = total // 2 * 2
        first = 0 if section == 0 else (chained if section == 1 else even)
        last = chained if section == 0 else (even if section == 1 else total)
        for group in range(first, last):
            taps = found + 8 + 32 * group
            put_group(wk + window * WINDOW, width, window, taps, weights + 64 * count, entries + 8 * count)
            count += 1
    return count


def pack_windows(wk: int, windows: int, panels: int, weights: int, entries: int, firsts: int, matched: int) -> int:
    """Returns the number of groups of all panels, at most panels * windows * MOST_GROUPS.

    wk: s8 [panels * 16][windows * 16]; weights: s8 [groups][16][4]; entries: int32 [groups][2], the window and the four indices of
    vpshufb; firsts: int32 [panels * SECTIONS + 1], the first group of each section; matched: room for MATCHED bytes a window.
    """
    width = windows * WINDOW
    count = 0
    for panel in range(panels):
        rows = wk + panel * 16 * width
        for window in range(windows):
            found = matched + MATCHED * window
            put(found, 0, match_window(rows + window * WINDOW, width, found + 8))
        for section in range(SECTIONS):
            st32(firsts + 4 * (SECTIONS * panel + section), count)
            count = pack_section(rows, windows, section, count, weights, entries, matched)
    st32(firsts + 4 * SECTIONS * panels, count)
    return count


TEMPLATES = (
    count_bits, tap_sums, largest, find_four, match_fours, fewest, match_pairs, match_window, put_group, pack_section, pack_windows,
)  # fmt: skip
