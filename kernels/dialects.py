"""What the micro-kernels' skeletons leave open: how an instruction set multiplies u8 by s8, rounds, and packs int32 to u8.

Two families of weights, chosen by `Dialect.pairs`, and a third for dense convolutions only (`Windows`):

* quads: s8 [4] under each int32 lane, for instructions that add four products u8 x s8 (vpdpbusd, sdot);
* pairs: int16 [2], for those that add two products of int16 (vpmaddwd). vpmaddubsw is faster, but it saturates. A dword of four
  u8 is taken as its even and its odd bytes, so weights come as (w0, w2) and (w1, w3);
* windows: s8 [4] for vpmaddubsw, whose taps are picked such that it cannot saturate (windows.py).

`Dialect` itself is plain LLVM IR that compiles for any CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import ClassVar

from llvmlite import ir

from graphopt.kernels.isa import Isa
from graphopt.kernels.vectors import (
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    Builder,
    Value,
    call,
    clamp,
    concat,
    const,
    lanewise,
    load,
    local,
    shuffle,
    splat,
    vector,
)

Taps = Callable[[int], list[Value]]  # i -> one operand for each group of taps; made when asked for, to be short-lived
Emit = Callable[..., Value]
EVEN_BYTES = 0x00FF00FF


class Dialect:
    """Portable IR: pairs of int16, 4 lanes."""

    pairs = True

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self.lanes = isa.lanes
        self.i32 = vector(I32, isa.lanes)
        self.i16 = vector(I16, 2 * isa.lanes)
        self.i8 = vector(I8, 4 * isa.lanes)
        self.f32 = vector(F32, isa.lanes)

    def add_pairs(self, b: Builder, acc: Value, x: Value, w: Value) -> Value:
        """acc + x[2 i] * w[2 i] + x[2 i + 1] * w[2 i + 1], of int16; LLVM knows the pattern as vpmaddwd."""
        wide = vector(I32, 2 * self.lanes)
        products = b.mul(b.sext(x, wide), b.sext(w, wide))
        even, odd = (shuffle(b, products, None, range(i, 2 * self.lanes, 2)) for i in (0, 1))
        return b.add(acc, b.add(even, odd))

    def broadcast(self, b: Builder, dword: Value) -> tuple[Value, ...]:
        """Four u8 of a pixel as the operands of `dot`."""
        x = splat(b, dword, self.lanes)
        even = b.and_(x, const(EVEN_BYTES, self.i32))
        return b.bitcast(even, self.i16), b.lshr(b.bitcast(x, self.i16), const(8, self.i16))

    def weights(self, b: Builder, address: Value, index: int) -> tuple[Value, ...]:
        """The weights of vector `index` of a panel, for four taps."""
        return tuple(load(b, address, self.i16, 64 * odd + 4 * self.lanes * index) for odd in (0, 1))

    def dot(self, b: Builder, acc: Value, x: Sequence[Value], w: Sequence[Value]) -> Value:
        """acc + four products in each lane."""
        for one, other in zip(x, w, strict=True):
            acc = self.add_pairs(b, acc, one, other)
        return acc

    def interleave(self, b: Builder, one: Value, two: Value, high: bool, size: int) -> Value:
        """Units of `size` bytes, of the low or high halves of each 16 bytes, alternately (vpunpck)."""
        units, width = 16 // size, one.type.count
        start = units // 2 if high else 0
        order = [
            lane + i + side for lane in range(0, width, units) for i in range(start, start + units // 2) for side in (0, width)
        ]
        return shuffle(b, one, two, order)

    def taps(self, b: Builder, rows: Sequence[Value]) -> Taps:
        """Operands of `tap_dot` from horizontal taps, each u8 [4 lanes]: of every group of taps, channels 4 i + 0..3 of each 16."""
        zero = ir.Constant(self.i8, None)
        pairs = [(rows[k], rows[min(k + 1, len(rows) - 1)]) for k in range(0, len(rows), 2)]

        @cache
        def half(k: int, high: bool) -> Value:
            return self.interleave(b, *pairs[k], high, 1)

        def operands(i: int) -> list[Value]:
            return [b.bitcast(self.interleave(b, half(k, i > 1), zero, bool(i % 2), 1), self.i16) for k in range(len(pairs))]

        return operands

    def tap_dot(self, b: Builder, acc: Value, x: Value, w: Value) -> Value:
        """acc + the products of one group of taps; w as bytes."""
        return self.add_pairs(b, acc, x, b.bitcast(w, self.i16))

    def rint(self, b: Builder, value: Value) -> Value:
        """float32 to int32, half to even."""
        return call(b, f"llvm.lrint.v{self.lanes}i32.v{self.lanes}f32", self.i32, [value])

    def fma(self, b: Builder, x: Value, y: Value, z: Value) -> Value:
        """x * y + z rounded once, x a u8; without the instruction, whose absence would become a call of libm.

        The product is exact in float64. The sum is rounded to odd there, after which rounding to float32 is exact.
        """
        double, bits = vector(F64, self.lanes), vector(I64, self.lanes)
        x, y, z = (b.fpext(value, double) for value in (x, y, z))
        product = b.fmul(x, y)
        total = b.fadd(product, z)
        back = b.fsub(total, product)
        error = b.fadd(b.fsub(product, b.fsub(total, back)), b.fsub(z, back))
        zero = ir.Constant(double, None)
        as_bits = b.bitcast(total, bits)
        even = b.icmp_signed("==", b.and_(as_bits, const(1, bits)), const(0, bits))
        inexact = b.and_(even, b.fcmp_ordered("!=", error, zero))
        # the neighbour of an even float64 on the side of the error is odd: away from zero it is one bit pattern up, else one down
        away = b.icmp_signed("==", b.fcmp_ordered(">", error, zero), b.fcmp_ordered(">", total, zero))
        step = b.select(away, const(1, bits), const(-1, bits))
        odd = b.bitcast(b.add(as_bits, step), double)
        return b.fptrunc(b.select(inexact, odd, total), self.f32)

    def pack(self, b: Builder, parts: Sequence[Value], zero: Value) -> Value:
        """Four int32 vectors plus int32 zero as u8, saturated; each 16 bytes hold 4 of each vector in turn."""
        low = splat(b, b.neg(zero), self.lanes)
        high = splat(b, b.sub(const(255, I32), zero), self.lanes)
        offset = splat(b, zero, self.lanes)
        whole = concat(b, [b.trunc(b.add(clamp(b, part, low, high), offset), vector(I8, self.lanes)) for part in parts])
        order = [part * self.lanes + lane + i for lane in range(0, self.lanes, 4) for part in range(4) for i in range(4)]
        return shuffle(b, whole, None, order)

    def in_order(self, b: Builder, packed: Value) -> Value:
        """What `pack` returns with the vectors one after the other."""
        if self.lanes == 4:
            return packed
        groups = self.lanes // 4
        dwords = b.bitcast(packed, self.i32)
        return b.bitcast(shuffle(b, dwords, None, [4 * (k % groups) + k // groups for k in range(self.lanes)]), self.i8)


class X86(Dialect):
    """AVX2 and above: the special instructions, or with `isa.soft` functions that compute the same."""

    NAMES: ClassVar[dict[tuple[str, int], str]] = {
        ("packssdw", 8): "llvm.x86.avx2.packssdw",
        ("packuswb", 8): "llvm.x86.avx2.packuswb",
        ("pmaddwd", 8): "llvm.x86.avx2.pmadd.wd",
        ("vpdpbusd", 8): "llvm.x86.avx512.vpdpbusd.256",
        ("packssdw", 16): "llvm.x86.avx512.packssdw.512",
        ("packuswb", 16): "llvm.x86.avx512.packuswb.512",
        ("vpdpbusd", 16): "llvm.x86.avx512.vpdpbusd.512",
    }

    def special(self, b: Builder, name: str, kind: ir.Type, *arguments: Value) -> Value:
        """One special instruction."""
        if not self.isa.soft:
            return call(b, self.NAMES[name, self.lanes], kind, arguments)
        emit: Emit = _soft_quads if name == "vpdpbusd" else _soft_narrow
        return b.call(local(b, f"soft_{name}_{self.lanes}", [value.type for value in arguments], kind, emit), arguments)

    def add_pairs(self, b: Builder, acc: Value, x: Value, w: Value) -> Value:
        return b.add(acc, self.special(b, "pmaddwd", self.i32, x, w))

    def fma(self, b: Builder, x: Value, y: Value, z: Value) -> Value:
        return super().fma(b, x, y, z) if self.isa.soft else lanewise(b, "fma", x, y, z)

    def pack(self, b: Builder, parts: Sequence[Value], zero: Value) -> Value:
        offset = splat(b, b.trunc(zero, I16), 2 * self.lanes)
        halves = [self.special(b, "packssdw", self.i16, parts[i], parts[i + 1]) for i in (0, 2)]
        halves = [lanewise(b, "sadd.sat", half, offset) for half in halves]
        return self.special(b, "packuswb", self.i8, *halves)


class Windows(X86):
    """AVX2: vpmaddubsw for dense convolutions, whose weights are made for it; vpmaddwd for others."""

    def indices(self, b: Builder, dword: Value) -> Value:
        """The operand of `pick` from four indices."""
        return b.bitcast(splat(b, dword, self.lanes), self.i8)

    def unknown(self, b: Builder, address: Value) -> Value:
        """The same address, but LLVM does not know that: what is loaded from it is loaded again."""
        return b.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [address], side_effect=True)

    def window(self, b: Builder, address: Value) -> Value:
        """The 16 bytes at an address, in both halves of a vector."""
        half = load(b, address, vector(I8, 16))
        return concat(b, [half, half])

    def pick(self, b: Builder, window: Value, indices: Value) -> Value:
        """Four bytes of a window, in every lane."""
        return call(b, "llvm.x86.avx2.pshuf.b", self.i8, [window, indices])

    def window_two(self, b: Builder, one: Value, two: Value) -> Value:
        """The 16 bytes at each of two addresses, in one half of a vector each."""
        return concat(b, [load(b, address, vector(I8, 16)) for address in (one, two)])

    def products(self, b: Builder, x: Value, w: Value) -> Value:
        """int16: sums of two products."""
        return call(b, "llvm.x86.avx2.pmadd.ub.sw", self.i16, [x, w])

    def widened(self, b: Builder, acc: Value, sums: Value) -> Value:
        """acc + two int16 in each lane."""
        return b.add(acc, self.special(b, "pmaddwd", self.i32, sums, const(1, self.i16)))


class Quads(Dialect):
    """Skeleton methods of instruction sets with a dot product of four bytes; `add_quads` is theirs."""

    pairs = False

    def add_quads(self, b: Builder, acc: Value, x: Value, w: Value) -> Value:
        """acc + sum of 4 products u8 x s8 in each lane."""
        raise NotImplementedError

    def prepared(self, b: Builder, x: Value) -> Value:
        """Integers holding u8, as `add_quads` wants them."""
        return x

    def broadcast(self, b: Builder, dword: Value) -> tuple[Value, ...]:
        return (b.bitcast(splat(b, self.prepared(b, dword), self.lanes), self.i8),)

    def weights(self, b: Builder, address: Value, index: int) -> tuple[Value, ...]:
        return (load(b, address, self.i8, 4 * self.lanes * index),)

    def dot(self, b: Builder, acc: Value, x: Sequence[Value], w: Sequence[Value]) -> Value:
        return self.add_quads(b, acc, x[0], w[0])

    def taps(self, b: Builder, rows: Sequence[Value]) -> Taps:
        ready = [self.prepared(b, row) for row in rows]
        # a tap that is missing has weight zero, whatever it is multiplied with
        quads = [[ready[min(k + t, len(rows) - 1)] for t in range(4)] for k in range(0, len(rows), 4)]

        @cache
        def half(k: int, first: int, high: bool) -> Value:
            return b.bitcast(self.interleave(b, quads[k][first], quads[k][first + 1], high, 1), self.i16)

        def operands(i: int) -> list[Value]:
            both = [(half(k, 0, i > 1), half(k, 2, i > 1)) for k in range(len(quads))]
            return [b.bitcast(self.interleave(b, one, two, bool(i % 2), 2), self.i8) for one, two in both]

        return operands

    def tap_dot(self, b: Builder, acc: Value, x: Value, w: Value) -> Value:
        return self.add_quads(b, acc, x, w)


class Vnni(Quads, X86):
    """vpdpbusd, of 512 or 256 bits."""

    def add_quads(self, b: Builder, acc: Value, x: Value, w: Value) -> Value:
        return self.special(b, "vpdpbusd", self.i32, acc, x, w)


class Neon(Quads):
    """sdot takes s8 x s8: 128 is taken off x by flipping its top bit, and comes back through `comp_adjust`."""

    def prepared(self, b: Builder, x: Value) -> Value:
        if isinstance(x.type, ir.VectorType):
            return b.xor(x, const(-128, x.type))
        return b.xor(x, const(0x80808080 - (1 << 32), I32))  # of the scalar: LLVM 22 hangs on the vector for some targets

    def fma(self, b: Builder, x: Value, y: Value, z: Value) -> Value:
        return super().fma(b, x, y, z) if self.isa.soft else lanewise(b, "fma", x, y, z)

    def add_quads(self, b: Builder, acc: Value, x: Value, w: Value) -> Value:
        if self.isa.soft:
            return b.call(local(b, "soft_sdot", [v.type for v in (acc, x, w)], self.i32, _soft_signed_quads), [acc, x, w])
        return call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", self.i32, [acc, x, w])


def _soft_narrow(b: Builder, one: Value, two: Value) -> Value:
    """packssdw (int32 to int16) or packuswb (int16 to u8): saturate, and take 16-byte lanes of both in turn."""
    kind, half = one.type, 128 // one.type.element.width
    small = vector(ir.IntType(kind.element.width // 2), kind.count)
    bounds = (0, 255) if kind.element.width == 16 else (-32768, 32767)
    low, high = (const(bound, kind) for bound in bounds)
    left, right = (b.trunc(clamp(b, value, low, high), small) for value in (one, two))
    sides = [lane + side for lane in range(0, kind.count, half) for side in (0, kind.count)]
    return shuffle(b, left, right, [side + i for side in sides for i in range(half)])


def _soft_products(b: Builder, acc: Value, x: Value, w: Value, signed: bool) -> Value:
    kind = acc.type
    x, w = b.bitcast(x, kind), b.bitcast(w, kind)
    for k in range(4):
        up = const(24 - 8 * k, kind)
        one = (b.ashr if signed else b.lshr)(b.shl(x, up), const(24, kind))
        acc = b.add(acc, b.mul(one, b.ashr(b.shl(w, up), const(24, kind))))
    return acc


def _soft_quads(b: Builder, acc: Value, x: Value, w: Value) -> Value:
    """vpdpbusd."""
    return _soft_products(b, acc, x, w, False)


def _soft_signed_quads(b: Builder, acc: Value, x: Value, w: Value) -> Value:
    """sdot."""
    return _soft_products(b, acc, x, w, True)


def dialect(isa: Isa) -> Dialect:
    """The dialect of a rung."""
    if isa.name.startswith(("amx", "avx512vnni", "avxvnni")):
        return Vnni(isa)
    return {"avx2": Windows, "neon_dot": Neon, "neon_dot_soft": Neon, "generic": Dialect}[isa.name](isa)
