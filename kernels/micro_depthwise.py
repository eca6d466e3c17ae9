"""The depthwise micro-kernel: one chunk of the flat output row, all rows, with the sums of unfinished rows in registers.

A chunk is 4 vectors of int32, so 16 bytes x lanes / 4. It may start in any channel that is a multiple of 16, therefore weights,
comp and scale are kept as [4][C / 16 + 3][4 channels], their last 3 groups being the first again: vector i of a chunk that starts
in group g is found at [i][g], for any number of lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.kernels import layout
from graphopt.kernels.dialects import Dialect
from graphopt.kernels.vectors import I8, I32, I64, Builder, Value, clamp, concat, const, load, loop, procedure, splat, store, vector

Taps = list[list[Value]]  # [group][4]


class _Chunk:
    """One chunk: `inputs` are the addresses of its 16-byte pieces in the first input row, or of all of it."""

    def __init__(self, b: Builder, d: Dialect, row: Value, start: Value, inputs: Sequence[Value], kernel: int) -> None:
        self.b, self.d, self.inputs, self.kernel = b, d, inputs, kernel

        def field(slot: int) -> Value:
            return load(b, row, I64, 8 * slot)

        self.channels, self.pitch = field(layout.DW_C), field(layout.DW_ROW)
        self.rows = field(layout.DW_OH)
        self.output, self.out_pitch = b.add(field(layout.DW_OUTPUT), start), field(layout.DW_OUT_ROW)
        self.part = b.add(self.channels, const(48))  # bytes of [C / 16 + 3][4 channels] x 4
        first = b.and_(b.urem(start, self.channels), const(-16))
        self.weights, comp, scale = (b.add(field(slot), first) for slot in (layout.DW_WEIGHTS, layout.DW_COMP, layout.DW_SCALE))
        self.comp, self.scale = (
            [load(b, b.add(base, b.mul(self.part, const(i))), kind) for i in range(4)]
            for base, kind in ((comp, d.i32), (scale, d.f32))
        )
        self.zero = b.trunc(field(layout.DW_ZERO), I32)
        self.low, self.high = (splat(b, b.trunc(field(slot), I8), 4 * d.lanes) for slot in (layout.DW_LOW, layout.DW_HIGH))

    def taps(self, y: Value | int) -> Taps:
        """The operands of input row y."""
        b, y = self.b, const(y) if isinstance(y, int) else y
        offset = b.mul(self.pitch, y)
        rows = []
        for tap in range(self.kernel):
            at = b.add(offset, b.mul(self.channels, const(tap)))
            kind = vector(I8, 4 * self.d.lanes // len(self.inputs))
            rows.append(concat(b, [load(b, b.add(address, at), kind) for address in self.inputs]))
        return self.d.taps(b, rows)

    def add(self, acc: Sequence[Value], taps: Taps, row: int) -> list[Value]:
        """acc + one row of the window."""
        b, out = self.b, list(acc)
        for i in range(4):
            for g, group in enumerate(taps):
                at = b.add(self.weights, b.mul(self.part, const((row * len(taps) + g) * 4 + i)))
                out[i] = self.d.tap_dot(b, out[i], group[i], load(b, at, self.d.i8))
        return out

    def finish(self, acc: Sequence[Value], y: Value) -> None:
        """Requantise and store output row y."""
        b, d = self.b, self.d
        values = [d.rint(b, b.fmul(b.sitofp(a, d.f32), s)) for a, s in zip(acc, self.scale, strict=True)]
        packed = clamp(b, d.pack(b, values, self.zero), self.low, self.high, "u")
        store(b, packed, b.add(self.output, b.mul(self.out_pitch, y)))


def _rows(chunk: _Chunk, stride: int) -> None:
    """All output rows. Each input row is prepared once, for every output row that it belongs to.

    pending[k] has what the output row y + k takes from the input rows before stride * y + kernel - stride.
    """
    b, kernel = chunk.b, chunk.kernel
    ready = kernel - stride
    depth = -(-ready // stride)
    known = [chunk.taps(r) for r in range(ready)]
    pending: list[Value] = []
    for k in range(depth):
        acc = chunk.comp
        for r in range(stride * k, ready):
            acc = chunk.add(acc, known[r], r - stride * k)
        pending += acc

    def body(y: Value, carried: list[Value]) -> list[Value]:
        acc = [carried[4 * k : 4 * k + 4] for k in range(depth)] + [chunk.comp]
        for fresh in range(stride):
            taps = chunk.taps(b.add(b.mul(y, const(stride)), const(ready + fresh)))
            for k in range(depth + 1):
                row = ready + fresh - stride * k
                if row >= 0:
                    acc[k] = chunk.add(acc[k], taps, row)
        chunk.finish(acc[0], y)
        return [value for four in acc[1 : depth + 1] for value in four]

    loop(b, const(0), chunk.rows, 1, pending, body)


def depthwise_chunk(d: Dialect, kernel: int, stride: int, whole: bool) -> Any:
    """void(S, o, a0 ... a3): the chunk at byte o of every output row; input at a0 (`whole`), or each 16 bytes at a0, a1, ..."""
    pieces = 1 if whole else d.lanes // 4

    def emit(b: Builder, row: Value, start: Value, *inputs: Value) -> None:
        _rows(_Chunk(b, d, row, start, inputs[:pieces], kernel), stride)

    return procedure(f"graphopt_dw_{d.isa.name}_{kernel}_{stride}_{pieces}", 6, emit)
