"""Checking a sparse plan and its weights, and arranging them. Nothing in a model file is trusted.

Templates, as in the `engine_*` modules.
"""

from __future__ import annotations

import numpy as np

from graphopt.kernels.engine_state import (
    H_ACTIVATIONS,
    R_DATA,
    R_DIMS,
    R_RANK,
    R_TYPE,
    TENSOR_RECORD,
    fail,
    get,
    own,
    put,
    release_all,
)
from graphopt.kernels.memory import copy, fill, free, ld32, ldf, lds8, ldu8, malloc, st32, stf, text, to_float
from graphopt.kernels.sparse_bitmap import check_bits, fill_bitmap
from graphopt.kernels.sparse_plan import (
    BITS,
    BYTES,
    CONV,
    MAGIC,
    MAX_CHANNELS,
    MAX_WINDOW,
    P_ACTIVATIONS,
    P_BIAS,
    P_COLUMNS,
    P_DH,
    P_GROUPS,
    P_IN,
    P_KH,
    P_KIND,
    P_KW,
    P_MAGIC,
    P_NUMBERS,
    P_OUT,
    P_PLACES,
    P_PR,
    P_PT,
    P_ROWS,
    P_VERSION,
    PLAN,
    ROWS,
    VERSION,
)
from graphopt.kernels.sparse_state import (
    CHUNK,
    H_BIAS,
    H_CHUNK,
    H_CHUNKS,
    H_COLUMNS,
    H_COUNT,
    H_LANES,
    H_LIMITS,
    H_OPEN,
    H_PLAN,
    H_ROWS,
    H_SCALES,
    H_SIZE,
    H_STARTS,
    H_VALUES,
    H_ZEROS,
)

MAX_COLUMNS = 1 << 28
MAX_WEIGHTS = 1 << 29
CHUNK_1, CHUNK_4 = CHUNK[1], CHUNK[4]


def outside(plan: int, first: int, last: int, low: int, high: int) -> int:
    """The first slot of [first, last] whose number is not within bounds, or -1."""
    for slot in range(first, last + 1):
        if get(plan, slot) < low or get(plan, slot) > high:
            return slot
    return -1


def across(plan: int) -> int:
    """Columns of the matrix of weights."""
    return get(plan, P_IN) // get(plan, P_GROUPS) * get(plan, P_KH) * get(plan, P_KW)


def check_forms(plan: int, error: int) -> int:
    """Blocks, and how places and values are stored."""
    rows, columns = get(plan, P_ROWS), get(plan, P_COLUMNS)
    if not ((rows == 1 or rows == 4 or rows == 16) and (columns == 1 or columns == 4)):
        return fail(error, text("no kernel for blocks of so many rows"), -1, rows)
    if outside(plan, P_PLACES, P_NUMBERS, 0, 1) >= 0:
        return fail(error, text("unknown form of places or values"), -1, get(plan, P_PLACES))
    if get(plan, P_PLACES) == BITS and (get(plan, P_KIND) != ROWS or rows != 1 or columns != 1):
        return fail(error, text("a bitmap is for single weights of a product of rows"), -1, rows)
    return 1


def check_plan(plan: int, plan_len: int, scales: int, n_scales: int, error: int) -> int:
    if plan_len != PLAN or get(plan, P_MAGIC) != MAGIC or get(plan, P_VERSION) != VERSION:
        return fail(error, text("not a sparse plan of this version of graphopt"), -1, plan_len)
    if outside(plan, P_KIND, P_BIAS, 0, 1) >= 0 or outside(plan, P_ACTIVATIONS, P_ACTIVATIONS, 1, 2) >= 0:
        return fail(error, text("kind, bias or activations of the plan are out of range"), -1, get(plan, P_KIND))
    if outside(plan, P_OUT, P_IN, 1, MAX_CHANNELS) >= 0:
        return fail(error, text("channels of the plan are out of range"), -1, get(plan, P_OUT))
    if outside(plan, P_KH, P_DH + 1, 1, MAX_WINDOW) >= 0 or outside(plan, P_PT, P_PR, 0, MAX_WINDOW) >= 0:
        return fail(error, text("kernel, strides, dilations or pads are out of range"), -1, get(plan, P_KH))
    if get(plan, P_KIND) == ROWS and (
        outside(plan, P_KH, P_DH + 1, 1, 1) >= 0 or outside(plan, P_PT, P_PR, 0, 0) >= 0 or get(plan, P_GROUPS) != 1
    ):
        return fail(error, text("a product of rows has no window"), -1, get(plan, P_KH))
    if check_forms(plan, error) == 0:
        return 0
    rows, columns = get(plan, P_ROWS), get(plan, P_COLUMNS)
    groups = get(plan, P_GROUPS)
    if groups < 1 or groups > MAX_CHANNELS or get(plan, P_IN) % groups != 0 or get(plan, P_OUT) % groups != 0:
        return fail(error, text("groups do not divide the channels"), -1, groups)
    wide = across(plan)
    if wide > MAX_COLUMNS or get(plan, P_OUT) // groups % rows != 0 or wide % columns != 0:
        return fail(error, text("blocks do not cover the weights exactly; columns"), -1, wide)
    if n_scales != 2 or not ldf(scales) <= ldf(scales + 4):
        return fail(error, text("expected two limits, the lower one first; there are"), -1, n_scales)
    return 1


