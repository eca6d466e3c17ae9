"""Malformed sparse weights: run as a script in a process of its own, so that a crash is a failed test and not a lost run.

    python sparse_fuzz.py FIRST COUNT [RUNG]

Constants and activations end right before a page that may not be touched, so that a read beyond them ends the process. Prints how
many were refused and how many ran.
"""

from __future__ import annotations

import ctypes
import mmap
import resource
import sys

import numpy as np

from graphopt.kernels.native import SparseLayer
from graphopt.kernels.sparse_plan import BITS, BLOCKS, BYTES, CONV, FLOATS, GAPS, ROWS, SparsePlan, Window, stored

NUMBERS = (
    -(2**63),
    -(2**31),
    -1000,
    -2,
    -1,
    0,
    1,
    2,
    3,
    4,
    7,
    16,
    31,
    255,
    256,
    4096,
    70000,
    2**20,
    2**31 - 1,
    2**31,
    2**62,
    2**63 - 1,
)
BAD_FLOATS = (np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-45, 3.4e38)
PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(array: np.ndarray) -> np.ndarray:
    """A copy whose last byte is the last before a page without access."""
    room = -(-max(array.nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, room + PAGE)
    base = np.frombuffer(memory, np.uint8)
    assert _LIBC.mprotect(base.ctypes.data + room, PAGE, 0) == 0
    start = room - array.nbytes
    copy = base[start:room].view(array.dtype).reshape(array.shape) if array.size else array
    if array.size:
        copy[...] = array
    return copy


class Raw:
    """What SparseLayer needs of a plan, with the numbers as they are."""

    def __init__(self, plan: SparsePlan, row: list[int], scales: list[float]) -> None:
        self.row, self.scales, self.activations, self.outputs = row, scales, plan.activations, 1

    def encode(self) -> list[int]:
        return self.row


class Guarded(SparseLayer):
    """With outputs that end before such a page, too."""

    def _allocate(self, instance: int, index: int) -> np.ndarray:
        return guarded(super()._allocate(instance, index))


def draw(rng: np.random.Generator) -> tuple[SparsePlan, list[np.ndarray], list[np.ndarray]]:
    """A layer that is right, and inputs that fit."""
    block = BLOCKS[int(rng.integers(len(BLOCKS)))]
    residual, bias = bool(rng.integers(2)), bool(rng.integers(2))
    numbers, places = int(rng.choice([FLOATS, BYTES])), BITS if rng.random() < 0.3 else GAPS
    if places == BITS:
        block = (1, 1)
    if places == BITS or rng.random() < 0.5:
        n, c, kernel = block[0] * int(rng.integers(1, 4)), block[1] * int(rng.integers(1, 40)), (1, 1)
        plan = SparsePlan(ROWS, n, c, block, bias=bias, residual=residual, places=places, numbers=numbers)
        rows = int(rng.integers(1, 70))
        shapes: list[tuple[int, ...]] = [(rows, c), (rows, n)]
    else:
        groups = 1 if block != (1, 1) or rng.random() < 0.5 else 3
        n, c, kernel = 3 * block[0] * int(rng.integers(1, 3)), 4 * groups, (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
        strides = (int(rng.integers(1, 3)), int(rng.integers(1, 3)))
        plan = SparsePlan(CONV, n, c, block, Window(kernel, strides, (1, 1), (1, 1, 1, 1), groups), bias, residual, numbers=numbers)
        h, w = int(rng.integers(2, 20)), int(rng.integers(2, 40))
        out = (1, n, (h + 2 - kernel[0]) // strides[0] + 1, (w + 2 - kernel[1]) // strides[1] + 1)
        shapes = [(1, c, h, w), out]
    weight = rng.normal(size=(n, plan.columns)) * (rng.random((n, plan.columns)) < 0.3)
    matrix = weight.astype(np.float32) if numbers == FLOATS else (30 * weight).astype(np.int8)
    constants = [*stored(matrix, plan), *[np.ones(n, np.float32)] * numbers, *[np.zeros(n, np.float32)] * bias]
    return plan, constants, [np.ones(s, np.float32) for s in shapes[: 1 + residual]]


def damage(rng: np.random.Generator, row: list[int], scales: list[float], constants: list[np.ndarray]) -> None:
    """One change to the integers, the limits or the constants, in place."""
    what = int(rng.integers(0, 10)) if all(c.size for c in constants) else int(rng.integers(0, 3))
    values, places = constants[0], constants[1]
    if what < 3:
        row[int(rng.integers(0, len(row)))] = int(rng.choice(NUMBERS))
    elif what == 3:
        constants[1] = places.copy()
        constants[1].reshape(-1)[int(rng.integers(0, places.size))] = int(rng.integers(0, 256))
    elif what == 4 and values.dtype == np.float32:
        constants[0] = values.copy()
        constants[0].reshape(-1)[int(rng.integers(0, values.size))] = float(rng.choice(BAD_FLOATS))
    elif what == 5:
        index = int(rng.integers(0, len(constants)))
        old = constants[index]
        choices = [old[: len(old) // 2], old[..., None], np.zeros(old.shape, np.int32), old[:0], old[:1]]
        constants[index] = choices[int(rng.integers(0, len(choices)))]
    elif what == 6:
        scales[int(rng.integers(0, 2))] = float(rng.choice(BAD_FLOATS))
    elif what == 7:
        del row[int(rng.integers(0, len(row))) :]
        row.append(0)
    elif what == 8 and constants[-1].dtype == np.float32:
        constants[-1] = constants[-1].copy()
        constants[-1].reshape(-1)[int(rng.integers(0, constants[-1].size))] = float(rng.choice(BAD_FLOATS))
    elif what == 9:
        constants.pop(int(rng.integers(0, len(constants))))


def main(first: int, count: int, isa: str | None) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    refused = ran = 0
    for seed in range(first, first + count):
        rng = np.random.default_rng(seed)
        plan, constants, inputs = draw(rng)
        row, scales = plan.encode(), list(plan.scales)
        for _ in range(int(rng.integers(1, 3))):
            if len(constants) > 1 and len(row) > 1:
                damage(rng, row, scales, constants)
        try:
            layer = Guarded(Raw(plan, row, scales), [guarded(c) for c in constants], isa=isa)  # type: ignore[arg-type]
            layer(*(guarded(i) for i in inputs))
            ran += 1
        except ValueError as error:
            refused += 1
            if not str(error):
                raise SystemExit("a refusal without a reason") from error
    sys.stdout.write(f"{refused} {ran}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
