"""LLVM IR for the micro-kernels: vectors at int64 addresses, counted loops, functions private to the module they are used in.

`b` is an llvmlite IRBuilder throughout, values are SSA values. llvmlite is untyped, hence the two aliases of Any.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

Builder = Any
Value = Any
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()


def vector(element: Any, lanes: int) -> Any:
    """A vector type."""
    return ir.VectorType(element, lanes)


def const(value: int, kind: Any = I64) -> Value:
    """A constant; of a vector type: the value in every lane."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [value] * kind.count)
    return ir.Constant(kind, value)


def pointer(b: Builder, address: Value, offset: int = 0, kind: Any = I8) -> Value:
    """The address plus bytes, as a pointer."""
    return b.inttoptr(b.add(address, const(offset)) if offset else address, kind.as_pointer())


def load(b: Builder, address: Value, kind: Any, offset: int = 0) -> Value:
    """An unaligned load."""
    return b.load(pointer(b, address, offset, kind), align=1)


def store(b: Builder, value: Value, address: Value, offset: int = 0) -> None:
    """An unaligned store."""
    b.store(value, pointer(b, address, offset, value.type), align=1)


def load_index(b: Builder, address: Value, offset: int = 0) -> Value:
    """An int32 of a table, as int64."""
    return b.sext(load(b, address, I32, offset), I64)


def scaled(b: Builder, base: Value, count: Value, size: int) -> Value:
    """base + count * size."""
    return b.add(base, b.mul(count, const(size)))


def splat(b: Builder, scalar: Value, lanes: int) -> Value:
    """The scalar in every lane."""
    kind = vector(scalar.type, lanes)
    undefined = ir.Constant(kind, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, scalar, const(0, I32)), undefined, const(0, vector(I32, lanes)))


def shuffle(b: Builder, one: Value, two: Value | None, lanes: Sequence[int]) -> Value:
    """Lanes of two vectors laid end to end."""
    other = ir.Constant(one.type, ir.Undefined) if two is None else two
    return b.shuffle_vector(one, other, ir.Constant(vector(I32, len(lanes)), list(lanes)))


def concat(b: Builder, parts: Sequence[Value]) -> Value:
    """Vectors of one type, a power of two of them, end to end."""
    parts = list(parts)
    while len(parts) > 1:
        width = 2 * parts[0].type.count
        parts = [shuffle(b, parts[i], parts[i + 1], range(width)) for i in range(0, len(parts), 2)]
    return parts[0]


def call(b: Builder, name: str, kind: Any, arguments: Sequence[Value]) -> Value:
    """Call an LLVM intrinsic by its full name."""
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(kind, [value.type for value in arguments]), name=name)
    return b.call(function, arguments)


def lanewise(b: Builder, name: str, *arguments: Value) -> Value:
    """An LLVM intrinsic overloaded on its (vector) argument type, e.g. smax."""
    kind = arguments[0].type
    letter = {ir.FloatType: "f32", ir.DoubleType: "f64"}.get(type(kind.element)) or f"i{kind.element.width}"
    return call(b, f"llvm.{name}.v{kind.count}{letter}", kind, arguments)


def clamp(b: Builder, value: Value, low: Value, high: Value, sign: str = "s") -> Value:
    """Integers within bounds; sign: s or u."""
    return lanewise(b, f"{sign}min", lanewise(b, f"{sign}max", value, low), high)


def loop(
    b: Builder,
    start: Value,
    stop: Value,
    step: int,
    carried: Sequence[Value],
    body: Callable[[Value, list[Value]], Sequence[Value]],
) -> list[Value]:
    """for (i = start; i < stop; i += step) carried = body(i, carried), the carried values in registers."""
    before = b.block
    head, inside, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(I64)
    index.add_incoming(start, before)
    state = [b.phi(value.type) for value in carried]
    for phi, value in zip(state, carried, strict=True):
        phi.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<", index, stop), inside, after)
    b.position_at_end(inside)
    new = body(index, list(state))
    index.add_incoming(b.add(index, const(step)), b.block)
    for phi, value in zip(state, new, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return state


def local(b: Builder, name: str, kinds: Sequence[Any], result: Any, emit: Callable[..., Value | None]) -> Any:
    """The function `name` of this module, private to it and never inlined; emit(builder, *arguments) writes it on first use."""
    known = b.module.globals.get(name)
    if known is not None:
        return known
    function = ir.Function(b.module, ir.FunctionType(result, kinds), name=name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    function.attributes.add("nounwind")
    inner = ir.IRBuilder(function.append_basic_block("entry"))
    value = emit(inner, *function.args)
    if value is None:
        inner.ret_void()
    else:
        inner.ret(value)
    return function


def procedure(name: str, arity: int, emit: Callable[..., None]) -> Any:
    """A Numba intrinsic void(int64 x arity), whose body is a local function."""

    def generate(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        b.call(local(b, name, [I64] * arity, ir.VoidType(), emit), arguments)
        return context.get_dummy_value()

    def typed(context: Any, *arguments: Any) -> Any:
        return (types.void(*[types.int64] * arity), generate) if len(arguments) == arity else None

    # Numba takes the arity from the signature that inspect reports
    names = ["context", *(f"a{i}" for i in range(arity))]
    signature = inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    typed.__signature__ = signature  # type: ignore[attr-defined]
    return intrinsic(typed)
