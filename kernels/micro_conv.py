"""The dense micro-kernel: pixels x panels of 16 channels, in registers over all of K, then requantised and stored.

Every function here writes LLVM IR and returns a Numba intrinsic on int64 addresses; `S` is the address of a row of layout.CONV_*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.kernels import layout
from graphopt.kernels.dialects import Dialect, Windows
from graphopt.kernels.vectors import (
    F32,
    I8,
    I32,
    I64,
    Builder,
    Value,
    clamp,
    concat,
    const,
    load,
    load_index,
    loop,
    procedure,
    scaled,
    shuffle,
    splat,
    store,
    vector,
)
from graphopt.kernels.windows import SECTIONS

Accumulator = Callable[[int, int], Value]  # (pixel, vector) -> int32 [lanes]


@dataclass(frozen=True)
class Tile:
    """What the epilogue knows about a tile of `pixels` x `vectors`."""

    dialect: Dialect
    row: Value  # address of the step's row
    panel: Value  # index of the first panel
    pixels: int
    vectors: int

    def field(self, b: Builder, slot: int) -> Value:
        """A field of the step."""
        return load(b, self.row, I64, 8 * slot)

    def channels(self, b: Builder, slot: int, kind: Any) -> list[Value]:
        """The tile's vectors of an array [panels * 16] of 4-byte elements."""
        base = scaled(b, self.field(b, slot), self.panel, 64)
        return [load(b, base, kind, 4 * self.dialect.lanes * j) for j in range(self.vectors)]

    def targets(self, b: Builder, base: int, table: int, pixel: Value, size: int) -> list[Value]:
        """Addresses of the tile's first channel in each pixel, elements of `size` bytes."""
        first = scaled(b, self.field(b, base), self.panel, 16 * size)
        offsets = scaled(b, self.field(b, table), pixel, 4)
        return [b.add(first, load_index(b, offsets, 4 * r)) for r in range(self.pixels)]


def _store_bytes(b: Builder, tile: Tile, targets: Sequence[Value], packed: Value, first: int, count: int) -> None:
    """Store vectors first .. first + count of the tile, whose bytes follow one another in `packed`."""
    lanes, k = tile.dialect.lanes, 0
    while k < count:
        pixel, j = divmod(first + k, tile.vectors)
        run = 1  # vectors of this pixel that are stored at once: a power of two
        while k + 2 * run <= count and j + 2 * run <= tile.vectors:
            run *= 2
        part = packed if run * lanes == packed.type.count else shuffle(b, packed, None, range(k * lanes, (k + run) * lanes))
        store(b, part, targets[pixel], j * lanes)
        k += run


def _store_u8(
    b: Builder, tile: Tile, acc: Accumulator, pixel: Value, finish: Callable[[Value, int, int], Value], zero: Value
) -> None:
    """Requantise, `finish` (pixel, vector), pack with a zero point, clamp and store."""
    d = tile.dialect
    targets = tile.targets(b, layout.CONV_OUTPUT, layout.CONV_OUT_PIXELS, pixel, 1)
    scale = tile.channels(b, layout.CONV_SCALE, d.f32)
    low, high = (splat(b, b.trunc(tile.field(b, slot), I8), 4 * d.lanes) for slot in (layout.CONV_LOW, layout.CONV_HIGH))
    total = tile.pixels * tile.vectors
    for first in range(0, total, 4):
        count = min(4, total - first)
        parts = []
        for k in range(first, first + count):
            r, j = divmod(k, tile.vectors)
            parts.append(finish(d.rint(b, b.fmul(b.sitofp(acc(r, j), d.f32), scale[j])), r, j))
        parts += [parts[-1]] * (4 - count)
        packed = clamp(b, d.in_order(b, d.pack(b, parts, zero)), low, high, "u")
        _store_bytes(b, tile, targets, packed, first, count)


def _store_sum(b: Builder, tile: Tile, acc: Accumulator, pixel: Value, zero: Value) -> None:
    """MODE_SUM: the quantised value and the residual, each as u8, are scaled and added in float32."""
    d = tile.dialect
    sources = tile.targets(b, layout.CONV_RESIDUAL, layout.CONV_RES_PIXELS, pixel, 1)
    ra, rb, fx = (splat(b, load(b, tile.field(b, layout.CONV_SUM), F32, 4 * i), d.lanes) for i in range(3))
    # the zero point is added after clamping to what it will leave in 0..255, which cannot overflow
    low, high = splat(b, b.neg(zero), d.lanes), splat(b, b.sub(const(255, I32), zero), d.lanes)
    offset = splat(b, zero, d.lanes)

    def finish(value: Value, r: int, j: int) -> Value:
        value = b.sitofp(b.add(clamp(b, value, low, high), offset), d.f32)
        other = b.sitofp(b.zext(load(b, sources[r], vector(I8, d.lanes), j * d.lanes), d.i32), d.f32)
        return d.rint(b, d.fma(b, other, rb, d.fma(b, value, ra, fx)))

    _store_u8(b, tile, acc, pixel, finish, const(0, I32))


