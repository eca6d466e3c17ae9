"""A plan bound to input shapes: sizes of all tensors, their padding, life and place in one arena."""

from __future__ import annotations

from graphopt.kernels.engine_pack import P_PARTS, PART, S_PHASE_X, S_PHASE_Y, tap_reach
from graphopt.kernels.engine_state import (
    B_BORN,
    B_BOTTOM,
    B_DIES,
    B_H,
    B_LEFT,
    B_ORIGIN,
    B_PLACE,
    B_RIGHT,
    B_ROW,
    B_SIZE,
    B_TOP,
    B_W,
    H_PACKED,
    H_STEPS,
    H_TENSORS,
    H_TILES,
    I_ARENA,
    I_ARENA_SIZE,
    I_BATCH,
    I_IMAGES,
    I_OUT_SHAPES,
    I_SHAPES,
    R_DIMS,
    R_RANK,
    R_TYPE,
    T_CHANNELS,
    T_PITCH,
    TENSOR_RECORD,
    fail,
    get,
    leading_axes,
    own,
    put,
    row_count,
    size_at,
    step_at,
    tensor_at,
)
from graphopt.kernels.layout import SLACK
from graphopt.kernels.memory import text
from graphopt.kernels.plan import (
    BINARY,
    CHANNELS_FIRST,
    CHANNELS_LAST,
    CONV,
    COPY,
    FLOAT,
    GLOBAL_POOL,
    INPUT,
    IOHW,
    OUTPUT,
    POOL,
    ROWS,
)

LIMIT = 1 << 31  # bytes of a tensor: offsets within it are int32
EDGE = 1 << 24  # rows or columns of a tensor


def define(instance: int, tensor: int, height: int, width: int, step: int, error: int) -> int:
    """Give a tensor its size, or check it against what it has."""
    if height < 1 or width < 1 or height > EDGE or width > EDGE:
        return fail(error, text("an image of this size is not possible here"), step, min(height, width))
    size = size_at(instance, tensor)
    if get(size, B_H) < 0:
        put(size, B_H, height)
        put(size, B_W, width)
        return 1
    if get(size, B_H) != height or get(size, B_W) != width:
        return fail(error, text("images of different sizes meet"), step, width)
    return 1


def bind_input(handle: int, instance: int, s: int, i: int, error: int) -> int:
    shape = get(instance, I_SHAPES) + 8 * TENSOR_RECORD * get(s, 1)
    rank, layout, out = get(s, 6), get(s, 5), get(s, 3)
    if get(shape, R_RANK) != rank:
        return fail(error, text("an activation has another rank than the plan"), i, get(shape, R_RANK))
    if get(shape, R_TYPE) != get(s, 4):
        return fail(error, text("an activation has another type than the plan"), i, get(shape, R_TYPE))
    last = get(shape, R_DIMS + rank - 1)
    channels = get(shape, R_DIMS + 1) if layout == CHANNELS_FIRST else last
    if channels != get(tensor_at(handle, out), T_CHANNELS):
        return fail(error, text("an activation has other channels than the plan"), i, channels)
    batch, height, width = 1, 1, 1
    if layout == ROWS:
        for axis in range(rank - 1):
            width *= get(shape, R_DIMS + axis)
            if width > LIMIT:
                return fail(error, text("too many rows"), i, width)
        if width == 0:
            batch, width = 0, 1
    else:
        put(instance, I_IMAGES, 1)
        batch = get(shape, R_DIMS)
        first = 1 if layout == CHANNELS_LAST else 2
        if rank == 4:
            height, width = get(shape, R_DIMS + first), get(shape, R_DIMS + first + 1)
        elif rank == 3:
            width = get(shape, R_DIMS + 2)
    known = get(instance, I_BATCH)
    if known >= 0 and known != batch:
        return fail(error, text("activations have different batches"), i, batch)
    put(instance, I_BATCH, batch)
    return define(instance, out, height, width, i, error)


def extent(size: int, begin: int, end: int, kernel: int, dilation: int, stride: int) -> int:
    """Output rows of a window; 0 where it does not fit once."""
    free = size + begin + end - dilation * (kernel - 1) - 1
    return free // stride + 1 if free >= 0 else 0


def pooled_extent(size: int, begin: int, end: int, kernel: int, dilation: int, stride: int, ceil: int) -> int:
    free = size + begin + end - dilation * (kernel - 1) - 1
    if free < 0:
        return 0
    if ceil == 0:
        return free // stride + 1
    count = (free + stride - 1) // stride + 1
    return count - 1 if (count - 1) * stride >= size + begin else count


