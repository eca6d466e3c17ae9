"""Blocks of 16 pixels x 16 channels between channel planes (onnxruntime's NCHW) and pixels (the engine's NHWC).

Intrinsics on addresses, in plain LLVM vectors for every instruction set. `planes` is how many of the 16 are real: one past them is
read as the last one, and written before it, in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types

from graphopt.kernels.memory import F32, I8, I32, I64, at, emit
from graphopt.kernels.vector_steps import LANES, quantised, splat
from graphopt.kernels.vectors import loop, shuffle

_U8, _S32, _FLT = (ir.VectorType(kind, LANES) for kind in (I8, I32, F32))
_V, _A, _F = types.void, types.int64, types.float32
Value = Any  # llvmlite is untyped
Build = Any


def _transposed(b: Build, rows: Sequence[Value]) -> list[Value]:
    """16 vectors of 16 bytes, columns for rows: each turn interleaves row i with row i + 8."""
    orders = [[first + i + side for i in range(8) for side in (0, LANES)] for first in (0, 8)]
    rows = list(rows)
    for _ in range(4):
        rows = [shuffle(b, rows[i], rows[i + 8], order) for i in range(8) for order in orders]
    return rows


def _row(b: Build, base: Value, stride: Value, planes: Value, k: int) -> Value:
    """Address of plane k, or of the last one."""
    last = b.sub(planes, I64(1))
    return b.add(base, b.mul(b.select(b.icmp_signed("<", I64(k), last), I64(k), last), stride))


def _to_pixels(b: Build, target: Value, pitch: Value, read: Callable[[int], Value]) -> None:
    for k, row in enumerate(_transposed(b, [read(k) for k in range(LANES)])):
        b.store(row, at(b, b.add(target, b.mul(pitch, I64(k))), _U8), align=1)


@emit(_V(_A, _A, _A, _A, _A, _A))
def bytes_to_pixels(b: Build, target: Value, pitch: Value, source: Value, plane: Value, planes: Value, flip: Value) -> None:
    """Bytes of planes, `plane` bytes apart, to 16 pixels; `flip` (0 or 128) is xored to each."""
    change = splat(b, b.trunc(flip, I8))
    _to_pixels(b, target, pitch, lambda k: b.xor(b.load(at(b, _row(b, source, plane, planes, k), _U8), align=1), change))


@emit(_V(_A, _A, _A, _A, _A, _F, _A))
def floats_to_pixels(
    b: Build, target: Value, pitch: Value, source: Value, plane: Value, planes: Value, scale: Value, zero: Value
) -> None:
    """Floats of planes, quantised, to 16 pixels."""
    divisor, offset = splat(b, scale), splat(b, b.trunc(zero, I32))
    with b.goto_entry_block():
        kept = b.ptrtoint(b.alloca(_U8, LANES), I64)

    def plane_of(k: Value, _: Sequence[Value]) -> Sequence[Value]:  # a loop: 16 divisions at once are too many registers
        last = b.sub(planes, I64(1))
        row = b.add(source, b.mul(b.select(b.icmp_signed("<", k, last), k, last), plane))
        b.store(b.trunc(quantised(b, row, divisor, offset), _U8), at(b, b.add(kept, b.mul(k, I64(LANES))), _U8), align=1)
        return []

    loop(b, I64(0), I64(LANES), 1, [], plane_of)
    _to_pixels(b, target, pitch, lambda k: b.load(at(b, b.add(kept, I64(LANES * k)), _U8), align=1))


def _to_planes(b: Build, source: Value, pitch: Value, write: Callable[[Value, int], None]) -> None:
    rows = [b.load(at(b, b.add(source, b.mul(pitch, I64(k))), _U8), align=1) for k in range(LANES)]
    columns = _transposed(b, rows)
    for k in reversed(range(LANES)):
        write(columns[k], k)


@emit(_V(_A, _A, _A, _A, _A, _A))
def pixels_to_bytes(b: Build, target: Value, plane: Value, planes: Value, source: Value, pitch: Value, flip: Value) -> None:
    """16 pixels to bytes of planes."""
    change = splat(b, b.trunc(flip, I8))
    _to_planes(b, source, pitch, lambda row, k: b.store(b.xor(row, change), at(b, _row(b, target, plane, planes, k), _U8), align=1))


@emit(_V(_A, _A, _A, _A, _A, _F, _A))
def pixels_to_floats(
    b: Build, target: Value, plane: Value, planes: Value, source: Value, pitch: Value, scale: Value, zero: Value
) -> None:
    """16 pixels, dequantised, to floats of planes."""
    factor, offset = splat(b, scale), splat(b, b.trunc(zero, I32))

    def write(row: Value, k: int) -> None:
        value = b.fmul(b.sitofp(b.sub(b.zext(row, _S32), offset), _FLT), factor)
        b.store(value, at(b, _row(b, target, plane, planes, k), _FLT), align=1)

    _to_planes(b, source, pitch, write)