def _store_floats(b: Builder, tile: Tile, acc: Accumulator, pixel: Value) -> None:
    """MODE_F32: whole vectors where all channels are real; else through a buffer, for the last panel."""
    d, width = tile.dialect, tile.vectors * tile.dialect.lanes
    targets = tile.targets(b, layout.CONV_OUTPUT, layout.CONV_OUT_PIXELS, pixel, 4)
    scale, bias = (tile.channels(b, slot, d.f32) for slot in (layout.CONV_SCALE, layout.CONV_BIAS))
    real = b.sub(tile.field(b, layout.CONV_CHANNELS), b.mul(tile.panel, const(16)))
    with b.goto_entry_block():
        buffer = b.ptrtoint(b.alloca(vector(F32, width)), I64)
    whole = b.icmp_signed(">=", real, const(width))
    for r in range(tile.pixels):
        target = b.select(whole, targets[r], buffer)
        for j in range(tile.vectors):
            store(b, b.fadd(b.fmul(b.sitofp(acc(r, j), d.f32), scale[j]), bias[j]), target, 4 * d.lanes * j)
        with b.if_then(b.not_(whole), likely=False):

            def copy(i: Value, _: list[Value], r: int = r) -> list[Value]:
                store(b, load(b, scaled(b, buffer, i, 4), F32), scaled(b, targets[r], i, 4))
                return []

            loop(b, const(0), real, 1, [], copy)


def epilogue(b: Builder, tile: Tile, acc: Accumulator, pixel: Value) -> None:
    """Turn accumulators into output by the step's mode. The builder is left in a new block."""
    zero = b.trunc(tile.field(b, layout.CONV_ZERO), I32)
    plain, summed, floats, done = (b.append_basic_block(name) for name in ("u8", "sum", "f32", "done"))
    choice = b.switch(tile.field(b, layout.CONV_MODE), plain)
    choice.add_case(const(layout.MODE_SUM), summed)
    choice.add_case(const(layout.MODE_F32), floats)
    b.position_at_end(plain)
    _store_u8(b, tile, acc, pixel, lambda value, r, j: value, zero)
    b.branch(done)
    b.position_at_end(summed)
    _store_sum(b, tile, acc, pixel, zero)
    b.branch(done)
    b.position_at_end(floats)
    _store_floats(b, tile, acc, pixel)
    b.branch(done)
    b.position_at_end(done)


