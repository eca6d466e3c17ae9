"""What removing more and more units of a group does to the outputs, measured: one session whose reading weights are fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from graphopt.agreement import Answers, error, with_outputs
from graphopt.dims import Group
from graphopt.layers import from_matrix
from graphopt.model import Model
from graphopt.readers import Reader
from graphopt.runtime import run, session
from graphopt.shapes import shapes
from graphopt.walk import element, reads_of

ALPHA = 1e-3
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_HOPELESS = 1.0  # an error as large as the spread of the outputs: not worth measuring any further, but going on as it does
Curve = tuple[np.ndarray, np.ndarray]  # numbers of units removed, from 0; error at the outputs


class Trial:
    """The original model, in which the weights of readers may be replaced for a run; what lies before them is run once."""

    def __init__(self, model: Model, readers: Sequence[Reader], truth: Answers) -> None:
        self._truth, self._dtypes = truth, shapes(model).dtypes
        self._names = [s.tensor for s in truth.scored]
        proto = with_outputs(model, self._names)
        self._proto = proto
        self._values: dict[str, np.ndarray] = {}
        added = {r.layer.node for r in readers if r.layer.bias is None and r.layer.addable}
        for node in proto.graph.node:
            if node.name in added:
                while len(node.input) < 3:
                    node.input.append("")
                node.input[2] = f"{node.name}/bias"
        for reader in readers:
            if reader.layer.node in added:
                zero = np.zeros(reader.matrix.shape[1], np.float32)
                proto.graph.initializer.append(onnx.numpy_helper.from_array(zero, f"{reader.layer.node}/bias"))
        wanted = {n for r in readers for n in (r.layer.weight, bias_name(r)) if n}
        for tensor in proto.graph.initializer:
            if tensor.name in wanted:
                self._values[tensor.name] = onnx.numpy_helper.to_array(tensor)
        self._reads = [set(reads_of(node)) for node in proto.graph.node]
        self._tail: tuple[int, frozenset[str], _Tail] | None = None

    def value(self, name: str) -> np.ndarray:
        return self._values[name]

    def error(self, changed: Mapping[str, np.ndarray]) -> float:
        """The error at the outputs with these weights in place of the original ones."""
        first = next((i for i, reads in enumerate(self._reads) if not reads.isdisjoint(changed)), 0)
        names = frozenset(changed)
        if self._tail is None or self._tail[:2] != (first, names):
            self._tail = first, names, self._after(first, names)
        return error(self._truth, self._tail[2].outputs(changed))

    def _after(self, first: int, changed: frozenset[str]) -> _Tail:
        """The nodes from that one on, and what they read of those before."""
        graph = self._proto.graph
        nodes, reads = list(graph.node)[first:], {n for r in self._reads[first:] for n in r if n}
        made = {out for node in nodes for out in node.output}
        kept = [t for t in graph.initializer if t.name in reads and t.name not in changed]
        inside = made | {t.name for t in graph.initializer}
        fed = sorted((reads | set(self._names)) - inside)
        before = [n for n in fed if n not in {i.name for i in graph.input}]
        values = self._values_of(before)
        piece = onnx.ModelProto(ir_version=self._proto.ir_version, opset_import=self._proto.opset_import)
        piece.functions.extend(self._proto.functions)
        piece.graph.CopyFrom(onnx.GraphProto(name="tail", node=nodes, initializer=kept))
        outputs = [n for n in self._names if n in made]
        piece.graph.input.extend(helper.make_tensor_value_info(n, element(self._dtypes, n), None) for n in fed if n in reads)
        for name in sorted(changed):
            value = self._values[name]
            piece.graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape))
        piece.graph.output.extend(onnx.ValueInfoProto(name=n) for n in outputs)
        feeds = [{**feed, **more} for feed, more in zip(self._truth.feeds, values, strict=True)]
        return _Tail(session(piece), self._names, outputs, [n for n in fed if n in reads], feeds)

    def _values_of(self, names: Sequence[str]) -> list[dict[str, np.ndarray]]:
        if not names:
            return [{} for _ in self._truth.feeds]
        whole = onnx.ModelProto()
        whole.CopyFrom(self._proto)
        del whole.graph.output[:]
        whole.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
        runner = session(whole)
        return [dict(zip(names, run(runner, feed, list(names)), strict=True)) for feed in self._truth.feeds]


@dataclass(frozen=True)
class _Tail:
    """The last part of a model: it reads `fed` of the feeds, and makes `made` of `names`; the others lie in the feeds."""

    runner: Any
    names: Sequence[str]
    made: Sequence[str]
    fed: Sequence[str]
    feeds: Sequence[dict[str, np.ndarray]]

    def outputs(self, changed: Mapping[str, np.ndarray]) -> list[list[np.ndarray]]:
        found = []
        for feed in self.feeds:
            given = {**{n: feed[n] for n in self.fed}, **changed}
            values = {**feed, **dict(zip(self.made, run(self.runner, given, list(self.made)), strict=True))}
            found.append([np.asarray(values[n]) for n in self.names])
        return found


def bias_name(reader: Reader) -> str | None:
    """The bias of the layer, also where only a trial has one."""
    if reader.layer.bias is not None:
        return reader.layer.bias
    return f"{reader.layer.node}/bias" if reader.layer.addable else None


def without(reader: Reader, trial: Trial, units: np.ndarray) -> dict[str, np.ndarray]:
    """The reader's weight and bias refitted to do without these units, on the inputs it has now."""
    rows = reader.features(units)
    gone = np.unique(rows[rows >= 0])
    if not gone.size:
        return {}
    covariance, matrix = reader.moments.cov[0], reader.matrix
    stay = np.setdiff1d(np.arange(len(matrix)), gone)
    system = covariance[np.ix_(stay, stay)]
    strength = ALPHA * np.trace(system) / max(len(stay), 1) + 1e-10
    fitted = np.zeros_like(matrix)
    step = np.linalg.solve(system + strength * np.eye(len(stay)), covariance[np.ix_(stay, gone)] @ matrix[gone])
    fitted[stay] = matrix[stay] + step
    weight = trial.value(reader.layer.weight)
    found = {reader.layer.weight: from_matrix(reader.layer, fitted[None], weight)}
    name = bias_name(reader)
    if name is not None:
        old = trial.value(name)
        shift = reader.moments.mean_x[0] @ (matrix - fitted)
        found[name] = (old + shift.reshape(old.shape)).astype(np.float32)
    return found


def curve(group: Group, order: np.ndarray, readers: Sequence[Reader], trial: Trial) -> Curve:
    """The error with the first units of the order gone and their readers refitted, never falling."""
    counts = sorted({round(len(order) * share) for share in SHARES} - {0})
    points, errors = [0], [0.0]
    for count in counts:
        changed: dict[str, np.ndarray] = {}
        for reader in readers:
            changed.update(without(reader, trial, group.units[order[:count]]))
        points.append(count)
        errors.append(max(trial.error(changed), errors[-1]))
        if errors[-1] > _HOPELESS and count < counts[-1]:
            points.append(counts[-1])
            errors.append(errors[-1] * counts[-1] / count)
            break
    return np.array(points), np.array(errors)
