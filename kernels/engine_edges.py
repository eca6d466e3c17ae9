"""Where a region begins and ends: onnxruntime's tensors to the engine's padded bytes, pixels before channels, and back."""

from __future__ import annotations

import numpy as np

from graphopt.kernels.abi import stack64
from graphopt.kernels.engine_state import get
from graphopt.kernels.memory import copy as copy_bytes
from graphopt.kernels.memory import ldf, ldu8, lrint, stf, stu8, to_float
from graphopt.kernels.plan import CHANNELS_FIRST, FLOAT, INT8
from graphopt.kernels.planes import bytes_to_pixels, floats_to_pixels, pixels_to_bytes, pixels_to_floats
from graphopt.kernels.vector_steps import copy16, dequantise16, quantise16, quantise_planes


def quantise_one(source: int, scale: int, zero: int) -> int:
    """The float32 at an address as the vectors do it: NaN becomes 0. `scale` is an address, too."""
    scaled = np.float32(ldf(source) / ldf(scale))
    if not scaled > np.float32(-1024.0):
        return 0
    return min(max(lrint(min(scaled, np.float32(1024.0))) + zero, 0), 255)


def quantise_bytes(target: int, source: int, n: int, scale: int, zero: int) -> None:
    """n contiguous floats to n contiguous bytes, and not one more."""
    i = 0
    while i + 16 <= n:
        quantise16(target + i, source + 4 * i, ldf(scale), zero)
        i += 16
    while i < n:
        stu8(target + i, quantise_one(source + 4 * i, scale, zero))
        i += 1


def block(row: int, pixels: int, pitch: int, planes: int, plane: int, count: int, output: bool) -> None:
    """16 pixels of up to 16 channels (`count`), from planes that are `plane` bytes apart or (`output`) to them."""
    kind, zero = get(row, 1), get(row, 9)
    flip = 128 if kind == INT8 else 0
    if kind == FLOAT and output:
        pixels_to_floats(planes, plane, count, pixels, pitch, ldf(get(row, 10)), zero)
    elif kind == FLOAT:
        floats_to_pixels(pixels, pitch, planes, plane, count, ldf(get(row, 10)), zero)
    elif output:
        pixels_to_bytes(planes, plane, count, pixels, pitch, flip)
    else:
        bytes_to_pixels(pixels, pitch, planes, plane, count, flip)


def narrow_block(row: int, pixels: int, pitch: int, planes: int, plane: int, count: int, n: int, output: bool) -> None:
    """As `block` for n < 16 pixels: through a block of its own, as neither side may be touched beyond them."""
    own_pixels, own_planes = stack64(32), stack64(128)
    each = 4 if get(row, 1) == FLOAT else 1
    if output:
        for k in range(n):
            copy16(own_pixels + 16 * k, pixels + pitch * k, 16)
        block(row, own_pixels, 16, own_planes, 16 * each, count, True)
        for k in range(count):
            copy_bytes(planes + plane * k, own_planes + 16 * each * k, n * each)
        return
    for k in range(count):
        copy_bytes(own_planes + 16 * each * k, planes + plane * k, n * each)
    block(row, own_pixels, 16, own_planes, 16 * each, count, False)
    for k in range(n):
        copy16(pixels + pitch * k, own_pixels + 16 * k, 16)


def blocks(row: int, line: int, planes: int, plane: int, x0: int, x1: int, output: bool) -> None:
    """Pixels [x0, x1) of a line, whose channels' lines begin at `planes`; the last block overlaps the one before."""
    channels, pitch = get(row, 5), get(row, 6)
    each = 4 if get(row, 1) == FLOAT else 1
    for c in range(0, channels, 16):
        count = min(16, channels - c)
        first = planes + c * plane
        if x1 - x0 < 16:
            narrow_block(row, line + x0 * pitch + c, pitch, first + x0 * each, plane, count, x1 - x0, output)
            continue
        for x in range(x0, x1, 16):
            at = min(x, x1 - 16)
            block(row, line + at * pitch + c, pitch, first + at * each, plane, count, output)


