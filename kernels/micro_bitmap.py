"""Products of a few rows with weights of which a bitmap says which are not zero, in LLVM IR.

Eight weights at a time: a byte of the bitmap finds, in a table of 256 entries, where each of them lies among the packed values, and
one shuffle spreads these over the lanes (AVX2 has no expanding load). The rows of features stay in the first-level cache, and each
weight is read once for up to four of them. CPUs without AVX2 walk the set bits one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from graphopt.kernels.isa import Isa
from graphopt.kernels.micro_sparse import finish, multiply_add
from graphopt.kernels.vectors import (
    F32,
    I1,
    I8,
    I32,
    I64,
    Builder,
    Value,
    call,
    const,
    load,
    load_index,
    local,
    loop,
    procedure,
    scaled,
    shuffle,
    store,
    vector,
)

# slots of the record S that the kernels read
(M_MASKS, M_GROUPS, M_STARTS, M_VALUES, M_SCALES, M_BIAS, M_LIMITS, M_TABLE, M_PITCH_X, M_PITCH_Y, M_PITCH_R) = range(11)
MASK_RECORD = 11
GROUP = 8  # weights of a byte of the bitmap
UNROLL = 4  # groups of an output are a multiple of this
TABLE = 256 * GROUP  # bytes; the kernels read 8 more
EMPTY = 128  # in the table: no value, zero
SIZES = {"float": 4, "byte": 1}
EIGHT = vector(F32, GROUP)


def wide(isa: Isa) -> bool:
    """Whether the rung has the shuffles; without them rows are done one by one."""
    return "avx2" in isa.features


def bitmap(isa: Isa, kind: str) -> Any:
    """void(S, x, y, r, n0, n1, rows): outputs [n0, n1) of 1 to 4 rows of features (without AVX2: of one).

    y[i, n] = limited(scales[n] * sum of the weights of n times x[i] + bias[n] + r[i, n]); pitches in bytes from row to row, that of
    r 0 where it is one row of zeros. S_MASKS: u8 [n][groups]; S_STARTS: int32 [n], the first of its values; values: float32 or s8,
    and 32 readable bytes behind them; x: float32 [groups * 8] a row, all of it readable; table: as `sparse_bitmap.make_table` has
    it.
    """

    def emit(b: Builder, *arguments: Value) -> None:
        *given, rows = arguments
        done, unknown = b.append_basic_block("done"), b.append_basic_block("unknown")
        choice = b.switch(rows, unknown)
        for count in (1, 2, 3, 4) if wide(isa) else (1,):
            block = b.append_basic_block(f"rows{count}")
            choice.add_case(const(count), block)
            b.position_at_end(block)
            name = f"graphopt_bitmap_{isa.name}_{kind}{count}"
            b.call(local(b, name, [I64] * 6, ir.VoidType(), _outputs(isa, kind, count)), given)
            b.branch(done)
        b.position_at_end(unknown)
        b.branch(done)
        b.position_at_end(done)

    return procedure(f"graphopt_bitmap_{isa.name}_{kind}", 7, emit)


def _outputs(isa: Isa, kind: str, rows: int) -> Callable[..., None]:
    def emit(b: Builder, record: Value, x: Value, y: Value, r: Value, n0: Value, n1: Value) -> None:
        fields = [load(b, record, I64, 8 * i) for i in range(MASK_RECORD)]
        masks, groups, starts, values, scales, bias, limits, table, pitch_x, pitch_y, pitch_r = fields
        low, high = (load(b, limits, F32, 4 * i) for i in range(2))
        sums = _spread_sums if wide(isa) else _walk_sums

        def output(n: Value, _: list[Value]) -> list[Value]:
            first = scaled(b, values, load_index(b, scaled(b, starts, n, 4)), SIZES[kind])
            inputs = [b.add(x, b.mul(pitch_x, const(i))) for i in range(rows)]
            totals = sums(b, isa, kind, b.add(masks, b.mul(n, groups)), groups, first, table, inputs)
            place = b.mul(n, const(4))
            scale, added = load(b, b.add(scales, place), F32), load(b, b.add(bias, place), F32)
            for i, total in enumerate(totals):
                before = load(b, b.add(r, b.add(place, b.mul(pitch_r, const(i)))), F32)
                value = b.fadd(b.fadd(b.fmul(total, scale), added), before)
                store(b, finish(b, value, low, high), b.add(y, b.add(place, b.mul(pitch_y, const(i)))))
            return []

        loop(b, n0, n1, 1, [], output)

    return emit


def _spread_sums(
    b: Builder, isa: Isa, kind: str, masks: Value, groups: Value, first: Value, table: Value, inputs: list[Value]
) -> list[Value]:  # fmt: skip
    """The sum of each row of features; several sums in flight, as each waits four cycles for the one before."""
    rows = len(inputs)
    abreast = UNROLL if rows == 1 else 2

    def body(group: Value, state: list[Value]) -> list[Value]:
        at, *acc = state
        for u in range(abreast):
            here = b.add(group, const(u))
            mask = b.zext(load(b, b.add(masks, here), I8), I64)
            weights = _spread(b, kind, at, scaled(b, table, mask, GROUP))
            for i, address in enumerate(inputs):
                features = load(b, scaled(b, address, here, 4 * GROUP), EIGHT)
                acc[u * rows + i] = multiply_add(b, isa, weights, features, acc[u * rows + i])
            at = scaled(b, at, call(b, "llvm.ctpop.i64", I64, [mask]), SIZES[kind])
        return [at, *acc]

    zero = ir.Constant(EIGHT, None)
    _, *acc = loop(b, const(0), groups, abreast, [first, *[zero] * (rows * abreast)], body)
    while len(acc) > rows:
        half = len(acc) // 2
        acc = [b.fadd(one, two) for one, two in zip(acc[:half], acc[half:], strict=True)]
    return [_across(b, value) for value in acc]


def _spread(b: Builder, kind: str, address: Value, entry: Value) -> Value:
    """Eight weights as float32, zeros among them, from the packed values and the entry of the table."""
    if kind == "float":
        lanes = b.sext(load(b, entry, vector(I8, GROUP)), vector(I32, GROUP))
        spread = call(b, "llvm.x86.avx2.permps", EIGHT, [load(b, address, EIGHT), lanes])
        # where the top bit is set; LLVM makes three instructions of a select
        return call(b, "llvm.x86.avx.blendv.ps.256", EIGHT, [spread, ir.Constant(EIGHT, None), b.bitcast(lanes, EIGHT)])
    packed = b.insert_element(ir.Constant(vector(I64, 2), None), load(b, address, I64), const(0, I32))
    bytes_ = vector(I8, 16)  # of the entry behind this one, too, which go where nothing is read
    spread = call(b, "llvm.x86.ssse3.pshuf.b.128", bytes_, [b.bitcast(packed, bytes_), load(b, entry, bytes_)])
    return b.sitofp(b.sext(shuffle(b, spread, None, range(GROUP)), vector(I32, GROUP)), EIGHT)


def _across(b: Builder, value: Value) -> Value:
    """The sum of the lanes."""
    while value.type.count > 1:
        half = value.type.count // 2
        value = b.fadd(shuffle(b, value, None, range(half)), shuffle(b, value, None, range(half, 2 * half)))
    return b.extract_element(value, const(0, I32))


def _walk_sums(
    b: Builder, isa: Isa, kind: str, masks: Value, groups: Value, first: Value, table: Value, inputs: list[Value]
) -> list[Value]:  # fmt: skip
    """The same, of one row, bit by bit."""
    del isa, table

    def group(g: Value, state: list[Value]) -> list[Value]:
        at, total = state
        mask = b.zext(load(b, b.add(masks, g), I8), I64)
        count = call(b, "llvm.ctpop.i64", I64, [mask])

        def bit(i: Value, inner: list[Value]) -> list[Value]:
            left, acc = inner
            lane = call(b, "llvm.cttz.i64", I64, [left, ir.Constant(I1, 0)])
            if kind == "float":
                weight = load(b, scaled(b, at, i, 4), F32)
            else:
                weight = b.sitofp(load(b, b.add(at, i), I8), F32)
            feature = load(b, scaled(b, scaled(b, inputs[0], g, 4 * GROUP), lane, 4), F32)
            return [b.and_(left, b.sub(left, const(1))), b.fadd(acc, b.fmul(weight, feature))]

        _, total = loop(b, const(0), count, 1, [mask, total], bit)
        return [scaled(b, at, count, SIZES[kind]), total]

    _, total = loop(b, const(0), groups, 1, [first, ir.Constant(F32, 0.0)], group)
    return [total]
