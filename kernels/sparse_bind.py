"""Binding sparse weights to the shapes of a run: where blocks read, which tiles of pixels there are, what is copied first."""

from __future__ import annotations

from graphopt.kernels.engine_state import (
    I_OUT_SHAPES,
    I_SHAPES,
    R_DIMS,
    R_RANK,
    R_TYPE,
    TENSOR_RECORD,
    fail,
    get,
    own,
    put,
)
from graphopt.kernels.memory import copy, fill, ld32, st32, text
from graphopt.kernels.sparse_bitmap import bind_bitmap
from graphopt.kernels.sparse_plan import (
    BITS,
    P_ACTIVATIONS,
    P_DH,
    P_DW,
    P_GROUPS,
    P_IN,
    P_KH,
    P_KIND,
    P_KW,
    P_OUT,
    P_PB,
    P_PL,
    P_PLACES,
    P_PR,
    P_PT,
    P_SH,
    P_SW,
    ROWS,
)
from graphopt.kernels.sparse_state import (
    DIRECT,
    FLAT,
    H_CHUNKS,
    H_COLUMNS,
    H_COUNT,
    H_LANES,
    H_PLAN,
    H_ROWS,
    H_STARTS,
    I_CHANNEL,
    I_COPIES,
    I_DEPTHWISE,
    I_DX,
    I_DY,
    I_FLAGS,
    I_H,
    I_IMAGES,
    I_LINES,
    I_MODE,
    I_OFFSETS,
    I_OH,
    I_OVERLAP,
    I_OW,
    I_PARTS,
    I_PH,
    I_PITCH,
    I_PW,
    I_SCRATCH,
    I_SLOT,
    I_TILE_COUNT,
    I_TILES,
    I_W,
    MAX_PARTS,
    PADDED,
    PART_WORK,
    SINGLE,
    TILE,
    TRANSPOSED,
)

FLOAT = 1  # ONNX's element type
FAR = (1 << 31) - 1  # offsets are int32
ENOUGH = 1 << 40  # too much for memory
FEW = 3  # rows that are not worth transposing


def widest(handle: int) -> int:
    """Vectors of pixels that the kernels take abreast."""
    return 8 if get(handle, H_ROWS) == 1 else 3


def set_tile(instance: int, x: int, y: int, vectors: int, last: int) -> None:
    """One more tile; last: pixels from its first vector to its last, or -1 where that lies as the others do."""
    index = get(instance, I_TILE_COUNT)
    tile = get(instance, I_TILES) + 8 * TILE * index
    put(tile, 0, 4 * x)
    put(tile, 1, 4 * y)
    put(tile, 2, vectors)
    put(tile, 3, 4 * last if last >= 0 else -1)
    put(instance, I_TILE_COUNT, index + 1)


def tile_lines(instance: int, lines: int, length: int, pitch: int, lanes: int, most: int) -> int:
    """Tiles along lines of `length` pixels, `pitch` apart in the input; the last vector ends where the line does."""
    vectors = (length + lanes - 1) // lanes
    count = (vectors + most - 1) // most
    tiles = own(instance, 8 * TILE * lines * count)
    if tiles == 0:
        return 0
    put(instance, I_TILES, tiles)
    put(instance, I_DX, 4 * lanes)
    put(instance, I_DY, 4 * lanes)
    for line in range(lines):
        for i in range(count):
            first, behind = vectors * i // count, vectors * (i + 1) // count
            x = min(first * lanes, length - lanes)
            last = length - lanes - x if behind == vectors else -1
            set_tile(instance, line * pitch + x, line * length + x, behind - first, last)
    return 1


