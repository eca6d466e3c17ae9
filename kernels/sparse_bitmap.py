"""Weights that a bitmap places: checked, arranged for the kernels of `micro_bitmap`, and bound to rows of features.

Templates, as in the `engine_*` modules.
"""

from __future__ import annotations

import numpy as np

from graphopt.kernels.engine_state import R_DATA, R_DIMS, TENSOR_RECORD, fail, get, own, put
from graphopt.kernels.memory import copy, fill, ldu8, st32, stu8, text
from graphopt.kernels.micro_bitmap import EMPTY, GROUP, TABLE, UNROLL
from graphopt.kernels.sparse_plan import BYTES, P_IN, P_NUMBERS, P_OUT
from graphopt.kernels.sparse_state import (
    BITMAP,
    H_COUNT,
    H_GROUPS,
    H_MASKS,
    H_PLAN,
    H_STARTS,
    H_TABLE,
    H_VALUES,
    I_MODE,
    I_OH,
    I_PITCH,
    I_SCRATCH,
)

BEHIND = 32  # bytes behind the values that the kernels may read


def ones(byte: int) -> int:
    """Bits of a byte that are set."""
    byte -= byte >> 1 & 0x55
    byte = (byte & 0x33) + (byte >> 2 & 0x33)
    return (byte + (byte >> 4)) & 15


def check_bits(plan: int, record: int, values: int, error: int) -> int:
    """That the bitmap (uint8, whose size was checked) has as many bits as there are values, and none behind the last weight."""
    weights = get(plan, P_OUT) * get(plan, P_IN)
    total, data, size = 0, get(record, R_DATA), get(record, R_DIMS)
    for i in range(size):
        total += ones(ldu8(data + i))
    if total != values:
        return fail(error, text("the bitmap has another number of bits than there are values"), -1, total)
    if weights % 8 != 0 and ldu8(data + size - 1) >> weights % 8 != 0:
        return fail(error, text("the bitmap has bits behind the last weight"), -1, weights)
    return 1


def make_table(table: int) -> None:
    """For each byte of a bitmap: which of the packed values each of its eight weights is, or EMPTY."""
    fill(table, EMPTY, TABLE + 8)
    for byte in range(256):
        index = 0
        for bit in range(GROUP):
            if byte >> bit & 1:
                stu8(table + GROUP * byte + bit, index)
                index += 1


def spread_rows(bits: int, target: int, starts: int, outputs: int, width: int, groups: int) -> None:
    """Bits of rows that follow each other -> rows of `groups` whole bytes, and the first value of each row."""
    index = 0
    for n in range(outputs):
        st32(starts + 4 * n, index)
        for g in range((width + GROUP - 1) // GROUP):
            first, byte = n * width + g * GROUP, 0
            for bit in range(min(GROUP, width - g * GROUP)):
                byte |= (ldu8(bits + (first + bit) // 8) >> (first + bit) % 8 & 1) << bit
            stu8(target + n * groups + g, byte)
            index += ones(byte)


def fill_bitmap(handle: int, plan: int, consts: int, error: int) -> int:
    """Arrange the weights; the plan, scales, bias and limits are in place."""
    outputs, width, count = get(plan, P_OUT), get(plan, P_IN), get(consts, R_DIMS)
    groups = (width + GROUP * UNROLL - 1) // (GROUP * UNROLL) * UNROLL
    size = count if get(plan, P_NUMBERS) == BYTES else 4 * count
    masks, starts = own(handle, outputs * groups), own(handle, 4 * outputs)
    values, table = own(handle, size + BEHIND), own(handle, TABLE + 8)
    if masks == 0 or starts == 0 or values == 0 or table == 0:
        return fail(error, text("no memory for the weights"), -1, outputs)
    fill(masks, 0, outputs * groups)
    fill(values + size, 0, BEHIND)
    copy(values, get(consts, R_DATA), size)
    make_table(table)
    spread_rows(get(consts + 8 * TENSOR_RECORD, R_DATA), masks, starts, outputs, width, groups)
    put(handle, H_MASKS, masks)
    put(handle, H_STARTS, starts)
    put(handle, H_VALUES, values)
    put(handle, H_TABLE, table)
    put(handle, H_GROUPS, groups)
    put(handle, H_COUNT, count)
    return 1


def bind_bitmap(handle: int, instance: int, rows: int, error: int) -> int:
    """`rows` of features, which are copied to where they end with zeros unless they fill whole groups."""
    width, padded = get(get(handle, H_PLAN), P_IN), get(handle, H_GROUPS) * GROUP
    put(instance, I_MODE, BITMAP)
    put(instance, I_OH, rows)
    put(instance, I_PITCH, 4 * padded)
    if width == padded:
        return 1
    scratch = own(instance, 4 * padded * rows) if rows < (1 << 40) // padded else 0
    if scratch == 0:
        return fail(error, text("no memory for a copy of the rows; there are"), -1, rows)
    fill(scratch, 0, 4 * padded * rows)
    put(instance, I_SCRATCH, scratch)
    return 1


assert np.iinfo(np.uint8).max >= EMPTY  # stu8
TEMPLATES = (ones, check_bits, make_table, spread_rows, fill_bitmap, bind_bitmap)
