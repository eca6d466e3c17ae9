"""Rows of dense convolutions, on vectors or on matrix tiles, with the tables of offsets that they read."""

from __future__ import annotations

from graphopt.kernels.engine_bind import phase_rows
from graphopt.kernels.engine_pack import (
    S_BIAS,
    S_CHANNELS,
    S_COMP,
    S_ENTRIES,
    S_FIRST_OUT,
    S_FIRSTS,
    S_GROUPS,
    S_OFFSETS,
    S_PANEL,
    S_PANELS,
    S_PHASE_X,
    S_PHASE_Y,
    S_QUADS,
    S_SCALE,
    S_TILE_GROUPS,
    S_TILE_OFFSETS,
    S_TILE_PANEL,
    S_TILE_WEIGHTS,
    S_WEIGHTS,
)
from graphopt.kernels.engine_state import (
    B_H,
    B_ORIGIN,
    B_ROW,
    B_W,
    H_SCALES,
    H_TILES,
    I_ARENA,
    I_ARENA_SIZE,
    I_COUNT,
    I_ROOM,
    I_ROWS,
    T_PITCH,
    get,
    own,
    put,
    size_at,
    tensor_at,
)
from graphopt.kernels.layout import (
    CONV_BIAS,
    CONV_BLOCK,
    CONV_CHANNELS,
    CONV_COMP,
    CONV_FIRSTS,
    CONV_GROUPS,
    CONV_HIGH,
    CONV_INPUT,
    CONV_K,
    CONV_LOW,
    CONV_M,
    CONV_MODE,
    CONV_OUT_PIXELS,
    CONV_OUTPUT,
    CONV_PANEL,
    CONV_PANELS,
    CONV_PIXELS,
    CONV_QUADS,
    CONV_RES_PIXELS,
    CONV_RESIDUAL,
    CONV_ROW_PITCH,
    CONV_SCALE,
    CONV_SUM,
    CONV_TILES,
    CONV_WEIGHTS,
    CONV_ZERO,
    MODE_F32,
    MODE_SUM,
    MODE_U8,
    PIXELS,
    ROW,
)
from graphopt.kernels.memory import fill, ld32, st32
from graphopt.kernels.plan import IOHW

# slot 0 of a row
RUN_CONV, RUN_TILES, RUN_DEPTHWISE, RUN_ANY_DEPTHWISE, RUN_BORDER, RUN_INPUT = 1, 2, 3, 4, 5, 6
RUN_OUTPUT, RUN_POOL, RUN_BINARY, RUN_COPY, RUN_FILL = 7, 8, 9, 10, 11
ROW_INDEX = 28  # the node's input or output that the row reads or writes, or -1
ROW_STEP = 29  # bytes of one image of it
ROW_WORK = 30  # how much there is to do, in about a nanosecond each
ROW_UNITS = 31  # in how many parts it can be cut

MACS_NS = 30  # multiplications a nanosecond, roughly


def new_row(instance: int, code: int) -> int:
    """The next row, zeroed; 0 where there is no more room (which would be a mistake of ours)."""
    index = get(instance, I_COUNT)
    if index >= get(instance, I_ROOM):
        return 0
    put(instance, I_COUNT, index + 1)
    row = get(instance, I_ROWS) + 8 * ROW * index
    fill(row, 0, 8 * ROW)
    put(row, 0, code)
    put(row, ROW_INDEX, -1)
    put(row, ROW_UNITS, 1)
    return row


def conv_tables(instance: int, s: int, row: int, part: int, rows: int, columns: int, pitches: int) -> int:
    """Offsets of every output pixel: into the input, the output and the residual. `pitches`: int64 [3], bytes of their pixels."""
    x, out = size_at(instance, get(s, 1)), size_at(instance, max(get(s, 3), 0))
    residual = size_at(instance, max(get(s, 2), 0))
    turned = get(s, 18) == IOHW
    down, right = (1, 1) if turned else (get(s, 9), get(s, 10))
    out_down, out_right = (get(s, 9), get(s, 10)) if turned else (1, 1)
    count = rows * columns
    padded = (count + PIXELS - 1) // PIXELS * PIXELS
    table = own(instance, 12 * padded)
    if table == 0:
        return 0
    floats = get(s, 3) < 0
    for m in range(padded):
        pixel = min(m, count - 1)
        y, xx = pixel // columns, pixel % columns
        oy, ox = get(part, S_PHASE_Y) + out_down * y, get(part, S_PHASE_X) + out_right * xx
        st32(table + 4 * m, y * down * get(x, B_ROW) + xx * right * get(pitches, 0))
        place = pixel * 4 * get(s, 30) if floats else oy * get(out, B_ROW) + ox * get(pitches, 1)
        st32(table + 4 * (padded + m), place)
        st32(table + 4 * (2 * padded + m), oy * get(residual, B_ROW) + ox * get(pitches, 2))
    put(row, CONV_PIXELS, table)
    put(row, CONV_OUT_PIXELS, table + 4 * padded)
    put(row, CONV_RES_PIXELS, table + 8 * padded)
    return 1


