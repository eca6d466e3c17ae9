"""Rows that the interpreter runs, made from the steps of a plan once sizes and places are known."""

from __future__ import annotations

from graphopt.kernels.engine_bind import part_at
from graphopt.kernels.engine_conv import (
    ROW_INDEX,
    ROW_STEP,
    ROW_UNITS,
    ROW_WORK,
    RUN_ANY_DEPTHWISE,
    RUN_BINARY,
    RUN_BORDER,
    RUN_COPY,
    RUN_DEPTHWISE,
    RUN_FILL,
    RUN_INPUT,
    RUN_OUTPUT,
    RUN_POOL,
    conv_row,
    new_row,
)
from graphopt.kernels.engine_pack import (
    DENSE,
    DEPTHWISE_FAST,
    P_ANY_COMP,
    P_ANY_SCALE,
    P_ANY_WEIGHTS,
    P_COMP,
    P_COUNT,
    P_SCALE,
    P_TAPS,
    P_VARIANT,
    P_WEIGHTS,
)
from graphopt.kernels.engine_state import (
    B_BORN,
    B_BOTTOM,
    B_H,
    B_LEFT,
    B_ORIGIN,
    B_RIGHT,
    B_ROW,
    B_TOP,
    B_W,
    H_CHUNK,
    H_MIN_ROW,
    H_PACKED,
    H_SCALES,
    H_STEPS,
    I_COUNT,
    I_ROOM,
    I_ROWS,
    R_DATA,
    T_CHANNELS,
    T_PITCH,
    T_ZERO,
    constant_at,
    fail,
    get,
    own,
    put,
    size_at,
    step_at,
    tensor_at,
)
from graphopt.kernels.layout import (
    DW_ACROSS,
    DW_C,
    DW_COMP,
    DW_HIGH,
    DW_INPUT,
    DW_KERNEL,
    DW_LOW,
    DW_OH,
    DW_OUT_ROW,
    DW_OUTPUT,
    DW_OW,
    DW_ROW,
    DW_SCALE,
    DW_STRIDE,
    DW_WEIGHTS,
    DW_ZERO,
    ROW,
)
from graphopt.kernels.memory import ld32, st32, text
from graphopt.kernels.plan import BINARY, CONV, COPY, INPUT, OUTPUT, POOL


def border_row(handle: int, instance: int, tensor: int) -> None:
    """Zero points around a tensor: written before it, as others used the memory meanwhile."""
    size = size_at(instance, tensor)
    top, left, bottom, right = get(size, B_TOP), get(size, B_LEFT), get(size, B_BOTTOM), get(size, B_RIGHT)
    if top + left + bottom + right == 0:
        return
    pitch = get(tensor_at(handle, tensor), T_PITCH)
    row = new_row(instance, RUN_BORDER)
    put(row, 1, get(size, B_ORIGIN) - top * get(size, B_ROW) - left * pitch)
    put(row, 2, get(size, B_ROW))
    put(row, 3, get(size, B_H))
    put(row, 4, top)
    put(row, 5, bottom)
    put(row, 6, left * pitch)
    put(row, 7, get(size, B_W) * pitch)
    put(row, 8, right * pitch)
    put(row, 9, get(tensor_at(handle, tensor), T_ZERO))


