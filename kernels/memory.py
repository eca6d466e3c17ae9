"""Intrinsics on plain addresses: what compiled code that must run without Python, NumPy or Numba's runtime is written with.

Addresses, sizes and integers are int64. Nothing here checks anything: the engine validates before it reads or writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I1, I8, I16, I32, I64, F32 = (*(ir.IntType(bits) for bits in (1, 8, 16, 32, 64)), ir.FloatType())


def at(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: int = 0) -> ir.Value:
    """A typed pointer to an address."""
    if offset:
        address = builder.add(address, I64(offset))
    return builder.inttoptr(address, kind.as_pointer())


def function(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    """The function of that name, declared in the module if it is not yet."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _loader(name: str, stored: ir.Type, widen: str, result: types.Type) -> Any:
    def load(typing: Any, address: types.Type) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            value = builder.load(at(builder, arguments[0], stored), align=1)
            return getattr(builder, widen)(value, I64) if widen else value

        return result(types.int64), codegen

    load.__name__ = name
    return intrinsic(load)


def _storer(name: str, stored: ir.Type, value: types.Type) -> Any:
    def store(typing: Any, address: types.Type, content: types.Type) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            narrow = arguments[1]
            if isinstance(stored, ir.IntType) and stored.width < 64:
                narrow = builder.trunc(narrow, stored)
            builder.store(narrow, at(builder, arguments[0], stored), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, value), codegen

    store.__name__ = name
    return intrinsic(store)


ld64, st64 = _loader("ld64", I64, "", types.int64), _storer("st64", I64, types.int64)
ld32, st32 = _loader("ld32", I32, "sext", types.int64), _storer("st32", I32, types.int64)
st16 = _storer("st16", I16, types.int64)
ldu8, stu8 = _loader("ldu8", I8, "zext", types.int64), _storer("stu8", I8, types.int64)
lds8 = _loader("lds8", I8, "sext", types.int64)
ldf, stf = _loader("ldf", F32, "", types.float32), _storer("stf", F32, types.float32)


def _emit(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `body(builder, *arguments)` becomes an intrinsic of the Numba signature."""

    def wrap(body: Callable[..., Any]) -> Any:
        names = ", ".join(f"a{i}" for i in range(len(signature.args)))

        def codegen(context: Any, builder: ir.IRBuilder, _: Any, arguments: Any) -> ir.Value:
            value = body(builder, *arguments)
            return context.get_dummy_value() if value is None else value

        scope: dict[str, Any] = {"signature": signature, "codegen": codegen}
        exec(f"def {body.__name__}(typing{', ' if names else ''}{names}):\n    return signature, codegen", scope)
        return intrinsic(scope[body.__name__])

    return wrap


emit = _emit
_V, _A, _F = types.void, types.int64, types.float32


@emit(_A(_A))
def malloc(builder: ir.IRBuilder, size: ir.Value) -> ir.Value:
    return builder.ptrtoint(builder.call(function(builder, "malloc", I8.as_pointer(), [I64]), [size]), I64)


@emit(_V(_A))
def free(builder: ir.IRBuilder, address: ir.Value) -> None:
    builder.call(function(builder, "free", ir.VoidType(), [I8.as_pointer()]), [at(builder, address, I8)])


@emit(_V(_A, _A, _A))
def fill(builder: ir.IRBuilder, target: ir.Value, value: ir.Value, size: ir.Value) -> None:
    memset = function(builder, "llvm.memset.p0.i64", ir.VoidType(), [I8.as_pointer(), I8, I64, I1])
    builder.call(memset, [at(builder, target, I8), builder.trunc(value, I8), size, I1(0)])


@emit(_V(_A, _A, _A))
def copy(builder: ir.IRBuilder, target: ir.Value, source: ir.Value, size: ir.Value) -> None:
    """Bytes of ranges that do not overlap."""
    memcpy = function(builder, "llvm.memcpy.p0.p0.i64", ir.VoidType(), [I8.as_pointer(), I8.as_pointer(), I64, I1])
    builder.call(memcpy, [at(builder, target, I8), at(builder, source, I8), size, I1(0)])


@emit(_A(_F))
def lrint(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """float32 -> int32, half to even."""
    return builder.sext(builder.call(function(builder, "llvm.lrint.i32.f32", I32, [F32]), [value]), I64)


@emit(_F(_F, _F, _F))
def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """float32 a * b + c, rounded once."""
    return builder.call(function(builder, "llvm.fma.f32", F32, [F32] * 3), [a, b, c])


@emit(_F(_A))
def to_float(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """An int64 that fits int32 -> float32, half to even."""
    return builder.sitofp(builder.trunc(value, I32), F32)


@intrinsic(prefer_literal=True)
def text(typing: Any, literal: types.Type) -> Any:
    """Address of a NUL-terminated constant in the module: it survives ahead-of-time compilation."""
    if not isinstance(literal, types.StringLiteral):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.ptrtoint(context.insert_const_string(builder.module, literal.literal_value), I64)

    return types.int64(literal), codegen
