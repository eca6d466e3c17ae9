"""Compiling for the first time on more than one core: `python -m graphopt.kernels.warm ISA FIRST EVERY PLACE ...`.

Numba compiles on one core and keeps the result on disk. Each process started here compiles every so many of an operator family's
functions into that cache, the last first, while its parent starts with the first. Order does not matter: symbols that a process has
not compiled itself stand at a dummy address, as nothing is called.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

WORKERS = 3  # at most, the calling process not counted


def marker(isa: str) -> Path:
    """A file that is there once everything was compiled on this machine from these sources."""
    from graphopt.kernels.aot import cache_folder
    from graphopt.kernels.specialise import digest

    return cache_folder() / "compiled" / f"{digest()[:16]}-{isa}-py{sys.version_info[0]}{sys.version_info[1]}"


@contextmanager
def helped(isa: str, places: Sequence[str]) -> Iterator[None]:
    """While the block compiles, other processes compile parts of the same into Numba's cache, if that was not done before."""
    done = marker(isa)
    workers = 0 if done.exists() else min(WORKERS, (os.cpu_count() or 1) - 1)
    command = [sys.executable, "-m", "graphopt.kernels.warm", isa]
    running = [
        subprocess.Popen([*command, str(i), str(workers), *places], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for i in range(workers)
    ]
    try:
        yield
    finally:
        for process in running:
            process.terminate()
            process.wait()
    try:
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()
    except OSError:  # no home to keep it in: compiled with help again next time
        return


def main(isa: str, first: int, every: int, places: Sequence[str]) -> None:
    """Compile every so many of the functions, the last first."""
    import llvmlite.binding as llvm
    from numba import cfunc, types

    from graphopt.kernels.customop import served_by
    from graphopt.kernels.runtime import families

    found = list({e.name: e for family in families(places) for e in family.exports(served_by(family, isa))}.values())
    for export in found:
        llvm.add_symbol(export.name, 1)
    for export in found[::-1][first::every]:
        signature = (types.void if export.void else types.int64)(*[types.int64] * export.arguments)
        cfunc(signature, cache=True, error_model="numpy", boundscheck=False)(export.function)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