def group_table(instance: int, offsets: int, count: int, row_bytes: int, pitch: int) -> int:
    """Offsets of the groups of input bytes that one output pixel reads."""
    table = own(instance, 4 * count + 64)
    if table != 0:
        for g in range(count):
            entry = offsets + 12 * g
            st32(table + 4 * g, ld32(entry) * row_bytes + ld32(entry + 4) * pitch + ld32(entry + 8))
    return table


def entry_table(instance: int, part: int, row_bytes: int, pitch: int) -> int:
    """As `group_table` for groups picked from windows: the offset of its window and the indices in it, of each group."""
    count, entries = get(part, S_GROUPS), get(part, S_ENTRIES)
    table = own(instance, 8 * count + 64)
    if table != 0:
        for g in range(count):
            window = get(part, S_OFFSETS) + 12 * ld32(entries + 8 * g)
            st32(table + 8 * g, ld32(window) * row_bytes + ld32(window + 4) * pitch + ld32(window + 8))
            st32(table + 8 * g + 4, ld32(entries + 8 * g + 4))
    return table


def average_groups(part: int) -> int:
    """Groups of 4 taps of one panel of 16 channels; four groups of 4 channels count as one."""
    panels = get(part, S_PANELS) * (1 + 3 * get(part, S_QUADS))
    return get(part, S_GROUPS) if get(part, S_FIRSTS) == 0 else max(1, get(part, S_GROUPS) // panels)


def conv_row(handle: int, instance: int, s: int, part: int, pitches: int) -> int:
    """One dense part of a convolution; 0 where memory runs out."""
    x = size_at(instance, get(s, 1))
    floats = get(s, 3) < 0
    rows = get(x, B_H) if floats else phase_rows(instance, s, part, True)
    columns = get(x, B_W) if floats else phase_rows(instance, s, part, False)
    if rows < 1 or columns < 1:
        return 1
    put(pitches, 0, get(tensor_at(handle, get(s, 1)), T_PITCH))
    put(pitches, 1, 0 if floats else get(tensor_at(handle, get(s, 3)), T_PITCH))
    put(pitches, 2, get(tensor_at(handle, get(s, 2)), T_PITCH) if get(s, 2) >= 0 else 0)
    row = new_row(instance, RUN_CONV)
    if get(part, S_FIRSTS) != 0:
        table = entry_table(instance, part, get(x, B_ROW), get(pitches, 0))
    else:
        table = group_table(instance, get(part, S_OFFSETS), get(part, S_GROUPS), get(x, B_ROW), get(pitches, 0))
    if row == 0 or table == 0 or conv_tables(instance, s, row, part, rows, columns, pitches) == 0:
        return 0
    turned = get(s, 18) == IOHW
    first = 0 if turned else get(s, 13) * get(x, B_ROW) + get(s, 14) * get(pitches, 0)
    put(row, CONV_INPUT, get(x, B_ORIGIN) - first)
    put(row, CONV_K, table)
    groups = average_groups(part)
    put(row, CONV_GROUPS, groups)
    put(row, CONV_FIRSTS, get(part, S_FIRSTS))
    put(row, CONV_QUADS, get(part, S_QUADS))
    put(row, CONV_WEIGHTS, get(part, S_WEIGHTS))
    put(row, CONV_PANEL, get(part, S_PANEL))
    put(row, CONV_COMP, get(part, S_COMP))
    put(row, CONV_SCALE, get(part, S_SCALE))
    put(row, CONV_M, rows * columns)
    put(row, CONV_PANELS, get(part, S_PANELS))
    put(row, CONV_BLOCK, max(1, 196608 // (groups * 4) // PIXELS) * PIXELS)
    put(row, CONV_BIAS, get(part, S_BIAS))
    put(row, CONV_CHANNELS, get(part, S_CHANNELS))
    put(row, CONV_LOW, get(s, 23))
    put(row, CONV_HIGH, get(s, 24))
    put(row, CONV_ZERO, get(s, 22))
    conv_target(handle, instance, s, row, part, rows * columns)
    macs = rows * columns * groups * 4 * get(part, S_PANELS) * 16
    put(row, ROW_WORK, macs // MACS_NS)
    put(row, ROW_UNITS, (rows * columns + PIXELS - 1) // PIXELS)
    near = get(instance, I_ARENA_SIZE) < 1 << 30 and (turned or get(s, 10) <= 2)
    if get(handle, H_TILES) != 0 and near and get(part, S_TILE_GROUPS) > 0 and rows * columns >= 16:
        return tile_row(handle, instance, s, row, part, rows, columns, pitches)
    return 1


def conv_target(handle: int, instance: int, s: int, row: int, part: int, pixels: int) -> None:
    """Where a convolution writes, and what it adds."""
    first = get(part, S_FIRST_OUT)
    if get(s, 3) < 0:
        put(row, CONV_MODE, MODE_F32)
        put(row, ROW_INDEX, get(s, 26))
        put(row, ROW_STEP, pixels * 4 * get(s, 30))
        return
    put(row, CONV_MODE, MODE_U8)
    put(row, CONV_OUTPUT, get(size_at(instance, get(s, 3)), B_ORIGIN) + first)
    if get(s, 2) >= 0:
        put(row, CONV_MODE, MODE_SUM)
        put(row, CONV_RESIDUAL, get(size_at(instance, get(s, 2)), B_ORIGIN) + first)
        put(row, CONV_SUM, get(handle, H_SCALES) + 4 * get(s, 25))


def tile_row(handle: int, instance: int, s: int, row: int, part: int, rows: int, columns: int, pitches: int) -> int:
    """Turn a dense row into one for tiles of 16 pixels that follow each other in memory; stray lanes write to the arena's front."""
    x = size_at(instance, get(s, 1))
    turned = get(s, 18) == IOHW
    down, right = (1, 1) if turned else (get(s, 9), get(s, 10))
    wide = get(x, B_ROW) // get(pitches, 0)
    flat = down == 1 and right == 1 and rows > 1 and ((rows - 1) * wide + columns + 15) // 16 < rows * ((columns + 15) // 16)
    across = (columns + 15) // 16
    tiles = ((rows - 1) * wide + columns + 15) // 16 if flat else rows * across
    pairs = (tiles + 1) // 2
    lanes = 32 * pairs
    bases, table = own(instance, 8 * pairs), own(instance, 8 * lanes)
    offsets = group_table(instance, get(part, S_TILE_OFFSETS), get(part, S_TILE_GROUPS), get(x, B_ROW), get(pitches, 0))
    if bases == 0 or table == 0 or offsets == 0:
        return 0
    nowhere = get(instance, I_ARENA) - get(row, CONV_OUTPUT)
    outs, residuals = get(row, CONV_OUT_PIXELS), get(row, CONV_RES_PIXELS)
    for t in range(2 * pairs):
        tile = min(t, tiles - 1)
        y = 0 if flat else tile // across
        first = tile * 16 if flat else tile % across * 16
        if not flat and columns >= 16:
            first = min(first, columns - 16)  # overlap the last tile with the one before: no lane is wasted
        st32(bases + 4 * t, y * down * get(x, B_ROW) + first * right * get(pitches, 0))
        for lane in range(16):
            at_y = (first + lane) // wide if flat else y
            at_x = (first + lane) % wide if flat else first + lane
            inside = at_y < rows and at_x < columns
            pixel = at_y * columns + at_x if inside else 0
            st32(table + 4 * (16 * t + lane), ld32(outs + 4 * pixel) if inside else nowhere)
            st32(table + 4 * (lanes + 16 * t + lane), ld32(residuals + 4 * pixel))
    if get(s, 3) < 0 and (rows != 1 or columns < 16):
        return 1  # float rows have no place for stray lanes: stay with vectors
    put(row, 0, RUN_TILES)
    put(row, CONV_TILES, bases)
    put(row, CONV_OUT_PIXELS, table)
    put(row, CONV_RES_PIXELS, table + 4 * lanes)
    put(row, CONV_ROW_PITCH, right * get(pitches, 0))
    put(row, CONV_K, offsets)
    put(row, CONV_GROUPS, get(part, S_TILE_GROUPS))
    put(row, CONV_WEIGHTS, get(part, S_TILE_WEIGHTS))
    put(row, CONV_PANEL, get(part, S_TILE_PANEL))
    put(row, CONV_BLOCK, max(2, 262144 // (get(part, S_TILE_GROUPS) * 64) // 32) * 32)
    put(row, ROW_UNITS, pairs)
    return 1


TEMPLATES = (
    new_row,
    conv_tables,
    group_table,
    entry_table,
    average_groups,
    conv_row,
    conv_target,
    tile_row,
)
