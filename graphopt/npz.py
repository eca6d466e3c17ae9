"""Arrays in .npy and .npz files, read as a stream of row blocks, so that memory is one block whatever the file's size.

A memory map would not do: its pages count as resident memory, and members of a .npz may be deflated.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.lib import format as npy

from graphopt.errors import DataError

_READ = 1 << 20  # bytes asked of a file at once: what a zip member decompresses into, next to the block itself
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class Column(Protocol):
    """One array, rows along the first axis, that can be read any number of times."""

    @property
    def where(self) -> str: ...  # file and key, for messages

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Consecutive blocks of `rows` rows; the last may be shorter. The whole array where it has no axes."""
        ...


@dataclass(frozen=True, eq=False)
class MemoryColumn:
    """An array that the caller holds."""

    where: str
    values: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        if not self.shape:
            yield self.values
            return
        for start in range(0, self.shape[0], rows):
            yield self.values[start : start + rows]


@dataclass(frozen=True)
class OneRow:
    """An array without a row axis, as a column of one row."""

    whole: Column

    @property
    def where(self) -> str:
        return self.whole.where

    @property
    def dtype(self) -> np.dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, *self.whole.shape)

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        for block in self.whole.blocks(max(1, *self.whole.shape[:1])):
            yield block[None]


@dataclass(frozen=True)
class FileColumn:
    """A C-ordered array in a .npy file, or in a member of a .npz; `offset` is where its data start."""

    where: str
    path: Path
    member: str | None
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        count, row = (self.shape[0], self.shape[1:]) if self.shape else (1, ())
        with _reading(self.where), _stream(self.path, self.member) as stream:
            stream.read(self.offset)
            for start in range(0, count, rows):
                block = np.empty((min(rows, count - start), *row), self.dtype)
                _fill(stream, block.reshape(-1).view(np.uint8), self.where)
                yield block if self.shape else block.reshape(())


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn whatever a damaged file makes zipfile, zlib or numpy raise into one line."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"data {where}: cannot be read: {reason}") from error


@contextmanager
def _stream(path: Path, member: str | None) -> Iterator[IO[bytes]]:
    if member is None:
        with path.open("rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        yield file


def _fill(stream: IO[bytes], target: np.ndarray, where: str) -> None:
    done = 0
    while done < target.size:
        read = stream.read(min(_READ, target.size - done))
        if not read:
            raise DataError(f"data {where}: the file ends {target.size - done} bytes too early; write it again")
        target[done : done + len(read)] = np.frombuffer(read, np.uint8)
        done += len(read)


def _column(where: str, path: Path, member: str | None, size: int) -> FileColumn:
    """Check the header of an array that takes `size` bytes with its header."""
    with _reading(where), _stream(path, member) as stream:
        version = npy.read_magic(stream)
        if version not in _HEADERS:
            raise DataError(f"data {where}: npy format {version[0]}.{version[1]} is for structured arrays; save plain arrays")
        shape, fortran, dtype = _HEADERS[version](stream)
        offset = stream.tell()
    if dtype.hasobject or dtype.names:
        raise DataError(f"data {where}: holds Python objects or records ({dtype}); save a numeric array")
    if fortran:
        raise DataError(f"data {where}: is in Fortran order, which cannot be streamed by rows; save np.ascontiguousarray(array)")
    expected = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size != expected:
        raise DataError(f"data {where}: {list(shape)} {dtype} takes {expected} bytes, found {size}; write the file again")
    return FileColumn(where, path, member, dtype, tuple(shape), offset)


def open_npy(path: Path) -> FileColumn:
    """The array of a .npy file; DataError where it cannot be streamed."""
    where = f"'{path.name}'"
    with _reading(where):
        size = path.stat().st_size
    return _column(where, path, None, size)


def open_npz(path: Path) -> dict[str, FileColumn]:
    """The arrays of a .npz file by key; only headers are read. DataError where the file is damaged or cannot be streamed."""
    with _reading(f"'{path.name}'"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    columns = {}
    for member in members:
        key = member.filename.removesuffix(".npy")
        where = f"'{path.name}' key '{key}'"
        if key == member.filename:
            raise DataError(f"data {where}: is not a .npy array; write the file with numpy.savez")
        columns[key] = _column(where, path, member.filename, member.file_size)
    return columns
