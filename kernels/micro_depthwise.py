"""The depthwise micro-kernel: one chunk of the flat output row, all rows, with the sums of unfinished rows in registers.

A chunk is 4 vectors of int32, so 16 bytes x lanes / 4, and may start in any channel that is a multiple of 16. Weights, comp and
scale are kept as the vectors of a chunk for each such start, side by side (packing.py): one address serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.kernels import layout
from graphopt.kernels.dialects import Dialect, Taps
from graphopt.kernels.vectors import (
    I8,
    I32,
    I64,
    Builder,
    Value,
    clamp,
    concat,
    const,
    load,
    loop,
    procedure,
    scaled,
    splat,
    store,
    vector,
)


class _Chunk:
    """One chunk: `inputs` are the addresses of its 16-byte pieces in the first input row, or of all of it."""

    def __init__(self, b: Builder, d: Dialect, row: Value, start: Value, inputs: Sequence[Value], kernel: int) -> None:
        self.b, self.d, self.inputs, self.kernel = b, d, inputs, kernel

        def field(slot: int) -> Value:
            return load(b, row, I64, 8 * slot)

        self.channels, self.pitch = field(layout.DW_C), field(layout.DW_ROW)
        self.rows = field(layout.DW_OH)
        self.output, self.out_pitch = b.add(field(layout.DW_OUTPUT), start), field(layout.DW_OUT_ROW)
        first = b.udiv(b.urem(start, self.channels), const(16))
        size, sets = 16 * d.lanes, -(-kernel // (2 if d.pairs else 4))
        self.weights = scaled(b, field(layout.DW_WEIGHTS), first, kernel * sets * size)
        comp, scale = (scaled(b, field(slot), first, size) for slot in (layout.DW_COMP, layout.DW_SCALE))
        self.comp = [load(b, comp, d.i32, 4 * d.lanes * i) for i in range(4)]
        self.scale = [load(b, scale, d.f32, 4 * d.lanes * i) for i in range(4)]
        self.zero = b.trunc(field(layout.DW_ZERO), I32)
        self.low, self.high = (splat(b, b.trunc(field(slot), I8), 4 * d.lanes) for slot in (layout.DW_LOW, layout.DW_HIGH))

    def taps(self, y: Value | int) -> Taps:
        """Input row y."""
        b, y = self.b, const(y) if isinstance(y, int) else y
        offset = b.mul(self.pitch, y)
        rows = []
        for tap in range(self.kernel):
            at = b.add(offset, b.mul(self.channels, const(tap)))
            kind = vector(I8, 4 * self.d.lanes // len(self.inputs))
            rows.append(concat(b, [load(b, b.add(address, at), kind) for address in self.inputs]))
        return self.d.taps(b, rows)

    def add(self, acc: Value, operands: Sequence[Value], row: int, i: int) -> Value:
        """Vector i of a sum + one row of the window."""
        b = self.b
        for g, operand in enumerate(operands):
            w = load(b, self.weights, self.d.i8, ((row * len(operands) + g) * 4 + i) * 4 * self.d.lanes)
            acc = self.d.tap_dot(b, acc, operand, w)
        return acc

    def requantise(self, acc: Value, i: int) -> Value:
        """int32, before the zero point."""
        return self.d.rint(self.b, self.b.fmul(self.b.sitofp(acc, self.d.f32), self.scale[i]))

    def finish(self, values: Sequence[Value], y: Value) -> None:
        """Store output row y."""
        b = self.b
        packed = clamp(b, self.d.pack(b, values, self.zero), self.low, self.high, "u")
        store(b, packed, b.add(self.output, b.mul(self.out_pitch, y)))


def _rows(chunk: _Chunk, stride: int) -> None:
    """All output rows. Each input row is prepared once, for every output row that it belongs to.

    Vector i of pending sum k, carried at 4 k + i, is what output row y + k takes from the input rows before
    stride * y + kernel - stride. All of vector i is done before vector i + 1: registers are few.
    """
    b, ready = chunk.b, chunk.kernel - stride
    depth = -(-ready // stride)
    pending = [vector for _ in range(depth) for vector in chunk.comp]
    for r in range(ready):
        taps = chunk.taps(r)
        for i in range(4):
            operands = taps(i)
            for k in range(r // stride + 1):
                pending[4 * k + i] = chunk.add(pending[4 * k + i], operands, r - stride * k, i)

    def body(y: Value, carried: list[Value]) -> list[Value]:
        acc = [*carried, *chunk.comp]
        values = []
        for fresh in range(stride):
            row = ready + fresh
            taps = chunk.taps(b.add(b.mul(y, const(stride)), const(row)))
            for i in range(4):
                operands = taps(i)
                for k in range(min(depth, row // stride) + 1):
                    acc[4 * k + i] = chunk.add(acc[4 * k + i], operands, row - stride * k, i)
                if fresh == stride - 1:
                    values.append(chunk.requantise(acc[i], i))
        chunk.finish(values, y)
        return acc[4 : 4 * depth + 4]

    loop(b, const(0), chunk.rows, 1, pending, body)


def depthwise_chunk(d: Dialect, kernel: int, stride: int, whole: bool) -> Any:
    """void(S, o, a0 ... a3): the chunk at byte o of every output row; input at a0 (`whole`), or each 16 bytes at a0, a1, ..."""
    pieces = 1 if whole else d.lanes // 4

    def emit(b: Builder, row: Value, start: Value, *inputs: Value) -> None:
        _rows(_Chunk(b, d, row, start, inputs[:pieces], kernel), stride)

    return procedure(f"graphopt_dw_{d.isa.name}_{kernel}_{stride}_{pieces}", 6, emit)