def bind_conv(instance: int, s: int, i: int, error: int) -> int:
    x = size_at(instance, get(s, 1))
    if get(s, 18) == IOHW:
        height = get(s, 9) * (get(x, B_H) - 1) + get(s, 19) + get(s, 11) * (get(s, 7) - 1) + 1 - get(s, 13) - get(s, 15)
        width = get(s, 10) * (get(x, B_W) - 1) + get(s, 20) + get(s, 12) * (get(s, 8) - 1) + 1 - get(s, 14) - get(s, 16)
    else:
        height = extent(get(x, B_H), get(s, 13), get(s, 15), get(s, 7), get(s, 11), get(s, 9))
        width = extent(get(x, B_W), get(s, 14), get(s, 16), get(s, 8), get(s, 12), get(s, 10))
    if get(s, 3) < 0:
        if get(x, B_H) != 1:
            return fail(error, text("float output is for rows only"), i, get(x, B_H))
        return 1
    if get(s, 2) >= 0:
        residual = size_at(instance, get(s, 2))
        if get(residual, B_H) != height or get(residual, B_W) != width:
            return fail(error, text("the residual has another size"), i, get(residual, B_W))
    return define(instance, get(s, 3), height, width, i, error)


def bind_copy(instance: int, s: int, i: int, error: int) -> int:
    x = size_at(instance, get(s, 1))
    rows, columns = get(s, 9), get(s, 12)
    most_rows = (get(x, B_H) - get(s, 7) + get(s, 8) - 1) // get(s, 8)
    most_columns = (get(x, B_W) - get(s, 10) + get(s, 11) - 1) // get(s, 11)
    rows = most_rows if rows < 0 else rows
    columns = most_columns if columns < 0 else columns
    if rows < 1 or columns < 1 or rows > most_rows or columns > most_columns:
        return fail(error, text("a slice reaches past the image"), i, rows)
    height = get(s, 13) + rows * get(s, 17) + get(s, 15)
    width = get(s, 14) + columns * get(s, 18) + get(s, 16)
    return define(instance, get(s, 3), height, width, i, error)


def bind_pool(instance: int, s: int, i: int, error: int) -> int:
    x = size_at(instance, get(s, 1))
    if get(s, 4) == GLOBAL_POOL:
        if get(x, B_H) * get(x, B_W) >= 1 << 23:
            return fail(error, text("the sum of so many pixels overflows"), i, get(x, B_H) * get(x, B_W))
        return define(instance, get(s, 3), 1, 1, i, error)
    height = pooled_extent(get(x, B_H), get(s, 13), get(s, 15), get(s, 7), get(s, 11), get(s, 9), get(s, 18))
    width = pooled_extent(get(x, B_W), get(s, 14), get(s, 16), get(s, 8), get(s, 12), get(s, 10), get(s, 18))
    return define(instance, get(s, 3), height, width, i, error)


def bind_binary(instance: int, s: int, i: int, error: int) -> int:
    x, y = size_at(instance, get(s, 1)), size_at(instance, get(s, 2))
    height, width = max(get(x, B_H), get(y, B_H)), max(get(x, B_W), get(y, B_W))
    for size in (x, y):
        same = get(size, B_H) == height and get(size, B_W) == width
        one = get(size, B_H) == 1 and get(size, B_W) == 1
        if not same and not one:
            return fail(error, text("images of different sizes meet"), i, get(size, B_W))
    return define(instance, get(s, 3), height, width, i, error)


