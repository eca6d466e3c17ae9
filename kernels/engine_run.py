"""Running the rows of an instance, in parts that onnxruntime's threads may share."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.kernels.abi import parallel_for, stack64, symaddr
from graphopt.kernels.engine_conv import (
    ROW_INDEX,
    ROW_STEP,
    ROW_UNITS,
    ROW_WORK,
    RUN_ANY_DEPTHWISE,
    RUN_BINARY,
    RUN_BORDER,
    RUN_CONV,
    RUN_COPY,
    RUN_DEPTHWISE,
    RUN_FILL,
    RUN_INPUT,
    RUN_OUTPUT,
    RUN_POOL,
    RUN_TILES,
)
from graphopt.kernels.engine_edges import edge_part
from graphopt.kernels.engine_state import I_BATCH, I_COUNT, I_ROWS, R_DATA, TENSOR_RECORD, get, put
from graphopt.kernels.layout import (
    CONV_BIAS,
    CONV_CHANNELS,
    CONV_COMP,
    CONV_FIRSTS,
    CONV_M,
    CONV_MODE,
    CONV_OUTPUT,
    CONV_PANEL,
    CONV_PANELS,
    CONV_QUADS,
    CONV_RESIDUAL,
    CONV_SCALE,
    CONV_WEIGHTS,
    DW_C,
    DW_COMP,
    DW_HIGH,
    DW_INPUT,
    DW_KERNEL,
    DW_LOW,
    DW_OUT_ROW,
    DW_OUTPUT,
    DW_OW,
    DW_ROW,
    DW_SCALE,
    DW_STRIDE,
    DW_WEIGHTS,
    DW_ZERO,
    MODE_F32,
    PIXELS,
    ROW,
)
from graphopt.kernels.memory import copy as copy_bytes
from graphopt.kernels.memory import fill, ldf, ldu8, stu8, to_float
from graphopt.kernels.plan import ADD, GLOBAL_POOL, MAX_POOL
from graphopt.kernels.vector_steps import (
    add_bytes,
    copy_pixels,
    depthwise_pixel,
    mul_bytes,
    pool_average,
    pool_global,
    pool_max,
)
from graphopt.kernels.windows import SECTIONS

SMALL = 20_000  # nanoseconds of work that are not worth a second thread
PART_NS = 10_000  # of work that a part should have
MAX_PARTS = 16

# given by the rung
conv: Any = None
gemv: Any = None
conv_amx: Any = None
depthwise: Any = None
look_up: Any = None
TILES = False
BODY = ""


def border_part(row: int) -> None:
    start, line, height = get(row, 1), get(row, 2), get(row, 3)
    top, left, inside, right, zero = get(row, 4), get(row, 6), get(row, 7), get(row, 8), get(row, 9)
    fill(start, zero, top * line)
    for y in range(height):
        begin = start + (top + y) * line
        fill(begin, zero, left)
        fill(begin + left + inside, zero, right)
    fill(start + (top + height) * line, zero, get(row, 5) * line)


def any_depthwise_part(row: int, first: int, last: int) -> None:
    pitch, out_pitch = get(row, DW_C), get(row, 17)
    for y in range(first, last):
        source, target = get(row, DW_INPUT) + y * get(row, DW_ROW), get(row, DW_OUTPUT) + y * get(row, DW_OUT_ROW)
        for x in range(get(row, DW_OW)):
            depthwise_pixel(
                target + x * out_pitch, source + x * get(row, DW_STRIDE), get(row, 16), get(row, DW_KERNEL), get(row, DW_WEIGHTS),
                pitch, get(row, DW_COMP), get(row, DW_SCALE), get(row, DW_ZERO), get(row, DW_LOW), get(row, DW_HIGH),
            )  # fmt: skip


def window_start(at: int, dilation: int) -> int:
    """The first tap of a window that starts at row `at` and lies inside."""
    return (-at + dilation - 1) // dilation if at < 0 else 0


def window_count(at: int, size: int, kernel: int, dilation: int, skipped: int) -> int:
    """How many taps lie inside, after the skipped ones."""
    inside = (size - at + dilation - 1) // dilation
    return max(min(kernel, inside) - skipped, 0)


def pool_part(row: int, first: int, last: int) -> None:
    s, scales = get(row, 20), get(row, 21)
    x_row, x_pixel, height, width = get(row, 2), get(row, 3), get(row, 4), get(row, 5)
    n = (get(row, 19) + 15) // 16 * 16
    zero, out_zero = get(row, 16), get(row, 18)
    scale = scales + 4 * get(s, 21)
    if get(s, 4) == GLOBAL_POOL:
        count = height * width
        factor = np.float32(ldf(scale) / np.float32(ldf(scale + 4) * to_float(count)))
        pool_global(get(row, 6), get(row, 1), x_row, x_pixel, height, width, n, -zero * count, factor, out_zero)
        return
    dh, dw = get(s, 11), get(s, 12)
    for y in range(first, last):
        at_y = y * get(s, 9) - get(s, 13)
        skip_y = window_start(at_y, dh)
        rows = window_count(at_y, height, get(s, 7), dh, skip_y)
        for x in range(get(row, 10)):
            at_x = x * get(s, 10) - get(s, 14)
            skip_x = window_start(at_x, dw)
            columns = window_count(at_x, width, get(s, 8), dw, skip_x)
            source = get(row, 1) + (at_y + skip_y * dh) * x_row + (at_x + skip_x * dw) * x_pixel
            target = get(row, 6) + y * get(row, 7) + x * get(row, 8)
            if get(s, 4) == MAX_POOL:
                pool_max(target, source, x_row * dh, x_pixel * dw, rows, columns, n)
            else:
                count = get(s, 7) * get(s, 8) if get(s, 17) == 1 else rows * columns
                pool_average(
                    target, source, x_row * dh, x_pixel * dw, rows, columns, n,
                    ldf(scale), zero, to_float(count), ldf(scale + 4), to_float(out_zero),
                )  # fmt: skip


def binary_bytes(row: int, target: int, x: int, y: int, n: int) -> None:
    s = get(row, 20)
    scale = get(row, 21) + 4 * get(s, 21)
    low, high = get(s, 23), get(s, 24)
    if get(s, 4) == ADD:
        add_bytes(target, x, y, n, ldf(scale), ldf(scale + 4), ldf(scale + 8), low, high)
    else:
        mul_bytes(target, x, y, n, get(row, 16), get(row, 17), ldf(scale), to_float(get(row, 18)), low, high)


def binary_part(row: int, first: int, last: int) -> None:
    """Whole lines at once where all three images agree, else pixel by pixel; an image of one pixel is used for all."""
    columns, pixel = get(row, 10), get(row, 8)
    x_one = get(row, 4) * get(row, 5) == 1
    y_one = get(row, 14) * get(row, 15) == 1
    whole = get(row, 3) == pixel and get(row, 13) == pixel and not x_one and not y_one
    n = (get(row, 19) + 15) // 16 * 16
    for i in range(first, last):
        target = get(row, 6) + i * get(row, 7)
        x = get(row, 1) + (0 if x_one else i * get(row, 2))
        y = get(row, 11) + (0 if y_one else i * get(row, 12))
        if whole:
            binary_bytes(row, target, x, y, columns * pixel)
            continue
        for j in range(columns):
            at_x, at_y = x + (0 if x_one else j * get(row, 3)), y + (0 if y_one else j * get(row, 13))
            binary_bytes(row, target + j * pixel, at_x, at_y, n)


def copy_run(target: int, source: int, table: int, n: int) -> None:
    """n bytes, and not one more; through a table where there is one."""
    if table == 0:
        copy_bytes(target, source, n)
        return
    whole = n // 8 * 8
    look_up(target, source, table, whole)
    for i in range(whole, n):
        stu8(target + i, ldu8(table + ldu8(source + i)))


def copy_part(row: int, first: int, last: int) -> None:
    """Lines [first, last) of the output, those of its padding are left alone."""
    s, table = get(row, 20), get(row, 22)
    count, pixel, out_pixel = get(s, 6), get(row, 3), get(row, 8)
    columns = get(row, 10) - get(s, 14) - get(s, 16)
    rows = get(row, 9) - get(s, 13) - get(s, 15)
    whole = (
        pixel == out_pixel and get(s, 11) == 1 and get(s, 18) == 1 and get(s, 5) == 0 and get(s, 19) == 0 and count == get(row, 19)
    )
    whole = whole and count == get(row, 23)
    for line in range(first, last):
        i = line - get(s, 13)
        if i < 0 or i >= rows:
            continue
        source = get(row, 1) + (get(s, 7) + i // get(s, 17) * get(s, 8)) * get(row, 2) + get(s, 10) * pixel + get(s, 5)
        target = get(row, 6) + line * get(row, 7) + get(s, 14) * out_pixel + get(s, 19)
        if whole:
            copy_run(target, source, table, columns * pixel)
            continue
        repeat, by = get(s, 18), get(s, 11) * pixel
        if table == 0:
            for k in range(repeat):
                copy_pixels(target + k * out_pixel, repeat * out_pixel, source, by, count, columns // repeat)
            continue
        for j in range(columns):
            copy_run(target + j * out_pixel, source + j // repeat * by, table, count)


def fill_part(row: int) -> None:
    for y in range(get(row, 9)):
        fill(get(row, 6) + y * get(row, 7), get(row, 18), get(row, 10) * get(row, 8))


def run_part(row: int, memory: int, first: int, last: int) -> None:
    """Units [first, last) of a row. `memory`: the node's input or output, of the current image, where the row has one."""
    code = get(row, 0)
    if code == RUN_CONV:
        conv(row, first * PIXELS, min(last * PIXELS, get(row, CONV_M)))
    elif code == RUN_DEPTHWISE:
        depthwise(row, first, last)
    elif code == RUN_TILES:
        if TILES:
            scratch = stack64(3072)  # of the soft tiles; the real ones take half
            conv_amx(row, first, last, scratch)
    elif code == RUN_BORDER:
        border_part(row)
    elif code == RUN_INPUT:
        edge_part(row, memory, first, last, False)
    elif code == RUN_OUTPUT:
        edge_part(row, memory, first, last, True)
    elif code == RUN_BINARY:
        binary_part(row, first, last)
    elif code == RUN_COPY:
        copy_part(row, first, last)
    elif code == RUN_POOL:
        pool_part(row, first, last)
    elif code == RUN_ANY_DEPTHWISE:
        any_depthwise_part(row, first, last)
    elif code == RUN_FILL:
        fill_part(row)


