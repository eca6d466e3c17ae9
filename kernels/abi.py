"""Numba intrinsics for code that lives behind a C interface: raw memory, C calls, constant strings, symbols, atomics.

Every value is an int64: addresses, sizes, enums, pointers to opaque structs (0 is the null pointer). Functions built from these
intrinsics touch neither Python objects nor Numba's runtime and raise nothing, which is what lets `graphopt.kernels.aot` turn them
into a library that needs no Python. Compile them with
`specialise.compiled`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from graphopt.kernels.memory import ld64, st64
from graphopt.kernels.specialise import compiled

I64 = ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()


def machine() -> str:
    """Architecture that code is generated for, "x86_64" or "aarch64"; `graphopt.kernels.aot` sets it to compile for another one."""
    name = os.environ.get("GRAPHOPT_MACHINE") or platform.machine().lower()
    return {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}.get(name, name)


def _pointer(builder: Any, address: Any, element: Any) -> Any:
    return builder.inttoptr(address, element.as_pointer())


def _make_call(count: int) -> Any:
    """An intrinsic `call(function, a0, ...)` for a C function of `count` integer arguments that returns an integer or pointer."""
    names = [f"a{i}" for i in range(count)]

    def typer(_context: Any, *_arguments: Any) -> Any:
        def codegen(_ctx: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            function = ir.FunctionType(I64, [I64] * count)
            return builder.call(_pointer(builder, arguments[0], function), list(arguments[1:]))

        return types.int64(*[types.int64] * (count + 1)), codegen

    # Numba reads the parameter names off the function, so that *arguments will not do
    scope: dict[str, Any] = {"typer": typer}
    exec(f"def call{count}(context, {', '.join(['function', *names])}):\n    return typer(context)\n", scope)
    return intrinsic(scope[f"call{count}"])


call0, call1, call2, call3, call4, call5, call6, call7 = (_make_call(n) for n in range(8))


@intrinsic
def stack64(_context: Any, count: Any) -> Any:
    """Address of `count` (a literal) uninitialised int64 in the frame of the calling function, 64-byte aligned."""
    if not isinstance(count, types.IntegerLiteral):
        return None

    def codegen(_ctx: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        slot = cgutils.alloca_once(builder, ir.ArrayType(I64, count.literal_value))
        slot.align = 64
        return builder.ptrtoint(slot, I64)

    return types.int64(count), codegen


@intrinsic(prefer_literal=True)
def cstr(_context: Any, text: Any) -> Any:
    """Address of a constant NUL-terminated string (a literal) that is part of the compiled module."""
    if not isinstance(text, types.StringLiteral):
        return None

    def codegen(ctx: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        return builder.ptrtoint(ctx.insert_const_string(builder.module, text.literal_value), I64)

    return types.int64(text), codegen


def _external(module: Any, name: str) -> Any:
    """The declaration of a symbol; its type does not matter, only its address is used."""
    found = module.globals.get(name)
    if found is None:
        found = ir.GlobalVariable(module, ir.IntType(8), name)
        found.linkage = "external"
    return found


@intrinsic(prefer_literal=True)
def symaddr(_context: Any, name: Any) -> Any:
    """Address of a symbol (a literal name) of another module: an export of `graphopt.kernels.exports`, its code or its storage."""
    if not isinstance(name, types.StringLiteral):
        return None

    def codegen(_ctx: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        return builder.ptrtoint(_external(builder.module, name.literal_value), I64)

    return types.int64(name), codegen


def constant_table(name: str, rows: Sequence[int | str]) -> Any:
    """An intrinsic without arguments: the address of a constant table of int64; a string stands for the address of that symbol."""

    @intrinsic
    def table(_context: Any) -> Any:
        def codegen(_ctx: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
            found = builder.module.globals.get(name)
            if found is None:
                values = [_external(builder.module, row).ptrtoint(I64) if isinstance(row, str) else I64(row) for row in rows]
                found = ir.GlobalVariable(builder.module, ir.ArrayType(I64, len(values)), name)
                found.linkage, found.global_constant = "internal", True
                found.initializer = ir.Constant(found.type.pointee, values)
            return builder.ptrtoint(found, I64)

        return types.int64(), codegen

    return table


def text_words(text: str, words: int) -> tuple[int, ...]:
    """A NUL-terminated string as int64 of a `constant_table`."""
    data = text.encode().ljust(8 * words, b"\0")
    assert len(data) == 8 * words, f"'{text}' does not fit {8 * words} bytes with its NUL"
    return tuple(int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, 8 * words, 8))


def _make_libc(name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """An intrinsic for a function of the C library; `None` as result is void, "p" a pointer; all are int64 to the caller."""
    names = ", ".join(f"a{i}" for i in range(len(arguments)))

    def lower(builder: Any, values: Any) -> Any:
        types_ = [_BYTES if a == "p" else a for a in arguments]
        returns = ir.VoidType() if result is None else _BYTES if result == "p" else result
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(returns, types_), name)
        called = builder.call(
            function,
            [
                builder.inttoptr(v, _BYTES) if t is _BYTES else builder.trunc(v, t) if t.width < 64 else v
                for v, t in zip(values, types_, strict=True)
            ],
        )
        if result is None:
            return I64(0)
        if result == "p":
            return builder.ptrtoint(called, I64)
        return called if result.width == 64 else builder.sext(called, I64)

    def typer() -> Any:
        return types.int64(*[types.int64] * len(arguments)), lambda _c, builder, _s, values: lower(builder, values)

    scope: dict[str, Any] = {"typer": typer}
    exec(f"def {name}(context{', ' if names else ''}{names}):\n    return typer()\n", scope)
    return intrinsic(scope[name])


c_malloc = _make_libc("malloc", "p", [I64])
c_free = _make_libc("free", None, ["p"])
getenv = _make_libc("getenv", "p", ["p"])
getauxval = _make_libc("getauxval", I64, [I64])  # Linux only; declared where it is called
sched_yield = _make_libc("SwitchToThread" if os.name == "nt" else "sched_yield", ir.IntType(32), [])


def _make_block(lower: Callable[[Any, Any, Any, Any], None]) -> Any:
    """An intrinsic (destination, source or byte, size) -> nothing."""

    @intrinsic
    def block(_context: Any, target: Any, other: Any, size: Any) -> Any:
        def codegen(ctx: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            lower(builder, *arguments)
            return ctx.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return block


memcpy = _make_block(lambda b, to, source, n: cgutils.raw_memcpy(b, b.inttoptr(to, _BYTES), b.inttoptr(source, _BYTES), n, 1))
memmove = _make_block(lambda b, to, source, n: cgutils.raw_memmove(b, b.inttoptr(to, _BYTES), b.inttoptr(source, _BYTES), n, 1))
memset = _make_block(lambda b, to, byte, n: cgutils.memset(b, b.inttoptr(to, _BYTES), n, b.trunc(byte, ir.IntType(8))))


@intrinsic
def atomic_xchg(_context: Any, address: Any, value: Any) -> Any:
    """Swap the int64 at an address for a value and return the old one; sequentially consistent."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("xchg", _pointer(builder, arguments[0], I64), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_cas(_context: Any, address: Any, expected: Any, value: Any) -> Any:
    """Store the value where the int64 at an address is the expected one; return what was there."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pair = builder.cmpxchg(_pointer(builder, arguments[0], I64), arguments[1], arguments[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 0)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def atomic_load(_context: Any, address: Any) -> Any:
    """The int64 at an address, acquire."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(builder, arguments[0], I64), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_store(_context: Any, address: Any, value: Any) -> Any:
    """Store an int64, release."""

    def codegen(ctx: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _pointer(builder, arguments[0], I64), "release", 8)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def cpu_pause(_context: Any) -> Any:
    """Tell the CPU that this is a waiting loop."""

    def codegen(ctx: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        if machine() == "x86_64":
            builder.call(
                cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"), []
            )
        elif machine() == "aarch64":
            hint = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            builder.call(cgutils.get_or_insert_function(builder.module, hint, "llvm.aarch64.hint"), [ir.IntType(32)(1)])
        return ctx.get_dummy_value()

    return types.void(), codegen


@compiled
def lock(address: int) -> None:
    """Take the spin lock (an int64, 0 when free): spins shortly, then gives the CPU away, as the holder may not be running."""
    spins = 0
    while atomic_xchg(address, 1) != 0:
        while atomic_load(address) != 0:
            spins += 1
            if spins % 64 == 0:
                sched_yield()
            else:
                cpu_pause()


@compiled
def unlock(address: int) -> None:
    """Free the spin lock."""
    atomic_store(address, 0)


@compiled
def aligned_malloc(size: int) -> int:
    """Address of `size` uninitialised bytes, 64-byte aligned; 0 where memory is out. Free it with `aligned_free`."""
    if size < 0:
        return 0
    block = c_malloc(size + 72)
    if block == 0:
        return 0
    aligned = (block + 71) // 64 * 64
    st64(aligned - 8, block)
    return aligned


@compiled
def aligned_free(address: int) -> None:
    """Free what `aligned_malloc` gave; 0 is allowed."""
    if address != 0:
        c_free(ld64(address - 8))


@compiled
def parallel_for(par: int, function: int, total: int, usr: int) -> None:
    """Call the C function `void function(void *usr, size_t i)` for every i < total, on onnxruntime's threads where there are any.

    Parameters
    ----------
    par : address of int64 [4]: OrtApi's KernelContext_ParallelFor, the kernel context, the OrtApi table, out: OrtStatus of a
        failure; 0 runs a plain loop on this thread
    function : address of the callback (`symaddr` of an export)
    total : number of calls
    usr : first argument of every call
    """
    if par == 0:
        for i in range(total):
            call2(function, usr, i)
    elif total > 0:
        status = call5(ld64(par), ld64(par + 8), function, total, 0, usr)
        if status != 0 and ld64(par + 24) == 0:
            st64(par + 24, status)