def bind_output(handle: int, instance: int, s: int, i: int, error: int) -> int:
    floats = get(s, 0) == CONV
    tensor = get(s, 1)
    index = get(s, 26) if floats else get(s, 2)
    rank = get(s, 28) if floats else get(s, 6)
    shape = get(instance, I_OUT_SHAPES) + 8 * TENSOR_RECORD * index
    size = size_at(instance, tensor)
    put(shape, R_RANK, rank)
    put(shape, R_TYPE, FLOAT if floats else get(s, 4))
    if floats or get(s, 5) == ROWS:
        channels = get(s, 30) if floats else get(tensor_at(handle, tensor), T_CHANNELS)
        if get(instance, I_IMAGES) == 1:
            if rank != 2 or get(size, B_H) * get(size, B_W) != 1:
                return fail(error, text("an output of rows has several pixels of each image"), i, get(size, B_W))
            put(shape, R_DIMS, get(instance, I_BATCH))
            put(shape, R_DIMS + 1, channels)
            return 1
        if not leading_axes(instance, shape, rank, get(s, 29) if floats else get(s, 8), channels):
            return fail(error, text("an output has another rank than the activation it takes axes from"), i, rank)
        if get(instance, I_BATCH) > 0 and (get(size, B_H) != 1 or get(size, B_W) != row_count(instance, shape, rank)):
            return fail(error, text("an output has other rows than the activation it takes axes from"), i, get(size, B_W))
        return 1
    channels, height, width = get(tensor_at(handle, tensor), T_CHANNELS), get(size, B_H), get(size, B_W)
    put(shape, R_DIMS, get(instance, I_BATCH))
    if get(s, 5) == CHANNELS_LAST:
        put(shape, R_DIMS + 1, height)
        put(shape, R_DIMS + 2, width)
        put(shape, R_DIMS + 3, channels)
        return 1
    put(shape, R_DIMS + 1, channels)
    if rank == 2 and height * width != 1:
        return fail(error, text("an output of two axes has several pixels"), i, height * width)
    if rank == 3:
        put(shape, R_DIMS + 2, height * width)
    if rank == 4:
        put(shape, R_DIMS + 2, height)
        put(shape, R_DIMS + 3, width)
    return 1


def bind_sizes(handle: int, instance: int, error: int) -> int:
    """Sizes of all tensors and outputs, step by step."""
    for t in range(get(handle, H_TENSORS)):
        put(size_at(instance, t), B_H, -1)
    for i in range(get(handle, H_STEPS)):
        s = step_at(handle, i)
        kind = get(s, 0)
        done = 1
        if kind == INPUT:
            done = bind_input(handle, instance, s, i, error)
        elif kind == CONV:
            done = bind_conv(instance, s, i, error)
        elif kind == POOL:
            done = bind_pool(instance, s, i, error)
        elif kind == BINARY:
            done = bind_binary(instance, s, i, error)
        elif kind == COPY:
            done = bind_copy(instance, s, i, error)
        if done != 0 and (kind == OUTPUT or (kind == CONV and get(s, 3) < 0)):
            done = bind_output(handle, instance, s, i, error)
        if done == 0:
            return 0
    return 1


def need(size: int, slot: int, rows: int) -> None:
    put(size, slot, max(get(size, slot), rows))


def pad_for_phases(handle: int, instance: int, s: int, i: int) -> None:
    """Padding that the phases of a transposed convolution read."""
    x, out = size_at(instance, get(s, 1)), size_at(instance, get(s, 3))
    for vertical in (True, False):
        stride, kernel = (get(s, 9), get(s, 7)) if vertical else (get(s, 10), get(s, 8))
        size, outs = (get(x, B_H), get(out, B_H)) if vertical else (get(x, B_W), get(out, B_W))
        for phase in range(stride):
            count = (outs - phase + stride - 1) // stride
            for tap in range(kernel):
                reach = tap_reach(s, phase, tap, vertical)
                if reach != -(1 << 30) and count > 0:
                    need(x, B_TOP if vertical else B_LEFT, -reach)
                    need(x, B_BOTTOM if vertical else B_RIGHT, count - 1 + reach - (size - 1))


def bind_padding(handle: int, instance: int) -> None:
    """The padding that convolutions need around their inputs."""
    for i in range(get(handle, H_STEPS)):
        s = step_at(handle, i)
        if get(s, 0) != CONV or get(s, 3) < 0:
            continue
        if get(s, 18) == IOHW:
            pad_for_phases(handle, instance, s, i)
            continue
        x, out = size_at(instance, get(s, 1)), size_at(instance, get(s, 3))
        need(x, B_TOP, get(s, 13))
        need(x, B_LEFT, get(s, 14))
        need(x, B_BOTTOM, (get(out, B_H) - 1) * get(s, 9) + get(s, 11) * (get(s, 7) - 1) - get(s, 13) - get(x, B_H) + 1)
        need(x, B_RIGHT, (get(out, B_W) - 1) * get(s, 10) + get(s, 12) * (get(s, 8) - 1) - get(s, 14) - get(x, B_W) + 1)


