"""Malformed plans for the engine: run as a script in a process of its own, so that a crash is a failed test and not a lost run.

    python plan_fuzz.py FIRST COUNT [RUNG]

Prints how many plans were refused, refused at run time, and run; any crash, hang or write outside a buffer ends it otherwise.
"""

from __future__ import annotations

import resource
import sys
from collections import Counter

import numpy as np
import plan_cases

from graphopt.kernels import native
from graphopt.kernels import plan as p

NUMBERS = (-(2**63), -(2**31), -1000, -2, -1, 0, 1, 2, 3, 7, 16, 31, 255, 256, 70000, 2**31 - 1, 2**31, 2**62, 2**63 - 1)
FLOATS = (np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-45, 1e-30, 3.4e38, 1e10, 5.0)


class Raw:
    """What native.Region needs of a plan, with the integers as they are."""

    def __init__(self, plan: p.Plan, row: list[int], scales: list[float], constants: int) -> None:
        self.row, self.scales, self.constants = row, scales, constants
        self.activations, self.outputs = plan.activations, plan.outputs

    def encode(self) -> list[int]:
        return self.row


def damage(rng: np.random.Generator, plan: p.Plan, constants: list[np.ndarray]) -> tuple[Raw, list[np.ndarray]]:
    """One to three changes to the integers, the floats or the constants."""
    row, scales, constants = plan.encode(), list(plan.scales), list(constants)
    for _ in range(int(rng.integers(1, 4))):
        what = int(rng.integers(0, 10))
        if what < 6:
            row[int(rng.integers(0, len(row)))] = int(rng.choice(NUMBERS))
        elif what == 6:
            start = p.HEADER + p.TENSOR * len(plan.tensors) + p.STEP * int(rng.integers(0, len(plan.steps)))
            if start < len(row):
                row[start] = int(rng.integers(0, 8))
        elif what == 7:
            row = row[: int(rng.integers(0, len(row)))] or [0]
        elif what == 8 and scales:
            scales[int(rng.integers(0, len(scales)))] = float(rng.choice(FLOATS))
        elif constants:
            constants[int(rng.integers(0, len(constants)))] = damaged_array(rng, constants[int(rng.integers(0, len(constants)))])
    return Raw(plan, row, scales, len(constants)), constants


def damaged_array(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    choice = int(rng.integers(0, 5))
    if choice == 0:
        return array.ravel()[: max(1, array.size // 2)]
    if choice == 1:
        return array[..., None]
    if choice == 2:
        return np.zeros((0, 3), array.dtype)
    if choice == 3 and array.dtype == np.float32:
        return np.full_like(array, rng.choice(FLOATS))
    if array.dtype == np.int32:
        return np.full_like(array, rng.choice([-(2**31), 2**31 - 1]))
    return array.astype(np.uint8)


def damaged_inputs(rng: np.random.Generator, inputs: list[np.ndarray]) -> list[np.ndarray]:
    if rng.random() < 0.6:
        return inputs
    kind = int(rng.integers(0, 4))
    first = inputs[0]
    changed = [first.astype(np.uint8), first[..., :0], first[None], np.concatenate([first, first], axis=1)][kind]
    if kind == 0 and first.dtype == np.float32:
        changed = np.full_like(first, rng.choice(FLOATS))
    return [changed, *inputs[1:]]


def explained(error: ValueError) -> None:
    if not str(error):
        raise SystemExit("a refusal without a reason")


def main(first: int, count: int, isa: str | None) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    found: Counter[str] = Counter()
    for seed in range(first, first + count):
        rng = np.random.default_rng(seed)
        plan, constants, inputs = (plan_cases.draw if seed % 4 else plan_cases.rows)(seed % 997)
        raw, damaged = damage(rng, plan, constants)
        try:
            region = native.Region(raw, damaged, isa=isa)  # type: ignore[arg-type]
        except ValueError as error:
            found["refused"] += 1
            explained(error)
            continue
        try:
            region(*damaged_inputs(rng, inputs))
            found["ran"] += 1
        except ValueError as error:
            found["refused at run time"] += 1
            explained(error)
    sys.stdout.write(f"{dict(found)}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