def input_line(row: int, source: int, y: int, x0: int, x1: int) -> None:
    """Pixels [x0, x1) of one line of an activation."""
    kind, layout = get(row, 1), get(row, 2)
    height, width, channels, pitch = get(row, 3), get(row, 4), get(row, 5), get(row, 6)
    line = get(row, 8) + y * get(row, 7)
    scale, zero = get(row, 10), get(row, 9)
    each = 4 if kind == FLOAT else 1
    if layout != CHANNELS_FIRST or channels == 1:
        for x in range(x0, x1):
            start = source + (y * width + x) * channels * each
            if kind == FLOAT and channels == 1 and pitch == 1:
                quantise_bytes(line + x0, start, x1 - x0, scale, zero)
                return
            if kind == FLOAT:
                quantise_bytes(line + x * pitch, start, channels, scale, zero)
            elif kind != INT8:
                copy_bytes(line + x * pitch, start, channels)
            else:
                for c in range(channels):
                    stu8(line + x * pitch + c, ldu8(start + c) ^ (128 if kind == INT8 else 0))
        return
    plane = height * width * each
    if pitch >= 16:
        return blocks(row, line, source + y * width * each, plane, x0, x1, False)
    x = x0
    if kind == FLOAT:
        while x + 16 <= x1:
            quantise_planes(line + x * pitch, source + (y * width + x) * 4, plane, channels, ldf(scale), zero)
            x += 16
    while x < x1:
        for c in range(channels):
            start = source + c * plane + (y * width + x) * each
            value = quantise_one(start, scale, zero) if kind == FLOAT else ldu8(start) ^ (128 if kind == INT8 else 0)
            stu8(line + x * pitch + c, value)
        x += 1


def output_line(row: int, target: int, y: int, x0: int, x1: int) -> None:
    """Pixels [x0, x1) of one line of an output."""
    kind, layout = get(row, 1), get(row, 2)
    height, width, channels, pitch = get(row, 3), get(row, 4), get(row, 5), get(row, 6)
    line = get(row, 8) + y * get(row, 7)
    scale, zero = ldf(get(row, 10)) if kind == FLOAT else np.float32(1), get(row, 9)
    each = 4 if kind == FLOAT else 1
    if layout == CHANNELS_FIRST and height * width != 1 and pitch >= 16:
        return blocks(row, line, target + y * width * each, height * width * each, x0, x1, True)
    for x in range(x0, x1):
        source, place = line + x * pitch, target + (y * width + x) * channels * each
        if layout == CHANNELS_FIRST and height * width != 1:
            place = target + (y * width + x) * each
        step = height * width * each if layout == CHANNELS_FIRST else each
        c = 0
        if kind == FLOAT and step == each:
            while c + 16 <= channels:
                dequantise16(place + 4 * c, source + c, scale, zero)
                c += 16
        if kind != FLOAT and kind != INT8 and step == each:
            copy_bytes(place, source, channels)
            c = channels
        while c < channels:
            byte = ldu8(source + c)
            if kind == FLOAT:
                stf(place + step * c, np.float32(to_float(byte - zero) * scale))
            else:
                stu8(place + step * c, byte ^ (128 if kind == INT8 else 0))
            c += 1


def edge_part(row: int, memory: int, first: int, last: int, output: bool) -> None:
    """Lines [first, last) of an activation or output; of a single line, blocks of 256 pixels."""
    height, width = get(row, 3), get(row, 4)
    lines = height > 1
    for unit in range(first, last):
        y = unit if lines else 0
        x0, x1 = (0, width) if lines else (256 * unit, min(width, 256 * unit + 256))
        if output:
            output_line(row, memory, y, x0, x1)
        else:
            input_line(row, memory, y, x0, x1)


TEMPLATES = (quantise_one, quantise_bytes, block, narrow_block, blocks, input_line, output_line, edge_part)
