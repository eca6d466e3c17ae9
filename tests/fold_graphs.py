"""Random small graphs of affine nodes, linear operators and what lies between them, for the folding passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

Draw = Any
SCALES = [-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 3.0]


@dataclass
class Builder:
    """A graph that grows at its newest tensor; every earlier tensor stays in reach for branches."""

    draw: Draw
    opset: int
    random: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    top: str = "x"

    @property
    def shape(self) -> list[int]:
        return self.shapes[self.top]

    def constant(self, values: Any) -> str:
        array = np.asarray(values)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        self.constants.append(numpy_helper.from_array(array, f"c{len(self.constants)}"))
        return self.constants[-1].name

    def normal(self, *shape: int) -> str:
        return self.constant(self.random.standard_normal(shape))

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Append a node if its shapes fit; the newest tensor is then its first output. Returns its outputs."""
        made = [f"t{len(self.nodes)}_{i}" for i in range(outputs)]
        node = helper.make_node(op, list(inputs), made, name=f"n{len(self.nodes)}", **attributes)
        known = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in self.shapes.items() if n in inputs]
        graph = helper.make_graph([node], "g", known, [], [c for c in self.constants if c.name in inputs])
        inferred = onnx.shape_inference.infer_shapes(_model(graph, self.opset), strict_mode=True, data_prop=True)
        found = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info}
        if not all(found.get(n) is not None and all(d > 0 for d in found[n]) for n in made):
            return []
        self.nodes.append(node)
        self.shapes.update({n: found[n] for n in made})
        self.top = made[0]
        return made


def _model(graph: onnx.GraphProto, opset: int) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _vector(b: Builder, size: int) -> np.ndarray:
    return np.array([b.pick(*SCALES) for _ in range(size)])


def affine_node(b: Builder) -> None:
    op = b.pick("Mul", "Add", "Sub", "Div")
    axis = b.pick(None, 1, 1, 1, len(b.shape) - 1)
    values = _vector(b, 1 if axis is None else b.shape[axis])
    if axis is None:
        values = values.reshape(b.pick((), (1,), (1, 1)))
    else:
        lead = b.pick(0, axis)
        values = values.reshape([1] * lead + [-1] + [1] * (len(b.shape) - axis - 1))
    if op == "Div":
        values = np.where(values == 0, 2.0, values)
    pair = [b.top, b.constant(values)]
    b.add(op, *(pair[::-1] if op != "Div" and b.pick(True, False) else pair))


def batch_normalization(b: Builder) -> None:
    c = b.shape[1]
    spread = b.constant(b.random.uniform(0.1, 2, c))
    b.add("BatchNormalization", b.top, b.constant(_vector(b, c)), b.normal(c), b.normal(c), spread, epsilon=b.pick(1e-5, 0.1))


def pointwise(b: Builder) -> None:
    op = b.pick("Relu", "Relu", "LeakyRelu", "PRelu", "Identity", "Abs", "Sigmoid")
    b.add(op, b.top, *([b.normal(b.shape[1], *[1] * (len(b.shape) - 2))] if op == "PRelu" else []))


def pool(b: Builder) -> None:
    op, spatial = b.pick("MaxPool", "AveragePool", "GlobalAveragePool"), len(b.shape) - 2
    if spatial < 1 or min(b.shape[2:]) < 3:
        return
    if op == "GlobalAveragePool":
        b.add(op, b.top)
        return
    extra = {"count_include_pad": b.pick(0, 1)} if op == "AveragePool" else {}
    pads = [b.pick(0, 1)] * (2 * spatial)
    b.add(op, b.top, kernel_shape=[2] * spatial, strides=[b.pick(1, 2)] * spatial, pads=pads, **extra)


