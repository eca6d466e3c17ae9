"""Calibration and evaluation data: rows for a model's inputs, checked against their types and read one batch at a time.

A dataset comes from a .npz whose keys are input names (first axis = rows, `labels` for evaluation), a .npy of a
single-input model, a folder of such files, `module:function` or `file.py:function` returning feeds, or in Python from a
dict of arrays, a list of feeds, a function or any other iterable that starts anew each time. Arrays are split into
batches; feeds of a function or iterable are used as they come, unless the model's first axis is fixed to another size.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import DataError
from graphopt.feeds import (
    Feed,
    InputSpec,
    check_feed,
    check_names,
    check_type,
    convert,
    fixed_batch,
    input_specs,
    joined,
    padded,
    random_row,
    row_count,
)
from graphopt.npz import Column, MemoryColumn, OneRow, open_npy, open_npz

__all__ = [
    "Dataset",
    "Feed",
    "InputSpec",
    "check_feed",
    "fixed_batch",
    "generated",
    "input_specs",
    "open_dataset",
    "padded",
    "row_count",
]

LABELS = "labels"
_DIGEST_ROWS = 8  # rows hashed at a time: few, because rows may be large

# ---- parts: what a dataset is made of


@dataclass(frozen=True)
class _Arrays:
    """Columns of equal row count by input name; those without axes go into every feed."""

    where: str
    columns: Mapping[str, Column]
    labels: Column | None
    rows: int
    unused: tuple[str, ...] = ()  # keys that are no inputs

    def feeds(self, inputs: Sequence[InputSpec], batch: int) -> Iterator[Feed]:
        constant = {name: next(column.blocks(1)) for name, column in self.columns.items() if not column.shape}
        streams = {name: column.blocks(batch) for name, column in self.columns.items() if column.shape}
        for start in range(0, self.rows, batch):
            values = {**constant, **{name: next(stream) for name, stream in streams.items()}}
            yield {spec.name: convert(spec, values[spec.name], self.columns[spec.name].where, start) for spec in inputs}

    def read_labels(self) -> np.ndarray | None:
        return None if self.labels is None else np.concatenate(list(self.labels.blocks(1 << 16)))


@dataclass(frozen=True)
class _Feeds:
    """Whatever `make` yields, from its start each time."""

    where: str
    make: Callable[[], Iterable[Any]]
    rows: int | None

    def feeds(self, inputs: Sequence[InputSpec], batch: int) -> Iterator[Feed]:
        fixed = fixed_batch(inputs) is not None
        for number, feed in enumerate(self._raw()):
            yield check_feed(inputs, feed, f"{self.where} feed {number}", any_rows=fixed)

    def _raw(self) -> Iterator[Mapping[str, Any]]:
        with _running(self.where):
            for number, feed in enumerate(self.make()):
                if not isinstance(feed, Mapping):
                    raise DataError(
                        f"data {self.where}: feed {number} is a {type(feed).__name__}, not a dict of input name to array"
                    )
                yield feed

    def read_labels(self) -> np.ndarray | None:
        found = []
        for feed in self._raw():
            if LABELS not in feed:
                return None
            found.append(np.atleast_1d(feed[LABELS]))
        return np.concatenate(found) if found else None


@contextmanager
def _running(where: str) -> Iterator[None]:
    """Turn whatever a user's function raises into one line; the cause stays attached."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data {where}: raised {type(error).__name__}: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class Dataset:
    """Rows for the inputs of one model; immutable, and iterated anew as often as wanted."""

    where: str
    inputs: tuple[InputSpec, ...]
    parts: tuple[_Arrays | _Feeds, ...]
    as_given: bool = False  # feeds are neither split nor joined
    preprocessing: str | None = None  # SHA-256 of a declared preprocessing

    @property
    def rows(self) -> int | None:
        """The number of rows; None where only a full iteration would tell."""
        counts = [part.rows for part in self.parts]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def unused(self) -> list[str]:
        """Keys of arrays that are no inputs of the model, and so are not read."""
        return sorted({name for part in self.parts if isinstance(part, _Arrays) for name in part.unused})

    @property
    def labels(self) -> np.ndarray | None:
        """One label per row, read now; None where there are none. The only data read as a whole."""
        found = [part.read_labels() for part in self.parts]
        present = [labels for labels in found if labels is not None]
        if present and len(present) < len(found):
            missing = next(part.where for part, labels in zip(self.parts, found, strict=True) if labels is None)
            raise DataError(f"data {missing}: has no '{LABELS}', while others in {self.where} have")
        return np.concatenate(present) if present else None

    def batches(self, batch: int) -> Iterator[Feed]:
        """Feeds of `batch` rows, or of the model's fixed batch; fewer in the last and where row shapes change.

        At most two batches are held at a time. DataError where there are no rows.
        """
        fixed = fixed_batch(self.inputs)
        size = fixed or max(1, batch)
        feeds = chain.from_iterable(part.feeds(self.inputs, size) for part in self.parts)
        first = next(feeds, None)
        if first is None:
            raise DataError(f"data {self.where}: has no rows")
        feeds = chain([first], feeds)
        return feeds if self.as_given and fixed is None else joined(feeds, size)

    def digest(self) -> str:
        """SHA-256 of names, dtypes, shapes and values as the model gets them: the same in whatever files they lie."""
        streams = {spec.name: hashlib.sha256() for spec in self.inputs}
        shapes: dict[str, tuple[int, ...]] = {}
        for feed in self.batches(_DIGEST_ROWS):
            for name, value in feed.items():
                if shapes.get(name) != value.shape[1:]:
                    shapes[name] = value.shape[1:]
                    streams[name].update(str(shapes[name]).encode())
                text = value.dtype == np.dtype(object)
                streams[name].update(repr(value.tolist()).encode() if text else np.ascontiguousarray(value).tobytes())
        whole = hashlib.sha256()
        for spec in self.inputs:
            whole.update(f"{spec.name} {spec.dtype} {streams[spec.name].hexdigest()}\n".encode())
        return whole.hexdigest()


