"""Weights that a plan stores in blocks, made dense before anything else looks at them: what follows sees ordinary constants.

Nothing in a plan is trusted. Templates, as in the other `engine_*` modules.
"""

from __future__ import annotations

from graphopt.kernels.engine_state import (
    MAX_SIZE,
    R_DATA,
    R_DIMS,
    R_RANK,
    R_TYPE,
    constant_at,
    fail,
    get,
    own,
    put,
    within,
)
from graphopt.kernels.memory import fill, ldu8, stu8, text
from graphopt.kernels.plan import (
    INT8,
    K_COLUMNS,
    K_DIMS,
    K_GAPS,
    K_RANK,
    K_ROWS,
    K_TURNED,
    K_VALUES,
    MAX_CHANNELS,
    PACK,
    UINT8,
)

LARGEST_BLOCK = 16  # rows, and columns, of a block
MOST_ZEROS = 4096  # times the size of what is stored that a weight may have, and a megabyte more: no small file takes all memory


def dense_size(entry: int) -> int:
    """Elements of the weight; -1 where its axes are out of range."""
    rank, size = get(entry, K_RANK), 1
    if not within(rank, 2, 4) or not within(get(entry, K_TURNED), 0, 1) or (get(entry, K_TURNED) == 1 and rank != 2):
        return -1
    for axis in range(rank):
        if not within(get(entry, K_DIMS + axis), 1, MAX_CHANNELS) or size >= MAX_SIZE // get(entry, K_DIMS + axis):
            return -1
        size *= get(entry, K_DIMS + axis)
    return size


def check_packed(handle: int, entry: int, constants: int, error: int) -> int:
    """Types and sizes of values and gaps, and that blocks cover the weight; its size, or 0."""
    values, gaps = get(entry, K_VALUES), get(entry, K_GAPS)
    if not within(values, 0, constants - 1) or not within(gaps, 0, constants - 1):
        return fail(error, text("values or gaps of a packed weight are no constants"), -1, values)
    rows, columns = get(entry, K_ROWS), get(entry, K_COLUMNS)
    if not within(rows, 1, LARGEST_BLOCK) or not within(columns, 1, LARGEST_BLOCK):
        return fail(error, text("blocks of a packed weight are out of range"), -1, rows)
    one, two = constant_at(handle, values), constant_at(handle, gaps)
    blocks = get(two, R_DIMS)
    if get(two, R_TYPE) != UINT8 or get(two, R_RANK) != 1 or not within(blocks, 1, MAX_SIZE // (LARGEST_BLOCK * LARGEST_BLOCK)):
        return fail(error, text("gaps of a packed weight must be uint8 [blocks]"), -1, gaps)
    if get(one, R_TYPE) != INT8 or get(one, R_RANK) != 2 or get(one, R_DIMS) != blocks or get(one, R_DIMS + 1) != rows * columns:
        return fail(error, text("values of a packed weight must be int8 [blocks, rows * columns]"), -1, values)
    size = dense_size(entry)
    outputs = get(entry, K_DIMS + get(entry, K_TURNED))
    if size < 0 or size > MOST_ZEROS * blocks * rows * columns + (1 << 20):
        return fail(error, text("the shape of a packed weight is out of range"), -1, values)
    if outputs % rows != 0 or size // outputs % columns != 0:
        return fail(error, text("blocks do not cover a packed weight exactly"), -1, values)
    place = 0
    for i in range(blocks):
        gap = ldu8(get(two, R_DATA) + i)
        place += gap
        if gap == 0 or place > size // (rows * columns):
            return fail(error, text("a gap of a packed weight is 0 or leads out of it: number"), -1, i)
    return size


def unpack(handle: int, entry: int, size: int, error: int) -> int:
    """Write the checked weight to memory of the handle, and have its constant say so."""
    dense = own(handle, size)
    if dense == 0:
        return fail(error, text("no memory for a packed weight"), -1, size)
    fill(dense, 0, size)
    record, gaps = constant_at(handle, get(entry, K_VALUES)), get(constant_at(handle, get(entry, K_GAPS)), R_DATA)
    rows, columns, turned = get(entry, K_ROWS), get(entry, K_COLUMNS), get(entry, K_TURNED)
    outputs = get(entry, K_DIMS + turned)
    width, source, place = size // outputs, get(record, R_DATA), -1
    for i in range(get(record, R_DIMS)):
        place += ldu8(gaps + i)
        row, column = place // (width // columns) * rows, place % (width // columns) * columns
        for j in range(rows * columns):
            n, k = row + j // columns, column + j % columns
            stu8(dense + (k * outputs + n if turned == 1 else n * width + k), ldu8(source + i * rows * columns + j))
    put(record, R_DATA, dense)
    put(record, R_RANK, get(entry, K_RANK))
    for axis in range(get(entry, K_RANK)):
        put(record, R_DIMS + axis, get(entry, K_DIMS + axis))
    return 1


def unpack_all(handle: int, entries: int, count: int, constants: int, error: int) -> int:
    """All weights that the plan stores in blocks; 0 and a message where one is not right."""
    for i in range(count):
        size = check_packed(handle, entries + 8 * PACK * i, constants, error)
        if size == 0 or unpack(handle, entries + 8 * PACK * i, size, error) == 0:
            return 0
    return 1


TEMPLATES = (dense_size, check_packed, unpack, unpack_all)
