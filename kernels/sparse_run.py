"""Running sparse weights: copying the input where it must be padded or transposed, and tiles of pixels, on several threads."""

from __future__ import annotations

from typing import Any

from graphopt.kernels import sparse_rows
from graphopt.kernels.abi import atomic_cas, atomic_store, parallel_for, stack64, symaddr
from graphopt.kernels.engine_state import I_HANDLE, R_DATA, TENSOR_RECORD, get, put
from graphopt.kernels.memory import ldf, stf
from graphopt.kernels.micro_sparse import (
    S_BIAS,
    S_CHANNEL,
    S_DX,
    S_DY,
    S_LIMITS,
    S_OFFSETS,
    S_STARTS,
    S_STEP,
    S_VALUES,
    TILE_LAST,
    TILE_VECTORS,
    TILE_X,
    TILE_Y,
)
from graphopt.kernels.sparse_plan import (
    P_ACTIVATIONS,
    P_DH,
    P_DW,
    P_IN,
    P_KH,
    P_KW,
    P_OUT,
    P_PL,
    P_PT,
    P_SH,
    P_SW,
)
from graphopt.kernels.sparse_rows import copy_features
from graphopt.kernels.sparse_state import (
    BITMAP,
    DIRECT,
    H_BIAS,
    H_CHUNKS,
    H_LIMITS,
    H_OPEN,
    H_PLAN,
    H_ROWS,
    H_STARTS,
    H_VALUES,
    H_ZEROS,
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
    I_PW,
    I_SCRATCH,
    I_SLOT,
    I_TILE_COUNT,
    I_TILES,
    I_W,
    SINGLE,
    TILE,
    TRANSPOSED,
    U_INPUT,
    U_INSTANCE,
    U_OUTPUT,
    U_PARTS,
    U_RESIDUAL,
    U_SOURCE,
)

# given by the rung
LANES = 1
COPY_BODY, TILE_BODY, ROWS_BODY, SINGLE_BODY, BITMAP_BODY = "", "", "", "", ""
spmm_one: Any = None
spmm_four: Any = None
dot_one: Any = None
dot_four: Any = None
square: Any = None
plane1: Any = None
plane2: Any = None


def single(rows: int, s: int, x: int, y: int, r: int, n0: int, n1: int) -> None:
    """One row of features."""
    if rows == 1:
        dot_one(s, x, y, r, n0, n1)
    else:
        dot_four(s, x, y, r, n0, n1)


def block_rows(handle: int) -> int:
    """Rows of blocks of the weights."""
    outputs = get(get(handle, H_PLAN), P_OUT)
    return outputs if get(handle, H_ROWS) == 1 else outputs // 4


def multiply(handle: int, s: int, x: int, y: int, r: int, tiles: int, count: int, n0: int, n1: int) -> None:
    """Tiles of as many vectors each; r: the residual, or 0."""
    if get(handle, H_CHUNKS) == 1:
        products(handle, s, x, y, r, tiles, count, n0, n1)
        return
    for t in range(count):
        multiply_chunks(handle, s, x, y, r, tiles + 8 * TILE * t, n0, n1)


def multiply_chunks(handle: int, s: int, x: int, y: int, r: int, tile: int, n0: int, n1: int) -> None:
    """All chunks of a tile, one after the other: each adds to what those before left in the output."""
    chunks = get(handle, H_CHUNKS)
    for c in range(chunks):
        put(s, S_STARTS, get(handle, H_STARTS) + 4 * c)
        put(s, S_BIAS, get(handle, H_BIAS) if c == 0 else get(handle, H_ZEROS))
        put(s, S_LIMITS, get(handle, H_LIMITS) if c == chunks - 1 else get(handle, H_OPEN))
        products(handle, s, x, y, r if c == 0 else y, tile, 1, n0, n1)


def products(handle: int, s: int, x: int, y: int, r: int, tiles: int, count: int, n0: int, n1: int) -> None:
    """By the kernel for the rows of a block."""
    if get(handle, H_ROWS) == 1:
        spmm_one(s, x, y, r, n0, n1, tiles, count)
    else:
        spmm_four(s, x, y, r, n0, n1, tiles, count)