def convolution(b: Builder) -> None:
    spatial, channels = len(b.shape) - 2, b.shape[1]
    op, kernel = b.pick("Conv", "Conv", "ConvTranspose"), b.pick(1, 2, 3)
    if spatial < 1 or min(b.shape[2:]) < kernel:
        return
    groups = b.pick(*[g for g in (1, 2, channels) if channels % g == 0])
    each = b.pick(1, 2)
    shape = (groups * each, channels // groups) if op == "Conv" else (channels, each)
    weights = [b.normal(*shape, *[kernel] * spatial)] + ([b.normal(groups * each)] if b.pick(True, False) else [])
    padding: dict[str, Any] = {"pads": [b.pick(0, 0, 1) for _ in range(2 * spatial)]}
    if op == "Conv" and b.pick(True, False, False):
        padding = {"auto_pad": b.pick("SAME_UPPER", "VALID")}
    b.add(op, b.top, *weights, group=groups, strides=[b.pick(1, 2)] * spatial, dilations=[1] * spatial, **padding)


def product(b: Builder) -> None:
    size = b.shape[-1]
    if len(b.shape) == 2 and b.pick(True, False):
        turned, out = b.pick(0, 1), b.pick(2, 3)
        bias = [b.normal(*b.pick((out,), (1, out), (1,)))] if b.opset < 11 or b.pick(True, False) else []
        weight = b.normal(out, size) if turned else b.normal(size, out)
        b.add("Gemm", b.top, weight, *bias, transB=turned, alpha=b.pick(1.0, 0.5), beta=b.pick(1.0, 2.0))
    elif b.pick(True, True, False):
        b.add("MatMul", b.top, b.normal(size, b.pick(2, 4)))
    else:
        b.add("MatMul", b.normal(3, b.shape[-2]), b.top)


def pad(b: Builder) -> None:
    rank = len(b.shape)
    widths = np.zeros(2 * rank, np.int64)
    widths[b.pick(*range(2 * rank))] = 1
    b.add("Pad", b.top, b.constant(widths), mode=b.pick("constant", "edge"))


def slice_channels(b: Builder) -> None:
    b.add("Slice", b.top, *(b.constant(np.array([v])) for v in (1, b.shape[1], 1, b.pick(1, 2))))


def split_channels(b: Builder) -> None:
    """As the heads of attention."""
    if b.shape[1] % 2 == 0:
        b.add("Reshape", b.top, b.constant(np.array([b.shape[0], 2, b.shape[1] // 2, *b.shape[2:]])))


def to_space(b: Builder) -> None:
    if len(b.shape) == 4 and b.shape[1] % 4 == 0:
        b.add("DepthToSpace", b.top, blocksize=2, mode=b.pick("DCR", "CRD"))


def to_depth(b: Builder) -> None:
    if len(b.shape) == 4 and not (b.shape[2] % 2 or b.shape[3] % 2):
        b.add("SpaceToDepth", b.top, blocksize=2)


# (first opset in this form, step)
MOVES: list[tuple[int, Callable[[Builder], object]]] = [
    (7, lambda b: b.add("Transpose", b.top, perm=b.draw(st.permutations(range(len(b.shape)))))),
    (7, lambda b: b.add("Flatten", b.top, axis=1)),
    (7, lambda b: b.add("Reshape", b.top, b.constant(np.array([0, b.shape[1], -1])))),
    (7, split_channels),
    (7, to_depth),
    (10, slice_channels),
    (11, pad),
    (11, to_space),
    (13, lambda b: b.add("Unsqueeze", b.top, b.constant(np.array([len(b.shape)])))),
]


def moved(b: Builder) -> None:
    b.pick(*[step for opset, step in MOVES if b.opset >= opset])(b)


def joined(b: Builder) -> None:
    """Another tensor of the same shape, from anywhere before."""
    same = [n for n, s in b.shapes.items() if s == b.shape]
    other = b.pick(*same)
    op = b.pick("Add", "Sub", "Mul", "Concat")
    b.add(op, *b.draw(st.permutations([b.top, other])), **({"axis": 1} if op == "Concat" else {}))


def parted(b: Builder) -> None:
    if b.opset >= 13 and b.shape[1] % 2 == 0:
        half = b.shape[1] // 2
        parts = b.add("Split", b.top, b.constant(np.array([half, half])), outputs=2, axis=1)
        if parts and b.pick(True, False):
            b.top = parts[b.pick(0, 1)]
            pointwise(b)
            b.add("Concat", *b.draw(st.permutations([b.top, parts[0]])), axis=1)


STEPS = [affine_node, affine_node, affine_node, batch_normalization, pointwise, pool, convolution, product, moved, joined, parted]


@st.composite
def graphs(draw: Draw) -> onnx.ModelProto:
    """A model with one input 'x' of a fixed shape; the newest tensor and perhaps an earlier one are its outputs."""
    seed = draw(st.integers(0, 1 << 16))
    b = Builder(draw, draw(st.sampled_from([9, 13, 15, 17])), np.random.default_rng(seed))
    b.shapes["x"] = draw(st.sampled_from([[2, 4, 5, 4], [1, 2, 6, 6], [3, 4], [2, 4, 7]]))
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=9)):
        step(b)
    if not b.nodes:
        b.add("Mul", b.top, b.constant(2.0))
    tensors = [n for n in b.shapes if n != "x"]
    outputs = dict.fromkeys([b.top, *draw(st.lists(st.sampled_from(tensors), max_size=1))])
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, b.shapes[n]) for n in ("x", *outputs)]
    used = {n for node in b.nodes for n in node.input}
    return _model(helper.make_graph(b.nodes, "g", infos[:1], infos[1:], [c for c in b.constants if c.name in used]), b.opset)