def check_shape(record: int, kind: int, rank: int, first: int, second: int) -> bool:
    """Whether a constant has this element type, rank and sizes (the second where the rank is 2)."""
    if get(record, R_DATA) == 0 or get(record, R_TYPE) != kind or get(record, R_RANK) != rank:
        return False
    return get(record, R_DIMS) == first and (rank == 1 or get(record, R_DIMS + 1) == second)


def check_finite(address: int, count: int) -> int:
    """The index of the first float that is NaN or infinite, or -1."""
    for i in range(count):
        value = ldf(address + 4 * i)
        if not value - value == np.float32(0):
            return i
    return -1


def check_numbers(record: int, outputs: int, positive: bool, error: int) -> int:
    """A constant float32 [outputs] of finite numbers, above 0 where they are scales."""
    if not check_shape(record, 1, 1, outputs, 0):
        return fail(error, text("bias and scales must be float32, one number an output channel"), -1, outputs)
    bad = check_finite(get(record, R_DATA), outputs)
    if bad >= 0:
        return fail(error, text("a bias or scale is NaN or infinite: number"), -1, bad)
    if positive:
        for i in range(outputs):
            scale = ldf(get(record, R_DATA) + 4 * i)
            if not (scale > np.float32(0) and scale < np.float32(1e36)):
                return fail(error, text("a scale is not above 0, or as large as to leave float32: number"), -1, i)
    return 1


def check_gaps(plan: int, data: int, blocks: int, error: int) -> int:
    """That they lead forward, and not out of the weights."""
    places = get(plan, P_OUT) // get(plan, P_ROWS) * (across(plan) // get(plan, P_COLUMNS))
    place = 0
    for i in range(blocks):
        gap = ldu8(data + i)
        place += gap
        if gap == 0 or place > places:
            return fail(error, text("a gap is 0 or leads out of the weights: number"), -1, i)
    return 1