def tile_down(instance: int, lines: int, length: int, pitch: int, lanes: int, most: int) -> int:
    """Tiles of one vector in each of several lines; vectors at the end of a line overlap those before."""
    tiles = own(instance, 8 * TILE * (length // lanes + 1) * (lines // most + 1))
    if tiles == 0:
        return 0
    put(instance, I_TILES, tiles)
    put(instance, I_DX, 4 * pitch)
    put(instance, I_DY, 4 * length)
    steps = (length + lanes - 1) // lanes
    for i in range(steps * ((lines + most - 1) // most)):  # those of as many lines follow each other
        x, first = min(i % steps * lanes, length - lanes), i // steps * most
        set_tile(instance, first * pitch + x, first * length + x, min(most, lines - first), -1)
    return 1


def set_offsets(handle: int, instance: int) -> int:
    """Where each block reads, in bytes from the tile's begin."""
    plan, count = get(handle, H_PLAN), get(handle, H_COUNT)
    offsets = own(instance, 4 * count + 4)
    if offsets == 0:
        return 0
    put(instance, I_OFFSETS, offsets)
    kw, taps = get(plan, P_KW), get(plan, P_KH) * get(plan, P_KW)
    sh, sw, ph, pw = get(plan, P_SH), get(plan, P_SW), get(instance, I_PH), get(instance, I_PW)
    copied = get(instance, I_MODE) == PADDED or get(instance, I_MODE) == FLAT
    pitch, starts = get(instance, I_PITCH), get(handle, H_STARTS)
    rows = get(plan, P_OUT) // get(handle, H_ROWS)
    for slot in range(rows * get(handle, H_CHUNKS)):
        n = slot // get(handle, H_CHUNKS)
        first = n * get(plan, P_GROUPS) // rows * (get(plan, P_IN) // get(plan, P_GROUPS)) * taps  # column of its group
        if get(instance, I_DEPTHWISE) == 1:
            first = 0
        for i in range(ld32(starts + 4 * slot), ld32(starts + 4 * slot + 4)):
            k = ld32(get(handle, H_COLUMNS) + 4 * i) + first
            place = k * pitch
            if copied:
                y, x = k % taps // kw * get(plan, P_DH), k % taps % kw * get(plan, P_DW)
                place = (((k // taps * sh + y % sh) * sw + x % sw) * ph + y // sh) * pw + x // sw
            st32(offsets + 4 * i, 4 * place)
    return 1


def set_parts(handle: int, instance: int, pixels: int) -> None:
    """How many threads may share an image (or all rows)."""
    work = get(handle, H_COUNT) * get(handle, H_ROWS) * pixels
    put(instance, I_PARTS, max(1, min(MAX_PARTS, work // PART_WORK)))


def bind_rows(handle: int, instance: int, inputs: int, shape: int, error: int) -> int:
    """x [..., inputs]."""
    plan, lanes, rank = get(handle, H_PLAN), get(handle, H_LANES), get(inputs, R_RANK)
    outputs, width = get(plan, P_OUT), get(plan, P_IN)
    if rank < 1 or get(inputs, R_DIMS + rank - 1) != width:
        return fail(error, text("the last axis of the activation does not fit the weights, which have columns"), -1, width)
    rows = 1
    for axis in range(rank - 1):
        rows *= get(inputs, R_DIMS + axis)
        put(shape, R_DIMS + axis, get(inputs, R_DIMS + axis))
    put(shape, R_RANK, rank)
    put(shape, R_DIMS + rank - 1, outputs)
    put(instance, I_IMAGES, 1 if rows > 0 else 0)
    put(instance, I_OH, rows)
    set_parts(handle, instance, rows)
    if get(plan, P_PLACES) == BITS:
        return bind_bitmap(handle, instance, rows, error)
    if rows <= FEW:
        put(instance, I_MODE, SINGLE)
        put(instance, I_PITCH, 1)
        return 1
    tile = min(widest(handle) * lanes, (rows + lanes - 1) // lanes * lanes)
    tiles = (rows + tile - 1) // tile
    put(instance, I_MODE, TRANSPOSED)
    put(instance, I_OW, tile)
    put(instance, I_PITCH, tile)
    put(instance, I_TILE_COUNT, tiles)
    put(instance, I_DX, 4 * lanes)
    put(instance, I_DY, 4 * lanes)
    put(instance, I_CHANNEL, 4 * tile)
    put(instance, I_PARTS, max(1, min(get(instance, I_PARTS), tiles)))
    slots = get(instance, I_PARTS)
    size = 4 * tile * (width + outputs * get(plan, P_ACTIVATIONS))
    scratch, flags = own(instance, slots * size), own(instance, 8 * slots)
    if scratch == 0 or flags == 0 or 4 * tile * width > FAR:
        return fail(error, text("no memory for a tile of rows; columns"), -1, width)
    fill(scratch, 0, slots * size)
    fill(flags, 0, 8 * slots)
    put(instance, I_SCRATCH, scratch)
    put(instance, I_SLOT, size)
    put(instance, I_FLAGS, flags)
    return 1


def out_size(plan: int, size: int, axis: int) -> int:
    """Height (axis 0) or width (1) of the output for one of the input; below 1 where the kernel does not fit."""
    reach = (get(plan, P_KH + axis) - 1) * get(plan, P_DH + axis) + 1
    room = size + get(plan, P_PT + axis) + get(plan, P_PB + axis) - reach
    return room // get(plan, P_SH + axis) + 1 if room >= 0 else 0


def capped(a: int, b: int) -> int:
    """a * b of numbers of at least 0, or ENOUGH where that is more."""
    if a == 0 or b == 0:
        return 0
    return ENOUGH if a > ENOUGH // b else a * b


def set_mode(handle: int, instance: int) -> int:
    """How the input is read; the floats to copy it to, at most ENOUGH."""
    plan, lanes = get(handle, H_PLAN), get(handle, H_LANES)
    oh, ow = get(instance, I_OH), get(instance, I_OW)
    kernel, strides = get(plan, P_KH) * get(plan, P_KW), get(plan, P_SH) * get(plan, P_SW)
    pads = get(plan, P_PT) + get(plan, P_PL) + get(plan, P_PB) + get(plan, P_PR)
    put(instance, I_PITCH, oh * ow)
    if kernel * strides == 1 and pads == 0 and oh * ow >= lanes:
        put(instance, I_MODE, DIRECT)
        return capped(get(plan, P_IN), oh * ow)
    put(instance, I_MODE, PADDED if ow >= lanes else FLAT)
    put(instance, I_PH, oh + (get(plan, P_KH) - 1) * get(plan, P_DH) // get(plan, P_SH))
    put(instance, I_PW, ow + (get(plan, P_KW) - 1) * get(plan, P_DW) // get(plan, P_SW))
    groups = get(plan, P_GROUPS)
    put(instance, I_DEPTHWISE, 1 if groups == get(plan, P_IN) and groups == get(plan, P_OUT) else 0)
    channel, extra = capped(strides, capped(get(instance, I_PH), get(instance, I_PW))), get(instance, I_PW) + lanes
    # beyond the last plane: what vectors read of pixels that are no output
    put(instance, I_SLOT, 4 * channel)
    if get(instance, I_DEPTHWISE) == 1:  # planes for each part of the work, not for each channel
        put(instance, I_SLOT, 4 * (channel + extra))
        return capped(MAX_PARTS, channel + extra)
    return capped(get(plan, P_IN), channel) + extra


def conv_memory(handle: int, instance: int, floats: int, error: int) -> int:
    """The copy of the input, and in FLAT mode the output channels with the pixels between their lines."""
    plan, lanes = get(handle, H_PLAN), get(handle, H_LANES)
    pixels = get(instance, I_OH) * get(instance, I_OW)
    if 4 * floats > FAR:
        return fail(error, text("an image is too large for 32-bit offsets; pixels"), -1, pixels)
    if get(instance, I_MODE) != DIRECT:
        scratch = own(instance, 4 * floats)
        if scratch == 0:
            return fail(error, text("no memory for the padded input; pixels"), -1, pixels)
        fill(scratch, 0, 4 * floats)
        put(instance, I_SCRATCH, scratch)
    put(instance, I_CHANNEL, 4 * pixels)
    if get(instance, I_MODE) == FLAT:
        wide = (get(instance, I_OH) * get(instance, I_PW) + lanes - 1) // lanes * lanes
        size = capped(4 * wide, get(plan, P_OUT) * get(plan, P_ACTIVATIONS))
        lines = own(instance, size) if size < ENOUGH else 0
        if lines == 0:
            return fail(error, text("no memory for the output; pixels"), -1, pixels)
        fill(lines, 0, size)
        put(instance, I_LINES, lines)
        put(instance, I_CHANNEL, 4 * wide)
    return 1


def bind_conv(handle: int, instance: int, inputs: int, shape: int, error: int) -> int:
    """x [N, C, H, W] or [N, C, W]."""
    plan, lanes, rank = get(handle, H_PLAN), get(handle, H_LANES), get(inputs, R_RANK)
    if rank < 3 or rank > 4 or get(inputs, R_DIMS + 1) != get(plan, P_IN):
        return fail(error, text("the activation does not fit the weights, which have input channels"), -1, get(plan, P_IN))
    height, width = 1 if rank == 3 else get(inputs, R_DIMS + 2), get(inputs, R_DIMS + rank - 1)
    oh, ow = out_size(plan, height, 0), out_size(plan, width, 1)
    if oh < 1 or ow < 1 or height < 1 or width < 1 or (rank == 3 and oh != 1):
        return fail(error, text("the kernel does not fit the activation, of width"), -1, width)
    if height > FAR or width > FAR or oh * ow > FAR:
        return fail(error, text("an image is too large for 32-bit offsets; width"), -1, width)
    put(shape, R_RANK, rank)
    put(shape, R_DIMS, get(inputs, R_DIMS))
    put(shape, R_DIMS + 1, get(plan, P_OUT))
    put(shape, R_DIMS + 2, oh)
    put(shape, R_DIMS + rank - 1, ow)
    put(instance, I_IMAGES, get(inputs, R_DIMS))
    put(instance, I_H, height)
    put(instance, I_W, width)
    put(instance, I_OH, oh)
    put(instance, I_OW, ow)
    floats = set_mode(handle, instance)
    if conv_memory(handle, instance, floats, error) == 0:
        return 0
    most = widest(handle)
    if get(instance, I_MODE) != PADDED:
        made = tile_lines(
            instance, 1, oh * ow if get(instance, I_MODE) == DIRECT else get(instance, I_CHANNEL) // 4, 0, lanes, most
        )
    elif oh > 1 and ow < most * lanes:
        made = tile_down(instance, oh, ow, get(instance, I_PW), lanes, most)
    else:
        made = tile_lines(instance, oh, ow, get(instance, I_PW), lanes, most)
    if made == 0:
        return fail(error, text("no memory for the tiles"), -1, oh * ow)
    set_parts(handle, instance, oh * ow)
    # tiles that share pixels must not run at once where they are summed up in the output, or where they share a copied channel
    summed = get(handle, H_CHUNKS) > 1 and get(instance, I_MODE) == PADDED and ow % lanes != 0
    put(instance, I_OVERLAP, 1 if summed or get(instance, I_DEPTHWISE) == 1 or get(instance, I_MODE) == FLAT else 0)
    put(instance, I_COPIES, max(1, min(min(MAX_PARTS, get(plan, P_IN)), floats // (PART_WORK // 8))))
    return 1


def check_residual(other: int, shape: int, error: int) -> int:
    """It must have the shape of the output."""
    if get(other, R_RANK) != get(shape, R_RANK):
        return fail(error, text("the residual must have the shape of the output; its rank is"), -1, get(other, R_RANK))
    for axis in range(get(shape, R_RANK)):
        if get(other, R_DIMS + axis) != get(shape, R_DIMS + axis):
            return fail(error, text("the residual must have the shape of the output; not so on axis"), -1, axis)
    return 1


def bind(handle: int, instance: int, inputs: int, error: int) -> int:
    """Bind an instance to these inputs."""
    plan = get(handle, H_PLAN)
    activations = get(plan, P_ACTIVATIONS)
    shapes, shape = own(instance, 8 * TENSOR_RECORD * activations), own(instance, 8 * TENSOR_RECORD)
    if shapes == 0 or shape == 0:
        return fail(error, text("no memory for an instance"), -1, 0)
    copy(shapes, inputs, 8 * TENSOR_RECORD * activations)
    fill(shape, 0, 8 * TENSOR_RECORD)
    put(shape, R_TYPE, FLOAT)
    put(instance, I_SHAPES, shapes)
    put(instance, I_OUT_SHAPES, shape)
    for i in range(activations):
        if get(inputs + 8 * TENSOR_RECORD * i, R_TYPE) != FLOAT:
            return fail(error, text("activations must be float32; not so is input"), -1, i)
    if get(plan, P_KIND) == ROWS:
        made = bind_rows(handle, instance, inputs, shape, error)
    else:
        made = bind_conv(handle, instance, inputs, shape, error)
    if made == 0:
        return 0
    if get(plan, P_PLACES) != BITS and set_offsets(handle, instance) == 0:
        return fail(error, text("no memory for the offsets"), -1, 0)
    return check_residual(inputs + 8 * TENSOR_RECORD, shape, error) if activations == 2 else 1


TEMPLATES = (
    widest, set_tile, tile_lines, tile_down, set_offsets, set_parts, bind_rows, out_size, capped, set_mode, conv_memory, bind_conv,
    check_residual, bind,
)  # fmt: skip
