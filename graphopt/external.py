"""Weights in files beside the model: read on demand and written as a stream, so that models over 2 GB never sit in memory."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import IO

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphopt.errors import ModelError

ALIGN = 4096  # onnxruntime maps external weights; its writer aligns to a page too
LIMIT = 1_900_000_000  # protobuf refuses messages of 2 GiB; leave room for the graph itself
_COMPLEX = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)  # their real and imaginary parts are values of their own


def check_tensor(tensor: TensorProto, base_dir: Path | None) -> None:
    """Raise ModelError unless the tensor holds as many values as its dims say, inside or in its external file; reads none."""
    name = tensor.name
    if tensor.data_type not in _known_types():
        raise ModelError(f"initializer '{name}': unknown data type {tensor.data_type}")
    if any(d < 0 for d in tensor.dims):
        raise ModelError(f"initializer '{name}': shape {list(tensor.dims)} has a negative size")
    if tensor.data_location == TensorProto.EXTERNAL:
        locate(tensor, base_dir)
        return
    count, stored = math.prod(tensor.dims), helper.tensor_dtype_to_field(tensor.data_type)
    packed = (count * _bits(tensor.data_type) + 7) // 8
    if tensor.HasField("raw_data") and stored != "string_data":
        found, expected, unit = len(tensor.raw_data), packed, "bytes"
    else:
        found, unit = len(getattr(tensor, stored)), f"values in {stored}"
        expected = packed if _bits(tensor.data_type) in (2, 4) else count * (2 if tensor.data_type in _COMPLEX else 1)
    if found != expected:
        raise ModelError(
            f"initializer '{name}': shape {list(tensor.dims)} needs {expected} {unit}, found {found}; is the file complete?"
        )


@functools.cache
def _known_types() -> frozenset[int]:
    return frozenset(helper.get_all_tensor_dtypes())


def load_tensor(tensor: TensorProto, base_dir: Path | None) -> np.ndarray:
    """The values as an array; external data comes as a read-only memory map. Never write into the result."""
    if tensor.data_location != TensorProto.EXTERNAL:
        try:
            return np.asarray(onnx.numpy_helper.to_array(tensor))
        except (ValueError, TypeError) as error:
            raise ModelError(f"initializer '{tensor.name}': {error}") from error
    path, offset, length = locate(tensor, base_dir)
    dtype, shape = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)), tuple(tensor.dims)
    if length == 0:
        return np.zeros(shape, dtype)
    if length == int(np.prod(shape, dtype=np.int64)) * dtype.itemsize and dtype.kind in "biufc":
        return np.memmap(path, dtype.newbyteorder("<"), "r", offset, shape)
    inline = TensorProto()
    inline.CopyFrom(tensor)
    inline.ClearField("external_data")
    inline.data_location = TensorProto.DEFAULT
    with path.open("rb") as file:
        file.seek(offset)
        inline.raw_data = file.read(length)
    return load_tensor(inline, None)


def locate(tensor: TensorProto, base_dir: Path | None) -> tuple[Path, int, int]:
    """(file, offset, length in bytes) of external data; refuses paths outside the model's folder and ranges outside the file."""
    entries = {e.key: e.value for e in tensor.external_data}
    name, where = tensor.name, entries.get("location", "")
    if base_dir is None:
        raise ModelError(f"initializer '{name}' is in the external file '{where}': load the model by path, not from memory")
    if not where or "\0" in where:
        raise ModelError(f"initializer '{name}': its external data name no file")
    path = (base_dir / where).resolve()
    if not path.is_relative_to(base_dir.resolve()):
        raise ModelError(f"initializer '{name}': external file '{where}' lies outside the model's folder; copy it beside the model")
    if not path.is_file():
        raise ModelError(f"initializer '{name}': external file '{where}' is missing; put it beside the model")
    size = path.stat().st_size
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", max(0, size - offset)))
    except ValueError as error:
        raise ModelError(f"initializer '{name}': external offset or length is not a number") from error
    expected = (math.prod(tensor.dims) * _bits(tensor.data_type) + 7) // 8
    if offset < 0 or length != expected or offset + length > size:
        raise ModelError(
            f"initializer '{name}': {length} bytes at offset {offset} of '{where}' ({size} bytes) "
            f"do not hold shape {list(tensor.dims)} ({expected} bytes); is the file complete?"
        )
    return path, offset, length


def _bits(data_type: int) -> int:
    """Bits an element takes on disk: sub-byte types are packed (ONNX IR spec, TensorProto.raw_data)."""
    name = TensorProto.DataType.Name(data_type)
    packed = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
    return packed.get(name, helper.tensor_dtype_to_np_dtype(data_type).itemsize * 8)


def write_external(tensor_name: str, values: np.ndarray, file: IO[bytes], location: str) -> TensorProto:
    """Append little-endian values to `file`, aligned, in blocks; return the TensorProto that points there."""
    proto = TensorProto(name=tensor_name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
    file.write(b"\0" * (-file.tell() % ALIGN))
    offset = file.tell()
    flat = np.ascontiguousarray(values).reshape(-1)
    step = max(1, (16 << 20) // max(1, flat.itemsize))
    for start in range(0, flat.size, step):
        file.write(flat[start : start + step].astype(flat.dtype.newbyteorder("<"), copy=False).tobytes())
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(file.tell() - offset))):
        proto.external_data.add(key=key, value=value)
    return proto
