"""Random small networks: whatever couples, zeroing equals removing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import soundness
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

GROUPS = 2  # every layer has a multiple of 4 channels, so that all layers fit each other


class Builder:
    """Grows a network of [N, C, 4, 4] tensors from drawn choices."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw, self.random = draw, np.random.default_rng(draw(st.integers(0, 99)))
        self.nodes, self.weights = list[onnx.NodeProto](), list[onnx.TensorProto]()
        self.channels = {"x": 3}

    def add(self, op: str, inputs: list[str], channels: int, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        self.channels[name] = channels
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self.random.normal(size=shape).astype(np.float32))

    def constant(self, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def pick(self, channels: int | None = None) -> str:
        return self.draw(st.sampled_from([n for n, c in self.channels.items() if n != "x" and channels in (None, c)]))

    def conv(self, source: str, channels: int, group: int = 1) -> str:
        weight = self.weight(channels, self.channels[source] // group, 3, 3)
        return self.add("Conv", [source, weight, self.weight(channels)], channels, group=group, pads=[1, 1, 1, 1])

    def layer(self) -> None:
        a = self.pick()
        c = self.channels[a]
        getattr(self, self.draw(st.sampled_from(["dense", "grouped", "unary", "sum", "join", "cut", "shuffle", "gate", "pad"])))(
            a, c
        )

    def dense(self, a: str, c: int) -> None:
        self.conv(a, self.draw(st.sampled_from([4, 8])))

    def grouped(self, a: str, c: int) -> None:
        self.conv(a, c, self.draw(st.sampled_from([GROUPS, c])))

    def unary(self, a: str, c: int) -> None:
        self.add(self.draw(st.sampled_from(["Relu", "Sigmoid", "HardSwish", "Neg"])), [a], c)

    def sum(self, a: str, c: int) -> None:
        self.add(self.draw(st.sampled_from(["Add", "Mul", "Max"])), [a, self.pick(c)], c)

    def join(self, a: str, c: int) -> None:
        b = self.pick()
        if c + self.channels[b] <= 16:
            self.add("Concat", [a, b], c + self.channels[b], axis=1)

    def cut(self, a: str, c: int) -> None:
        low = self.draw(st.integers(0, c - 4))
        bounds = [self.constant(np.array([v], np.int64)) for v in (low, low + 4 - c or 99, 1)]
        self.add("Slice", [a, *bounds], 4)

    def shuffle(self, a: str, c: int) -> None:
        apart, back = (self.constant(np.array(s, np.int64)) for s in ((0, GROUPS, c // GROUPS, 4, 4), (0, c, 4, 4)))
        b = self.add("Reshape", [a, apart], 0)
        d = self.add("Transpose", [b], 0, perm=[0, 2, 1, 3, 4])
        del self.channels[b], self.channels[d]
        self.add("Reshape", [d, back], c)

    def gate(self, a: str, c: int) -> None:
        pooled = self.add("GlobalAveragePool", [a], c)
        scale = self.add("HardSigmoid", [self.add("Conv", [pooled, self.weight(c, c, 1, 1)], c)], c)
        del self.channels[pooled], self.channels[scale], self.channels[f"t{len(self.nodes) - 2}"]
        self.add("Mul", [a, scale], c)

    def pad(self, a: str, c: int) -> None:
        if c == 4:
            self.add("Pad", [a, self.constant(np.array([0, 2, 0, 0, 0, 2, 0, 0], np.int64))], 8)

    def model(self) -> onnx.ModelProto:
        for channels in (4, 8):
            self.conv("x", channels)
        for _ in range(self.draw(st.integers(2, 9))):
            self.layer()
        last = list(self.channels)[-1]
        flat = self.add("Flatten", [last], 0)
        self.nodes.append(helper.make_node("MatMul", [flat, self.weight(16 * self.channels[last], 3)], ["y"]))
        x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 4, 4])
        y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 3])
        graph = helper.make_graph(self.nodes, "g", [x], [y], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    return Builder(draw).model()


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks())
def test_random_networks(proto: onnx.ModelProto) -> None:
    assert soundness.findings(proto, [soundness.inputs(proto)]) == []
