"""Compiled functions that live behind a C interface: how they are compiled, cached, and copied for each instruction set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

OPTIONS: dict[str, Any] = {"error_model": "numpy", "boundscheck": False, "nogil": True}
"""Options of every njit function that is reached from a C callback: nothing in it may raise."""


def package_sources() -> tuple[str, ...]:
    """All source files of this package: what an engine that lives in it may be made of."""
    return tuple(str(path) for path in sorted(Path(__file__).parent.glob("*.py")))


@cache
def digest(*sources: str) -> str:
    """Hash of the sources of this package, of other source files, and of what compiles them: what cached code must depend on."""
    import llvmlite
    import numba

    found = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in map(Path, sorted({*package_sources(), *sources})):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def clone(template: Callable[..., Any], name: str, **scope: Any) -> Callable[..., Any]:
    """A copy of a Python function under another name, with these globals in place of, or beside, its module's.

    Numba finds cached code by source file, qualified name and line, and looks for changes in that one file only. The copy's
    qualified name therefore has the digest of this package and of the files in `SOURCES` of the scope: code compiled from
    others is never found.
    """
    assert isinstance(template, FunctionType)
    made = FunctionType(template.__code__, {**template.__globals__, **scope}, name, template.__defaults__, template.__closure__)
    made.__qualname__ = f"k{digest(*scope.get('SOURCES', ()))[:12]}_{name}"
    made.__module__ = template.__module__
    return made


def compiled(function: Callable[..., Any]) -> Any:
    """Decorator: an njit function that raises nothing, cached for as long as no source of this package changes."""
    from numba import njit

    function.__qualname__ = f"k{digest()[:12]}_{function.__name__}"
    return njit(cache=True, **OPTIONS)(function)


def specialise(template: Callable[..., Any], isa: str, **scope: Any) -> Any:
    """`template` as a compiled function for one rung, named `<template>__<isa>`; `scope` gives it the rung's kernels.

    `SOURCES` in the scope are the files, besides this package, that the compiled code is made of.
    """
    from numba import njit

    return njit(cache=True, **OPTIONS)(clone(template, f"{template.__name__}__{isa}", **scope))
