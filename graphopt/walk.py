"""Running a model piece by piece over calibration rows: values that later pieces need wait in a store of bounded memory.

Weights may change between pieces, so that each layer can be fitted on what the layers before it, already repaired, really give.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from graphopt.data import Dataset
from graphopt.errors import DataError, ModelError
from graphopt.feeds import fixed_batch, padded, row_count
from graphopt.model import Model
from graphopt.runtime import run, session

Values = dict[str, np.ndarray]
BUDGET = 1 << 30  # bytes of waiting values held in memory; the rest lies in temporary files
_LARGE = 1 << 26  # bytes of weights from which a model runs on all cores: small ones lose more to waiting than they win
_STEP = 64 << 20  # bytes of inputs a batch should stay below


def finite(values: Values, owner: str = "") -> Values:
    """The same values. DataError, which `owner` (as "recover: ") begins, where one holds NaN or Inf."""
    for name, value in values.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise DataError(f"{owner}tensor '{name}' holds NaN or Inf on the calibration rows; remove the row, or repair the model")
    return values


class Store:
    """Values by batch number, in memory up to a budget and in temporary files beyond."""

    def __init__(self, budget: int = BUDGET) -> None:
        self._held: dict[int, Values] = {}
        self._bytes = 0
        self._budget = budget
        self._folder = contextlib.ExitStack()
        self._path: Path | None = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self._held.clear()
        self._folder.close()

    def __getitem__(self, number: int) -> Values:
        held = self._held.get(number)
        if held is not None:
            return held
        with np.load(self._file(number), allow_pickle=False) as file:
            return {name: file[f"v{i}"] for i, name in enumerate(file["names"].tolist())}

    def __setitem__(self, number: int, values: Values) -> None:
        self._bytes -= _size(self._held.pop(number, {}))
        size = _size(values)
        plain = all(v.dtype.kind in "biuf" for v in values.values())
        if not plain or self._bytes + size <= self._budget:
            self._held[number] = values
            self._bytes += size
            return
        names = np.array(list(values), dtype=np.str_)
        with self._file(number).open("wb") as file:
            np.savez(file, names=names, **{f"v{i}": v for i, v in enumerate(values.values())})  # type: ignore[arg-type]

    def _file(self, number: int) -> Path:
        if self._path is None:
            self._path = Path(self._folder.enter_context(tempfile.TemporaryDirectory(prefix="graphopt-")))
        return self._path / f"{number}.npz"


def _size(values: Mapping[str, np.ndarray]) -> int:
    return sum(v.nbytes for v in values.values())


def feeds_of(dataset: Dataset) -> Iterator[tuple[Values, int]]:
    """Batches of moderate size, padded to the model's fixed batch, and how many rows of each count."""
    fixed = fixed_batch(dataset.inputs)
    if fixed is None:
        first = next(iter(dataset.batches(1)))
        batch = max(1, min(16, _STEP // max(1, 16 * _size(first))))
    else:
        batch = fixed
    for feed in dataset.batches(batch):
        rows = row_count(feed) or 1
        yield (dict(padded(feed, fixed)) if fixed else dict(feed)), rows


IMAGE_SIDE = 16  # pixels: below, axes of rank-4 inputs are as likely time and frequency


def mirrorable(dataset: Dataset | None) -> bool:
    """Whether an input looks like images (rank 4, 1 to 4 channels first or last, at least 16 x 16): then rows may be mirrored too.

    A mirrored photograph is as good a question to the original model as the photograph itself, and needs no label.
    """
    return dataset is not None and any(_width(spec.dtype, spec.shape) is not None for spec in dataset.inputs)


def _width(dtype: np.dtype, shape: Sequence[object] | None) -> int | None:
    """The axis to mirror along."""
    if shape is None or len(shape) != 4 or dtype.kind != "f":
        return None
    for channels, sides in ((1, (2, 3)), (3, (1, 2))):
        small = shape[channels] in (1, 2, 3, 4)
        if small and all(not isinstance(shape[s], int) or int(str(shape[s])) >= IMAGE_SIDE for s in sides):
            return sides[1]
    return None


def mirrored(dataset: Dataset, feed: Values) -> Values:
    """The feed with its images mirrored left to right."""
    axes = {spec.name: _width(spec.dtype, spec.shape) for spec in dataset.inputs}
    return {n: v if axes.get(n) is None else np.ascontiguousarray(np.flip(v, axes[n])) for n, v in feed.items()}


class Walk:
    """A model run in stages over the batches of a store; stage i makes the tensors `stages[i]`.

    `run(i, number)` gives them for one batch; stages come in order, all batches of one before the next. Nodes run in the first
    stage that needs them, with the weights that the model has when the stage begins.
    """

    def __init__(self, model: Model, dtypes: Mapping[str, np.dtype], stages: Sequence[Sequence[str]], store: Store) -> None:
        self._proto, self._dtypes, self._stages, self._store = model.proto(), dtypes, [list(s) for s in stages], store
        self._weights = {t.name: t for t in self._proto.graph.initializer}
        self._nodes = list(self._proto.graph.node)
        self._reads = [[n for n in reads_of(node) if n and n not in self._weights] for node in self._nodes]
        self._members = self._schedule()
        self._threads = 0 if model.weight_bytes() > _LARGE else 1
        self._session: tuple[int, object, list[str], list[str]] | None = None

    def set_weight(self, name: str, values: np.ndarray) -> None:
        """What later stages compute with; a new name is a new initializer."""
        self._weights[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)

    def set_input(self, node: str, index: int, name: str) -> None:
        """Input `index` of the node of that name, which no stage has run yet, becomes the tensor `name`."""
        found = next(n for n in self._nodes if n.name == node)
        while len(found.input) <= index:
            found.input.append("")
        found.input[index] = name

    def _schedule(self) -> list[list[int]]:
        made = {out: i for i, node in enumerate(self._nodes) for out in node.output if out}
        inputs = {i.name for i in self._proto.graph.input}
        done: set[int] = set()
        members = []
        for wanted in self._stages:
            mine: set[int] = set()
            stack = list(wanted)
            while stack:
                name = stack.pop()
                index = made.get(name)
                if index is None:
                    if name not in inputs and name not in self._weights:
                        raise ModelError(f"tensor '{name}' is not computed by the model's main graph")
                elif index not in done and index not in mine:
                    mine.add(index)
                    stack.extend(self._reads[index])
            done |= mine
            members.append(sorted(mine))
        return members

    def _needed_after(self, stage: int) -> set[str]:
        later = {name for wanted in self._stages[stage + 1 :] for name in wanted}
        return later | {name for m in self._members[stage + 1 :] for i in m for name in self._reads[i]}

    def _prepare(self, stage: int) -> tuple[int, object, list[str], list[str]]:
        nodes = [self._nodes[i] for i in self._members[stage]]
        made = {out for node in nodes for out in node.output if out}
        fed = list(dict.fromkeys(n for i in self._members[stage] for n in self._reads[i] if n not in made))
        outputs = [n for n in dict.fromkeys(out for node in nodes for out in node.output if out) if n in self._kept(stage)]
        if not outputs:
            return stage, None, [], []
        used = {n for node in nodes for n in reads_of(node)}
        graph = onnx.GraphProto(name="stage", node=nodes, initializer=[t for n, t in self._weights.items() if n in used])
        graph.input.extend(helper.make_tensor_value_info(n, element(self._dtypes, n), None) for n in fed)
        graph.output.extend(onnx.ValueInfoProto(name=n) for n in outputs)
        piece = onnx.ModelProto(ir_version=self._proto.ir_version, opset_import=self._proto.opset_import, graph=graph)
        piece.functions.extend(self._proto.functions)
        return stage, session(piece, threads=self._threads), fed, outputs

    def _kept(self, stage: int) -> set[str]:
        return self._needed_after(stage) | set(self._stages[stage])

    def run(self, stage: int, number: int) -> Values:
        """The tensors of the stage for one batch; what later stages need replaces what the store held."""
        if self._session is None or self._session[0] != stage:
            self._session = self._prepare(stage)
            self._later = self._needed_after(stage)
        _, runner, fed, outputs = self._session
        values = dict(self._store[number])
        if runner is not None:
            values.update(zip(outputs, run(runner, {n: values[n] for n in fed}, outputs), strict=True))
        self._store[number] = {n: v for n, v in values.items() if n in self._later}
        return {n: self._constant(n) if n in self._weights else values[n] for n in self._stages[stage]}

    def _constant(self, name: str) -> np.ndarray:
        return onnx.numpy_helper.to_array(self._weights[name])


def element(dtypes: Mapping[str, np.dtype], name: str) -> int:
    """The ONNX type of a tensor; ModelError where it is not known."""
    if name not in dtypes:
        raise ModelError(f"the type of tensor '{name}' is not known, so the model cannot be run in pieces")
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtypes[name]))


def reads_of(node: onnx.NodeProto) -> list[str]:
    """What the node and the bodies inside it read from outside them."""
    names = list(node.input)
    for attribute in node.attribute:
        for body in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
            local = {i.name for i in body.input} | {t.name for t in body.initializer} | {o for n in body.node for o in n.output}
            names.extend(n for inner in body.node for n in reads_of(inner) if n and n not in local)
            names.extend(o.name for o in body.output if o.name not in local)
    return names
