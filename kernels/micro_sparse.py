"""The sparse micro-kernels: vectors of pixels stay in registers while the non-zero weights of a few output channels pass.

The scheme of "Fast Sparse ConvNets" (Elsen et al. 2020, arXiv:1911.09723), in LLVM IR for any number of lanes. Activations are
channel-major: the pixels of a channel lie one after the other, so that each weight multiplies contiguous vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from graphopt.kernels.isa import Isa
from graphopt.kernels.vectors import (
    F32,
    I64,
    Builder,
    Value,
    call,
    const,
    lanewise,
    load,
    load_index,
    local,
    loop,
    procedure,
    scaled,
    shuffle,
    splat,
    store,
    vector,
)

# slots of the record S that the kernels read
(S_DX, S_DY, S_CHANNEL, S_STARTS, S_OFFSETS, S_VALUES, S_BIAS, S_LIMITS, S_STEP) = range(9)
RECORD = 9
(TILE_X, TILE_Y, TILE_VECTORS, TILE_LAST) = range(4)  # slots of a tile: see sparse_state
WIDTHS = {1: 8, 4: 3}  # most vectors of pixels abreast, by rows of a block: what sixteen registers hold


def multiply_add(b: Builder, isa: Isa, x: Value, y: Value, z: Value) -> Value:
    """x * y + z; fused where the CPU has the instruction, as its absence would become a call of libm."""
    fused = bool(isa.features & {"fma", "neon"})
    return lanewise(b, "fma", x, y, z) if fused else b.fadd(b.fmul(x, y), z)


def finish(b: Builder, value: Value, low: Value, high: Value) -> Value:
    """Within limits; NaN stays."""
    value = b.select(b.fcmp_ordered("<", value, low), low, value)
    return b.select(b.fcmp_ordered(">", value, high), high, value)


def spmm(isa: Isa, rows: int) -> Any:
    """void(S, x, y, r, n0, n1, tiles, count): block rows [n0, n1) of tiles, all of as many vectors of pixels as the first.

    A tile: int64 [4], bytes from x (input), and from y (output) and r (residual, or 0; it may be the output), to its first vector,
    vectors, and bytes from the first to the last, or -1 where it lies as the others do. S_DX, S_DY: bytes from one vector to the
    next in the input, and in output and residual; S_CHANNEL: from one output channel to the next. S_STARTS: of each block row,
    S_STEP bytes apart, int32 [2]: its first block and the one behind its last; S_OFFSETS: int32, bytes from x to the input of each
    block; S_VALUES: float32 [blocks][rows]; S_BIAS: float32 [block rows * rows]; S_LIMITS: float32 low, high.
    """

    def emit(b: Builder, *arguments: Value) -> None:
        none = b.icmp_signed("==", arguments[3], const(0))
        done, unknown = b.append_basic_block("done"), b.append_basic_block("unknown")
        choice = b.switch(load(b, arguments[6], I64, 8 * TILE_VECTORS), unknown)
        for w in range(1, WIDTHS[rows] + 1):
            block = b.append_basic_block(f"width{w}")
            choice.add_case(const(w), block)
            b.position_at_end(block)
            with b.if_else(none) as (plain, summed):
                for branch, residual in ((plain, False), (summed, True)):
                    with branch:
                        name = f"graphopt_spmm_{isa.name}_{rows}x{w}{'_sum' * residual}"
                        b.call(local(b, name, [I64] * 8, ir.VoidType(), _tiles(isa, rows, w, residual)), arguments)
            b.branch(done)
        b.position_at_end(unknown)
        b.branch(done)
        b.position_at_end(done)

    return procedure(f"graphopt_spmm_{isa.name}_{rows}", 8, emit)


def _tiles(isa: Isa, rows: int, width: int, residual: bool) -> Callable[..., None]:
    def emit(b: Builder, record: Value, x: Value, y: Value, r: Value, n0: Value, n1: Value, tiles: Value, count: Value) -> None:
        fields = [load(b, record, I64, 8 * i) for i in range(RECORD)]

        def tile(t: Value, _: list[Value]) -> list[Value]:
            place = scaled(b, tiles, t, 32)
            first, target, last = (load(b, place, I64, 8 * slot) for slot in (TILE_X, TILE_Y, TILE_LAST))
            steps = []
            for pitch in fields[:2]:
                usual = b.mul(pitch, const(width - 1))
                final = b.select(b.icmp_signed("<", last, const(0)), usual, last)
                steps.append([*(b.mul(pitch, const(v)) for v in range(width - 1)), final] if width > 1 else [const(0)])
            inputs = [b.add(b.add(x, first), step) for step in steps[0]]
            _block_rows(
                b, isa, rows, fields, (inputs, steps[1]), (b.add(y, target), b.add(r, target) if residual else None), n0, n1
            )
            return []

        loop(b, const(0), count, 1, [], tile)

    return emit


def _block_rows(
    b: Builder, isa: Isa, rows: int, fields: list[Value], vectors: tuple[list[Value], list[Value]], ends: tuple[Value, Any],
    n0: Value, n1: Value,
) -> None:  # fmt: skip
    """One tile. vectors: where each is in the input, and how far from the `ends`, in output and residual."""
    lanes, kind = isa.lanes, vector(F32, isa.lanes)
    _, _, channel, starts, offsets, values, bias, limits, step = fields
    (inputs, places), (y, r), width = vectors, ends, len(vectors[0])
    low, high = (splat(b, load(b, limits, F32, 4 * i), lanes) for i in range(2))

    def product(j: Value, acc: list[Value]) -> Sequence[Value]:
        offset, weights = load_index(b, scaled(b, offsets, j, 4)), scaled(b, values, j, 4 * rows)
        pixels = [load(b, b.add(address, offset), kind) for address in inputs]
        for i in range(rows):
            weight = splat(b, load(b, weights, F32, 4 * i), lanes)
            for v in range(width):
                acc[i * width + v] = multiply_add(b, isa, weight, pixels[v], acc[i * width + v])
        return acc

    def block_row(n: Value, _: list[Value]) -> list[Value]:
        first = scaled(b, bias, n, 4 * rows)
        acc = [splat(b, load(b, first, F32, 4 * i), lanes) for i in range(rows) for _ in range(width)]
        start, stop = (load_index(b, b.add(starts, b.mul(n, step)), 4 * i) for i in range(2))
        acc = loop(b, start, stop, 1, acc, product)
        place = b.mul(b.mul(n, const(rows)), channel)
        for i in range(rows):
            row = b.add(place, b.mul(channel, const(i)))
            results = acc[i * width : (i + 1) * width]
            if r is not None:  # all are read before any is written: the last vectors may overlap, and r be y
                before = [load(b, b.add(r, b.add(row, at)), kind) for at in places]
                results = [b.fadd(value, other) for value, other in zip(results, before, strict=True)]
            for value, at in zip(results, places, strict=True):
                store(b, finish(b, value, low, high), b.add(y, b.add(row, at)))
        return []

    loop(b, n0, n1, 1, [], block_row)


def dot(isa: Isa, rows: int) -> Any:
    """void(S, x, y, r, n0, n1): block rows [n0, n1) of one row of features; offsets: bytes from x, r: residual or zeros."""
    kind = F32 if rows == 1 else vector(F32, rows)
    abreast = 4  # sums in flight

    def step(b: Builder, fields: list[Value], x: Value, j: Value, acc: Value) -> Value:
        offset, weights = load_index(b, scaled(b, fields[0], j, 4)), load(b, scaled(b, fields[1], j, 4 * rows), kind)
        value = load(b, b.add(x, offset), F32)
        if rows == 1:
            return b.fadd(acc, b.fmul(value, weights)) if not fused else call(b, "llvm.fma.f32", F32, [value, weights, acc])
        return multiply_add(b, isa, splat(b, value, rows), weights, acc)

    fused = bool(isa.features & {"fma", "neon"})

    def emit(b: Builder, record: Value, x: Value, y: Value, r: Value, n0: Value, n1: Value) -> None:
        starts, offsets, values, bias, limits = (load(b, record, I64, 8 * i) for i in range(S_STARTS, S_LIMITS + 1))
        far = load(b, record, I64, 8 * S_STEP)
        low, high = (load(b, limits, F32, 4 * i) for i in range(2))
        if rows > 1:
            low, high = splat(b, low, rows), splat(b, high, rows)
        zero = ir.Constant(kind, 0.0 if rows == 1 else None)

        def block_row(n: Value, _: list[Value]) -> list[Value]:
            place = b.mul(n, const(4 * rows))
            start, stop = (load_index(b, b.add(starts, b.mul(b.add(n, const(i)), far))) for i in range(2))
            whole = b.add(start, b.and_(b.sub(stop, start), const(-abreast)))
            acc = [b.fadd(load(b, b.add(bias, place), kind), load(b, b.add(r, place), kind)), *[zero] * (abreast - 1)]
            fields = [offsets, values]
            acc = loop(
                b, start, whole, abreast, acc,
                lambda j, acc: [step(b, fields, x, b.add(j, const(i)), acc[i]) for i in range(abreast)],
            )  # fmt: skip
            (total,) = loop(
                b, whole, stop, 1, [b.fadd(b.fadd(acc[0], acc[1]), b.fadd(acc[2], acc[3]))],
                lambda j, acc: [step(b, fields, x, j, acc[0])],
            )  # fmt: skip
            store(b, finish(b, total, low, high), b.add(y, place))
            return []

        loop(b, n0, n1, 1, [], block_row)

    return procedure(f"graphopt_dot_{isa.name}_{rows}", 6, emit)


def transpose(isa: Isa) -> Any:
    """void(target, target_pitch, source, source_pitch): a square of `lanes` x `lanes` floats, pitches in bytes."""
    lanes, kind = isa.lanes, vector(F32, isa.lanes)

    def emit(b: Builder, target: Value, target_pitch: Value, source: Value, source_pitch: Value) -> None:
        rows = [load(b, b.add(source, b.mul(source_pitch, const(i))), kind) for i in range(lanes)]
        half = lanes // 2
        while half:
            # rows i and i + half swap the off-diagonal blocks of size half
            for i in range(lanes):
                if i & half:
                    continue
                one, two = rows[i], rows[i + half]
                keep = [k if not k & half else lanes + k - half for k in range(lanes)]
                swap = [k + half if not k & half else lanes + k for k in range(lanes)]
                rows[i], rows[i + half] = shuffle(b, one, two, keep), shuffle(b, one, two, swap)
            half //= 2
        for i, row in enumerate(rows):
            store(b, row, b.add(target, b.mul(target_pitch, const(i))))

    return procedure(f"graphopt_transpose_{isa.name}", 4, emit)


def plane(isa: Isa, step: int) -> Any:
    """void(target, target_pitch, source, source_pitch, lines, count): target[y][i] = source[y][i * step], pitches in bytes.

    Of floats, step 1 or 2; nothing beyond the last is touched.
    """

    def emit(
        b: Builder, target: Value, target_pitch: Value, source: Value, source_pitch: Value, lines: Value, count: Value
    ) -> None:
        one = local(b, f"graphopt_line_{isa.name}_{step}", [I64] * 3, ir.VoidType(), _line(isa, step))

        def body(i: Value, _: list[Value]) -> list[Value]:
            b.call(one, [b.add(target, b.mul(target_pitch, i)), b.add(source, b.mul(source_pitch, i)), count])
            return []

        loop(b, const(0), lines, 1, [], body)

    return procedure(f"graphopt_plane_{isa.name}_{step}", 6, emit)


def _line(isa: Isa, step: int) -> Callable[..., None]:
    lanes, kind = isa.lanes, vector(F32, isa.lanes)

    def part(b: Builder, target: Value, source: Value, i: Value) -> None:
        at = scaled(b, source, i, 4 * step)
        value = load(b, at, kind)
        if step == 2:  # the second vector ends with the last element wanted
            behind = load(b, at, kind, 4 * (lanes - 1))
            value = shuffle(b, value, behind, [*range(0, lanes, 2), *range(lanes + 1, 2 * lanes, 2)])
        store(b, value, scaled(b, target, i, 4))

    def emit(b: Builder, target: Value, source: Value, count: Value) -> None:
        whole = b.and_(count, const(-lanes))

        def vectors(i: Value, _: list[Value]) -> list[Value]:
            part(b, target, source, i)
            return []

        def single(i: Value, _: list[Value]) -> list[Value]:
            store(b, load(b, scaled(b, source, i, 4 * step), F32), scaled(b, target, i, 4))
            return []

        loop(b, const(0), whole, lanes, [], vectors)
        wide, narrow, done = (b.append_basic_block(name) for name in ("wide", "narrow", "done"))
        b.cbranch(b.icmp_signed(">=", count, const(lanes)), wide, narrow)
        b.position_at_end(wide)
        part(b, target, source, b.sub(count, const(lanes)))
        b.branch(done)
        b.position_at_end(narrow)
        loop(b, const(0), count, 1, [], single)
        b.branch(done)
        b.position_at_end(done)

    return emit