def set_record(instance: int, s: int) -> None:
    """What the kernels read; some of it is set anew by `multiply_chunks`."""
    handle = get(instance, I_HANDLE)
    put(s, S_DX, get(instance, I_DX))
    put(s, S_DY, get(instance, I_DY))
    put(s, S_CHANNEL, get(instance, I_CHANNEL))
    put(s, S_OFFSETS, get(instance, I_OFFSETS))
    put(s, S_VALUES, get(handle, H_VALUES))
    put(s, S_STEP, 4 * get(handle, H_CHUNKS))
    put(s, S_STARTS, get(handle, H_STARTS))
    put(s, S_BIAS, get(handle, H_BIAS))
    put(s, S_LIMITS, get(handle, H_LIMITS))


def copy_lines_padded(target: int, target_pitch: int, source: int, source_pitch: int, lines: int, first: int, step: int,
                      width: int, count: int) -> None:  # fmt: skip
    """Of each of `lines` lines: target[i] = source[first + i * step] of those i < count for which that is inside [0, width)."""
    i = (step - 1 - first) // step if first < 0 else 0
    inside = min(count, (width - first + step - 1) // step) - i
    if inside <= 0 or lines <= 0:
        return
    to, at = target + 4 * i, source + 4 * (first + i * step)
    if step == 1:
        plane1(to, target_pitch, at, source_pitch, lines, inside)
    elif step == 2:
        plane2(to, target_pitch, at, source_pitch, lines, inside)
    else:
        for line in range(lines):
            for j in range(inside):
                stf(to + line * target_pitch + 4 * j, ldf(at + line * source_pitch + 4 * j * step))


def pad_channel(instance: int, plan: int, source: int, c: int, planes: int) -> None:
    """One channel into its planes, one for each phase; what is around the image was zero from the start."""
    h, w, ph, pw = get(instance, I_H), get(instance, I_W), get(instance, I_PH), get(instance, I_PW)
    sh, sw, top, left = get(plan, P_SH), get(plan, P_SW), get(plan, P_PT), get(plan, P_PL)
    used_h, used_w = min(sh, (get(plan, P_KH) - 1) * get(plan, P_DH) + 1), min(sw, (get(plan, P_KW) - 1) * get(plan, P_DW) + 1)
    for y in range(used_h):
        # lines of the plane whose line of the image, line * sh + y - top, is one
        first = (top - y + sh - 1) // sh if y < top else 0
        lines = min(ph, (h + top - y + sh - 1) // sh) - first
        at = source + 4 * (c * h + first * sh + y - top) * w
        for x in range(used_w):
            plane = planes + 4 * ((y * sw + x) * ph * pw + first * pw)
            copy_lines_padded(plane, 4 * pw, at, 4 * w * sh, lines, x - left, sw, w, pw)


def copy_body(usr: int, part: int) -> None:
    """A part of the channels of the input."""
    instance = get(usr, U_INSTANCE)
    plan = get(get(instance, I_HANDLE), H_PLAN)
    channels, parts = get(plan, P_IN), get(instance, I_COPIES)
    for c in range(channels * part // parts, channels * (part + 1) // parts):
        pad_channel(instance, plan, get(usr, U_SOURCE), c, get(instance, I_SCRATCH) + c * get(instance, I_SLOT))


def tile_body(usr: int, part: int) -> None:
    """A part of the tiles, or of the output channels."""
    instance = get(usr, U_INSTANCE)
    handle = get(instance, I_HANDLE)
    tiles, rows = get(instance, I_TILE_COUNT), block_rows(handle)
    t0, t1, n0, n1 = 0, tiles, 0, rows
    parts = get(usr, U_PARTS)
    if get(instance, I_OVERLAP) == 0 and tiles >= parts:
        t0, t1 = tiles * part // parts, tiles * (part + 1) // parts
    else:
        n0, n1 = rows * part // parts, rows * (part + 1) // parts
    record = stack64(12)
    set_record(instance, record)
    if get(instance, I_DEPTHWISE) == 0:
        part_range(instance, usr, record, get(usr, U_INPUT), t0, t1, n0, n1)
        return
    planes = get(usr, U_INPUT) + part * get(instance, I_SLOT)
    for n in range(n0, n1):  # a channel at a time: it stays in the cache
        pad_channel(instance, get(handle, H_PLAN), get(usr, U_SOURCE), n, planes)
        part_range(instance, usr, record, planes, t0, t1, n, n + 1)


def part_range(instance: int, usr: int, record: int, x: int, t0: int, t1: int, n0: int, n1: int) -> None:
    """Tiles [t0, t1) of block rows [n0, n1); in FLAT mode lines are spread out before and gathered after."""
    handle, lines, output = get(instance, I_HANDLE), get(instance, I_LINES), get(usr, U_OUTPUT)
    residual, outputs, rows = get(usr, U_RESIDUAL), get(get(handle, H_PLAN), P_OUT), get(handle, H_ROWS)
    if lines == 0:
        tile_range(instance, record, x, output, residual, t0, t1, n0, n1)
        return
    spread = lines + get(instance, I_CHANNEL) * outputs if residual != 0 else 0
    if residual != 0:
        for c in range(n0 * rows, n1 * rows):
            copy_lines(instance, spread, residual, c, 1)
    tile_range(instance, record, x, lines, spread, t0, t1, n0, n1)
    for c in range(n0 * rows, n1 * rows):
        copy_lines(instance, lines, output, c, 0)


def copy_lines(instance: int, flat: int, dense: int, c: int, out: int) -> None:
    """The lines of a channel between the FLAT form and the dense one; out: 1 to the FLAT form."""
    oh, ow, pitch = get(instance, I_OH), get(instance, I_OW), get(instance, I_PW)
    one, two = flat + c * get(instance, I_CHANNEL), dense + 4 * c * oh * ow
    if out == 1:
        plane1(one, 4 * pitch, two, 4 * ow, oh, ow)
    else:
        plane1(two, 4 * ow, one, 4 * pitch, oh, ow)


def tile_range(
    instance: int, record: int, x: int, y: int, r: int, t0: int, t1: int, n0: int, n1: int
) -> None:  # fmt: skip
    """Tiles [t0, t1) of block rows [n0, n1); r: the residual, or 0."""
    handle, t = get(instance, I_HANDLE), t0
    while t < t1:
        first, count = get(instance, I_TILES) + 8 * TILE * t, 1
        while t + count < t1 and get(first + 8 * TILE * count, TILE_VECTORS) == get(first, TILE_VECTORS):
            count += 1
        multiply(handle, record, x, y, r, first, count, n0, n1)
        t += count


def turn(target: int, target_pitch: int, source: int, source_pitch: int, rows: int, columns: int) -> None:
    """target[c][r] = source[r][c] of floats; pitches in bytes."""
    for r in range(0, rows, LANES):
        for c in range(0, columns, LANES):
            to, at = target + c * target_pitch + 4 * r, source + r * source_pitch + 4 * c
            if r + LANES <= rows and c + LANES <= columns:
                square(to, target_pitch, at, source_pitch)
            else:
                for i in range(min(LANES, rows - r)):
                    for j in range(min(LANES, columns - c)):
                        stf(to + j * target_pitch + 4 * i, ldf(at + i * source_pitch + 4 * j))


def single_body(usr: int, part: int) -> None:
    """A part of the outputs of a few rows."""
    instance = get(usr, U_INSTANCE)
    handle, record = get(instance, I_HANDLE), stack64(12)
    set_record(instance, record)
    plan, rows, parts, residual = get(handle, H_PLAN), block_rows(handle), get(usr, U_PARTS), get(usr, U_RESIDUAL)
    n0, n1 = rows * part // parts, rows * (part + 1) // parts
    for m in range(get(instance, I_OH)):
        x, place = get(usr, U_INPUT) + 4 * m * get(plan, P_IN), 4 * m * get(plan, P_OUT)
        before = residual + place if residual != 0 else get(handle, H_ZEROS)
        single(get(handle, H_ROWS), record, x, get(usr, U_OUTPUT) + place, before, n0, n1)


def take_slot(flags: int, slots: int) -> int:
    """Scratch memory of no other thread: there are as many as parts."""
    slot = 0
    while atomic_cas(flags + 8 * slot, 0, 1) != 0:
        slot = slot + 1 if slot + 1 < slots else 0
    return slot


def rows_body(usr: int, part: int) -> None:
    """A part of the tiles of rows: transposed, multiplied, transposed back."""
    instance = get(usr, U_INSTANCE)
    handle = get(instance, I_HANDLE)
    plan, parts = get(handle, H_PLAN), get(usr, U_PARTS)
    width, outputs, tile = get(plan, P_IN), get(plan, P_OUT), get(instance, I_OW)
    slot = take_slot(get(instance, I_FLAGS), parts)
    x = get(instance, I_SCRATCH) + slot * get(instance, I_SLOT)
    y = x + 4 * tile * width
    r = y + 4 * tile * outputs if get(plan, P_ACTIVATIONS) == 2 else 0
    tiles, record, whole = get(instance, I_TILE_COUNT), stack64(12), stack64(TILE)
    set_record(instance, record)
    put(whole, TILE_X, 0)
    put(whole, TILE_Y, 0)
    put(whole, TILE_LAST, -1)
    for t in range(tiles * part // parts, tiles * (part + 1) // parts):
        count = min(tile, get(instance, I_OH) - t * tile)
        place = 4 * t * tile * outputs
        turn(x, 4 * tile, get(usr, U_INPUT) + 4 * t * tile * width, 4 * width, count, width)
        if r != 0:
            turn(r, 4 * tile, get(usr, U_RESIDUAL) + place, 4 * outputs, count, outputs)
        put(whole, TILE_VECTORS, (count + LANES - 1) // LANES)
        multiply(handle, record, x, y, r, whole, 1, 0, block_rows(handle))
        turn(get(usr, U_OUTPUT) + place, 4 * outputs, y, 4 * tile, outputs, count)
    atomic_store(get(instance, I_FLAGS) + 8 * slot, 0)


def run_image(instance: int, usr: int, par: int) -> None:
    """One image."""
    copies = get(instance, I_COPIES)
    put(usr, U_SOURCE, get(usr, U_INPUT))
    if get(instance, I_MODE) != DIRECT:
        if get(instance, I_DEPTHWISE) == 0:
            parallel_for(par if copies > 1 else 0, symaddr(COPY_BODY), copies, usr)
        put(usr, U_INPUT, get(instance, I_SCRATCH))
    parts = min(get(usr, U_PARTS), max(get(instance, I_TILE_COUNT), block_rows(get(instance, I_HANDLE))))
    put(usr, U_PARTS, parts)
    parallel_for(par if parts > 1 else 0, symaddr(TILE_BODY), parts, usr)


def run(instance: int, inputs: int, outputs: int, par: int) -> int:
    """The whole batch; `inputs`: tensor records, `outputs`: addresses. Always 0."""
    plan = get(get(instance, I_HANDLE), H_PLAN)
    usr = stack64(16)
    residual = get(inputs + 8 * TENSOR_RECORD, R_DATA) if get(plan, P_ACTIVATIONS) == 2 else 0
    put(usr, U_INSTANCE, instance)
    images, mode = get(instance, I_IMAGES), get(instance, I_MODE)
    size = 4 * get(plan, P_IN) * get(instance, I_H) * get(instance, I_W)
    out = 4 * get(plan, P_OUT) * get(instance, I_OH) * get(instance, I_OW)
    for image in range(images):
        put(usr, U_INPUT, get(inputs, R_DATA) + image * size)
        put(usr, U_OUTPUT, get(outputs, 0) + image * out)
        put(usr, U_RESIDUAL, residual + image * out if residual != 0 else 0)
        parts = get(instance, I_PARTS)
        put(usr, U_PARTS, parts)
        if mode == TRANSPOSED:
            parallel_for(par if parts > 1 else 0, symaddr(ROWS_BODY), parts, usr)
        elif mode == SINGLE:
            parallel_for(par if parts > 1 else 0, symaddr(SINGLE_BODY), parts, usr)
        elif mode == BITMAP:
            copy_features(instance, usr)
            parallel_for(par if parts > 1 else 0, symaddr(BITMAP_BODY), parts, usr)
        else:
            run_image(instance, usr, par)
    return 0


PARTS = (
    single, block_rows, products, multiply_chunks, multiply, set_record, copy_lines_padded, pad_channel, copy_body, tile_range,
    copy_lines, part_range, tile_body, turn, single_body, take_slot, rows_body, *sparse_rows.PARTS,
)  # fmt: skip
TEMPLATES = (run_image, run)  # which reach those by symbols that must be known before