def _accumulate(b: Builder, tile: Tile, pixel: Value, panels: int) -> list[Value]:
    """comp + all of K; int32 vectors, pixel by pixel."""
    d, per_panel = tile.dialect, 16 // tile.dialect.lanes
    table = scaled(b, tile.field(b, layout.CONV_PIXELS), pixel, 4)
    base, stride = tile.field(b, layout.CONV_INPUT), tile.field(b, layout.CONV_PANEL)
    inputs = [b.add(base, load_index(b, table, 4 * r)) for r in range(tile.pixels)]
    first = b.add(tile.field(b, layout.CONV_WEIGHTS), b.mul(tile.panel, stride))
    weights = [b.add(first, b.mul(stride, const(p))) for p in range(panels)]
    offsets = tile.field(b, layout.CONV_K)
    comp = tile.channels(b, layout.CONV_COMP, d.i32)

    turns = 1 if d.pairs else 2  # LLVM reorders the sums of two groups of pairs, and runs out of registers

    def body(group: Value, acc: list[Value]) -> list[Value]:
        for turn in range(turns):
            offset = load_index(b, scaled(b, offsets, group, 4), 4 * turn)
            x = [d.broadcast(b, load(b, b.add(address, offset), I32)) for address in inputs]
            for j in range(tile.vectors):
                at = b.add(scaled(b, weights[j // per_panel], group, d.isa.weight_bytes), const(turn * d.isa.weight_bytes))
                w = d.weights(b, at, j % per_panel)
                for r in range(tile.pixels):
                    acc[r * tile.vectors + j] = d.dot(b, acc[r * tile.vectors + j], x[r], w)
        return acc

    return loop(b, const(0), tile.field(b, layout.CONV_GROUPS), turns, comp * tile.pixels, body)


def _accumulate_windows(b: Builder, tile: Tile, d: Windows, pixel: Value) -> list[Value]:
    """As `_accumulate`, of one panel (or its first half), whose groups are its own and come in sections (windows.py)."""
    table = scaled(b, tile.field(b, layout.CONV_PIXELS), pixel, 4)
    base = tile.field(b, layout.CONV_INPUT)
    inputs = [b.add(base, load_index(b, table, 4 * r)) for r in range(tile.pixels)]
    weights, entries = tile.field(b, layout.CONV_WEIGHTS), tile.field(b, layout.CONV_K)
    firsts = scaled(b, tile.field(b, layout.CONV_FIRSTS), tile.panel, 4 * SECTIONS)

    def section(groups: int, chained: bool) -> Callable[[Value, list[Value]], list[Value]]:
        def body(group: Value, acc: list[Value]) -> list[Value]:
            entry, at = scaled(b, entries, group, 8), scaled(b, weights, group, 64)
            offset = load_index(b, entry)
            indices = [d.indices(b, load(b, entry, I32, 8 * k + 4)) for k in range(groups)]
            for r, address in enumerate(inputs):
                # Zen 3 takes four vector instructions a cycle, loads by themselves among them: weights are operands in memory
                at = d.unknown(b, at) if groups > 1 else at
                window = d.window(b, b.add(address, offset))
                x = [d.pick(b, window, index) for index in indices]
                for j in range(tile.vectors):
                    products = [d.products(b, x[k], load(b, at, d.i8, 64 * k + 4 * d.lanes * j)) for k in range(groups)]
                    for product in [b.add(*products)] if chained else products:
                        acc[r * tile.vectors + j] = d.widened(b, acc[r * tile.vectors + j], product)
            return acc

        return body

    acc = tile.channels(b, layout.CONV_COMP, d.i32) * tile.pixels
    limits = [load_index(b, firsts, 4 * k) for k in range(SECTIONS + 1)]
    for k, (groups, chained) in enumerate(((2, True), (2, False), (1, False))):
        acc = loop(b, limits[k], limits[k + 1], groups, acc, section(groups, chained))
    return acc


def conv_tiles(d: Dialect, pixels: int, panels: int, half: bool = False) -> Any:
    """void(S, panel, m0, m1): pixels m0, m0 + pixels, ... up to m1, of `panels` panels; `half`: of 8 channels."""

    def emit(b: Builder, row: Value, panel: Value, start: Value, stop: Value) -> None:
        tile = Tile(d, row, panel, pixels, panels * (8 if half else 16) // d.lanes)

        def body(pixel: Value, _: list[Value]) -> list[Value]:
            if isinstance(d, Windows):
                acc = _accumulate_windows(b, tile, d, pixel)
            else:
                acc = _accumulate(b, tile, pixel, panels)
            epilogue(b, tile, lambda r, j: acc[r * tile.vectors + j], pixel)
            return []

        loop(b, start, stop, pixels, [], body)

    return procedure(f"graphopt_conv_{d.isa.name}_{pixels}x{panels}{'_half' * half}", 4, emit)


def conv_quads(d: Dialect, pixels: int) -> Any:
    """As `conv_tiles` for a panel of 16 channels whose weights come in four panels of 4, each with groups of its own.

    Two pixels share a vector, 4 channels each; sums go through memory, to where the epilogue finds 16 channels a pixel.
    """
    assert isinstance(d, Windows)

    def emit(b: Builder, row: Value, panel: Value, start: Value, stop: Value) -> None:
        tile = Tile(d, row, panel, pixels, 16 // d.lanes)
        with b.goto_entry_block():
            buffer = b.ptrtoint(b.alloca(vector(I32, 16 * pixels)), I64)

        def body(pixel: Value, _: list[Value]) -> list[Value]:
            loop(b, const(0), const(4), 1, [], lambda quad, _: _accumulate_quad(b, tile, d, pixel, quad, buffer))
            epilogue(b, tile, lambda r, j: load(b, buffer, d.i32, 64 * r + 4 * d.lanes * j), pixel)
            return []

        loop(b, start, stop, pixels, [], body)

    return procedure(f"graphopt_conv_{d.isa.name}_{pixels}_quads", 4, emit)


def _accumulate_quad(b: Builder, tile: Tile, d: Windows, pixel: Value, quad: Value, buffer: Value) -> list[Value]:
    """comp + all of K for 4 channels of the tile's pixels, into int32 buffer [pixels][16]."""
    table = scaled(b, tile.field(b, layout.CONV_PIXELS), pixel, 4)
    base = tile.field(b, layout.CONV_INPUT)
    inputs = [b.add(base, load_index(b, table, 4 * r)) for r in range(tile.pixels)]
    weights, entries = tile.field(b, layout.CONV_WEIGHTS), tile.field(b, layout.CONV_K)
    which = b.add(b.mul(tile.panel, const(4)), quad)
    firsts = scaled(b, tile.field(b, layout.CONV_FIRSTS), which, 4)
    comp = load(b, scaled(b, tile.field(b, layout.CONV_COMP), which, 16), vector(I32, 4))

    def body(group: Value, acc: list[Value]) -> list[Value]:
        entry = scaled(b, entries, group, 8)
        offset, indices = load_index(b, entry), d.indices(b, load(b, entry, I32, 4))
        w = load(b, scaled(b, weights, group, 16), vector(I8, 16))
        for i in range(tile.pixels // 2):
            one, two = (b.add(address, offset) for address in inputs[2 * i : 2 * i + 2])
            x = d.pick(b, d.window_two(b, one, two), indices)
            acc[i] = d.widened(b, acc[i], d.products(b, x, concat(b, [w, w])))
        return acc

    acc = loop(b, load_index(b, firsts), load_index(b, firsts, 4), 1, [concat(b, [comp, comp])] * (tile.pixels // 2), body)
    target = scaled(b, buffer, quad, 16)
    for i, value in enumerate(acc):
        for half in (0, 1):
            store(b, shuffle(b, value, None, range(4 * half, 4 * half + 4)), target, 64 * (2 * i + half))
    return []
