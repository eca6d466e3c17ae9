"""Bytewise steps in plain LLVM vectors of 16 lanes, which every instruction set gets from the same text: quantise, dequantise, add,
multiply, pool, copy through a table, general depthwise convolution.

All are intrinsics on addresses. `n` is a multiple of 16 wherever a function says "rounded": it then writes up to 15 bytes more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types

from graphopt.kernels import vectors
from graphopt.kernels.memory import F32, I8, I16, I32, I64, at, emit, function
from graphopt.kernels.vectors import loop

LANES = 16
_U8, _S16, _S32, _FLT = (ir.VectorType(kind, LANES) for kind in (I8, I16, I32, F32))
_V, _A, _F = types.void, types.int64, types.float32
Value = Any  # llvmlite is untyped
Build = Any


def _load(b: Build, address: Value, kind: ir.Type = _U8) -> Value:
    return b.load(at(b, address, kind), align=1)


def _store(b: Build, value: Value, address: Value) -> None:
    b.store(value, at(b, address, value.type), align=1)


def splat(b: Build, value: Value) -> Value:
    """The scalar in all lanes."""
    return vectors.splat(b, value, LANES)


def _binary(b: Build, name: str, x: Value, y: Value) -> Value:
    return b.call(function(b, f"llvm.{name}", x.type, [x.type] * 2), [x, y])


def _rint(b: Build, value: Value) -> Value:
    return b.call(function(b, "llvm.lrint.v16i32.v16f32", _S32, [_FLT]), [value])


def _fma(b: Build, x: Value, y: Value, z: Value) -> Value:
    return b.call(function(b, "llvm.fma.v16f32", _FLT, [_FLT] * 3), [x, y, z])


def _saturate(b: Build, value: Value, low: Value, high: Value) -> Value:
    """int32 lanes -> bytes in [low, high]; low and high are int64 scalars within 0..255."""
    clamped = _binary(b, "smax.v16i32", value, splat(b, b.trunc(low, I32)))
    return b.trunc(_binary(b, "smin.v16i32", clamped, splat(b, b.trunc(high, I32))), _U8)


def _wide(b: Build, value: Value) -> Value:
    return b.zext(value, _S32)


def _floats(b: Build, value: Value) -> Value:
    return b.uitofp(value, _FLT)


def quantised(b: Build, address: Value, scale: Value, zero: Value) -> Value:
    """16 floats -> int32 lanes in 0..255. Clamped before the conversion: infinities saturate; NaN becomes 0."""
    value = b.fdiv(_load(b, address, _FLT), scale)
    value = _binary(b, "maxnum.v16f32", value, ir.Constant(_FLT, [-1024.0] * LANES))
    value = _binary(b, "minnum.v16f32", value, ir.Constant(_FLT, [1024.0] * LANES))
    value = b.add(_rint(b, value), zero)
    value = _binary(b, "smax.v16i32", value, ir.Constant(_S32, [0] * LANES))
    return _binary(b, "smin.v16i32", value, ir.Constant(_S32, [255] * LANES))


@emit(_V(_A, _A, _F, _A))
def quantise16(b: Build, target: Value, source: Value, scale: Value, zero: Value) -> None:
    """16 contiguous floats to 16 contiguous bytes."""
    value = quantised(b, source, splat(b, scale), splat(b, b.trunc(zero, I32)))
    _store(b, b.trunc(value, _U8), target)


@emit(_V(_A, _A, _A, _A, _F, _A))
def quantise_planes(b: Build, target: Value, source: Value, plane: Value, planes: Value, scale: Value, zero: Value) -> None:
    """16 pixels of up to 4 channel planes, `plane` bytes apart, to pixels of 4 bytes; past `planes` the last one is read."""
    divisor, offset = splat(b, scale), splat(b, b.trunc(zero, I32))
    last = b.sub(planes, I64(1))
    word: Value = ir.Constant(_S32, [0] * LANES)
    for k in range(4):
        index = b.select(b.icmp_signed("<", I64(k), last), I64(k), last)
        value = quantised(b, b.add(source, b.mul(index, plane)), divisor, offset)
        word = b.or_(word, b.shl(value, ir.Constant(_S32, [8 * k] * LANES)))
    b.store(word, at(b, target, _S32), align=1)


@emit(_V(_A, _A, _F, _A))
def dequantise16(b: Build, target: Value, source: Value, scale: Value, zero: Value) -> None:
    """16 contiguous bytes to 16 contiguous floats."""
    value = b.sub(_wide(b, _load(b, source)), splat(b, b.trunc(zero, I32)))
    _store(b, b.fmul(b.sitofp(value, _FLT), splat(b, scale)), target)


def _bytes(b: Build, n: Value, body: Callable[[Value], None]) -> None:
    def step(i: Value, _: Sequence[Value]) -> Sequence[Value]:
        body(i)
        return []

    loop(b, I64(0), n, LANES, [], step)


@emit(_V(_A, _A, _A, _A, _F, _F, _F, _A, _A))
def add_bytes(
    b: Build, target: Value, x: Value, y: Value, n: Value, ra: Value, rb: Value, fx: Value, low: Value, high: Value
) -> None:
    """sat(rint(fma(y, rb, fma(x, ra, fx)))) in [low, high]; n rounded."""
    a, c, d = splat(b, ra), splat(b, rb), splat(b, fx)

    def body(i: Value) -> None:
        value = _fma(b, _floats(b, _load(b, b.add(x, i))), a, d)
        value = _fma(b, _floats(b, _load(b, b.add(y, i))), c, value)
        _store(b, _saturate(b, _rint(b, value), low, high), b.add(target, i))

    _bytes(b, n, body)


@emit(_V(_A, _A, _A, _A, _A, _A, _F, _F, _A, _A))
def mul_bytes(
    b: Build, target: Value, x: Value, y: Value, n: Value, zx: Value, zy: Value, ratio: Value, zero: Value, low: Value, high: Value
) -> None:
    """sat(rint(float((x - zx)(y - zy)) * ratio + zero)) in [low, high]; n rounded."""
    ox, oy = splat(b, b.trunc(zx, I32)), splat(b, b.trunc(zy, I32))
    factor, offset = splat(b, ratio), splat(b, zero)

    def body(i: Value) -> None:
        product = b.mul(b.sub(_wide(b, _load(b, b.add(x, i))), ox), b.sub(_wide(b, _load(b, b.add(y, i))), oy))
        value = b.fadd(b.fmul(b.sitofp(product, _FLT), factor), offset)
        value = _binary(b, "maxnum.v16f32", value, ir.Constant(_FLT, [-1024.0] * LANES))
        value = _binary(b, "minnum.v16f32", value, ir.Constant(_FLT, [1024.0] * LANES))
        _store(b, _saturate(b, _rint(b, value), low, high), b.add(target, i))

    _bytes(b, n, body)


def _window(
    b: Build, source: Value, row: Value, column: Value, height: Value, width: Value, first: Value, step: Callable[..., Value]
) -> Value:
    """Fold `step(accumulator, 16 bytes)` over a window of pixels."""

    def line(i: Value, carried: Sequence[Value]) -> Sequence[Value]:
        start = b.add(source, b.mul(i, row))
        return loop(b, I64(0), width, 1, carried, lambda j, inner: [step(inner[0], _load(b, b.add(start, b.mul(j, column))))])

    return loop(b, I64(0), height, 1, [first], line)[0]


@emit(_V(_A, _A, _A, _A, _A, _A, _A))
def pool_max(b: Build, target: Value, source: Value, row: Value, column: Value, height: Value, width: Value, n: Value) -> None:
    """The greatest byte of a window of pixels, for n channels (rounded)."""
    zero = ir.Constant(_U8, [0] * LANES)

    def body(i: Value) -> None:
        value = _window(b, b.add(source, i), row, column, height, width, zero, lambda c, x: _binary(b, "umax.v16i8", c, x))
        _store(b, value, b.add(target, i))

    _bytes(b, n, body)


@emit(_V(_A, _A, _A, _A, _A, _A, _A, _F, _A, _F, _F, _F))
def pool_average(
    b: Build, target: Value, source: Value, row: Value, column: Value, height: Value, width: Value, n: Value,
    scale: Value, zero: Value, count: Value, out_scale: Value, out_zero: Value,
) -> None:  # fmt: skip
    """sat(rint(sum(scale * float(x - zero)) / count / out_scale + out_zero)), summed in window order; n rounded."""
    factor, offset = splat(b, scale), splat(b, b.trunc(zero, I32))

    def add(total: Value, x: Value) -> Value:
        return b.fadd(total, b.fmul(factor, b.sitofp(b.sub(_wide(b, x), offset), _FLT)))

    def body(i: Value) -> None:
        total = _window(b, b.add(source, i), row, column, height, width, ir.Constant(_FLT, [0.0] * LANES), add)
        value = b.fadd(b.fdiv(b.fdiv(total, splat(b, count)), splat(b, out_scale)), splat(b, out_zero))
        value = _binary(b, "maxnum.v16f32", value, ir.Constant(_FLT, [-1024.0] * LANES))
        value = _binary(b, "minnum.v16f32", value, ir.Constant(_FLT, [1024.0] * LANES))
        _store(b, _saturate(b, _rint(b, value), I64(0), I64(255)), b.add(target, i))

    _bytes(b, n, body)


@emit(_V(_A, _A, _A, _A, _A, _A, _A, _A, _F, _A))
def pool_global(
    b: Build, target: Value, source: Value, row: Value, column: Value, height: Value, width: Value, n: Value,
    bias: Value, scale: Value, out_zero: Value,
) -> None:  # fmt: skip
    """sat(rint(float(sum + bias) * scale) + out_zero); n rounded."""
    start = splat(b, b.trunc(bias, I32))

    def body(i: Value) -> None:
        total = _window(b, b.add(source, i), row, column, height, width, start, lambda c, x: b.add(c, _wide(b, x)))
        value = b.fmul(b.sitofp(total, _FLT), splat(b, scale))
        value = _binary(b, "maxnum.v16f32", value, ir.Constant(_FLT, [-1024.0] * LANES))
        value = _binary(b, "minnum.v16f32", value, ir.Constant(_FLT, [1024.0] * LANES))
        value = b.add(_rint(b, value), splat(b, b.trunc(out_zero, I32)))
        _store(b, _saturate(b, value, I64(0), I64(255)), b.add(target, i))

    _bytes(b, n, body)


@emit(_V(_A, _A, _A, _A, _A, _A, _A, _A, _A, _A, _A))
def depthwise_pixel(
    b: Build, target: Value, source: Value, taps: Value, count: Value, weights: Value, pitch: Value,
    comp: Value, scale: Value, zero: Value, low: Value, high: Value,
) -> None:  # fmt: skip
    """One pixel of a depthwise convolution of any kernel: `taps` int32 byte offsets, weights s8 [taps][pitch]."""
    offset = splat(b, b.trunc(zero, I32))

    def body(i: Value) -> None:
        base, column = b.add(source, i), b.add(weights, i)

        def tap(t: Value, carried: Sequence[Value]) -> Sequence[Value]:
            place = b.sext(b.load(at(b, b.add(taps, b.mul(t, I64(4))), I32), align=1), I64)
            x = b.zext(_load(b, b.add(base, place)), _S16)
            w = b.sext(_load(b, b.add(column, b.mul(t, pitch))), _S16)
            return [b.add(carried[0], b.sext(b.mul(x, w), _S32))]  # 255 * 128 fits 16 bits

        wide = b.mul(i, I64(4))
        total = loop(b, I64(0), count, 1, [_load(b, b.add(comp, wide), _S32)], tap)[0]
        value = b.fmul(b.sitofp(total, _FLT), _load(b, b.add(scale, wide), _FLT))
        _store(b, _saturate(b, b.add(_rint(b, value), offset), low, high), b.add(target, i))

    _bytes(b, pitch, body)


@emit(_V(_A, _A, _A, _A))
def look_up(b: Build, target: Value, source: Value, table: Value, n: Value) -> None:
    """target[i] = table[source[i]], 8 bytes at a time; n is a multiple of 8."""

    def step(i: Value, _: Sequence[Value]) -> Sequence[Value]:
        packed = b.load(at(b, b.add(source, i), I64), align=1)
        out: Value = I64(0)
        for k in range(8):
            index = b.and_(b.lshr(packed, I64(8 * k)) if k else packed, I64(255))
            found = b.zext(b.load(at(b, b.add(table, index), I8), align=1), I64)
            out = b.or_(out, b.shl(found, I64(8 * k)) if k else found)
        b.store(out, at(b, b.add(target, i), I64), align=1)
        return []

    loop(b, I64(0), n, 8, [], step)


@emit(_V(_A, _A, _A))
def copy16(b: Build, target: Value, source: Value, n: Value) -> None:
    """n bytes, rounded: reads and writes whole vectors."""
    _bytes(b, n, lambda i: _store(b, _load(b, b.add(source, i)), b.add(target, i)))


@emit(_V(_A, _A, _A, _A, _A, _A))
def copy_pixels(b: Build, target: Value, to: Value, source: Value, by: Value, n: Value, columns: Value) -> None:
    """The first n bytes, and not one more, of pixels that are `by` bytes apart, to pixels that are `to` bytes apart."""

    def run(kind: Any, size: int) -> None:
        """In units of `size` bytes, the last of which overlaps the one before."""

        def pixel(j: Value, _: Sequence[Value]) -> Sequence[Value]:
            left, right = b.add(source, b.mul(j, by)), b.add(target, b.mul(j, to))

            def unit(i: Value, _: Sequence[Value]) -> Sequence[Value]:
                last = b.sub(n, I64(size))
                place = b.select(b.icmp_signed("<", i, last), i, last)
                _store(b, _load(b, b.add(left, place), kind), b.add(right, place))
                return []

            loop(b, I64(0), n, size, [], unit)
            return []

        loop(b, I64(0), columns, 1, [], pixel)

    def choose(sizes: Sequence[tuple[Any, int]]) -> None:
        kind, size = sizes[0]
        if len(sizes) == 1:
            return run(kind, size)
        with b.if_else(b.icmp_signed(">=", n, I64(size))) as (fits, smaller):
            with fits:
                run(kind, size)
            with smaller:
                choose(sizes[1:])

    choose([(_U8, LANES), (I64, 8), (I32, 4), (I8, 1)])