# ---- opening


def open_dataset(source: Any, inputs: Sequence[InputSpec]) -> Dataset:
    """The dataset that `source` (see the module) gives for these inputs; names, types and row counts of arrays are checked now.

    DataError names file, key, what was expected and what was found.
    """
    specs = tuple(inputs)
    if isinstance(source, Dataset):
        return Dataset(source.where, specs, source.parts, source.as_given, source.preprocessing)
    if isinstance(source, str | os.PathLike):
        return _open_text(os.fspath(source), specs)
    if isinstance(source, Mapping):
        columns = {name: MemoryColumn(f"'arrays' key '{name}'", np.asarray(value)) for name, value in source.items()}
        return Dataset("'arrays'", specs, (_arrays("'arrays'", columns, specs),))
    if isinstance(source, Iterator):
        raise DataError("data: a generator can be read only once; pass the function that makes it, or a list")
    if callable(source):
        name = getattr(source, "__qualname__", type(source).__name__)
        return Dataset(f"'{name}'", specs, (_Feeds(f"'{name}'", source, None),), as_given=True)
    if isinstance(source, Iterable):
        return Dataset("'feeds'", specs, (_Feeds("'feeds'", lambda: source, None),), as_given=True)
    raise DataError(f"data: cannot read rows from a {type(source).__name__}; give a path, a dict of arrays, feeds or a function")


