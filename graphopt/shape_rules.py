"""Output shapes where ONNX's own inference gives up: symbolic axes and targets that are only partly known.

A rule takes a `Site` (a node and what is known of its inputs) and gives one shape per output, None for what it cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.attributes import attribute
from graphopt.symbols import (
    Size,
    Sizes,
    add,
    broadcast_all,
    ceil_divide,
    divide_exactly,
    floor_divide,
    multiply,
    not_negative,
    product,
    quotient,
    slice_length,
    subtract,
)

MAX_VALUES = 1024  # integer tensors up to this many elements are followed by value


@dataclass
class Known:
    """What is known of each tensor, by name; filled in order of the nodes."""

    opset: int
    sizes: dict[str, Sizes] = field(default_factory=dict)
    dtypes: dict[str, np.dtype] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)  # object arrays of int, bool, Polynomial, None
    types: dict[str, onnx.TypeProto] = field(default_factory=dict)  # sequences, optionals, maps, sparse tensors

    def value(self, tensor: gs.Tensor) -> np.ndarray | None:
        """Known elements; those of a small constant are read on first use."""
        if tensor.name not in self.values and isinstance(tensor, gs.Constant) and np.dtype(tensor.dtype).kind in "iub":
            if np.prod(tensor.shape, dtype=np.int64) <= MAX_VALUES:
                self.values[tensor.name] = objects(np.asarray(tensor.values))
        return self.values.get(tensor.name)


@dataclass(frozen=True)
class Site:
    """A node, for rules."""

    node: gs.Node
    known: Known

    def has(self, index: int) -> bool:
        return index < len(self.node.inputs) and bool(self.node.inputs[index].name)

    def shape(self, index: int = 0) -> Sizes | None:
        return self.known.sizes.get(self.node.inputs[index].name) if self.has(index) else None

    def value(self, index: int) -> np.ndarray | None:
        """Known elements of an integer or boolean input, as an array of objects."""
        return self.known.value(self.node.inputs[index]) if self.has(index) else None

    def sizes(self, index: int) -> Sizes | None:
        """A 1-D input as a list of sizes; unknown elements are None, an unknown length gives None."""
        value = self.value(index)
        if value is not None:
            return tuple(None if isinstance(v, bool) else v for v in value.reshape(-1).tolist())
        length = (self.shape(index) or (None, None))[0]
        single = len(self.shape(index) or ()) == 1
        return (None,) * length if single and isinstance(length, int) and length <= MAX_VALUES else None

    def attr(self, name: str) -> Any:
        return attribute(self.node, name, self.known.opset)

    def ints(self, index: int, name: str) -> list[int] | None:
        """A list that is an attribute in old opsets and a constant input in new ones; None where it is absent or unknown."""
        if name in self.node.attrs:
            return [int(v) for v in np.atleast_1d(self.node.attrs[name])]
        value = self.value(index)
        if value is None or not all(isinstance(v, int) for v in value.reshape(-1)):
            return None
        return [int(v) for v in value.reshape(-1)]


def objects(values: np.ndarray) -> np.ndarray:
    """The array with Python ints and bools as elements."""
    result = np.empty(values.shape, object)
    result[...] = values.tolist() if values.ndim == 0 else values.astype(object)
    return result


Shapes_ = list[Sizes | None]
ShapeRule = Callable[[Site], Shapes_]


def reshape(site: Site) -> Shapes_:
    """0 copies the input's axis (unless allowzero), -1 is what is left (ONNX operator Reshape)."""
    source, target = site.shape(), site.sizes(1) if site.has(1) else tuple(site.node.attrs.get("shape", ())) or None
    if target is None:
        return [None]
    copied = list(target)
    if not site.attr("allowzero"):
        for axis, size in enumerate(target):
            if size == 0:
                copied[axis] = source[axis] if source is not None and axis < len(source) else None
    unknown = [i for i, size in enumerate(copied) if size is None or size == -1]
    if len(unknown) == 1 and source is not None:
        rest = [size for i, size in enumerate(copied) if i != unknown[0]]
        copied[unknown[0]] = quotient(source, rest)
    return [tuple(None if size == -1 else size for size in copied)]


def flatten(site: Site) -> Shapes_:
    shape, axis = site.shape(), site.attr("axis")
    if shape is None:
        return [None]
    return [(product(shape[:axis]), product(shape[axis:]))]


def expand(site: Site) -> Shapes_:
    target = site.sizes(1)
    return [broadcast_all([site.shape(), target])] if target is not None else [None]


def tile(site: Site) -> Shapes_:
    shape, repeats = site.shape(), site.sizes(1)
    if shape is None or repeats is None or len(shape) != len(repeats):
        return [None]
    return [tuple(multiply(a, b) for a, b in zip(shape, repeats, strict=True))]


def constant_of_shape(site: Site) -> Shapes_:
    return [site.sizes(0)]


