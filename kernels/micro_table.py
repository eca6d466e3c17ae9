"""Bytes through a table of 256: sixteen shuffles in registers in place of a load for each byte, where the CPU shuffles bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.kernels import vector_steps
from graphopt.kernels.isa import Isa
from graphopt.kernels.vectors import I8, I64, Builder, Value, call, concat, const, lanewise, load, loop, procedure, store, vector

_WIDE = vector(I8, 32)
_SHUFFLE = "llvm.x86.avx2.pshuf.b"
ABREAST = 4  # vectors that share the loads of the table


def _changes(b: Builder, table: Value) -> Value:
    """Address of the table on the stack, each sixteenth but the first of a half as its difference (xor) to the one before."""
    with b.goto_entry_block():
        kept = b.ptrtoint(b.alloca(vector(I8, 256)), I64)
    for half in (0, 128):
        before: Value | None = None
        for part in range(half, half + 128, 16):
            own = load(b, table, vector(I8, 16), part)
            store(b, own if before is None else b.xor(own, before), kept, part)
            before = own
    return kept


def _mapped(b: Builder, changes: Value, values: Sequence[Value]) -> list[Value]:
    """What the table holds for each byte: the sum (xor) of all changes up to its sixteenth.

    vpshufb gives 0 where the index is negative: 16 is taken off before each next sixteenth, so a change counts for what lies in its
    sixteenth or above. Of an index and that with its top bit flipped one is negative, and stays so: only one half counts.
    """
    results: list[Value] = [const(0, _WIDE)] * len(values)
    for half in (0, 128):
        indices = [b.xor(value, const(-128, _WIDE)) if half else value for value in values]
        for part in range(half, half + 128, 16):
            change = load(b, changes, vector(I8, 16), part)
            both = concat(b, [change, change])
            results = [
                b.xor(result, call(b, _SHUFFLE, _WIDE, [both, index])) for result, index in zip(results, indices, strict=True)
            ]
            indices = [lanewise(b, "ssub.sat", index, const(16, _WIDE)) for index in indices]
    return results


def _emit(b: Builder, target: Value, source: Value, table: Value, n: Value) -> None:
    changes = _changes(b, table)

    def block(vectors: int) -> Any:
        def body(i: Value, _: Sequence[Value]) -> Sequence[Value]:
            values = [load(b, b.add(source, i), _WIDE, 32 * k) for k in range(vectors)]
            for k, value in enumerate(_mapped(b, changes, values)):
                store(b, value, b.add(target, i), 32 * k)
            return []

        return body

    def byte(i: Value, _: Sequence[Value]) -> Sequence[Value]:
        index = b.zext(load(b, b.add(source, i), I8), I64)
        store(b, load(b, b.add(table, index), I8), b.add(target, i))
        return []

    first, second = b.and_(n, const(-32 * ABREAST)), b.and_(n, const(-32))
    loop(b, const(0), first, 32 * ABREAST, [], block(ABREAST))
    loop(b, first, second, 32, [], block(1))
    loop(b, second, n, 1, [], byte)


def look_up(isa: Isa) -> Any:
    """void(target, source, table, n): target[i] = table[source[i]], for n a multiple of 8; target and source lie apart."""
    if isa.machine != "x86_64":
        return vector_steps.look_up
    return procedure(f"graphopt_table_{isa.name}", 4, _emit)
