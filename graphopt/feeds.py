"""Feeds: arrays by input name, one batch of rows. Their types, checks, batching, and random ones made from the types alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from graphopt.errors import DataError

Feed = dict[str, np.ndarray]
_SPATIAL, _CHANNELS = 64, 3  # generated sizes of dynamic image axes: divisible by the strides of common networks


@dataclass(frozen=True)
class InputSpec:
    """Name, dtype and shape of a model input; a dynamic axis is None or its symbol.

    The shape is None where even the rank is unknown; text has dtype object.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        return f"{self.dtype} {'of any shape' if self.shape is None else shape_text(self.shape)}"


def shape_text(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def input_specs(model: onnx.ModelProto) -> tuple[InputSpec, ...]:
    """The inputs a caller must feed: graph inputs without an initializer. DataError where one is not a tensor."""
    known = {tensor.name for tensor in model.graph.initializer}
    specs = []
    for value in model.graph.input:
        if value.name in known:
            continue
        tensor = value.type.tensor_type
        if not tensor.elem_type:
            kind = value.type.WhichOneof("value") or "no type"
            raise DataError(f"input '{value.name}' is not a tensor ({kind}): it cannot be fed from arrays")
        dims = tuple(d.dim_value if d.dim_value > 0 else d.dim_param or None for d in tensor.shape.dim)  # some exporters write -1
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        specs.append(InputSpec(value.name, dtype, dims if tensor.HasField("shape") else None))
    return tuple(specs)


def fixed_batch(inputs: Iterable[InputSpec]) -> int | None:
    """The size that the first axis of the inputs is fixed to; None where it is dynamic, or where inputs differ."""
    sizes = {spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)}
    return sizes.pop() if len(sizes) == 1 else None


# ---- checks: one line naming data, key, what was expected and what was found


def check_feed(inputs: Sequence[InputSpec], feed: Mapping[str, Any], where: str, *, any_rows: bool = False) -> Feed:
    """The feed as arrays of the inputs' dtypes; DataError for names, dtypes, shapes or NaN and Inf that do not fit.

    `any_rows`: the first axis may differ from a fixed size, because the rows will be batched anew.
    """
    check_names(inputs, feed, where)
    arrays = {spec.name: _array(feed[spec.name], f"{where} key '{spec.name}'") for spec in inputs}
    if row_count(arrays) == 0:
        raise DataError(f"data {where}: has no rows")
    checked = {}
    for spec in inputs:
        value, place = arrays[spec.name], f"{where} key '{spec.name}'"
        check_type(spec, value.dtype, value.shape, place, any_rows=any_rows)
        checked[spec.name] = convert(spec, value, place, 0)
    return checked


