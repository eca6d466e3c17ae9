"""Where a region begins and ends: onnxruntime's tensors to the engine's padded bytes, pixels before channels, and back."""

from __future__ import annotations

import numpy as np

from graphopt.kernels.engine_state import get
from graphopt.kernels.memory import copy as copy_bytes
from graphopt.kernels.memory import ldf, ldu8, lrint, stf, stu8, to_float
from graphopt.kernels.plan import CHANNELS_FIRST, FLOAT, INT8
from graphopt.kernels.vector_steps import dequantise16, dequantise_planes, quantise16, quantise_planes


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
    x = x0
    if kind == FLOAT:
        groups = min((channels + 3) // 4, pitch // 4)
        while x + 16 <= x1:
            quantise_planes(line + x * pitch, pitch, source + (y * width + x) * 4, plane, channels, ldf(scale), zero, groups)
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
    plane = height * width
    first = layout == CHANNELS_FIRST and plane != 1
    x = x0
    if first and kind == FLOAT:
        while x + 16 <= x1:
            c = 0
            while c + 4 <= channels:
                dequantise_planes(target + (c * plane + y * width + x) * 4, plane * 4, line + x * pitch + c, pitch, scale, zero)
                c += 4
            while c < channels:
                for k in range(16):
                    value = to_float(ldu8(line + (x + k) * pitch + c) - zero)
                    stf(target + (c * plane + y * width + x + k) * 4, np.float32(value * scale))
                c += 1
            x += 16
    while x < x1:
        c = 0
        if kind == FLOAT and not first:
            while c + 16 <= channels:
                dequantise16(target + ((y * width + x) * channels + c) * 4, line + x * pitch + c, scale, zero)
                c += 16
        if kind != FLOAT and kind != INT8 and not first:
            copy_bytes(target + (y * width + x) * channels, line + x * pitch, channels)
            c = channels
        while c < channels:
            place = c * plane + y * width + x if first else (y * width + x) * channels + c
            byte = ldu8(line + x * pitch + c)
            if kind == FLOAT:
                stf(target + 4 * place, np.float32(to_float(byte - zero) * scale))
            else:
                stu8(target + place * each, byte ^ (128 if kind == INT8 else 0))
            c += 1
        x += 1


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


TEMPLATES = (quantise_one, quantise_bytes, input_line, output_line, edge_part)