def check_values(plan: int, consts: int, error: int) -> int:
    """Types, sizes and numbers of values and places."""
    size, numbers = get(plan, P_ROWS) * get(plan, P_COLUMNS), get(plan, P_NUMBERS)
    values, places = consts, consts + 8 * TENSOR_RECORD
    blocks = get(values, R_DIMS)
    if blocks < 1 or blocks > MAX_WEIGHTS // size or not check_shape(values, 3 if numbers == BYTES else 1, 2, blocks, size):
        return fail(
            error, text("values must be [blocks, rows * columns], float32 or int8 as planned, blocks at least 1"), -1, blocks
        )
    if numbers != BYTES:
        bad = check_finite(get(values, R_DATA), blocks * size)
        if bad >= 0:
            return fail(error, text("a weight is NaN or infinite: number"), -1, bad)
    if get(plan, P_PLACES) == BITS:
        weights = get(plan, P_OUT) * across(plan)
        if weights > MAX_WEIGHTS or not check_shape(places, 2, 1, (weights + 7) // 8, 0):
            return fail(error, text("a bitmap must be uint8 [(outputs * inputs + 7) / 8]; weights"), -1, weights)
        return check_bits(plan, places, blocks, error)
    if not check_shape(places, 2, 1, blocks, 0):
        return fail(error, text("gaps must be uint8 [blocks]; blocks"), -1, blocks)
    return check_gaps(plan, get(places, R_DATA), blocks, error)


def check_weights(plan: int, consts: int, n_consts: int, error: int) -> int:
    """Types, sizes, places and numbers of the constants."""
    scaled = get(plan, P_NUMBERS)
    if n_consts != 2 + scaled + get(plan, P_BIAS):
        return fail(error, text("the plan was made for another number of constants"), -1, n_consts)
    if check_values(plan, consts, error) == 0:
        return 0
    for i in range(2, n_consts):
        if check_numbers(consts + 8 * TENSOR_RECORD * i, get(plan, P_OUT), i == 2 and scaled == 1, error) == 0:
            return 0
    return 1


def any_weight(source: int, step: int, rows: int) -> bool:
    """Whether one of `rows` floats, so many bytes apart, is not zero."""
    for i in range(rows):
        if ldf(source + i * step) != np.float32(0):
            return True
    return False


def arrange(handle: int, values: int, gaps: int, blocks: int, counting: int) -> None:
    """Count the blocks of each chunk of each row of blocks, as the kernels see them (in H_STARTS, one entry late), or write them.

    Stored blocks are cut into columns of H_ROWS rows, and those that are all zero are left out.
    """
    plan, starts = get(handle, H_PLAN), get(handle, H_STARTS)
    rows, columns, kernel_rows = get(plan, P_ROWS), get(plan, P_COLUMNS), get(handle, H_ROWS)
    blocks_across, place = across(plan) // columns, -1
    for i in range(blocks):
        place += ldu8(gaps + i)
        row, column = place // blocks_across, place % blocks_across
        for part in range(rows // kernel_rows):
            target = row * (rows // kernel_rows) + part
            for c in range(columns):
                source = values + 4 * ((i * rows + part * kernel_rows) * columns + c)
                if not any_weight(source, 4 * columns, kernel_rows):
                    continue
                slot = starts + 4 * (target * get(handle, H_CHUNKS) + (column * columns + c) // get(handle, H_CHUNK) + 1)
                index = ld32(slot)
                st32(slot, index + 1)
                if counting == 0:
                    st32(get(handle, H_COLUMNS) + 4 * index, column * columns + c)
                    for r in range(kernel_rows):
                        stf(get(handle, H_VALUES) + 4 * (index * kernel_rows + r), ldf(source + 4 * columns * r))


def set_chunks(handle: int, plan: int, kernel_rows: int, weights: int) -> None:
    """Cut the columns into chunks, as equal as can be. Not those of larger kernels, whose taps share their pixels.

    Where there are few of the `weights` in each row, sums are not interrupted so often.
    """
    wide = across(plan)
    most = CHUNK_1 if kernel_rows == 1 else CHUNK_4
    count = 1
    if get(plan, P_KH) * get(plan, P_KW) == 1 and get(plan, P_GROUPS) == 1:
        count = max(1, min((wide + most - 1) // most, weights // (4 * get(plan, P_OUT))))
    size = (wide + count - 1) // count
    put(handle, H_CHUNK, size)
    put(handle, H_CHUNKS, (wide + size - 1) // size)


def fill_numbers(handle: int, plan: int, scales: int, consts: int, error: int) -> int:
    """What all forms share: the plan, bias, limits and scales."""
    outputs = get(plan, P_OUT)
    kept, limits, zeros = own(handle, 8 * PLAN), own(handle, 16), own(handle, 4 * outputs)
    bias, factors = own(handle, 4 * outputs), own(handle, 4 * outputs)
    if kept == 0 or bias == 0 or limits == 0 or zeros == 0 or factors == 0:
        return fail(error, text("no memory for the weights"), -1, outputs)
    copy(kept, plan, 8 * PLAN)
    copy(limits, scales, 8)
    stf(limits + 8, -np.inf)
    stf(limits + 12, np.inf)
    fill(bias, 0, 4 * outputs)
    fill(zeros, 0, 4 * outputs)
    for n in range(outputs):
        stf(factors + 4 * n, 1.0)
    given = consts + 16 * TENSOR_RECORD
    if get(plan, P_NUMBERS) == BYTES:
        copy(factors, get(given, R_DATA), 4 * outputs)
        given += 8 * TENSOR_RECORD
    if get(plan, P_BIAS) == 1:
        copy(bias, get(given, R_DATA), 4 * outputs)
    put(handle, H_PLAN, kept)
    put(handle, H_BIAS, bias)
    put(handle, H_LIMITS, limits)
    put(handle, H_ZEROS, zeros)
    put(handle, H_OPEN, limits + 8)
    put(handle, H_SCALES, factors)
    put(handle, H_ACTIVATIONS, get(plan, P_ACTIVATIONS))
    return 1


def scaled_values(handle: int, plan: int, consts: int) -> int:
    """Values of int8 in float32, in memory to be freed; 0 where there is none."""
    values, gaps, blocks = get(consts, R_DATA), get(consts + 8 * TENSOR_RECORD, R_DATA), get(consts, R_DIMS)
    rows, columns = get(plan, P_ROWS), get(plan, P_COLUMNS)
    blocks_across, factors = across(plan) // columns, get(handle, H_SCALES)
    target = malloc(4 * blocks * rows * columns)
    place = -1
    for i in range(blocks if target != 0 else 0):
        place += ldu8(gaps + i)
        for j in range(rows * columns):
            factor = ldf(factors + 4 * (place // blocks_across * rows + j // columns))
            stf(target + 4 * (i * rows * columns + j), to_float(lds8(values + i * rows * columns + j)) * factor)
    return target


def fill_gaps(handle: int, plan: int, values: int, gaps: int, blocks: int, error: int) -> int:
    """Count and write blocks by rows and chunks."""
    kernel_rows = 1 if get(plan, P_ROWS) == 1 else 4
    set_chunks(handle, plan, kernel_rows, blocks * get(plan, P_ROWS) * get(plan, P_COLUMNS))
    slots = get(plan, P_OUT) // kernel_rows * get(handle, H_CHUNKS)
    starts = own(handle, 4 * (slots + 2))
    if starts == 0:
        return fail(error, text("no memory for the weights"), -1, slots)
    fill(starts, 0, 4 * (slots + 2))
    put(handle, H_STARTS, starts)
    put(handle, H_ROWS, kernel_rows)
    arrange(handle, values, gaps, blocks, 1)
    # counts stand one entry late; where each row of blocks begins is their running sum, and writing moves it to where the next does
    total = 0
    for slot in range(slots):
        mine = ld32(starts + 4 * (slot + 1))
        st32(starts + 4 * (slot + 1), total)
        total += mine
    columns, weights = own(handle, 4 * total + 4), own(handle, 4 * kernel_rows * total + 4)
    if columns == 0 or weights == 0:
        return fail(error, text("no memory for the weights"), -1, total)
    put(handle, H_COLUMNS, columns)
    put(handle, H_VALUES, weights)
    put(handle, H_COUNT, total)
    arrange(handle, values, gaps, blocks, 0)
    return 1


def fill_sparse(handle: int, plan: int, scales: int, consts: int, error: int) -> int:
    """Copy and arrange everything."""
    if fill_numbers(handle, plan, scales, consts, error) == 0:
        return 0
    if get(plan, P_PLACES) == BITS:
        put(handle, H_ROWS, 1)
        return fill_bitmap(handle, plan, consts, error)
    values, gaps, blocks = get(consts, R_DATA), get(consts + 8 * TENSOR_RECORD, R_DATA), get(consts, R_DIMS)
    if get(plan, P_NUMBERS) != BYTES:
        return fill_gaps(handle, plan, values, gaps, blocks, error)
    values = scaled_values(handle, plan, consts)
    if values == 0:
        return fail(error, text("no memory for the weights"), -1, blocks)
    made = fill_gaps(handle, plan, values, gaps, blocks, error)
    free(values)
    return made


def create_for(
    plan: int, plan_len: int, scales: int, n_scales: int, consts: int, n_consts: int, error: int, lanes: int
) -> int:  # fmt: skip
    """As `create`, for kernels of so many lanes."""
    if check_plan(plan, plan_len, scales, n_scales, error) == 0 or check_weights(plan, consts, n_consts, error) == 0:
        return 0
    handle = malloc(8 * H_SIZE)
    if handle == 0:
        return fail(error, text("no memory for the weights"), -1, plan_len)
    fill(handle, 0, 8 * H_SIZE)
    put(handle, H_LANES, lanes)
    if fill_sparse(handle, plan, scales, consts, error) == 0:
        release_all(handle)
        free(handle)
        return 0
    return handle


assert CONV == 1  # check_plan: kinds are 0 and 1
TEMPLATES = (
    outside, across, check_forms, check_plan, check_shape, check_finite, check_numbers, check_gaps, check_values, check_weights,
    any_weight, arrange, set_chunks, fill_numbers, scaled_values, fill_gaps, fill_sparse, create_for,
)  # fmt: skip
