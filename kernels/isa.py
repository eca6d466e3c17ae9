"""Rungs of the ladder of instruction sets that the INT8 kernels are written for, and the choice of one for this CPU.

Importing this module imports neither Numba nor llvmlite; `detect` does.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from dataclasses import dataclass

VARIABLE = "GRAPHOPT_CPU"


@dataclass(frozen=True)
class Isa:
    """One rung. `features` are LLVM's names; a soft rung runs the code of its namesake with special instructions emulated."""

    name: str
    lanes: int  # int32 lanes of a vector
    features: frozenset[str]
    weight_bytes: int  # packed bytes of 16 channels x 4 taps of a dense convolution
    comp_adjust: int  # what comp must hold besides, as a multiple of a channel's sum of weights
    gemm: tuple[int, ...]  # pixels of a tile of 1, 2, ... panels; each divides layout.PIXELS
    machine: str = ""  # the architecture that it is of; "" for any
    soft: bool = False

    @property
    def chunk(self) -> int:
        """Bytes of a chunk of a depthwise row."""
        return 4 * self.lanes

    @property
    def windows(self) -> bool:
        """Whether groups of taps are picked from windows of 16 input bytes (windows.py), by each panel for itself."""
        return self.name == "avx2"

    @property
    def tiles(self) -> bool:
        """Whether there are matrix tiles (AMX)."""
        return self.name.startswith("amx")


_AVX2 = frozenset({"avx2", "fma"})
_VNNI = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"}

# best first: `detect` takes the first that the CPU has
RUNGS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa("amx", 16, _VNNI | {"amx-tile", "amx-int8"}, 64, 0, (8, 8, 8, 6), "x86_64"),
        Isa("avx512vnni", 16, _VNNI, 64, 0, (8, 8, 8, 6), "x86_64"),
        Isa("avxvnni", 8, _AVX2 | {"avxvnni"}, 64, 0, (6, 3), "x86_64"),
        Isa("avx2", 8, _AVX2, 64, 0, (4,), "x86_64"),
        Isa("neon_dot", 4, frozenset({"neon", "dotprod"}), 64, 128, (6,), "aarch64"),
        Isa("generic", 4, frozenset(), 128, 0, (2,)),
        Isa("amx_soft", 16, frozenset(), 64, 0, (8, 8, 8, 6), soft=True),
        Isa("avx512vnni_soft", 16, frozenset(), 64, 0, (8, 8, 8, 6), soft=True),
        Isa("avxvnni_soft", 8, frozenset(), 64, 0, (6, 3), soft=True),
        Isa("neon_dot_soft", 4, frozenset(), 64, 128, (6,), soft=True),
    )
}
LADDERS: dict[str, tuple[str, ...]] = {
    machine: tuple(isa.name for isa in RUNGS.values() if not isa.soft and isa.machine in ("", machine))
    for machine in ("x86_64", "aarch64")
}
"""Rungs that code can be written for, best first, by architecture."""


@functools.cache
def _tiles_allowed() -> bool:
    """Ask Linux for the 8 KB of tile state: a process may not touch it otherwise."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


@functools.cache
def host_features() -> frozenset[str]:
    """LLVM's names of what this CPU has."""
    from llvmlite import binding

    try:
        return frozenset(name for name, present in binding.get_host_cpu_features().items() if present)
    except RuntimeError:  # LLVM does not know this operating system's way of asking
        return frozenset()


def available(name: str) -> bool:
    """Whether this CPU and operating system run a rung."""
    isa = RUNGS[name]
    return isa.features <= host_features() and (isa.soft or not isa.tiles or _tiles_allowed())


def detect() -> str:
    """The best rung of this CPU, or the one named by the environment variable GRAPHOPT_CPU; ValueError where it cannot run."""
    wanted = os.environ.get(VARIABLE, "")
    valid = [name for name in RUNGS if available(name)]
    if wanted and wanted not in valid:
        known = "this CPU lacks it" if wanted in RUNGS else "there is no such rung"
        raise ValueError(f"{VARIABLE}={wanted}: {known}; valid here: {', '.join(valid)}")
    return wanted or valid[0]
