"""Preprocessing, declared once in a TOML file that stands for a dataset, so that variants of a model cannot differ by it.

    kind = "images"            # or "text", "audio", "arrays", "function"
    folder = "photos"          # sub-folders are classes, or labels = "labels.csv" with lines of file,label
    size = [224, 224]
    subtract = [123.7, 116.3, 103.5]
    divide = [58.4, 57.1, 57.4]

Paths are relative to the file. What says where rows lie is not part of the hash; what is done to them is, down to the content of
the tokenizer and of the function's source file.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import DataError
from graphopt.feeds import Feed, InputSpec

_BATCH = 16  # rows prepared at a time
_WHERE = frozenset(("folder", "file", "labels"))  # where rows lie: not part of the hash
_COMMON: Mapping[str, type | tuple[type, ...]] = {"kind": str, "input": str, "labels": str}
_NUMBERS = (int, float, list)
FIELDS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "images": {"folder": str, "size": list, "crop": list, "subtract": _NUMBERS, "divide": _NUMBERS, "layout": str, "filter": str},
    "text": {"file": str, "tokenizer": str, "length": int},
    "audio": {"folder": str, "rate": int, "samples": int},
    "arrays": {"file": str, "key": str, "subtract": _NUMBERS, "divide": _NUMBERS, "layout": str},
    "function": {"function": str},
}
_NEEDED = {"images": ("folder",), "text": ("file", "tokenizer"), "audio": ("folder", "rate", "samples"), "arrays": ("file", "key")}


@dataclass(frozen=True)
class Declared:
    """A declaration that was read and checked; `rows` is None where only a full iteration would tell."""

    where: str
    make: Callable[[], Iterator[dict[str, Any]]]
    rows: int | None
    digest: str


def declared(path: Path, inputs: Sequence[InputSpec]) -> Declared:
    """Read a declaration for a model's inputs. DataError names the file, the key, and what was expected."""
    said = _read(path)
    kind = said["kind"]
    folder = path.parent
    if kind == "function":
        from graphopt.data import _function

        name = said.get("function", "")
        module, _, function = name.rpartition(":")
        module = str(folder / module) if module.endswith(".py") else module
        found: Any = _function(module, function, f"'{path.name}'")
        return Declared(f"'{path.name}'", found, None, _digest(said, folder))
    if kind == "text":
        return _text(path, said, inputs)
    name = said.get("input") or _single(path, inputs)
    items, load = _LOADERS[kind](path, said)
    labels = [label for _, label in items]

    def make() -> Iterator[dict[str, Any]]:
        for start in range(0, len(items), _BATCH):
            part = items[start : start + _BATCH]
            feed: dict[str, Any] = {name: np.stack([load(item) for item, _ in part])}
            if all(label is not None for label in labels):
                feed["labels"] = np.array([label for _, label in part])
            yield feed

    return Declared(f"'{path.name}'", make, len(items), _digest(said, folder))


def _read(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        said: dict[str, Any] = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"data '{path.name}': is not TOML: {' '.join(str(error).split())}") from error
    kind = str(said.get("kind"))
    if kind not in FIELDS:
        raise DataError(f"data '{path.name}': kind is '{kind}'; expected one of {', '.join(FIELDS)}")
    known = {**_COMMON, **FIELDS[kind]}
    for key, value in said.items():
        if key not in known:
            raise DataError(f"data '{path.name}': unknown key '{key}'; {kind} takes {', '.join(sorted(known))}")
        if not isinstance(value, known[key]):
            raise DataError(f"data '{path.name}': {key} = {value!r} has the wrong type")
    missing = [k for k in _NEEDED.get(kind, ()) if k not in said]
    if missing:
        raise DataError(f"data '{path.name}': {kind} needs {', '.join(missing)}")
    return said


