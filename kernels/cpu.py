"""Which of the instruction sets the code was written for this CPU has; compiled, as the library must find out by itself.

A rung counts only where the operating system saves its registers too. GRAPHOPT_CPU chooses another rung than the best one.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from graphopt.kernels.abi import cstr, getauxval, getenv, machine
from graphopt.kernels.isa import LADDERS
from graphopt.kernels.memory import ld64, ldu8
from graphopt.kernels.specialise import compiled
from graphopt.kernels.text import put_text, same_text

llvmlite.binding.initialize_native_asmparser()  # for the inline assembly below; once is enough, and more does no harm

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
NAME_WORDS = 2  # int64 that hold the name of a rung

# what the compiler may use for a rung: (CPU, features) of LLVM; x86-64-v3 is AVX2, FMA, BMI and what comes with them
_AVX512 = "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd,+avx512vnni"
LLVM_CPUS: dict[str, dict[str, tuple[str, str]]] = {
    "x86_64": {
        "amx": ("x86-64-v3", f"{_AVX512},+amx-tile,+amx-int8"),
        "avx512vnni": ("x86-64-v3", _AVX512),
        "avxvnni": ("x86-64-v3", "+avxvnni"),
        "avx2": ("x86-64-v3", ""),
        "generic": ("x86-64", ""),
    },
    "aarch64": {"neon_dot": ("generic", "+neon,+dotprod"), "generic": ("generic", "+neon")},
}


@intrinsic
def _cpuid(_context: Any, leaf: Any, subleaf: Any, register: Any) -> Any:
    """Register 0 (eax) to 3 (edx) of CPUID."""
    if not isinstance(register, types.IntegerLiteral):
        return None

    def codegen(_ctx: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        # rbx may be the frame's base pointer, which LLVM does not let inline assembly take
        text = "xchgq %rbx, ${1:q}\n cpuid\n xchgq %rbx, ${1:q}"
        function = ir.FunctionType(ir.LiteralStructType([_I32] * 4), [_I32, _I32])
        inputs = [builder.trunc(a, _I32) for a in arguments[:2]]
        found = builder.asm(function, text, "={ax},=r,={cx},={dx},0,2", inputs, True)
        return builder.zext(builder.extract_value(found, register.literal_value), _I64)

    return types.int64(types.int64, types.int64, register), codegen


@intrinsic
def _xgetbv(_context: Any) -> Any:
    """The low half of XCR0: the registers that the operating system saves."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        function = ir.FunctionType(ir.LiteralStructType([_I32] * 2), [_I32])
        found = builder.asm(function, "xgetbv", "={ax},={dx},{cx}", [_I32(0)], True)
        return builder.zext(builder.extract_value(found, 0), _I64)

    return types.int64(), codegen


@intrinsic
def _syscall2(_context: Any, number: Any, a: Any, b: Any) -> Any:
    """A Linux system call of two arguments on x86-64."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(_I64, [_I64] * 3)
        return builder.asm(function, "syscall", "={ax},{ax},{di},{si},~{rcx},~{r11},~{memory}", list(arguments), True)

    return types.int64(types.int64, types.int64, types.int64), codegen


@compiled
def _has(bits: int, mask: int) -> bool:
    return bits & mask == mask


@compiled
def _usable_x86() -> int:
    usable = 1 << 4  # generic
    if _cpuid(0, 0, 0) < 7:
        return usable
    one, seven = _cpuid(1, 0, 2), _cpuid(7, 0, 1)
    # FMA, MOVBE, OSXSAVE, AVX, F16C; BMI1, AVX2, BMI2; LZCNT; the system saves XMM and YMM
    if not (_has(one, 1 << 12 | 1 << 22 | 1 << 27 | 1 << 28 | 1 << 29) and _has(seven, 1 << 3 | 1 << 5 | 1 << 8)):
        return usable
    if not (_has(_cpuid(0x80000001, 0, 2), 1 << 5) and _has(_xgetbv(), 0x6)):
        return usable
    usable |= 1 << 3
    if _cpuid(7, 0, 0) >= 1 and _has(_cpuid(7, 1, 0), 1 << 4):
        usable |= 1 << 2  # AVX-VNNI
    # AVX-512 F, DQ, CD, BW, VL and VNNI; the system saves the masks and all of ZMM
    if not (
        _has(seven, 1 << 16 | 1 << 17 | 1 << 28 | 1 << 30 | 1 << 31) and _has(_cpuid(7, 0, 2), 1 << 11) and _has(_xgetbv(), 0xE6)
    ):
        return usable
    usable |= 1 << 1
    # AMX-TILE and AMX-INT8; Linux gives the tiles to a process that asks: arch_prctl(ARCH_REQ_XCOMP_PERM, 18)
    if _has(_cpuid(7, 0, 3), 1 << 24 | 1 << 25) and _has(_xgetbv(), 0x60000) and _syscall2(158, 0x1023, 18) == 0:
        usable |= 1
    return usable


@compiled
def _usable_aarch64() -> int:
    usable = 1 << 1
    if _has(getauxval(16), 1 << 20):  # AT_HWCAP, ASIMDDP
        usable |= 1
    return usable


usable = _usable_aarch64 if machine() == "aarch64" else _usable_x86
"""Compiled: bit i is set where rung i of `LADDERS[machine()]` can run here. Asks Linux for the AMX tiles."""


@compiled
def select(names: int, bits: int, count: int, message: int) -> int:
    """The rung to run: the first of `count` that can run here, or the one that GRAPHOPT_CPU names.

    Parameters
    ----------
    names : address of names, `NAME_WORDS` int64 each
    bits : address of their bits in `usable()`, int64 each
    message : buffer for the reason where -1 is returned
    """
    wish = getenv(cstr("GRAPHOPT_CPU"))
    if wish != 0 and ldu8(wish) == 0:
        wish = 0
    can = usable()
    for i in range(count):
        if can >> ld64(bits + 8 * i) & 1 and (wish == 0 or same_text(wish, names + 8 * NAME_WORDS * i)):
            return i
    end = put_text(message, 0, cstr("graphopt: "))
    if wish != 0:
        end = put_text(message, put_text(message, end, cstr("GRAPHOPT_CPU=")), wish)
        end = put_text(message, end, cstr(" is not available here"))
    else:
        end = put_text(message, end, cstr("this CPU has none of the instruction sets of this library"))
    end = put_text(message, end, cstr("; choose from:"))
    for i in range(count):
        if can >> ld64(bits + 8 * i) & 1:
            end = put_text(message, put_text(message, end, cstr(" ")), names + 8 * NAME_WORDS * i)
    return -1


def bit(rung: str) -> int:
    """The bit of a rung in `usable()`. A rung `..._soft` emulates another's instructions, and runs anywhere."""
    return LADDERS[machine()].index("generic" if rung.endswith("_soft") else rung)


def available() -> tuple[str, ...]:
    """The rungs that can run in this process, best first."""
    found = usable()
    return tuple(rung for i, rung in enumerate(LADDERS[machine()]) if found >> i & 1)
