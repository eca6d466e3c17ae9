"""What removing more and more units of a group does to the outputs, measured: one session whose reading weights are fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from graphopt.agreement import Answers, error, with_outputs
from graphopt.dims import Group
from graphopt.layers import from_matrix
from graphopt.model import Model
from graphopt.readers import Reader
from graphopt.runtime import run, session

ALPHA = 1e-3
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Curve = tuple[np.ndarray, np.ndarray]  # numbers of units removed, from 0; error at the outputs


class Trial:
    """The original model, in which the weights of readers may be replaced for a run."""

    def __init__(self, model: Model, readers: Sequence[Reader], truth: Answers) -> None:
        self._truth = truth
        self._names = [s.tensor for s in truth.scored]
        proto = with_outputs(model, self._names)
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
                proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        self._session = session(proto)

    def value(self, name: str) -> np.ndarray:
        return self._values[name]

    def error(self, changed: Mapping[str, np.ndarray]) -> float:
        """The error at the outputs with these weights in place of the original ones."""
        found = [[np.asarray(v) for v in run(self._session, {**feed, **changed}, self._names)] for feed in self._truth.feeds]
        return error(self._truth, found)


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
    return np.array(points), np.array(errors)
