"""Custom operators compiled in this process where `graphopt.kernels.trampoline` cannot be used: Windows and macOS.

The C source `shim.c` of this package is compiled once per machine, by the Zig compiler of the extra `graphopt[shim]`. The tests run
it on Linux, with the C compiler that is there; it was never run on Windows or macOS.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from graphopt.kernels.aot import cache_folder
from graphopt.kernels.specialise import digest
from graphopt.kernels.trampoline import SLOT

SOURCE = Path(__file__).with_name("shim.c")
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


def _compiler() -> list[str]:
    if importlib.util.find_spec("ziglang") is None:
        raise RuntimeError(
            f"graphopt: operators compiled in this process need a small library on {sys.platform}, "
            "and the Zig compiler to build it: pip install 'graphopt[shim]'."
        )
    return [sys.executable, "-m", "ziglang", "cc"]


def build(path: Path, compiler: Sequence[str] | None = None) -> None:
    """Compile the shim to `path`; RuntimeError with the compiler's words where that fails."""
    command = [
        *(compiler or _compiler()),
        "-shared",
        "-O2",
        *([] if sys.platform == "win32" else ["-fPIC"]),
        "-o",
        str(path),
        str(SOURCE),
    ]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode != 0:
        raise RuntimeError(f"graphopt: cannot build the library that leads to the operators: {made.stderr.strip()[-500:]}")


def shim_path(compiler: Sequence[str] | None = None) -> Path:
    """The compiled shim of this machine, built on the first call."""
    path = cache_folder() / f"shim-{digest(str(SOURCE))[:16]}{_SUFFIX}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            build(made, compiler)
            os.replace(made, path)
    return path


def load(target: int, compiler: Sequence[str] | None = None) -> str:
    """Path of a loaded library whose `RegisterCustomOps` is the code at this address; for as long as this process lives.

    Every target has a copy of its own: a library is loaded once per file.
    """
    content = shim_path(compiler).read_bytes()
    handle, path = tempfile.mkstemp(prefix="graphopt_shim", suffix=_SUFFIX)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    library = ctypes.CDLL(path)
    ctypes.c_void_p.in_dll(library, SLOT).value = target
    return path
