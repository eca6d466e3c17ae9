"""graphopt's operators as one shared library that needs neither Python, Numba nor a compiler: `build_library`, `library`.

The file is given to `SessionOptions.register_custom_ops_library` from any language. It holds code for every instruction set and
chooses when it is registered; the environment variable GRAPHOPT_CPU chooses another one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from graphopt.kernels.specialise import digest

TARGETS = {"x86-64": "x86_64", "aarch64": "aarch64"}

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps, what is done now)."""


class Library(NamedTuple):
    """A library that was built."""

    path: Path
    size: int
    rungs: tuple[str, ...]
    imports: tuple[str, ...]


def _environment(machine: str) -> dict[str, str]:
    """An environment in which Numba generates plain IR that depends on nothing of this machine."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "GRAPHOPT_"))}
    return kept | {
        "NUMBA_CPU_NAME": "x86-64",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_OPT": "0",  # optimised later, for each instruction set
        "NUMBA_LOOP_VECTORIZE": "0",
        "NUMBA_SLP_VECTORIZE": "0",
        "NUMBA_DISABLE_INTEL_SVML": "1",
        "GRAPHOPT_MACHINE": machine,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }


def build_library(
    path: str | Path, target: str = "x86-64", *, progress: Progress | None = None, places: Sequence[str] | None = None
) -> Library:
    """Build the library for Linux on a target ("x86-64" or "aarch64"), on any machine.

    Takes about a minute, in a process of its own. Raises ValueError for an unknown target, RuntimeError with the reason where the
    code cannot stand alone.
    """
    from graphopt.kernels.runtime import FAMILIES

    if target not in TARGETS:
        raise ValueError(f"graphopt: unknown target '{target}'; valid: {', '.join(TARGETS)}")
    output = Path(path)
    output.parent.mkdir(parents=True, exist_ok=True)
    machine = TARGETS[target]
    command = [sys.executable, "-m", "graphopt.kernels.aot_build", str(output.resolve()), machine, *(places or FAMILIES)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment(machine))
        last: dict[str, object] = {}
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            last = json.loads(line)
            if progress and "step" in last:
                progress(int(str(last["step"])), int(str(last["steps"])), str(last["text"]))
        code = process.wait()
        errors.seek(0)
        details = errors.read()
    if code != 0 or "done" not in last:
        reason = last.get("error", f"the build stopped with code {code}")
        raise RuntimeError(f"graphopt: cannot build a library for {target}: {reason}\n{details[-2000:]}")
    found = json.loads(line)
    return Library(output, found["size"], tuple(found["rungs"]), tuple(found["imports"]))


def cache_folder() -> Path:
    """Where built libraries are kept: GRAPHOPT_CACHE, or `graphopt` in the user's cache folder."""
    if os.environ.get("GRAPHOPT_CACHE"):
        return Path(os.environ["GRAPHOPT_CACHE"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "graphopt"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "graphopt"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphopt"


def library(target: str = "x86-64", *, progress: Progress | None = None, places: Sequence[str] | None = None) -> Path:
    """Path of the library for a target, built once per version of graphopt, its kernels, Numba and llvmlite."""
    from graphopt.kernels.runtime import FAMILIES, families

    chosen = tuple(places or FAMILIES)
    sources = tuple(sorted({s for f in families(chosen) for s in f.sources}))
    try:
        release = version("graphopt")
    except PackageNotFoundError:  # run from a source tree
        release = "0"
    own = [str(Path(__file__).with_name(f"{name}.py")) for name in ("aot", "aot_build", "linker", "relocations", "elf")]
    path = cache_folder() / f"graphopt-{release}-{target}-{digest(*sources, *own)[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # built beside it and moved into place, so that no other process ever loads half a file
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = build_library(Path(folder) / "graphopt.so", target, progress=progress, places=chosen)
            os.replace(made.path, path)
    return path