def range_(site: Site) -> Shapes_:
    start, limit, delta = (site.sizes(i) for i in range(3))
    if start is None or limit is None or delta is None or not isinstance(delta[0], int) or delta[0] <= 0:
        return [(None,)]
    length = subtract(limit[0], start[0])
    return [(ceil_divide(length, delta[0]) if not_negative(length) else None,)]


def slice_(site: Site) -> Shapes_:
    shape = site.shape()
    starts, ends, axes, steps = slice_arguments(site)
    if shape is None or axes is None:
        return [None if shape is None or starts is None else (None,) * len(shape)]
    result = list(shape)
    for i, axis in enumerate(axes):
        start, end, step = (x[i] if x is not None else None for x in (starts, ends, steps))
        result[axis] = slice_length(shape[axis], start, end, step)
    return [tuple(result)]


def slice_arguments(site: Site) -> tuple[Sizes | None, Sizes | None, list[int] | None, Sizes | None]:
    """Starts, ends, axes and steps of a Slice: attributes before opset 10, inputs since."""
    starts, ends = (tuple(site.attr(n) or ()) or site.sizes(i) for i, n in ((1, "starts"), (2, "ends")))
    count = len(starts) if starts is not None else len(ends) if ends is not None else 0
    axes = site.ints(3, "axes") if site.has(3) or "axes" in site.node.attrs else list(range(count))
    return starts, ends, axes, site.sizes(4) if site.has(4) else (1,) * count


def concat(site: Site) -> Shapes_:
    shapes = [site.shape(i) for i in range(len(site.node.inputs))]
    known = [s for s in shapes if s is not None]
    if not known:
        return [None]
    axis = site.attr("axis") % len(known[0])
    result: list[Size] = [next((s[i] for s in known if s[i] is not None), None) for i in range(len(known[0]))]
    for i in range(len(result)):
        result[i] = next((s[i] for s in known if isinstance(s[i], int)), result[i])
    total: Size = 0
    for shape in shapes:
        total = add(total, shape[axis] if shape is not None else None)
    result[axis] = total
    return [tuple(result)]


def split(site: Site) -> Shapes_:
    shape, parts, count = site.shape(), site.sizes(1), len(site.node.outputs)
    if shape is None:
        return [None] * count
    axis = site.attr("axis") % len(shape)
    parts = tuple(site.node.attrs["split"]) if "split" in site.node.attrs else parts
    if parts is None and not site.has(1):
        parts = (divide_exactly(shape[axis], count),) * count
    parts = parts if parts is not None and len(parts) == count else (None,) * count
    return [(*shape[:axis], part, *shape[axis + 1 :]) for part in parts]


def pad(site: Site) -> Shapes_:
    shape, pads = site.shape(), site.sizes(1) if site.has(1) else tuple(site.node.attrs.get("pads", ())) or None
    axes = site.ints(3, "axes") if site.has(3) else list(range(len(shape or ())))
    if shape is None or pads is None or axes is None or len(pads) != 2 * len(axes):
        return [None if shape is None else (None,) * len(shape)]
    result = list(shape)
    for i, axis in enumerate(axes):
        result[axis] = add(shape[axis], add(pads[i], pads[i + len(axes)]))
    return [tuple(result)]


def resize(site: Site) -> Shapes_:
    """Sizes as given; a whole scale multiplies exactly, the inverse of a whole number divides (rounded down)."""
    shape = site.shape()
    if shape is None or site.node.attrs.get("axes") or site.attr("keep_aspect_ratio_policy") not in (None, b"stretch", "stretch"):
        return [None]
    sizes = site.sizes(3)
    if sizes is not None and len(sizes) == len(shape):
        return [sizes]
    scales = _scales(site)
    if scales is None or len(scales) != len(shape):
        return [(None,) * len(shape)]
    return [tuple(_scaled(size, scale) for size, scale in zip(shape, scales, strict=True))]


def _scales(site: Site) -> list[float] | None:
    if "scales" in site.node.attrs:
        return [float(v) for v in site.node.attrs["scales"]]
    for index in (2, 1):
        tensor = site.node.inputs[index] if site.has(index) else None
        if (
            isinstance(tensor, gs.Constant)
            and np.dtype(tensor.dtype).kind == "f"
            and np.prod(tensor.shape) == len(site.shape() or ())
        ):
            return [float(v) for v in np.asarray(tensor.values).reshape(-1)]
    return None


def _scaled(size: Size, scale: float) -> Size:
    if scale >= 1 and scale.is_integer():
        return multiply(size, int(scale))
    if 0 < scale < 1 and (1 / scale).is_integer():
        return floor_divide(size, int(1 / scale))
    return None


