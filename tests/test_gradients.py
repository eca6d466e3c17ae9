"""Rules of gradients against central differences, where the gradient stops, and moments against a direct computation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import pytest

from graphopt.errors import ModelError
from graphopt.gradients import Backward, backward
from graphopt.model import Model, from_proto
from graphopt.runtime import session
from graphopt.shapes import shapes
from graphopt.vjp import VJP_RULES, Tape

# op -> graphs with it. T is the float type; x... are the inputs whose gradient is checked (xp: positive values), y the output
RULES: dict[str, list[str]] = {
    "Abs": ["g (T[N,4] x) => (T[N,4] y) { y = Abs(x) }"],
    "Add": [
        "g (T[N,4] x, T[N,4] x1) => (T[N,4] y) { y = Add(x, x1) }",
        "g (T[N,4] x, T[4] x1) => (T[N,4] y) { y = Add(x, x1) }",
        "g (T[N,1,4] x, T[3,1] x1) => (T[N,3,4] y) { y = Add(x, x1) }",
        "g (T[N,4] x, T[M,4] x1) => (T[P,4] y) { y = Add(x, x1) }",
        "g (T[N,M] x, T[P] x1) => (T[N,Q] y) { y = Add(x, x1) }",
    ],
    "AveragePool": [
        "g (T[N,2,6,6] x) => (T[N,2,3,3] y) { y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(x) }",
        "g (T[N,2,6,5] x) => (T[N,2,2,2] y) { y = AveragePool<kernel_shape=[3,2], strides=[3,2], pads=[0,0,0,0]>(x) }",
        "g (T[N,2,6,6] x) => (T[N,2,6,6] y) { y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x) }",
        "g (T[N,2,6,6] x) => (T[N,2,6,6] y) { y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x) }",
        "g (T[N,2,7,H] x) => (T[N,2,4,K] y) { y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x) }",
        'g (T[N,2,7] x) => (T[N,2,4] y) { y = AveragePool<kernel_shape=[3], strides=[2], auto_pad="SAME_UPPER">(x) }',
    ],
    "BatchNormalization": [
        "g (T[N,3,2,2] x) => (T[N,3,2,2] y) <T[3] s = {1, -2, 0.5}, T[3] b = {1, 2, 3}, T[3] m = {0, 1, 0}, T[3] q = {1, 2, 0.5}> "
        "{ y = BatchNormalization(x, s, b, m, q) }",
        "g (T[N,3] x) => (T[N,3] y) <T[3] s = {1, -2, 0.5}, T[3] b = {1, 2, 3}, T[3] m = {0, 1, 0}, T[3] q = {1, 2, 0.5}> "
        "{ y = BatchNormalization<epsilon=0.5>(x, s, b, m, q) }",
    ],
    "Cast": ["g (T[N,4] x) => (float[N,4] y) { y = Cast<to=1>(x) }"],
    "CastLike": ["g (T[N,4] x) => (float[N,4] y) <float like = {0}> { y = CastLike(x, like) }"],
    "Clip": [
        "g (T[N,8] x) => (T[N,8] y) <T low = {-0.5}, T high = {0.5}> { y = Clip(x, low, high) }",
        "g (T[N,8] x) => (T[N,8] y) <T high = {0.5}> { y = Clip(x, , high) }",
        "g (T[N,8] x) => (T[N,8] y) { y = Clip(x) }",
    ],
    "Concat": [
        "g (T[N,2] x, T[N,3] x1) => (T[N,5] y) { y = Concat<axis=-1>(x, x1) }",
        "g (T[N,2,4] x, T[N,C,4] x1) => (T[N,D,4] y) { y = Concat<axis=1>(x, x1, x) }",
    ],
    "Conv": [
        "g (T[N,3,6,5] x, T[4] xb) => (T[N,4,6,5] y) { w = W[4,3,3,3]  y = Conv<pads=[1,1,1,1]>(x, w, xb) }",
        "g (T[N,4,7,6] x) => (T[N,6,3,3] y) { w = W[6,2,3,3]  y = Conv<group=2, strides=[2,2], pads=[0,1,0,0]>(x, w) }",
        "g (T[N,3,9,9] x) => (T[N,6,3,3] y) { w = W[6,1,3,2]  y = Conv<group=3, strides=[2,3], dilations=[2,1]>(x, w) }",
        "g (T[N,3,H,K] x) => (T[N,4,J,L] y) { w = W[4,3,3,3]  y = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w) }",
        "g (T[N,3,H] x) => (T[N,4,J] y) { w = W[4,3,5]  y = Conv<pads=[4,0], dilations=[1]>(x, w) }",
        "g (T[N,3,8] x) => (T[N,4,4] y) { w = W[4,3,3]  y = Conv<strides=[2], pads=[0,1]>(x, w) }",
        'g (T[N,2,7,7] x) => (T[N,2,4,4] y) { w = W[2,2,3,3]  y = Conv<strides=[2,2], auto_pad="SAME_UPPER">(x, w) }',
        'g (T[N,2,H,7] x) => (T[N,2,K,7] y) { w = W[2,2,2,2]  y = Conv<auto_pad="SAME_LOWER">(x, w) }',
        "g (T[N,2,9,9] x) => (T[N,2,3,3] y) { w = W[2,2,1,1]  y = Conv<strides=[4,4]>(x, w) }",
        "g (T[N,2,3,4,4] x) => (T[N,2,3,2,2] y) { w = W[2,2,1,3,3]  y = Conv(x, w) }",
    ],
    "ConvTranspose": [
        "g (T[N,3,4,4] x, T[2] xb) => (T[N,2,8,8] y) { w = W[3,2,2,2]  y = ConvTranspose<strides=[2,2]>(x, w, xb) }",
        "g (T[N,4,4,3] x) => (T[N,4,8,6] y) { w = W[4,2,3,3]  y = ConvTranspose"
        "<group=2, strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]>(x, w) }",
        "g (T[N,3,5] x) => (T[N,2,9] y) { w = W[3,2,3]  y = ConvTranspose<dilations=[2]>(x, w) }",
    ],
    "Cos": ["g (T[N,4] x) => (T[N,4] y) { y = Cos(x) }"],
    "DepthToSpace": ["g (T[N,8,2,3] x) => (T[N,2,4,6] y) { y = DepthToSpace<blocksize=2>(x) }"],
    "Div": [
        "g (T[N,4] x, T[N,4] xp) => (T[N,4] y) { y = Div(x, xp) }",
        "g (T[N,4] x, T[N,1] xp) => (T[N,4] y) { y = Div(x, xp) }",
    ],
    "Dropout": ["g (T[N,4] x) => (T[N,4] y) { y, mask = Dropout(x) }"],
    "Elu": ["g (T[N,8] x) => (T[N,8] y) { y = Elu<alpha=0.7>(x) }"],
    "Erf": ["g (T[N,4] x) => (T[N,4] y) { y = Erf(x) }"],
    "Exp": ["g (T[N,4] x) => (T[N,4] y) { y = Exp(x) }"],
    "Expand": [
        "g (T[N,1,4] x) => (T[N,3,4] y) <int64[2] s = {3, 1}> { y = Expand(x, s) }",
        "g (T[N,1] x) => (T[2,N,3] y) <int64[3] s = {2, 1, 3}> { y = Expand(x, s) }",
    ],
    "Flatten": ["g (T[N,2,3] x) => (T[N,6] y) { y = Flatten(x) }"],
    "Gather": [
        "g (T[N,5,3] x) => (T[N,3] y) <int64 i = {-2}> { y = Gather<axis=1>(x, i) }",
        "g (T[N,5,3] x) => (T[N,2,2,3] y) <int64[2,2] i = {3, 0, 3, 3}> { y = Gather<axis=1>(x, i) }",
    ],
    "GatherElements": ["g (T[N,3] x) => (T[2,3] y) <int64[2,3] i = {1, 0, 1, 1, 0, 0}> { y = GatherElements(x, i) }"],
    "GatherND": ["g (T[N,3] x) => (T[2,3] y) <int64[2,1] i = {1, 1}> { y = GatherND(x, i) }"],
    "Gelu": [
        "g (T[N,6] x) => (T[N,6] y) { y = Gelu(x) }",
        'g (T[N,6] x) => (T[N,6] y) { y = Gelu<approximate="tanh">(x) }',
    ],
    "Gemm": [
        f"g (T[{a}] x, T[{b}] x1, T[{c}] x2) => (T[3,4] y) {{ "
        f"y = Gemm<transA={ta}, transB={tb}, alpha=0.5, beta=-2.0>(x, x1, x2) }}"
        for a, ta in (("3,2", 0), ("2,3", 1))
        for b, tb, c in (("2,4", 0, "4"), ("4,2", 1, "3,1"))
    ],
    "GlobalAveragePool": ["g (T[N,2,3,H] x) => (T[N,2,1,1] y) { y = GlobalAveragePool(x) }"],
    "GlobalMaxPool": ["g (T[N,2,3,3] x) => (T[N,2,1,1] y) { y = GlobalMaxPool(x) }"],
    "HardSigmoid": ["g (T[N,9] x) => (T[N,9] y) { y = HardSigmoid<alpha=0.5>(x) }"],
    "HardSwish": ["g (T[N,9] x) => (T[N,9] y) <T c = {3}> { z = Mul(x, c)  y = HardSwish(z) }"],
    "Identity": ["g (T[N,4] x) => (T[N,4] y) { y = Identity(x) }"],
    "InstanceNormalization": [
        "g (T[N,2,3,3] x) => (T[N,2,3,3] y) <T[2] s = {1, 2}, T[2] b = {0, 1}> { y = InstanceNormalization(x, s, b) }"
    ],
    "LayerNormalization": [
        "g (T[N,3,5] x, T[5] xs, T[5] xb) => (T[N,3,5] y) { y = LayerNormalization(x, xs, xb) }",
        "g (T[N,3,5] x, T[3,5] xs) => (T[N,3,5] y) { y = LayerNormalization<axis=1, epsilon=0.1>(x, xs) }",
    ],
    "LeakyRelu": ["g (T[N,8] x) => (T[N,8] y) { y = LeakyRelu<alpha=0.3>(x) }"],
    "Log": ["g (T[N,4] xp) => (T[N,4] y) { y = Log(xp) }"],
    "LogSoftmax": ["g (T[N,4,3] x) => (T[N,4,3] y) { y = LogSoftmax<axis=1>(x) }"],
    "MatMul": [
        "g (T[N,4] x, T[4,3] x1) => (T[N,3] y) { y = MatMul(x, x1) }",
        "g (T[N,2,4] x, T[4,3] x1) => (T[N,2,3] y) { y = MatMul(x, x1) }",
        "g (T[N,1,2,4] x, T[N,3,4,3] x1) => (T[N,3,2,3] y) { y = MatMul(x, x1) }",
        "g (T[2,4] x, T[N,3,4,3] x1) => (T[N,3,2,3] y) { y = MatMul(x, x1) }",
    ],
    "Max": ["g (T[N,4] x, T[4] x1) => (T[N,4] y) { y = Max(x, x1) }"],
    "MaxPool": [
        "g (T[N,2,6,6] x) => (T[N,2,3,3] y) { y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) }",
        "g (T[N,2,7,7] x) => (T[N,2,4,4] y) { y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x) }",
        "g (T[N,2,7] x) => (T[N,2,4] y) { y = MaxPool<kernel_shape=[2], strides=[2], ceil_mode=1>(x) }",
    ],
    "Min": ["g (T[N,4] x) => (T[N,4] y) <T c = {0.3}> { y = Min(x, c) }"],
    "Mul": [
        "g (T[N,4] x, T[N,1] x1) => (T[N,4] y) { y = Mul(x, x1) }",
        "g (T[N,3,2,2] x, T[N,3,1,1] x1) => (T[N,3,2,2] y) { y = Mul(x, x1) }",
        "g (T[N,4] x) => (T[N,4] y) { y = Mul(x, x) }",
    ],
    "Neg": ["g (T[N,4] x) => (T[N,4] y) { y = Neg(x) }"],
    "PRelu": ["g (T[N,3,4] x, T[3,1] x1) => (T[N,3,4] y) { y = PRelu(x, x1) }"],
    "Pad": [
        "g (T[N,2,4] x) => (T[N,3,9] y) <int64[6] p = {0,1,2, 0,0,3}> { y = Pad(x, p) }",
        "g (T[N,2,4] x) => (T[N,2,3] y) <int64[6] p = {0,0,-2, 0,0,1}> { y = Pad(x, p) }",
    ],
    "Pow": [
        "g (T[N,4] x) => (T[N,4] y) <T c = {2}> { y = Pow(x, c) }",
        "g (T[N,4] x) => (T[N,4] y) <T[4] c = {1, 2, 3, 0}> { y = Pow(x, c) }",
        "g (T[N,4] xp) => (T[N,4] y) <T c = {-0.5}> { y = Pow(xp, c) }",
    ],
    "Reciprocal": ["g (T[N,4] xp) => (T[N,4] y) { y = Reciprocal(xp) }"],
    "ReduceL2": ["g (T[N,4,3] x) => (T[N,4,1] y) <int64[1] a = {-1}> { y = ReduceL2(x, a) }"],
    "ReduceMax": ["g (T[N,4,3] x) => (T[N,3] y) <int64[1] a = {1}> { y = ReduceMax<keepdims=0>(x, a) }"],
    "ReduceMean": [
        "g (T[N,4,H] x) => (T[N,4] y) <int64[1] a = {-1}> { y = ReduceMean<keepdims=0>(x, a) }",
        "g (T[N,4,3] x) => (T[N,1,1] y) <int64[2] a = {2, 1}> { y = ReduceMean(x, a) }",
    ],
    "ReduceMin": ["g (T[N,4,3] x) => (T[N,1,3] y) <int64[1] a = {1}> { y = ReduceMin(x, a) }"],
    "ReduceSum": [
        "g (T[N,4,3] x) => (T[N,3] y) <int64[1] a = {1}> { y = ReduceSum<keepdims=0>(x, a) }",
        "g (T[N,4] x) => (T[1,1] y) { y = ReduceSum(x) }",
    ],
    "Relu": ["g (T[N,8] x) => (T[N,8] y) { y = Relu(x) }"],
    "Reshape": ["g (T[N,2,6] x) => (T[N,3,4] y) <int64[3] s = {0, 3, -1}> { y = Reshape(x, s) }"],
    "Resize": [
        f"g (T[N,2,3,H] x) => (T[N,2,6,J] y) <float[4] s = {{1, 1, {a}, {b}}}> {{ y = Resize<{how}>(x, , s) }}"
        for a, b in ((2, 2), (2, 0.5))
        for how in (
            'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"',
            'mode="linear"',
            'mode="linear", coordinate_transformation_mode="align_corners"',
            'mode="cubic"',
        )
    ]
    + [
        "g (T[N,2,3,H] x) => (T[N,2,5,4] y) <int64[2] e = {5, 4}> { s = Shape<start=0, end=2>(x)  z = Concat<axis=0>(s, e)"
        '  y = Resize<mode="linear">(x, , , z) }'
    ],
    "Sigmoid": ["g (T[N,4] x) => (T[N,4] y) { y = Sigmoid(x) }"],
    "Sin": ["g (T[N,4] x) => (T[N,4] y) { y = Sin(x) }"],
    "Slice": [
        "g (T[N,5,6] x) => (T[N,3,5] y) <int64[2] s = {-4, 1}, int64[2] e = {-1, 99}, int64[2] a = {1, -1}> "
        "{ y = Slice(x, s, e, a) }",
        "g (T[N,5,6] x) => (T[N,3,2] y) <int64[2] s = {0, 5}, int64[2] e = {9, -99}, int64[2] a = {1, 2}, int64[2] t = {2, -3}> "
        "{ y = Slice(x, s, e, a, t) }",
        "g (T[N,6] x) => (T[2,4] y) <int64[2] s = {0, 2}, int64[2] e = {2, 9}> { y = Slice(x, s, e) }",
    ],
    "Softmax": ["g (T[N,4] x) => (T[N,4] y) { y = Softmax(x) }", "g (T[N,4,3] x) => (T[N,4,3] y) { y = Softmax<axis=1>(x) }"],
    "Softplus": ["g (T[N,4] x) => (T[N,4] y) { y = Softplus(x) }"],
    "SpaceToDepth": ["g (T[N,2,4,6] x) => (T[N,8,2,3] y) { y = SpaceToDepth<blocksize=2>(x) }"],
    "Split": [
        "g (T[N,6] x) => (T[N,2] y) <int64[2] s = {4, 2}> { a, b = Split<axis=1>(x, s)  c, d = Split<axis=-1, num_outputs=2>(a)"
        "  e = Mul(b, d)  y = Add(e, c) }",
        "g (T[N,6] x) => (T[N,2] y) { a, y, c = Split<axis=1, num_outputs=3>(x) }",
    ],
    "Sqrt": ["g (T[N,4] xp) => (T[N,4] y) { y = Sqrt(xp) }"],
    "Squeeze": ["g (T[N,1,4] x) => (T[N,4] y) <int64[1] a = {1}> { y = Squeeze(x, a) }"],
    "Sub": ["g (T[N,4] x, T[1,4] x1) => (T[N,4] y) { y = Sub(x, x1) }"],
    "Sum": ["g (T[N,4] x, T[4] x1, T[N,1] x2) => (T[N,4] y) { y = Sum(x, x1, x2, x) }"],
    "Tanh": ["g (T[N,4] x) => (T[N,4] y) { y = Tanh(x) }"],
    "Tile": ["g (T[N,2,3] x) => (T[N,4,9] y) <int64[3] r = {1, 2, 3}> { y = Tile(x, r) }"],
    "Transpose": [
        "g (T[N,2,3] x) => (T[3,N,2] y) { y = Transpose<perm=[2,0,1]>(x) }",
        "g (T[N,3] x) => (T[3,N] y) { y = Transpose(x) }",
    ],
    "Unsqueeze": ["g (T[N,4] x) => (T[N,1,4] y) <int64[1] a = {1}> { y = Unsqueeze(x, a) }"],
    "Where": ["g (T[N,4] x, T[4] x1) => (T[N,4] y) <bool[4] c = {1, 0, 0, 1}> { y = Where(c, x, x1) }"],
    "com.microsoft::Gelu": ["g (T[N,6] x) => (T[N,6] y) { y = com.microsoft.Gelu(x) }"],
}
CASES = [pytest.param(text, id=f"{op}-{i}") for op, texts in RULES.items() for i, text in enumerate(texts)]
SIZES = {"N": 2, "M": 1, "P": 1, "H": 7, "K": 6, "C": 3}  # of the symbols of inputs


def built(text: str, dtype: str, opset: int = 20) -> Model:
    """The model; `w = W[2,3] ` in its nodes is a weight of random numbers."""
    body, random = text.replace("T[", f"{dtype}[").replace("T c", f"{dtype} c"), np.random.default_rng(1)
    body = body.replace("T low", f"{dtype} low").replace("T high", f"{dtype} high")
    weight = None
    if "w = W[" in body:
        start = body.index("w = W[")
        end = body.index("]", start) + 1
        weight = random.normal(size=[int(v) for v in body[start + 6 : end - 1].split(",")])
        body = body[:start] + body[end:]
    header = f'<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1]> '
    proto = onnx.parser.parse_model(header + body)
    if weight is not None:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype("f4" if dtype == "float" else "f8"), "w"))
    return from_proto(proto)


def differentiated(model: Model, targets: list[str], head: str = "y") -> tuple[onnx.ModelProto, Backward]:
    """The model with the gradient of sum(v * y), v being an input."""
    known = shapes(model)
    proto, tape = model.proto(), Tape(set(model.tensors()), model.opset)
    found = backward(model, known, tape, {head: "v"}, targets)
    kind = onnx.helper.np_dtype_to_tensor_dtype(known.dtypes[head])
    proto.graph.input.append(onnx.helper.make_tensor_value_info("v", kind, [None] * len(known.shapes[head])))
    proto.graph.node.extend(tape.nodes)
    proto.graph.initializer.extend(tape.constants)
    proto.graph.output.extend([onnx.ValueInfoProto(name=name) for name in found.tensors.values()])
    return proto, found


def values(model: Model, dtype: str) -> dict[str, np.ndarray]:
    random, known, feeds = np.random.default_rng(0), shapes(model), {}
    for tensor in model.graph.inputs:
        shape = [d if isinstance(d, int) else SIZES[str(d)] for d in known.shapes[tensor.name]]
        numbers = random.normal(size=shape)
        numbers = np.abs(numbers) + 0.5 if tensor.name == "xp" else numbers
        feeds[tensor.name] = numbers.astype("f4" if dtype == "float" else "f8")
    return feeds


def central(runner: object, feeds: Mapping[str, np.ndarray], name: str, v: np.ndarray, step: float) -> np.ndarray:
    """d sum(v * y) / dx, element by element."""
    found = np.zeros(feeds[name].shape)
    for place in np.ndindex(found.shape):
        sides = []
        for sign in (1, -1):
            moved = feeds[name].copy()
            moved[place] += sign * step
            y = runner.run(["y"], {**feeds, name: moved})[0]  # type: ignore[attr-defined]
            sides.append(float((y.astype(np.float64) * v).sum()))
        found[place] = (sides[0] - sides[1]) / (2 * step)
    return found


@pytest.mark.parametrize("text", CASES)
def test_rule(text: str) -> None:
    """In float64 where onnxruntime has the op in it, else in float32."""
    for dtype, step, tolerance in (("double", 1e-6, 1e-6), ("float", 1e-2, 2e-3)):
        model = built(text, dtype)
        feeds = values(model, dtype)
        try:
            runner = session(model.proto())
        except ModelError:
            assert dtype == "double"
            continue
        proto, found = differentiated(model, list(feeds))
        assert not found.stops
        assert set(found.tensors) == set(feeds)
        y = runner.run(["y"], feeds)[0]
        v = np.random.default_rng(2).normal(size=y.shape).astype(y.dtype)
        try:
            gradients = session(proto).run(list(found.tensors.values()), {**feeds, "v": v})
        except ModelError:
            assert dtype == "double"
            continue
        precise = tolerance if y.dtype == np.float64 else 2e-3
        for name, g in zip(found.tensors, gradients, strict=True):
            assert g.dtype == feeds[name].dtype
            expected = central(runner, feeds, name, v, step if y.dtype == np.float64 else 1e-2)
            np.testing.assert_allclose(g, expected, rtol=precise, atol=precise * np.abs(expected).max(), err_msg=name)
        return


def test_every_rule_is_tested() -> None:
    assert set(RULES) == set(VJP_RULES)