def conv_panels(row: int, first: int, last: int) -> None:
    """Panels [first, last) of a dense convolution, all pixels: a row of its own, whose first panel is `first`."""
    if get(row, CONV_M) == 1:
        gemv(row, first, last)
        return
    own = stack64(32)  # ROW
    copy_bytes(own, row, 8 * ROW)
    put(own, CONV_PANELS, last - first)
    put(own, CONV_CHANNELS, get(row, CONV_CHANNELS) - 16 * first)
    put(own, CONV_WEIGHTS, get(row, CONV_WEIGHTS) + first * get(row, CONV_PANEL))
    put(own, CONV_FIRSTS, get(row, CONV_FIRSTS) + 4 * first * (4 if get(row, CONV_QUADS) == 1 else SECTIONS))
    put(own, CONV_OUTPUT, get(row, CONV_OUTPUT) + first * (64 if get(row, CONV_MODE) == MODE_F32 else 16))
    put(own, CONV_RESIDUAL, get(row, CONV_RESIDUAL) + 16 * first)
    put(own, CONV_COMP, get(row, CONV_COMP) + 64 * first)
    put(own, CONV_SCALE, get(row, CONV_SCALE) + 64 * first)
    put(own, CONV_BIAS, get(row, CONV_BIAS) + 64 * first)
    conv(own, 0, get(row, CONV_M))