def _digest(said: Mapping[str, Any], folder: Path) -> str:
    held = {key: value for key, value in said.items() if key not in _WHERE}
    sources = [said["tokenizer"]] if "tokenizer" in said else []
    sources += [said["function"].rpartition(":")[0]] if str(said.get("function", "")).partition(":")[0].endswith(".py") else []
    for name in sources:
        held[f"content of {Path(name).name}"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def _single(path: Path, inputs: Sequence[InputSpec]) -> str:
    if len(inputs) != 1:
        raise DataError(f"data '{path.name}': the model has {len(inputs)} inputs; name one with input = \"...\"")
    return inputs[0].name


Items = list[tuple[Any, Any]]  # what is loaded, and its label or None


def _files(path: Path, said: Mapping[str, Any], suffixes: frozenset[str]) -> Items:
    """Files of the folder with labels: from a CSV of file,label, else from sub-folders in the order of their names."""
    folder = path.parent / said["folder"]
    if not folder.is_dir():
        raise DataError(f"data '{path.name}': folder {folder} does not exist")
    if "labels" in said:
        with (path.parent / said["labels"]).open(newline="") as file:
            lines = [line for line in csv.reader(file) if line]
        if any(len(line) != 2 for line in lines):
            raise DataError(f"data '{path.name}': {said['labels']} must have lines of file,label")
        return [(folder / name, _label(label)) for name, label in lines]
    classes = sorted(d.name for d in folder.iterdir() if d.is_dir())
    if classes:
        found: Items = [
            (f, i) for i, c in enumerate(classes) for f in sorted((folder / c).iterdir()) if f.suffix.lower() in suffixes
        ]
    else:
        found = [(f, None) for f in sorted(folder.iterdir()) if f.suffix.lower() in suffixes]
    if not found:
        raise DataError(f"data '{path.name}': {folder} holds no {', '.join(sorted(suffixes))}")
    return found


def _label(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _images(path: Path, said: Mapping[str, Any]) -> tuple[Items, Callable[[Any], np.ndarray]]:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"data '{path.name}': images need the package pillow: pip install 'graphopt[data]'") from error
    filters = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    chosen = said.get("filter", "bilinear")
    if chosen not in filters:
        raise DataError(f"data '{path.name}': filter is '{chosen}'; expected one of {', '.join(filters)}")
    size, crop = (tuple(said[k]) if k in said else None for k in ("size", "crop"))

    def load(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            raise DataError(f"data '{path.name}': {file.name} is no image that can be read") from error
        if size is not None:
            image = image.resize((size[1], size[0]), filters[chosen])
        values = np.asarray(image)
        if crop is not None:
            top, left = (values.shape[0] - crop[0]) // 2, (values.shape[1] - crop[1]) // 2
            values = values[top : top + crop[0], left : left + crop[1]]
        return _scaled(values, said)

    return _files(path, said, frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp"))), load


def _scaled(values: np.ndarray, said: Mapping[str, Any]) -> np.ndarray:
    """(values - subtract) / divide, by channel where those are lists, channels first unless layout is NHWC."""
    result = values.astype(np.float32)
    if "subtract" in said:
        result = result - np.float32(said["subtract"])
    if "divide" in said:
        result = result / np.float32(said["divide"])
    if said.get("layout", "NCHW") == "NCHW" and result.ndim == 3:
        result = result.transpose(2, 0, 1)
    return np.ascontiguousarray(result, np.float32)


def _audio(path: Path, said: Mapping[str, Any]) -> tuple[Items, Callable[[Any], np.ndarray]]:
    """WAV files of 16 bits as floats in [-1, 1): channels averaged, cut or padded with silence; the rate must be as declared."""
    import wave

    def load(file: Path) -> np.ndarray:
        try:
            with wave.open(str(file), "rb") as opened:
                rate, width, channels = opened.getframerate(), opened.getsampwidth(), opened.getnchannels()
                frames = opened.readframes(opened.getnframes())
        except (OSError, EOFError, wave.Error) as error:
            raise DataError(f"data '{path.name}': {file.name} is no WAV file that can be read: {error}") from error
        if rate != said["rate"] or width != 2:
            raise DataError(
                f"data '{path.name}': {file.name} has {rate} Hz and {8 * width} bits, expected {said['rate']} Hz and 16 bits"
            )
        samples = np.frombuffer(frames, "<i2").reshape(-1, channels).astype(np.float32).mean(1) / 32768
        wanted = int(said["samples"])
        return np.pad(samples[:wanted], (0, max(0, wanted - len(samples))))

    return _files(path, said, frozenset((".wav",))), load


def _arrays(path: Path, said: Mapping[str, Any]) -> tuple[Items, Callable[[Any], np.ndarray]]:
    try:
        with np.load(path.parent / said["file"], allow_pickle=False) as file:
            values, labels = file[said["key"]], file[said["labels"]] if "labels" in said else None
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data '{path.name}': cannot read {said['key']} from {said['file']}: {error}") from error
    items = [(i, None if labels is None else labels[i]) for i in range(len(values))]
    return items, lambda i: _scaled(values[i], said)


_LOADERS: Mapping[str, Callable[[Path, Mapping[str, Any]], tuple[Items, Callable[[Any], np.ndarray]]]] = {
    "images": _images,
    "audio": _audio,
    "arrays": _arrays,
}


def _text(path: Path, said: Mapping[str, Any], inputs: Sequence[InputSpec]) -> Declared:
    """Lines of text, a label behind a tab, through a tokenizer file; batches are padded to their longest, or to `length`."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(f"data '{path.name}': text needs the package tokenizers: pip install 'graphopt[data]'") from error
    try:
        lines = [line.split("\t") for line in (path.parent / said["file"]).read_text().splitlines() if line.strip()]
        tokenizer = Tokenizer.from_file(str(path.parent / said["tokenizer"]))
    except Exception as error:  # tokenizers raises plain exceptions
        raise DataError(f"data '{path.name}': {' '.join(str(error).split())}") from error
    names = {spec.name for spec in inputs}
    if "length" in said:
        tokenizer.enable_truncation(said["length"])
        tokenizer.enable_padding(length=said["length"])
    else:
        tokenizer.enable_padding()
    labelled = all(len(line) > 1 for line in lines)

    def make() -> Iterator[Feed]:
        for start in range(0, len(lines), _BATCH):
            part = lines[start : start + _BATCH]
            encoded = tokenizer.encode_batch([line[0] for line in part])
            ids, mask = (np.array([getattr(e, f) for e in encoded], np.int64) for f in ("ids", "attention_mask"))
            feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            feed = {k: v for k, v in feed.items() if k in names}
            if labelled:
                feed["labels"] = np.array([_label(line[1]) for line in part])
            yield feed

    return Declared(f"'{path.name}'", make, len(lines), _digest(said, path.parent))