def edge_row(handle: int, instance: int, s: int, output: bool) -> None:
    """Quantise an activation of the node, or dequantise one of its outputs."""
    tensor = get(s, 1) if output else get(s, 3)
    size = size_at(instance, tensor)
    row = new_row(instance, RUN_OUTPUT if output else RUN_INPUT)
    channels = get(tensor_at(handle, tensor), T_CHANNELS)
    bytes_each = 4 if get(s, 4) == 1 else 1
    put(row, 1, get(s, 4))
    put(row, 2, get(s, 5))
    put(row, 3, get(size, B_H))
    put(row, 4, get(size, B_W))
    put(row, 5, channels)
    put(row, 6, get(tensor_at(handle, tensor), T_PITCH))
    put(row, 7, get(size, B_ROW))
    put(row, 8, get(size, B_ORIGIN))
    put(row, 9, get(tensor_at(handle, tensor), T_ZERO))
    put(row, 10, get(handle, H_SCALES) + 4 * get(s, 7))
    put(row, ROW_INDEX, get(s, 2) if output else get(s, 1))
    put(row, ROW_STEP, channels * get(size, B_H) * get(size, B_W) * bytes_each)
    put(row, ROW_WORK, channels * get(size, B_H) * get(size, B_W) // 2)
    put(row, ROW_UNITS, get(size, B_H) if get(size, B_H) > 1 else (get(size, B_W) + 255) // 256)


def depthwise_row(handle: int, instance: int, s: int, packed: int) -> int:
    x, out = size_at(instance, get(s, 1)), size_at(instance, get(s, 3))
    pitch = get(tensor_at(handle, get(s, 1)), T_PITCH)
    first = get(x, B_ORIGIN) - get(s, 13) * get(x, B_ROW) - get(s, 14) * pitch
    work = get(out, B_H) * get(out, B_W) * pitch * get(s, 7) * get(s, 8)
    same = get(tensor_at(handle, get(s, 3)), T_PITCH) == pitch
    fast = same and get(packed, P_VARIANT) == DEPTHWISE_FAST and get(out, B_W) * pitch >= get(handle, H_MIN_ROW)
    row = new_row(instance, RUN_DEPTHWISE if fast else RUN_ANY_DEPTHWISE)
    if row == 0:
        return 0
    put(row, DW_INPUT, first)
    put(row, DW_C, pitch)
    put(row, DW_OUTPUT, get(out, B_ORIGIN))
    put(row, DW_OUT_ROW, get(out, B_ROW))
    put(row, DW_OH, get(out, B_H))
    put(row, DW_OW, get(out, B_W))
    put(row, DW_ZERO, get(s, 22))
    put(row, DW_LOW, get(s, 23))
    put(row, DW_HIGH, get(s, 24))
    if fast:
        put(row, DW_ROW, get(x, B_ROW))
        put(row, DW_WEIGHTS, get(packed, P_WEIGHTS))
        put(row, DW_COMP, get(packed, P_COMP))
        put(row, DW_SCALE, get(packed, P_SCALE))
        put(row, DW_KERNEL, get(s, 7))
        put(row, DW_STRIDE, get(s, 9))
        put(row, DW_ACROSS, get(s, 10))
        put(row, ROW_WORK, work // 10)
        put(row, ROW_UNITS, (get(out, B_W) * pitch + get(handle, H_CHUNK) - 1) // get(handle, H_CHUNK))
        return 1
    taps = get(s, 7) * get(s, 8)
    table = own(instance, 4 * taps + 64)
    if table == 0:
        return 0
    for t in range(taps):
        entry = get(packed, P_TAPS) + 8 * t
        st32(table + 4 * t, ld32(entry) * get(x, B_ROW) + ld32(entry + 4) * pitch)
    put(row, DW_ROW, get(s, 9) * get(x, B_ROW))
    put(row, DW_WEIGHTS, get(packed, P_ANY_WEIGHTS))
    put(row, DW_COMP, get(packed, P_ANY_COMP))
    put(row, DW_SCALE, get(packed, P_ANY_SCALE))
    put(row, DW_KERNEL, taps)
    put(row, DW_STRIDE, get(s, 10) * pitch)
    put(row, 16, table)
    put(row, 17, get(tensor_at(handle, get(s, 3)), T_PITCH))
    put(row, ROW_WORK, work // 3)
    put(row, ROW_UNITS, get(out, B_H))
    return 1


def put_image(handle: int, instance: int, row: int, slot: int, tensor: int) -> None:
    """Five slots that describe a tensor: origin, bytes of a row, bytes of a pixel, height, width."""
    size = size_at(instance, tensor)
    put(row, slot, get(size, B_ORIGIN))
    put(row, slot + 1, get(size, B_ROW))
    put(row, slot + 2, get(tensor_at(handle, tensor), T_PITCH))
    put(row, slot + 3, get(size, B_H))
    put(row, slot + 4, get(size, B_W))


def plain_row(handle: int, instance: int, s: int, code: int) -> int:
    """Pool, binary and copy rows keep the step's address (slot 20) and the images (slots 1, 6 and 11)."""
    row = new_row(instance, code)
    if row == 0:
        return 0
    put_image(handle, instance, row, 1, get(s, 1))
    put_image(handle, instance, row, 6, get(s, 3))
    if code == RUN_BINARY:
        put_image(handle, instance, row, 11, get(s, 2))
        put(row, 16, get(tensor_at(handle, get(s, 1)), T_ZERO))
        put(row, 17, get(tensor_at(handle, get(s, 2)), T_ZERO))
    else:
        put(row, 16, get(tensor_at(handle, get(s, 1)), T_ZERO))
    put(row, 18, get(tensor_at(handle, get(s, 3)), T_ZERO))
    put(row, 19, get(tensor_at(handle, get(s, 1)), T_CHANNELS))
    put(row, 20, s)
    put(row, 23, get(tensor_at(handle, get(s, 3)), T_CHANNELS))
    put(row, 21, get(handle, H_SCALES))
    if code == RUN_COPY and get(s, 4) >= 0:
        put(row, 22, get(constant_at(handle, get(s, 4)), R_DATA))
    pixels = get(row, 9) * get(row, 10)
    if code == RUN_COPY:
        pixels = get(row, 9) * get(row, 10) * get(s, 6) // max(get(row, 8), 1)
    if code == RUN_POOL:
        pixels *= get(s, 7) * get(s, 8)
    put(row, ROW_WORK, pixels * get(row, 8) // 8)
    put(row, ROW_UNITS, get(row, 9))
    return 1


def fill_row(handle: int, instance: int, tensor: int) -> None:
    size = size_at(instance, tensor)
    row = new_row(instance, RUN_FILL)
    if row != 0:
        put_image(handle, instance, row, 6, tensor)
        put(row, 18, get(tensor_at(handle, tensor), T_ZERO))
        put(row, ROW_WORK, get(size, B_H) * get(size, B_ROW) // 30)


def step_rows(handle: int, instance: int, i: int, pitches: int) -> int:
    """The rows of one step; 0 where memory runs out."""
    s = step_at(handle, i)
    kind = get(s, 0)
    if kind == OUTPUT:
        edge_row(handle, instance, s, True)
        return 1
    if get(s, 3) >= 0 and get(size_at(instance, get(s, 3)), B_BORN) == i:
        border_row(handle, instance, get(s, 3))
    if kind == INPUT:
        edge_row(handle, instance, s, False)
    elif kind == CONV:
        packed = get(get(handle, H_PACKED), i)
        if get(packed, P_VARIANT) != DENSE:
            return depthwise_row(handle, instance, s, packed)
        for index in range(get(packed, P_COUNT)):
            if conv_row(handle, instance, s, part_at(handle, i, index), pitches) == 0:
                return 0
    elif kind == POOL:
        return plain_row(handle, instance, s, RUN_POOL)
    elif kind == BINARY:
        return plain_row(handle, instance, s, RUN_BINARY)
    elif kind == COPY:
        if get(s, 20) == 1:
            fill_row(handle, instance, get(s, 3))
        return plain_row(handle, instance, s, RUN_COPY)
    return 1


def build_rows(handle: int, instance: int, error: int) -> int:
    """All rows of an instance; 0 where memory runs out."""
    room = 8
    for i in range(get(handle, H_STEPS)):
        packed = get(get(handle, H_PACKED), i)
        room += 2 if packed == 0 else 2 + get(packed, P_COUNT)
    rows, pitches = own(instance, 8 * ROW * room), own(instance, 64)
    if rows == 0 or pitches == 0:
        return fail(error, text("no memory for so many steps"), -1, room)
    put(instance, I_ROWS, rows)
    put(instance, I_ROOM, room)
    put(instance, I_COUNT, 0)
    for i in range(get(handle, H_STEPS)):
        if step_rows(handle, instance, i, pitches) == 0:
            return fail(error, text("no memory for the tables of this step"), i, 0)
    return 1


TEMPLATES = (
    border_row,
    edge_row,
    depthwise_row,
    put_image,
    plain_row,
    fill_row,
    step_rows,
    build_rows,
)
