"""Zeroing equals removing around every operator: onnx's own node tests, with constants before and behind.

Each axis of each input is made by a MatMul with a constant, and each axis of each output is read by one: whatever a rule leaves
free can thus be removed, and must be removed rightly.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import soundness
import zoo
from onnx import helper, numpy_helper

INFINITE_AT_ZERO = {"Log", "Reciprocal", "Div", "Pow", "Mod", "Acosh", "MeanVarianceNormalization"}  # zeros give NaN there
FLOATS = {onnx.TensorProto.FLOAT}


class Wrapper:
    """Builds the model around one node test."""

    def __init__(self, case: zoo.NodeTest, *, constants: bool) -> None:
        self.case, self.random, self.nodes = case, np.random.default_rng(0), list[onnx.NodeProto]()
        self.graph = onnx.GraphProto()
        self.graph.CopyFrom(case.model.graph)
        self.feeds = dict(case.data[0][0])
        self.constants = constants

    def constant(self, name: str, values: np.ndarray) -> str:
        self.graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def mix(self, source: str, shape: tuple[int, ...], matrix: np.ndarray | None) -> str:
        """Multiply every axis by a square constant: the identity, or random where none is given."""
        for axis, size in enumerate(shape):
            order = [i for i in range(len(shape)) if i != axis] + [axis]
            values = np.eye(size) if matrix is not None else self.random.normal(size=(size, size))
            names = [f"{source}_{axis}{suffix}" for suffix in ("t", "m", "w", "b")]
            self.nodes.append(helper.make_node("Transpose", [source], [names[0]], perm=order))
            weight = self.constant(names[2], values.astype(np.float32))
            self.nodes.append(helper.make_node("MatMul", [names[0], weight], [names[1]]))
            self.nodes.append(helper.make_node("Transpose", [names[1]], [names[3]], perm=[int(i) for i in np.argsort(order)]))
            source = names[3]
        return source

    def model(self) -> onnx.ModelProto:
        """The node between constants."""
        (node,) = self.graph.node
        renamed = onnx.NodeProto()
        renamed.CopyFrom(node)
        inputs = {value.name: value for value in self.graph.input}
        for index, name in enumerate(node.input):
            value = inputs.get(name)
            if value is None or not isinstance(self.feeds[name], np.ndarray):
                continue
            array = self.feeds[name]
            if value.type.tensor_type.elem_type not in FLOATS or (self.constants and index):
                if name in [i.name for i in self.graph.input]:
                    self.graph.input.remove(value)
                    self.constant(name, self.feeds.pop(name))
            elif array.ndim:
                renamed.input[index] = self.mix(name, array.shape, np.eye(1))
        outputs = []
        self.nodes.append(renamed)
        for value, array in zip(self.graph.output, self.case.data[0][1], strict=False):
            if value.type.tensor_type.elem_type in FLOATS and isinstance(array, np.ndarray):
                outputs.append(helper.make_tensor_value_info(self.mix(value.name, array.shape, None), onnx.TensorProto.FLOAT, None))
        del self.graph.node[:], self.graph.output[:]
        self.graph.node.extend(self.nodes)
        self.graph.output.extend(outputs)
        model = onnx.ModelProto()
        model.CopyFrom(self.case.model)
        model.graph.CopyFrom(self.graph)
        return model


def cases() -> Iterator[tuple[zoo.NodeTest, bool]]:
    """Tests of one node with float results, all inputs finite; with all inputs computed, and with all but the first constant."""
    for case in zoo.node_tests(("node",)):
        arrays = [a for a in (*case.data[0][0].values(), *case.data[0][1]) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
        floats = any(isinstance(a, np.ndarray) and a.dtype == np.float32 for a in case.data[0][1])
        if len(case.model.graph.node) == 1 and floats and all(np.isfinite(a).all() for a in arrays):
            yield case, False
            yield case, True


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_operators() -> None:
    tested, wrong = 0, []
    for case, constants in cases():
        wrapper = Wrapper(case, constants=constants)
        try:
            proto = wrapper.model()
            found = soundness.findings(proto, [wrapper.feeds])
        except soundness.FAILURES:  # onnxruntime lacks the operator or its types
            continue
        tested += 1
        infinite = case.model.graph.node[0].op_type in INFINITE_AT_ZERO
        wrong += [(case.name, constants, f) for f in found if not (infinite and "not finite" in f.message)]
    assert wrong == []
    assert tested > 800