def bind_lives(handle: int, instance: int) -> None:
    """First and last step at which each tensor is in use."""
    for t in range(get(handle, H_TENSORS)):
        put(size_at(instance, t), B_BORN, -1)
    for i in range(get(handle, H_STEPS)):
        s = step_at(handle, i)
        kind = get(s, 0)
        for slot in range(1, 4):
            tensor = get(s, slot)
            used = slot != 2 or kind == CONV or kind == BINARY
            used = used and not (slot == 1 and kind == INPUT) and not (slot == 3 and kind == OUTPUT)
            if used and tensor >= 0:
                size = size_at(instance, tensor)
                if get(size, B_BORN) < 0:
                    put(size, B_BORN, i)
                put(size, B_DIES, i)


def bind_bytes(handle: int, instance: int, error: int) -> int:
    for t in range(get(handle, H_TENSORS)):
        size = size_at(instance, t)
        if get(size, B_BORN) < 0:
            continue
        row = (get(size, B_W) + get(size, B_LEFT) + get(size, B_RIGHT)) * get(tensor_at(handle, t), T_PITCH)
        rows = get(size, B_H) + get(size, B_TOP) + get(size, B_BOTTOM)
        if row >= LIMIT or row * rows >= LIMIT - (1 << 20):
            return fail(error, text("an activation takes over 2 GB"), -1, t)
        put(size, B_ROW, row)
        put(size, B_SIZE, (row * rows + 63) // 64 * 64 + 128)
    return 1


def clashes(a: int, b: int) -> bool:
    return not (get(a, B_DIES) < get(b, B_BORN) or get(b, B_DIES) < get(a, B_BORN))


def lowest_place(handle: int, instance: int, size: int) -> int:
    """First fit among the tensors placed so far that are in use at the same time."""
    place = 0
    moved = True
    while moved:
        moved = False
        for t in range(get(handle, H_TENSORS)):
            other = size_at(instance, t)
            if get(other, B_BORN) < 0 or get(other, B_PLACE) < 0 or not clashes(size, other):
                continue
            end = get(other, B_PLACE) + get(other, B_SIZE)
            if place < end and get(other, B_PLACE) < place + get(size, B_SIZE):
                place = end
                moved = True
    return place


def bind_arena(handle: int, instance: int, error: int) -> int:
    """Greedy by size: the largest tensor first, each at the lowest place that is free while it lives."""
    tensors = get(handle, H_TENSORS)
    top, pitch = 0, 16
    for t in range(tensors):
        put(size_at(instance, t), B_PLACE, -1)
        pitch = max(pitch, get(tensor_at(handle, t), T_PITCH))
    for _ in range(tensors):
        best = -1
        for t in range(tensors):
            size = size_at(instance, t)
            if get(size, B_BORN) >= 0 and get(size, B_PLACE) < 0:
                if best < 0 or get(size, B_SIZE) > get(size_at(instance, best), B_SIZE):
                    best = t
        if best < 0:
            break
        size = size_at(instance, best)
        put(size, B_PLACE, lowest_place(handle, instance, size))
        top = max(top, get(size, B_PLACE) + get(size, B_SIZE))
    before = (SLACK + pitch + 63) // 64 * 64
    after = SLACK + pitch * (64 if get(handle, H_TILES) != 0 else 2)
    arena = own(instance, before + top + after)
    if arena == 0:
        return fail(error, text("no memory for activations of so many bytes"), -1, top)
    put(instance, I_ARENA, arena)
    put(instance, I_ARENA_SIZE, before + top + after)
    for t in range(tensors):
        size = size_at(instance, t)
        if get(size, B_BORN) >= 0:
            corner = get(size, B_TOP) * get(size, B_ROW) + get(size, B_LEFT) * get(tensor_at(handle, t), T_PITCH)
            put(size, B_ORIGIN, arena + before + get(size, B_PLACE) + corner)
    return 1


def phase_rows(instance: int, s: int, part: int, vertical: bool) -> int:
    """Output rows (columns) of one part of a convolution."""
    out = size_at(instance, get(s, 3))
    count = get(out, B_H) if vertical else get(out, B_W)
    if get(s, 18) != IOHW:
        return count
    stride, phase = (get(s, 9), get(part, S_PHASE_Y)) if vertical else (get(s, 10), get(part, S_PHASE_X))
    return (count - phase + stride - 1) // stride


def part_at(handle: int, i: int, index: int) -> int:
    return get(get(get(handle, H_PACKED), i), P_PARTS) + 8 * PART * index


TEMPLATES = (
    define, bind_input, extent, pooled_extent, bind_conv, bind_copy, bind_pool, bind_binary,
    bind_output, bind_sizes, need, pad_for_phases, bind_padding, bind_lives, bind_bytes, clashes, lowest_place, bind_arena,
    phase_rows, part_at,
)  # fmt: skip