def _array(value: Any, place: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:  # nested lists of different lengths
        raise DataError(f"data {place}: is not an array: {error}") from error


def check_names(inputs: Sequence[InputSpec], found: Iterable[str], where: str) -> None:
    """Every input must be there; other keys are left unread (tokenizers give more than every encoder takes)."""
    names, inputs_names = set(found), {spec.name for spec in inputs}
    expected = ", ".join(f"'{spec.name}'" for spec in inputs)
    listed = ", ".join(f"'{name}'" for name in sorted(names)) or "nothing"
    for missing in sorted(inputs_names - names):
        raise DataError(f"data {where}: input '{missing}' is missing; expected {expected}, found {listed}")


def check_type(spec: InputSpec, dtype: np.dtype, shape: tuple[int, ...], place: str, *, any_rows: bool) -> None:
    fits = spec.shape is None or len(spec.shape) == len(shape)
    for axis, (want, have) in enumerate(zip(spec.shape or (), shape, strict=False)):
        fits = fits and (not isinstance(want, int) or want == have or (any_rows and axis == 0))
    if not fits:
        raise DataError(f"data {place}: expected {spec}, found {dtype} {shape_text(shape)}")
    if not _castable(dtype, spec.dtype):
        raise DataError(f"data {place}: expected {spec.dtype}, found {dtype}, which does not convert without loss; save it so")


def _castable(found: np.dtype, wanted: np.dtype) -> bool:
    """Between floats of any width, to text, and where numpy knows that no value is lost."""
    if wanted == np.dtype(object):
        return found.kind in "UO"
    return found.kind == wanted.kind == "f" or np.can_cast(found, wanted, "safe")


def convert(spec: InputSpec, values: np.ndarray, place: str, first_row: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(values.astype(spec.dtype, copy=False)).reshape(values.shape)
    if converted.dtype.kind == "f" and not np.isfinite(converted).all():
        row = int(np.argwhere(~np.isfinite(converted))[0][0]) if converted.ndim else 0
        raise DataError(f"data {place}: row {first_row + row} holds NaN or Inf as {spec.dtype}; remove or repair the row")
    return converted


def row_count(feed: Mapping[str, np.ndarray]) -> int | None:
    """The first axis that all arrays of the feed share; None where they differ, or where none has an axis."""
    counts = {value.shape[0] for value in feed.values() if value.ndim}
    return counts.pop() if len(counts) == 1 else None


def padded(feed: Feed, rows: int) -> Feed:
    """The feed with its last row repeated up to `rows` rows, for models of a fixed batch; as it is where it has that many."""
    missing = rows - (row_count(feed) or rows)
    if missing <= 0:
        return feed
    return {name: np.concatenate([v, np.repeat(v[-1:], missing, 0)]) if v.ndim else v for name, v in feed.items()}


def joined(feeds: Iterable[Feed], size: int) -> Iterator[Feed]:
    """Split and join consecutive feeds of equal row shapes into feeds of `size` rows; others pass as they are."""
    held: Feed | None = None
    for feed in feeds:
        if row_count(feed) is None or (held is not None and not _same_rows(held, feed)):
            if held is not None:
                yield held
            held = None
        if row_count(feed) is None:
            yield feed
            continue
        if held is not None:
            feed = {name: np.concatenate([held[name], value]) if value.ndim else value for name, value in feed.items()}
        rows = row_count(feed) or 0
        whole = rows - rows % size
        for start in range(0, whole, size):
            yield {name: value[start : start + size] if value.ndim else value for name, value in feed.items()}
        held = {name: value[whole:] if value.ndim else value for name, value in feed.items()} if whole < rows else None
    if held is not None:
        yield held


def _same_rows(first: Feed, second: Feed) -> bool:
    for name, value in first.items():
        other = second[name]
        if value.shape[1:] != other.shape[1:] or (value.ndim == 0 and value != other):
            return False
    return True


def random_row(inputs: Sequence[InputSpec], seed: Sequence[int], *, axis: int = 8) -> Feed:
    """One row for each input: floats standard normal, booleans, 8-bit integers 0 to 127, other integers 0 or 1 (mostly 1).

    A symbol has one size everywhere: 1 where it is a first axis, 64 for the height and width of images, 3 for their
    channels, else `axis`.
    Integers stay that small because they may be token types or masks. DataError where the rank is unknown or the input is text.
    """
    random = np.random.default_rng(list(seed))
    sizes: dict[str, int] = {spec.shape[0]: 1 for spec in inputs if spec.shape and isinstance(spec.shape[0], str)}
    feed = {}
    for spec in inputs:
        if spec.shape is None or spec.dtype == np.dtype(object):
            raise DataError(f"input '{spec.name}': cannot generate {spec}; give data")
        image = len(spec.shape) >= 4 and spec.dtype.kind in "fu"
        shape = []
        for position, size in enumerate(spec.shape):
            if not isinstance(size, int):
                guess = (1, _CHANNELS if image else axis, _SPATIAL if image else axis)[min(position, 2)]
                size = guess if size is None else sizes.setdefault(size, guess)
            shape.append(size)
        feed[spec.name] = _random_values(random, spec.dtype, shape)
    return feed


def _random_values(random: np.random.Generator, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    if dtype.kind == "b":
        return random.random(shape) < 0.5
    if dtype.kind in "iu":
        small = (random.random(shape) < 0.75) if dtype.itemsize > 1 else random.integers(0, 128, shape)
        return np.asarray(small).astype(dtype)
    return np.asarray(random.standard_normal(shape)).astype(dtype)
