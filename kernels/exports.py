"""Functions that C code calls: named symbols with the C calling convention, written in Python.

An `Export` is a plain Python function, its name and its number of int64 arguments. `bind` compiles one in this process and makes
the name known to LLVM, so that `symaddr(name)` finds it; `graphopt.kernels.aot_build` links the same exports into a library.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Export(NamedTuple):
    """A C function of `arguments` int64; the result is int64, or nothing where `void` is set."""

    name: str
    function: Callable[..., Any]
    arguments: int
    void: bool = False


_LOCK = threading.RLock()
_BOUND: dict[str, Any] = {}  # compiled exports of this process by symbol; their code must outlive every caller


def bind(exports: Iterable[Export]) -> None:
    """Compile exports in this process, in this order, and make their symbols known; those already bound are left as they are."""
    import llvmlite.binding as llvm
    from numba import cfunc, types

    with _LOCK:
        for export in exports:
            if export.name in _BOUND:
                continue
            signature = (types.void if export.void else types.int64)(*[types.int64] * export.arguments)
            made = cfunc(signature, cache=True, error_model="numpy", boundscheck=False)(export.function)
            _BOUND[export.name] = made
            llvm.add_symbol(export.name, made.address)


def address(name: str) -> int:
    """Address of the code of a bound export."""
    found: int = _BOUND[name].address
    return found
