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

TOLERANCE = 1e-4  # of the largest magnitude of the output in the model as it came: sums run in another order
FAILURES: tuple[type[Exception], ...] = (GraphoptError, RuntimeError, ValueError, *zoo.RUNTIME_ERRORS)
ALL = -1  # all groups at once
HEADER = '<ir_version: 9, opset_import: ["" : 17]>\n'
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Finding:
    """Units whose removal is not the same as zeroing them; group ALL for some of every group."""

    group: int
    units: int
    message: str


def model(text: str, *, seed: int = 0) -> onnx.ModelProto:
    """A model from ONNX text: every graph input whose name does not start with x becomes an initializer of random numbers.

    Names that start with v are positive (variances), with i small integers of their type.
    """
    proto = onnx.parser.parse_model(HEADER + text if text.lstrip().startswith("g ") else text)
    random = np.random.default_rng(seed)
    for value in [i for i in proto.graph.input if not i.name.startswith("x")]:
        proto.graph.input.remove(value)
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        numbers: np.ndarray = random.normal(size=shape)
        if value.name.startswith("v"):
            numbers = np.abs(numbers) + 0.5
        if value.name.startswith("i"):
            numbers = random.integers(-9, 10, shape)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(numbers).astype(dtype), value.name))
    return proto


def inputs(proto: onnx.ModelProto, *, symbols: Mapping[str, int] | None = None, seed: int = 1) -> dict[str, np.ndarray]:
    """Random values for the graph inputs; `symbols` are the sizes of dynamic axes, 2 by default."""
    random, result = np.random.default_rng(seed), {}
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [d.dim_value if d.HasField("dim_value") else (symbols or {}).get(d.dim_param, 2) for d in dims]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        result[value.name] = (random.normal(size=shape) if dtype.kind == "f" else random.integers(0, 2, shape)).astype(dtype)
    return result


def halves(group: Group) -> Iterator[np.ndarray]:
    """One unit from the middle, and every other one."""
    yield group.units[len(group.units) // 2 :][:1]
    if len(group.units) > 2:
        yield group.units[::2][: len(group.units) // 2]


def findings(source: Path | onnx.ModelProto, feeds: Sequence[Feeds]) -> list[Finding]:
    """What is wrong with the groups of the model; [] if nothing."""
    model = load(source)
    dims = couple(model)
    session = zoo.session(model.proto().SerializeToString())
    runs = [(feed, [magnitude(value) for value in session.run(None, dict(feed))]) for feed in feeds]
    tests = [(group.index, units) for group in groups(model, dims) for units in halves(group)]
    if len(tests) > 2:
        tests.append((ALL, np.concatenate([units for _, units in tests])))
    found = []
    for group, units in tests:
        if message := difference(source, dims, units, runs):
            found.append(Finding(group, len(units), message))
    return found


def magnitude(value: np.ndarray) -> float:
    """The largest finite magnitude."""
    finite = np.isfinite(value)
    return float(np.abs(value[finite].astype(np.float64)).max(initial=0))


def difference(source: Path | onnx.ModelProto, dims: Dims, units: np.ndarray, runs: Sequence[tuple[Feeds, list[float]]]) -> str:
    """How the model with the units zeroed differs from the one with them removed; '' if it does not.

    `runs`: inputs, and the magnitudes of the outputs that they give in the model as it is.
    """
    zeroed, removed = load(source), load(source)
    try:
        zero(zeroed, dims, units)
        if not remove(removed, dims, units):
            return "nothing was removed"
        removed.verify()
        sessions = [zoo.session(m.proto().SerializeToString()) for m in (zeroed, removed)]
        for feed, scales in runs:
            wanted, given = (session.run(None, dict(feed)) for session in sessions)
            for value, a, b, scale in zip(sessions[0].get_outputs(), wanted, given, scales, strict=True):
                if message := unequal(a, b, scale):
                    return f"output '{value.name}': {message}"
    except FAILURES as error:
        return " ".join(str(error).split())[:300]
    return ""


def unequal(a: np.ndarray, b: np.ndarray, scale: float) -> str:
    """Why two outputs are not the same; '' if they are. Integers must be equal, floats relative to the largest."""
    if a.shape != b.shape:
        return f"shape {a.shape} became {b.shape}"
    if a.dtype.kind != "f":
        return "" if np.array_equal(a, b) else "integers differ"
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)) or (a.size and not np.isfinite(a).any()):
        return "not finite"
    a, b = a[np.isfinite(a)], b[np.isfinite(a)]
    error, scale = float(np.abs(a - b).max(initial=0)), max(scale, magnitude(a))
    return "" if error <= TOLERANCE * scale else f"error {error:.2e} of {scale:.2e}"
