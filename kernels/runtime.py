"""graphopt's operators in onnxruntime sessions of this process: `register(session_options)`."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.kernels.customop import Family

FAMILIES: tuple[str, ...] = (
    "graphopt.kernels.operators:REGION",
    "graphopt.kernels.operators:SPARSE",
    "graphopt.kernels.operators:NBITS",
)
"""Where the families of operators are: `module:attribute`."""

_LOCK = threading.RLock()
_PATHS: dict[tuple[str, tuple[str, ...]], str] = {}
_KEEP: list[Any] = []  # storage of the compiled code
_REGISTERED: weakref.WeakSet[Any] = weakref.WeakSet()


def families(places: Sequence[str] = FAMILIES) -> list[Family]:
    """The families at these places."""
    found = []
    for place in places:
        module, _, attribute = place.partition(":")
        found.append(getattr(importlib.import_module(module), attribute))
    return found


def rung() -> str:
    """The instruction set that this process uses: the best one, or what GRAPHOPT_CPU names."""
    from graphopt.kernels.cpu import available

    able = available()
    wish = os.environ.get("GRAPHOPT_CPU")
    if not wish:
        return able[0]
    if wish not in able and not wish.endswith("_soft"):
        raise ValueError(f"graphopt: GRAPHOPT_CPU={wish} is not available here; choose from: {' '.join(able)}")
    return wish


def _compile(isa: str, places: Sequence[str]) -> str:
    """Compile the operators for one instruction set and give the path of a library that leads to them."""
    import llvmlite.binding as llvm

    from graphopt.kernels import customop, exports, warm

    chosen = families(places)
    label = "graphopt_" + "_".join(f.name for f in chosen)
    storage_name, name = f"{label}_storage__{isa}", f"{label}_register__{isa}"
    storage = (ctypes.c_int64 * customop.storage_words(chosen))()
    _KEEP.append(storage)
    llvm.add_symbol(storage_name, ctypes.addressof(storage))
    exports.bind(customop.metadata())
    with warm.helped(isa, places):
        for family in chosen:
            exports.bind(family.exports(customop.served_by(family, isa)))
    exports.bind([customop.registration(chosen, [isa], name, storage_name)])
    return _library(exports.address(name))


def _library(target: int) -> str:
    if platform.system() == "Linux":
        from graphopt.kernels import trampoline

        return trampoline.load(target)
    from graphopt.kernels import shim

    return shim.load(target)


def library_path(places: Sequence[str] = FAMILIES) -> str:
    """Path to give to `SessionOptions.register_custom_ops_library`, valid in this process only; compiles on the first call."""
    with _LOCK:
        key = (rung(), tuple(places))
        if key not in _PATHS:
            _PATHS[key] = _compile(*key)
        return _PATHS[key]


def register(session_options: Any, places: Sequence[str] = FAMILIES) -> None:
    """Make graphopt's operators known to the sessions made with these options, compiled in this process.

    A second call for the same options does nothing. From any thread. Raises ValueError for a GRAPHOPT_CPU that this machine does
    not have, RuntimeError where code cannot be loaded.
    """
    with _LOCK:
        if session_options in _REGISTERED:
            return
        session_options.register_custom_ops_library(library_path(places))
        _REGISTERED.add(session_options)
