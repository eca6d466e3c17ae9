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


class Arranger:
    """A linear layer of heads and widths, rearranged at random with batch and length unknown, and a linear layer that reads it."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw, self.random = draw, np.random.default_rng(draw(st.integers(0, 99)))
        self.nodes, self.weights = list[onnx.NodeProto](), list[onnx.TensorProto]()
        self.sizes = {"B": 0, "S": 0, "H": draw(st.sampled_from([2, 3, 4])), "D": draw(st.sampled_from([2, 3, 4]))}

    def add(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def constant(self, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def size(self, atoms: str) -> str:
        """The product of the sizes of the atoms as a vector of one element, computed at run time where it must be."""
        known = int(np.prod([self.sizes[a] for a in atoms if self.sizes[a]], dtype=np.int64))
        size = self.constant(np.array([known], np.int64))
        for atom in (a for a in atoms if not self.sizes[a]):
            index = self.constant(np.array(["BS".index(atom)], np.int64))
            size = self.add("Mul", [size, self.add("Gather", [self.add("Shape", ["x"]), index])])
        return size

    def reshape(self, source: str, groups: list[str]) -> str:
        """Each group of atoms becomes an axis; one of them is sometimes left to be inferred."""
        sizes = [self.size(g) for g in groups]
        if self.draw(st.booleans()):
            sizes[self.draw(st.integers(0, len(groups) - 1))] = self.constant(np.array([-1], np.int64))
        return self.add("Reshape", [source, self.add("Concat", sizes, axis=0)])

    def grouped(self, order: str) -> list[str]:
        """The atoms in this order, cut into runs."""
        cuts = [i for i in range(1, 4) if self.draw(st.booleans())]
        return [order[a:b] for a, b in zip([0, *cuts], [*cuts, 4], strict=True)]

    def model(self) -> onnx.ModelProto:
        width = self.sizes["H"] * self.sizes["D"]
        first = self.constant(self.random.normal(size=(5, width)).astype(np.float32))
        tensor, order = self.add("MatMul", ["x", first]), "BSHD"
        for _ in range(self.draw(st.integers(1, 4))):
            tensor = self.reshape(tensor, list(order))
            perm = list(self.draw(st.permutations(range(4))))
            tensor = self.add("Transpose", [tensor], perm=perm)
            order = "".join(order[i] for i in perm)
            groups = self.grouped(order)
            tensor = self.add(self.draw(st.sampled_from(["Neg", "Sigmoid"])), [self.reshape(tensor, groups)])
            if self.sizes[groups[-1][0]] and self.draw(st.booleans()):
                bias = self.random.normal(size=int(np.prod([self.sizes[a] or 1 for a in groups[-1]]))).astype(np.float32)
                if all(self.sizes[a] for a in groups[-1]):
                    tensor = self.add("Add", [tensor, self.constant(bias)])
        tensor = self.reshape(tensor, list(order))
        tensor = self.add("Transpose", [tensor], perm=[order.index(a) for a in "BSHD"])
        tensor = self.reshape(tensor, ["B", "S", "HD"])
        self.nodes.append(
            helper.make_node("MatMul", [tensor, self.constant(self.random.normal(size=(width, 3)).astype(np.float32))], ["y"])
        )
        x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["B", "S", 5])
        y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["B", "S", 3])
        graph = helper.make_graph(self.nodes, "g", [x], [y], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@st.composite
def arrangements(draw: st.DrawFn) -> onnx.ModelProto:
    return Arranger(draw).model()


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(arrangements())
def test_random_arrangements(proto: onnx.ModelProto) -> None:
    feeds = [soundness.inputs(proto, symbols=sizes) for sizes in ({"B": 2, "S": 3}, {"B": 3, "S": 2})]
    assert soundness.findings(proto, feeds) == []
