"""The property that makes pruning safe: zero the units of a group, run; remove them, run; the outputs are the same.

`findings` tests one unit and half of the units of every group of a model in onnxruntime. A model without findings is sound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import zoo

from graphopt.dims import Dims, Group, couple, groups
from graphopt.errors import GraphoptError
from graphopt.model import load
from graphopt.removal import remove, zero

TOLERANCE = 1e-4  # of the largest magnitude of the output: sums run in another order
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Finding:
    """Units whose removal is not the same as zeroing them."""

    group: int
    units: int
    message: str


def halves(group: Group) -> Iterator[np.ndarray]:
    """One unit from the middle, and every other one."""
    yield group.units[len(group.units) // 2 :][:1]
    if len(group.units) > 2:
        yield group.units[::2][: len(group.units) // 2]


def findings(source: Path | onnx.ModelProto, feeds: Sequence[Feeds]) -> list[Finding]:
    """What is wrong with the groups of the model; [] if nothing."""
    model = load(source)
    dims = couple(model)
    found = []
    for group in groups(model, dims):
        for units in halves(group):
            message = difference(source, dims, units, feeds)
            if message:
                found.append(Finding(group.index, len(units), message))
    return found


def difference(source: Path | onnx.ModelProto, dims: Dims, units: np.ndarray, feeds: Sequence[Feeds]) -> str:
    """How the model with the units zeroed differs from the one with them removed; '' if it does not."""
    zeroed, removed = load(source), load(source)
    try:
        zero(zeroed, dims, units)
        if not remove(removed, dims, units):
            return "nothing was removed"
        removed.verify()
        sessions = [zoo.session(m.proto().SerializeToString()) for m in (zeroed, removed)]
        for feed in feeds:
            wanted, given = (session.run(None, dict(feed)) for session in sessions)
            for value, a, b in zip(sessions[0].get_outputs(), wanted, given, strict=True):
                if message := unequal(a, b):
                    return f"output '{value.name}': {message}"
    except (GraphoptError, RuntimeError, ValueError) as error:  # onnxruntime's own errors are RuntimeErrors
        return " ".join(str(error).split())[:300]
    return ""


def unequal(a: np.ndarray, b: np.ndarray) -> str:
    """Why two outputs are not the same; '' if they are. Integers must be equal, floats relative to the largest."""
    if a.shape != b.shape:
        return f"shape {a.shape} became {b.shape}"
    if a.dtype.kind != "f":
        return "" if np.array_equal(a, b) else "integers differ"
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)) or not np.isfinite(a).any():
        return "not finite"
    a, b = a[np.isfinite(a)], b[np.isfinite(a)]
    error, scale = float(np.abs(a - b).max(initial=0)), float(np.abs(a).max(initial=0))
    return "" if error <= TOLERANCE * max(scale, 1e-3) else f"error {error:.2e} of {scale:.2e}"