def generated(inputs: Sequence[InputSpec], rows: int, *, seed: int = 0, axis: int = 8) -> Dataset:
    """Random rows made from the input types, see `random_row`; the same for the same seed, whatever the batch.

    Where the model's batch is fixed, `rows` is rounded up to whole batches.
    """
    specs = tuple(inputs)
    if not specs:
        raise DataError("generated data: the model has no inputs")

    def make() -> Iterator[Feed]:
        return (random_row(specs, (seed, number), axis=axis) for number in range(count))

    each = fixed_batch(specs) or 1
    count = -(-rows // each)
    return Dataset("'generated'", specs, (_Feeds("'generated'", make, count * each),))


def _open_text(text: str, inputs: tuple[InputSpec, ...]) -> Dataset:
    path = Path(text)
    where = f"'{path.name or text}'"
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in _OPEN and not f.name.startswith("."))
        if not files:
            raise DataError(f"data '{text}': the folder holds no .npz or .npy file")
        return Dataset(where, inputs, tuple(_open_file(file, inputs, rows_optional=True) for file in files))
    if path.is_file() and path.suffix == ".toml":
        from graphopt.preprocess import declared

        found = declared(path, inputs)
        return Dataset(where, inputs, (_Feeds(where, found.make, found.rows),), preprocessing=found.digest)
    if path.is_file():
        if path.suffix not in _OPEN:
            raise DataError(f"data '{text}': expected a .npz or .npy file, a folder of them, a .toml, or module:function")
        return Dataset(where, inputs, (_open_file(path, inputs, rows_optional=False),))
    module, colon, name = text.rpartition(":")
    if not (colon and module and name.isidentifier()):
        raise DataError(f"data '{text}': no such file or folder, and not module:function")
    return Dataset(f"'{text}'", inputs, (_Feeds(f"'{text}'", _function(module, name, f"'{text}'"), None),), as_given=True)


def _open_file(path: Path, inputs: tuple[InputSpec, ...], *, rows_optional: bool) -> _Arrays:
    return _arrays(f"'{path.name}'", _OPEN[path.suffix](path, inputs), inputs, rows_optional=rows_optional)


def _open_single(path: Path, inputs: tuple[InputSpec, ...]) -> Mapping[str, Column]:
    if len(inputs) != 1:
        raise DataError(f"data '{path.name}': a .npy has no keys, and the model {len(inputs)} inputs; save a .npz with their names")
    return {inputs[0].name: open_npy(path)}


_OPEN: dict[str, Callable[[Path, tuple[InputSpec, ...]], Mapping[str, Column]]] = {
    ".npz": lambda path, inputs: open_npz(path),
    ".npy": _open_single,
}


def _arrays(where: str, columns: Mapping[str, Column], inputs: tuple[InputSpec, ...], *, rows_optional: bool = False) -> _Arrays:
    """Check names, types and row counts. `rows_optional`: arrays of one axis less than the inputs are one row."""
    labels = columns.get(LABELS) if LABELS not in {spec.name for spec in inputs} else None
    check_names(inputs, [name for name, column in columns.items() if column is not labels], where)
    fed = {spec.name: columns[spec.name] for spec in inputs}
    unused = tuple(sorted(set(columns) - set(fed) - ({LABELS} if labels is not None else set())))
    ranked = [(spec, fed[spec.name]) for spec in inputs if spec.shape]
    if rows_optional and ranked and all(len(spec.shape or ()) == len(column.shape) + 1 for spec, column in ranked):
        fed.update({spec.name: OneRow(column) for spec, column in ranked})
        labels = OneRow(labels) if labels is not None and not labels.shape else labels
    sizes = {}
    for spec in inputs:
        column = fed[spec.name]
        check_type(spec, column.dtype, column.shape, column.where, any_rows=True)
        if column.shape:
            sizes[column.where] = column.shape[0]
    if labels is not None:
        sizes[labels.where] = labels.shape[0] if labels.shape else 1
    counts = set(sizes.values()) or {1}
    if len(counts) > 1:
        raise DataError(f"data {where}: row counts differ: " + ", ".join(f"{place} has {rows}" for place, rows in sizes.items()))
    if counts == {0}:
        raise DataError(f"data {where}: has no rows")
    return _Arrays(where, fed, labels, counts.pop(), unused)


def _function(module: str, name: str, where: str) -> Callable[[], Iterable[Any]]:
    """Import `module` (dotted, or a .py file) with the working directory on the path, as `python -m` does."""
    with _running(where):
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            if spec is None or spec.loader is None:
                raise DataError(f"data {where}: '{module}' is not a Python file")
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            sys.path.insert(0, os.getcwd())
            try:
                loaded = importlib.import_module(module)
            finally:
                sys.path.remove(os.getcwd())
    function = getattr(loaded, name, None)
    if not callable(function):
        raise DataError(f"data {where}: '{module}' has no function '{name}'")
    made: Callable[[], Iterable[Any]] = function
    return made
