"""Writing models: atomically, with weights in an external file where they do not fit one protobuf."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.errors import ModelError
from graphopt.external import LIMIT, write_external
from graphopt.model import SMALL, Model
from graphopt.proto import encode_inline


def check_target(path: Path, *, overwrite: bool) -> None:
    """Raise before any work where the result could not be written: it exists, or its folder does not or is not writable."""
    if path.exists() and not overwrite:
        raise ModelError(f"{path} exists; give --overwrite (overwrite=True) or another name with -o")
    if path.is_dir():
        raise ModelError(f"{path} is a folder; name a file")
    folder = path.parent
    if not folder.is_dir():
        raise ModelError(f"cannot write {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise ModelError(f"cannot write {path}: the folder {folder} is not writable")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` only if the block ends without an error; nothing is left behind otherwise."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror}") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ModelError(f"cannot write {path}: {error.strerror or error}; nothing was written") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(model: Model, path: str | Path, *, overwrite: bool = False, external: bool | None = None) -> list[Path]:
    """Write the model to `path`, atomically; returns the files written.

    `external`: weights go to `<path>.data` beside it; by default only where one protobuf could not hold them. They are
    streamed, so memory stays at the size of the largest tensor. Raises ModelError where it cannot be written.
    """
    target = Path(path)
    check_target(target, overwrite=overwrite)
    if external is None:
        external = model.weight_bytes() > LIMIT
    if not external:
        write_bytes(target, serialized(model.proto()))
        return [target]
    data = target.with_name(target.name + ".data")
    if data.exists() and not overwrite:
        raise ModelError(f"{data} exists; give --overwrite (overwrite=True) or another name with -o")
    with atomic(data) as weights:

        def encode(constant: gs.Constant) -> onnx.TensorProto:
            if np.prod(constant.shape, dtype=np.int64) <= SMALL or np.dtype(constant.dtype).kind not in "biufc":
                return encode_inline(constant)
            lazy = constant._values
            values = lazy if isinstance(lazy, np.ndarray) else lazy.load()  # not kept: one tensor in memory at a time
            return write_external(constant.name, values, weights, data.name)

        proto = model.encoded(encode)
        content = serialized(proto)
    write_bytes(target, content)
    return [target, data]


def serialized(proto: onnx.ModelProto) -> bytes:
    """The protobuf's bytes; one clear error where protobuf refuses (2 GB)."""
    try:
        return bytes(proto.SerializeToString())
    except Exception as error:  # protobuf implementations differ in what they raise
        raise ModelError(f"the model cannot be written as one protobuf: {error}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically."""
    with atomic(path) as file:
        file.write(content)


def write_text(path: Path, text: str, *, overwrite: bool = True) -> None:
    """Write a text file atomically (reports, dumps)."""
    check_target(path, overwrite=overwrite)
    write_bytes(path, text.encode())


def default_output(source: Path) -> Path:
    """`IN.opt.onnx` beside the input."""
    return source.with_name(f"{source.stem}.opt.onnx")


def aside(path: Path) -> Path:
    """Where a result that failed a check is kept: `OUT.failed.onnx`."""
    return path.with_name(f"{path.stem}.failed{path.suffix}")
