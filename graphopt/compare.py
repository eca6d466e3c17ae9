"""How far two models' outputs are apart, on data; and the first node where they part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from graphopt.errors import CheckError
from graphopt.runtime import run, session

Feed = Mapping[str, np.ndarray]
EXACT_TOLERANCE = 1e-4  # of the output's scale: what an exact pass may move an output by rounding


@dataclass(frozen=True)
class OutputDifference:
    """One output of B against A over all rows. Errors are absolute; `scale` is max |A|; SQNR in dB (inf where equal)."""

    name: str
    max_error: float
    mean_error: float
    scale: float
    sqnr_db: float
    cosine: float
    argmax_agreement: float | None  # share of rows with the same argmax over the last axis; None for scalars and non-floats
    same_shape: bool = True

    @property
    def relative(self) -> float:
        """max_error over the output's scale."""
        return self.max_error / self.scale if self.scale else (0.0 if self.max_error == 0 else float("inf"))


@dataclass
class _Sums:
    max_error: float = 0.0
    error: float = 0.0
    count: int = 0
    scale: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    dot: float = 0.0
    other: float = 0.0
    agree: int = 0
    rows: int = 0
    same_shape: bool = True

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        if a.shape != b.shape:
            self.same_shape, self.max_error = False, float("inf")
            return
        if a.ndim and a.shape[-1] > 1 and a.dtype.kind == "f" and a.size:
            self.agree += int((a.argmax(-1) == b.argmax(-1)).sum())
            self.rows += a.size // a.shape[-1]
        x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        both = np.isfinite(x) & np.isfinite(y)
        odd = ~both & ~((x == y) | (np.isnan(x) & np.isnan(y)))
        error = np.abs(x[both] - y[both])
        if odd.any():
            self.max_error = float("inf")
        self.max_error = max(self.max_error, float(error.max(initial=0.0)))
        self.scale = max(self.scale, float(np.abs(x[both]).max(initial=0.0)))
        self.error, self.count = self.error + float(error.sum()), self.count + x.size
        self.signal, self.noise = self.signal + float(x[both] @ x[both]), self.noise + float(error @ error)
        self.dot, self.other = self.dot + float(x[both] @ y[both]), self.other + float(y[both] @ y[both])

    def result(self, name: str) -> OutputDifference:
        norm = np.sqrt(self.signal * self.other)
        cosine = self.dot / norm if norm else float(self.signal == self.other)
        sqnr = 10 * np.log10(self.signal / self.noise) if self.noise and self.signal else (float("inf") if not self.noise else 0.0)
        agreement = self.agree / self.rows if self.rows else None
        mean = self.error / max(self.count, 1)
        return OutputDifference(name, self.max_error, mean, self.scale, float(sqnr), float(cosine), agreement, self.same_shape)


def as_arrays(value: object) -> list[np.ndarray]:
    """A tensor output as one array, a sequence as several, None (an empty optional) as none; strings as codes of equality."""
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [a for v in value for a in as_arrays(v)]
    if isinstance(value, dict):
        return [a for v in value.values() for a in as_arrays(v)]
    return [np.asarray(value)]


def differences(names: Sequence[str], pairs: Iterable[tuple[Sequence[object], Sequence[object]]]) -> list[OutputDifference]:
    """Fold (outputs of A, outputs of B) over all feeds into one row an output; memory is one feed's outputs."""
    sums = {name: _Sums() for name in names}
    for a, b in pairs:
        for name, x, y in zip(names, a, b, strict=True):
            xs, ys = as_arrays(x), as_arrays(y)
            if len(xs) != len(ys):
                sums[name].same_shape, sums[name].max_error = False, float("inf")
            for left, right in zip(xs, ys, strict=False):
                if left.dtype.kind in "OUS":
                    equal = left.shape == right.shape and bool(np.all(left == right))
                    left, right = np.zeros(1), np.full(1, 0.0 if equal else np.inf)
                sums[name].add(left, right)
    return [s.result(name) for name, s in sums.items()]


def compare(a: str | bytes | onnx.ModelProto, b: str | bytes | onnx.ModelProto, feeds: Iterable[Feed]) -> list[OutputDifference]:
    """Compare the outputs that two models share, by name, on the feeds. Raises ModelError, or CheckError with no shared output."""
    first, second = session(a, threads=0), session(b, threads=0)
    theirs = {o.name for o in second.get_outputs()}
    names = [o.name for o in first.get_outputs() if o.name in theirs]
    if not names:
        raise CheckError("the two models share no output name, so there is nothing to compare")
    return differences(names, ((run(first, feed, names), run(second, feed, names)) for feed in feeds))


def first_difference(
    a: onnx.ModelProto, b: onnx.ModelProto, feeds: Sequence[Feed], *, tolerance: float
) -> tuple[str, str, float] | None:
    """(node of B, tensor, relative error) of the first tensor, in B's order, that both models have and that differs by more."""
    writers = shared_tensors(a, b)
    for row in inner_differences(a, b, list(writers), feeds):
        if not row.relative <= tolerance:
            return writers[row.name], row.name, row.relative
    return None


def shared_tensors(a: onnx.ModelProto, b: onnx.ModelProto) -> dict[str, str]:
    """The float tensors that nodes of both main graphs write under one name, in B's order, with the node of B that writes them."""
    known = {name for node in a.graph.node for name in node.output if name} | {o.name for o in a.graph.output}
    writers = {name: node.name for node in b.graph.node for name in node.output if name in known}
    typed_a, typed_b = _float_tensors(a), _float_tensors(b)
    return {name: node for name, node in writers.items() if name in typed_a and name in typed_b}


def inner_differences(
    a: onnx.ModelProto, b: onnx.ModelProto, names: Sequence[str], feeds: Sequence[Feed]
) -> list[OutputDifference]:
    """How far the tensors of B are from A's, with the graphs run as they are written. Memory: these tensors, of one feed, twice."""
    if not names:
        return []
    first, second = (session(_expose(m, names), optimize=False, operators=False) for m in (a, b))
    return differences(names, ((run(first, feed, names), run(second, feed, names)) for feed in feeds))


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    inferred = onnx.shape_inference.infer_shapes(model)
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    infos = (*inferred.graph.value_info, *inferred.graph.output)
    return {i.name for i in infos if i.type.tensor_type.elem_type in floats}


def _expose(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with the tensors as extra outputs (onnxruntime infers their types)."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    present = {o.name for o in exposed.graph.output}
    exposed.graph.output.extend([onnx.ValueInfoProto(name=n) for n in names if n not in present])
    return exposed