def rows_body(usr: int, i: int) -> None:
    """What one thread does: part i of `usr`: row, memory, units, parts, and whether it is cut by channels."""
    row, units, parts = get(usr, 0), get(usr, 2), get(usr, 3)
    first, last = units * i // parts, units * (i + 1) // parts
    if get(usr, 4) == 1:
        conv_panels(row, first, last)
    else:
        run_part(row, get(usr, 1), first, last)


def run_row(row: int, memory: int, par: int) -> None:
    """One row, on several threads where it is worth it: cut by lines or pixels, or by channels where there are few pixels."""
    units, work = get(row, ROW_UNITS), get(row, ROW_WORK)
    narrow = get(row, 0) == RUN_CONV and units < MAX_PARTS and units < get(row, CONV_PANELS)
    if narrow:
        units = get(row, CONV_PANELS)
    if par == 0 or work < SMALL or units < 2:
        run_part(row, memory, 0, get(row, ROW_UNITS))
        return
    parts = min(min(units, MAX_PARTS), work // PART_NS)
    usr = stack64(8)
    put(usr, 0, row)
    put(usr, 1, memory)
    put(usr, 2, units)
    put(usr, 3, parts)
    put(usr, 4, 1 if narrow else 0)
    parallel_for(par, symaddr(BODY), parts, usr)


def run(instance: int, inputs: int, outputs: int, par: int) -> int:
    """All images of the batch; `inputs`: tensor records, `outputs`: addresses. Always 0."""
    count, rows = get(instance, I_COUNT), get(instance, I_ROWS)
    for image in range(get(instance, I_BATCH)):
        for i in range(count):
            row = rows + 8 * ROW * i
            memory = 0
            index = get(row, ROW_INDEX)
            if index >= 0:
                memory = image * get(row, ROW_STEP)
                if get(row, 0) == RUN_INPUT:
                    memory += get(inputs + 8 * TENSOR_RECORD * index, R_DATA)
                else:
                    memory += get(outputs, index)
                if get(row, 0) == RUN_CONV or get(row, 0) == RUN_TILES:
                    put(row, CONV_OUTPUT, memory)
            run_row(row, memory, par)
    return 0


TEMPLATES = (
    border_part, any_depthwise_part, window_start,
    window_count, pool_part, binary_bytes, binary_part, copy_run, copy_part, fill_part, run_part,
    conv_panels, rows_body, run_row, run,
)  # fmt: skip
