"""The micro-kernel of 4-bit weights in blocks: rows of float32 x one panel of 16 columns, weights unpacked in registers.

A packed panel is one record for each block of K, in order: float32 scales [16], u8 zero points [16], then for each pair of taps one
byte a column, the even tap in its low half. That is the order in which they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from graphopt.kernels.dialects import Dialect
from graphopt.kernels.vectors import F32, I8, I64, Builder, Value, const, load, loop, procedure, scaled, splat, store, vector

PANEL = 16
HEAD = 4 * PANEL + PANEL  # bytes of scales and zero points
MOST = 256  # taps of a block, at most
ROWS = 4  # of the tile for many rows
CHUNK = 64  # rows for which a block of weights is unpacked at once
_FUSED = ("contract",)  # a product and a sum become one instruction where the CPU has it


def _madd(b: Builder, x: Value, y: Value, z: Value) -> Value:
    return b.fadd(b.fmul(x, y, flags=_FUSED), z, flags=_FUSED)


def _bytes(b: Builder, d: Dialect, address: Value, offset: int = 0) -> Value:
    """One byte a lane, as int32."""
    return b.zext(load(b, address, vector(I8, d.lanes), offset), d.i32)


def _halves(b: Builder, d: Dialect, address: Value, offset: int) -> list[Value]:
    """The weights of the even and the odd tap, as float32."""
    both = _bytes(b, d, address, offset)
    return [b.sitofp(half, d.f32) for half in (b.and_(both, const(15, d.i32)), b.lshr(both, const(4, d.i32)))]


_Block = Callable[[Value, Value, list[Value]], list[Value]]


def _each_block(b: Builder, weights: Value, count: Value, pairs: Value, carried: list[Value], body: _Block) -> list[Value]:
    """`body(block, address of its record, carried)` for every block."""
    size = b.add(b.mul(pairs, const(PANEL)), const(HEAD))

    def step(block: Value, state: list[Value]) -> list[Value]:
        return body(block, b.add(weights, b.mul(block, size)), state)

    return loop(b, const(0), count, 1, carried, step)


def nbits_row(d: Dialect) -> Any:
    """void(x, sums, weights, blocks, pairs, out, real): one row; the first `real` of 16 columns are written.

    x: float32 [blocks * pairs * 2]; sums: of each block of x. out = sum over blocks of scale * (sum of x * q - zero * sum of x).
    """
    vectors = PANEL // d.lanes

    def emit(b: Builder, x: Value, sums: Value, weights: Value, count: Value, pairs: Value, out: Value, real: Value) -> None:
        nothing = ir.Constant(d.f32, None)

        def block(index: Value, record: Value, total: list[Value]) -> list[Value]:
            first = scaled(b, x, b.mul(index, pairs), 8)
            taps = b.add(record, const(HEAD))

            def pair(i: Value, acc: list[Value]) -> list[Value]:
                at, place = scaled(b, first, i, 8), scaled(b, taps, i, PANEL)
                xs = [splat(b, load(b, at, F32, 4 * odd), d.lanes) for odd in (0, 1)]
                made = []
                for j in range(vectors):
                    made += [_madd(b, w, xs[odd], acc[2 * j + odd]) for odd, w in enumerate(_halves(b, d, place, d.lanes * j))]
                return made

            acc = loop(b, const(0), pairs, 1, [nothing] * (2 * vectors), pair)
            whole = splat(b, load(b, scaled(b, sums, index, 4), F32), d.lanes)
            for j in range(vectors):
                zero = b.sitofp(_bytes(b, d, record, 4 * PANEL + d.lanes * j), d.f32)
                both = b.fsub(b.fadd(acc[2 * j], acc[2 * j + 1]), b.fmul(zero, whole))
                total[j] = _madd(b, both, load(b, record, d.f32, 4 * d.lanes * j), total[j])
            return total

        total = _each_block(b, weights, count, pairs, [nothing] * vectors, block)
        _store(b, d, out, total, real)

    return procedure(f"graphopt_nbits_row_{d.isa.name}", 7, emit)


def nbits_rows(d: Dialect) -> Any:
    """void(x, pitch, m, weights, blocks, pairs, out, out_pitch, real): m rows, at most CHUNK; pitches in bytes.

    Each block of weights is unpacked once for all rows, as (q - zero) * scale, into a buffer that stays in the first cache.
    """
    vectors = PANEL // d.lanes

    def emit(b: Builder, x: Value, pitch: Value, m: Value, weights: Value, *others: Value) -> None:
        count, pairs, out, out_pitch, real = others
        with b.goto_entry_block():
            unpacked, sums = (_buffer(b, size) for size in (MOST * PANEL, (CHUNK + ROWS) * PANEL))
        nothing = ir.Constant(d.f32, None)

        def clear(r: Value) -> None:
            for j in range(vectors):
                store(b, nothing, scaled(b, sums, r, 4 * PANEL), 4 * d.lanes * j)

        _for(b, m, 1, clear)

        def block(index: Value, record: Value, _: list[Value]) -> list[Value]:
            _unpack(b, d, record, pairs, unpacked)
            start = b.add(x, b.mul(b.mul(index, pairs), const(8)))

            def tile(r: Value) -> None:
                rows = [b.add(start, b.mul(pitch, _least(b, b.add(r, const(i)), b.sub(m, const(1))))) for i in range(ROWS)]
                at = scaled(b, sums, r, 4 * PANEL)
                places = [(i * vectors + j, 4 * (i * PANEL + j * d.lanes)) for i in range(ROWS) for j in range(vectors)]
                acc = _multiply(b, d, rows, unpacked, pairs, [load(b, at, d.f32, place) for _, place in places])
                for number, place in places:
                    store(b, acc[number], at, place)

            _for(b, m, ROWS, tile)
            return []

        _each_block(b, weights, count, pairs, [], block)

        def give(r: Value) -> None:
            at = scaled(b, sums, r, 4 * PANEL)
            _store(b, d, b.add(out, b.mul(out_pitch, r)), [load(b, at, d.f32, 4 * d.lanes * j) for j in range(vectors)], real)

        _for(b, m, 1, give)

    return procedure(f"graphopt_nbits_rows_{d.isa.name}", 9, emit)


def _buffer(b: Builder, floats: int) -> Value:
    made = b.alloca(ir.ArrayType(F32, floats))
    made.align = 64
    return b.ptrtoint(made, I64)


def _least(b: Builder, one: Value, other: Value) -> Value:
    return b.select(b.icmp_signed("<", one, other), one, other)


def _for(b: Builder, stop: Value, step: int, body: Callable[[Value], Any]) -> None:
    def turn(i: Value, _: list[Value]) -> list[Value]:
        body(i)
        return []

    loop(b, const(0), stop, step, [], turn)


def _unpack(b: Builder, d: Dialect, record: Value, pairs: Value, target: Value) -> None:
    """float32 [taps][16] of a record."""
    vectors, taps = PANEL // d.lanes, b.add(record, const(HEAD))
    scales = [load(b, record, d.f32, 4 * d.lanes * j) for j in range(vectors)]
    zeros = [b.sitofp(_bytes(b, d, record, 4 * PANEL + d.lanes * j), d.f32) for j in range(vectors)]

    def pair(i: Value) -> None:
        place, to = scaled(b, taps, i, PANEL), scaled(b, target, i, 8 * PANEL)
        for j in range(vectors):
            for odd, q in enumerate(_halves(b, d, place, d.lanes * j)):
                store(b, b.fmul(b.fsub(q, zeros[j]), scales[j]), to, 4 * (odd * PANEL + j * d.lanes))

    _for(b, pairs, 1, pair)


def _multiply(b: Builder, d: Dialect, rows: list[Value], weights: Value, pairs: Value, acc: list[Value]) -> list[Value]:
    """acc + the taps of one block."""
    vectors = PANEL // d.lanes

    def pair(i: Value, acc: list[Value]) -> list[Value]:
        made, at = list(acc), scaled(b, weights, i, 8 * PANEL)
        for odd in (0, 1):
            w = [load(b, at, d.f32, 4 * (odd * PANEL + j * d.lanes)) for j in range(vectors)]
            for r, first in enumerate(rows):
                value = splat(b, load(b, scaled(b, first, i, 8), F32, 4 * odd), d.lanes)
                for j in range(vectors):
                    made[r * vectors + j] = _madd(b, w[j], value, made[r * vectors + j])
        return made

    return loop(b, const(0), pairs, 1, acc, pair)


def _store(b: Builder, d: Dialect, target: Value, values: list[Value], real: Value) -> None:
    """16 columns; through a buffer where not all of them are real."""
    with b.goto_entry_block():
        buffer = _buffer(b, PANEL)
    whole = b.icmp_signed(">=", real, const(PANEL))
    place = b.select(whole, target, buffer)
    for j, value in enumerate(values):
        store(b, value, place, 4 * d.lanes * j)
    with b.if_then(b.not_(whole), likely=False):
        _for(b, real, 1, lambda i: store(b, load(b, scaled(b, buffer, i, 4), F32), scaled(b, target, i, 4)))
