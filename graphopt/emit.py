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

from graphopt.edit import peek
from graphopt.errors import ModelError
from graphopt.external import LIMIT, locate, write_external
from graphopt.model import SMALL, Model, load
from graphopt.proto import Weights, encode_inline


def check_target(path: Path, *, overwrite: bool) -> None:
    """Raise before any work where the result could not be written: it exists, or its folder does not or is not writable."""
    try:
        found = os.path.exists(path) or os.lstat(path) is not None
    except FileNotFoundError:
        found = False
    except (OSError, ValueError) as error:  # the name is too long, or holds what names cannot
        raise ModelError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    if path.is_dir():
        raise ModelError(f"{path} is a folder; name a file")
    if path.exists() and not path.is_file():  # a device or pipe: renaming over it would replace it
        raise ModelError(f"{path} is not a regular file; name another")
    if found and not overwrite:
        raise ModelError(f"{path} exists; give --overwrite (overwrite=True) or another name")
    folder = path.parent
    if not folder.is_dir():
        raise ModelError(f"cannot write {path}: the folder {folder} does not exist")
    try:  # the one sure way to know
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ModelError(f"cannot write {path}: the folder {folder} is not writable ({error.strerror})") from error


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` only if the block ends without an error; nothing is left behind otherwise."""
    try:
        handle, name = tempfile.mkstemp(prefix=".graphopt-", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror}") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            _flush(file)
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


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


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
    check_target(data, overwrite=overwrite)
    if data.exists() and any(data.samefile(f) for f in sources(model)):
        raise ModelError(f"{data} holds the weights of the model that is read; give the output another name")
    with atomic(target) as main, atomic(data) as weights:

        def encode(constant: gs.Constant) -> onnx.TensorProto:
            if np.prod(constant.shape, dtype=np.int64) <= SMALL or np.dtype(constant.dtype).kind not in "biufc":
                return encode_inline(constant)
            return write_external(constant.name, peek(constant), weights, data.name)  # one tensor in memory at a time

        proto = model.encoded(encode)
        main.write(serialized(proto))
        _flush(main)  # before the weights are renamed: a full disk leaves both files as they were
    return [target, data]


def sources(model: Model) -> set[Path]:
    """The external files that weights are still read from."""
    lazy = [c._values.tensor for c in model.constants() if isinstance(c._values, Weights)]
    external = [t for t in lazy if isinstance(t, onnx.TensorProto) and t.data_location == onnx.TensorProto.EXTERNAL]
    folder = model.path.parent if model.path else None
    return {locate(t, folder)[0] for t in external}


def file_size(path: Path) -> int:
    """Bytes of a model's file and of the files that hold its weights."""
    return path.stat().st_size + sum(f.stat().st_size for f in sources(load(path)))


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