def window(site: Site) -> Shapes_:
    """Spatial axes of Conv and pooling: floor((x + pads - dilation * (kernel - 1) - 1) / stride) + 1, or ceil."""
    shape, weights = site.shape(), site.shape(1)
    kernel = site.node.attrs.get("kernel_shape") or (weights[2:] if weights is not None else None)
    if shape is None or kernel is None or len(kernel) != len(shape) - 2:
        return [None]
    rank, automatic = len(kernel), site.attr("auto_pad") or "NOTSET"
    strides, dilations = (site.node.attrs.get(n) or [1] * rank for n in ("strides", "dilations"))
    pads = (site.node.attrs.get("pads") or [0] * 2 * rank) if automatic == "NOTSET" else [0] * 2 * rank
    spatial: list[Size] = []
    for i in range(rank):
        if automatic.startswith("SAME"):
            spatial.append(ceil_divide(shape[i + 2], strides[i]))
            continue
        reach = add(multiply(add(kernel[i], -1), dilations[i]), 1 - pads[i] - pads[i + rank])
        spatial.append(add(_windows(subtract(shape[i + 2], reach), strides[i], bool(site.attr("ceil_mode"))), 1))
    return [(None, None, *spatial)]


def _windows(room: Size, stride: int, ceil: bool) -> Size:
    if ceil:  # runtimes drop a last window that starts in the padding: only exact without one
        return divide_exactly(room, stride)
    return floor_divide(room, stride)


def transposed_window(site: Site) -> Shapes_:
    """ConvTranspose: stride * (x - 1) + output_padding + dilation * (kernel - 1) + 1 - pads."""
    shape, weights = site.shape(), site.shape(1)
    kernel = site.node.attrs.get("kernel_shape") or (weights[2:] if weights is not None else None)
    if shape is None or kernel is None or site.attr("auto_pad") not in (None, "NOTSET") or "output_shape" in site.node.attrs:
        return [None]
    rank = len(kernel)
    strides, dilations = (site.node.attrs.get(n) or [1] * rank for n in ("strides", "dilations"))
    pads, extra = site.node.attrs.get("pads") or [0] * 2 * rank, site.node.attrs.get("output_padding") or [0] * rank
    spatial = [
        add(
            multiply(add(shape[i + 2], -1), strides[i]),
            add(multiply(add(kernel[i], -1), dilations[i]), extra[i] + 1 - pads[i] - pads[i + rank]),
        )
        for i in range(rank)
    ]
    return [(None, None, *spatial)]


def same(site: Site) -> Shapes_:
    return [site.shape()]


SHAPE_RULES: dict[str, ShapeRule] = {
    "AveragePool": window,
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "Conv": window,
    "ConvInteger": window,
    "ConvTranspose": transposed_window,
    "Expand": expand,
    "Flatten": flatten,
    "LpPool": window,
    "MaxPool": lambda site: window(site) * len(site.node.outputs),
    "Pad": pad,
    "Range": range_,
    "Reshape": reshape,
    "Resize": resize,
    "Slice": slice_,
    "Split": split,
    "Tile": tile,
    "Upsample": resize,
}

# operators that give the shape and type of their first input: no need to ask ONNX
SAME = frozenset(
    "Abs Acos Acosh Asin Asinh Atan Atanh Ceil Celu Clip Cos Cosh CumSum Elu Erf Exp Floor Gelu HardSigmoid HardSwish Hardmax "
    "Identity LeakyRelu Log LogSoftmax LpNormalization LRN MeanVarianceNormalization Mish Neg Not PRelu Reciprocal Relu Round Selu "
    "Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Trilu "
    "com.microsoft::BiasGelu com.microsoft::BiasSoftmax com.microsoft::FastGelu com.microsoft::Gelu com.microsoft::QuickGelu "
    "com.microsoft::QLinearLeakyRelu com.microsoft::QLinearSigmoid com.microsoft::QLinearSoftmax "
    "com.microsoft::RotaryEmbedding".split()
)
# elementwise with broadcasting and one type; comparisons give booleans
BROADCAST = frozenset("Add And BitwiseAnd BitwiseOr BitwiseXor BitShift Div Max Mean Min Mod Mul Or Pow Sub Sum Xor".split())
COMPARE = frozenset("Equal Greater GreaterOrEqual Less LessOrEqual".split())

# operators ONNX's inference does not know, as one that it knows: (operator, its inputs, where the output's type comes from)
ALIKE: dict[str, tuple[str, tuple[int, ...], int]] = {
    "com.microsoft::DequantizeLinear": ("Identity", (0,), 1),
    "com.microsoft::DynamicQuantizeLSTM": ("LSTM", (0, 1, 2, 3, 4, 5, 6, 7), 0),
    "com.microsoft::DynamicQuantizeMatMul": ("MatMul", (0, 1), 0),
    "com.microsoft::FusedConv": ("Conv", (0, 1, 2), 0),
    "com.microsoft::FusedGemm": ("Gemm", (0, 1, 2), 0),
    "com.microsoft::MatMulIntegerToFloat": ("MatMul", (0, 1), 2),
    "com.microsoft::QLinearAdd": ("Add", (0, 3), 0),
    "com.microsoft::QLinearMul": ("Mul", (0, 3), 0),
    "com.microsoft::QuantizeLinear": ("Identity", (0,), 2),
}
