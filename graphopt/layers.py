"""Linear layers as repair and data-driven criteria see them: one matrix that mixes input features into outputs, and a bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import op_key
from graphopt.edit import Wiring, only_user
from graphopt.model import Model

MALFORMED = (ArithmeticError, LookupError, StopIteration, TypeError, ValueError)  # what rules meet in damaged nodes


@dataclass(frozen=True)
class Window:
    """How a convolution reads its input; `pads` is begins then ends, None where `auto_pad` decides from the input's size."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    upper: bool = True  # SAME_UPPER: an odd padding has its larger half at the end

    @property
    def extents(self) -> tuple[int, ...]:
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    def padding(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        """(before, after) of each spatial axis of that size (ONNX spec, Conv, auto_pad)."""
        if self.pads is not None:
            half = len(self.kernel)
            return list(zip(self.pads[:half], self.pads[half:], strict=True))
        found = []
        for size, stride, extent in zip(sizes, self.strides, self.extents, strict=True):
            total = max((-(-size // stride) - 1) * stride + extent - size, 0)
            small, large = total // 2, total - total // 2
            found.append((small, large) if self.upper else (large, small))
        return found


@dataclass(frozen=True)
class Layer:
    """y = x W + b. The matrix form of W has shape (groups, features, outputs a group): see `to_matrix`.

    `x` and `y` are tensors; the channels of a convolution lie on axis 1, of a Gemm or MatMul on the last. `bias` is None where
    there is none; `addable`: the operator has an input for one. `other`: what is added to y by the one operator that reads it.
    """

    node: str
    op: str
    x: str
    y: str
    weight: str
    bias: str | None
    addable: bool
    groups: int
    window: Window | None
    transposed: bool  # the weight is [outputs, features]
    other: str | None

    @property
    def out_axis(self) -> int:
        """The weight's axis of outputs."""
        return 0 if self.transposed or self.window is not None else 1

    @property
    def in_axis(self) -> int:
        """The weight's axis of inputs; of a depthwise convolution the axis of its groups, which are both."""
        return 1 - self.out_axis if self.groups == 1 else 0

    @property
    def channel_axis(self) -> int:
        """Where x and y have their channels."""
        return -1 if self.window is None else 1


def to_matrix(layer: Layer, weight: np.ndarray) -> np.ndarray:
    """The weight as (groups, features, outputs a group): of a convolution, features are (channel of the group, *kernel)."""
    if layer.window is None:
        return weight.T[None] if layer.transposed else weight[None]
    return np.asarray(weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1).transpose(0, 2, 1))


def from_matrix(layer: Layer, matrix: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The inverse of `to_matrix`, in the shape and dtype of `like`."""
    if layer.window is None:
        found = matrix[0].T if layer.transposed else matrix[0]
    else:
        found = matrix.transpose(0, 2, 1)
    return np.ascontiguousarray(found.reshape(like.shape), dtype=like.dtype)


def find_layers(model: Model) -> tuple[list[Layer], list[tuple[gs.Node, str]]]:
    """The linear layers of the main graph in its order, and those that cannot be taken, with the reason."""
    wiring = model.wiring()
    layers: list[Layer] = []
    left: list[tuple[gs.Node, str]] = []
    for node in model.graph.nodes:
        rule = RULES.get(op_key(node))
        if rule is None:
            continue
        reason = _unfit(node)
        try:
            layer = None if reason else rule(node)
            layer = layer and _followed(layer, node, wiring)
        except MALFORMED:
            layer, reason = None, f"{node.op} is not as its rule expects"
        if layer is None:
            left.append((node, reason or "its attributes are not those of a plain linear layer"))
        else:
            layers.append(layer)
    return layers, left


def _unfit(node: gs.Node) -> str:
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if not isinstance(weight, gs.Constant):
        return "its weight is not a constant"
    if weight.dtype != np.float32:
        return "its weight is not float32"
    if len(weight.outputs) != 1:
        return "its weight is shared"
    return ""


def _own(tensor: gs.Tensor | None, size: int) -> str | None:
    """The name of a bias that only this node reads."""
    fits = isinstance(tensor, gs.Constant) and tensor.dtype == np.float32 and len(tensor.outputs) == 1
    return tensor.name if tensor is not None and fits and int(np.prod(tensor.shape)) == size else None


def _conv(node: gs.Node) -> Layer | None:
    weight = node.inputs[1]
    outputs, kernel = int(weight.shape[0]), tuple(int(k) for k in weight.shape[2:])
    rank, groups = len(kernel), int(node.attrs.get("group", 1))
    depthwise = groups > 1 and weight.shape[1] == 1 and outputs == groups
    auto = node.attrs.get("auto_pad", "NOTSET")
    pads = tuple(node.attrs.get("pads", (0,) * 2 * rank)) if auto == "NOTSET" else (0,) * 2 * rank
    given = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    bias = _own(given, outputs)
    if (groups > 1 and not depthwise) or (given is not None and bias is None) or not rank:
        return None
    ones = (1,) * rank
    window = Window(
        kernel,
        tuple(node.attrs.get("strides", ones)),
        tuple(node.attrs.get("dilations", ones)),
        None if auto.startswith("SAME") else pads,
        auto != "SAME_LOWER",
    )
    return Layer(
        node.name, "Conv", node.inputs[0].name, node.outputs[0].name, weight.name, bias, given is None, groups, window, True, None
    )


def _gemm(node: gs.Node) -> Layer | None:
    transposed = bool(node.attrs.get("transB", 0))
    if node.attrs.get("transA", 0) or node.attrs.get("alpha", 1.0) != 1 or node.attrs.get("beta", 1.0) != 1:
        return None
    weight = node.inputs[1]
    given = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    bias = _own(given, int(weight.shape[0 if transposed else 1]))
    if given is not None and bias is None:
        return None
    return Layer(
        node.name, "Gemm", node.inputs[0].name, node.outputs[0].name, weight.name, bias, given is None, 1, None, transposed, None
    )


def _matmul(node: gs.Node) -> Layer | None:
    weight = node.inputs[1]
    if len(weight.shape) != 2:
        return None
    return Layer(node.name, "MatMul", node.inputs[0].name, node.outputs[0].name, weight.name, None, False, 1, None, False, None)


RULES: dict[str, Callable[[gs.Node], Layer | None]] = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul}


def _followed(layer: Layer, node: gs.Node, wiring: Wiring) -> Layer:
    """With the bias that an Add behind a MatMul brings, and the other operand of the Add that reads y."""
    user = only_user(node.outputs[0], wiring)
    if layer.op == "MatMul" and user is not None and op_key(user) == "Add":
        added = next(t for t in user.inputs if t is not node.outputs[0])
        bias = _own(added, int(node.inputs[1].shape[1]))
        if bias and len(added.shape) == 1:
            layer = replace(layer, bias=bias, y=user.outputs[0].name)
            user = only_user(user.outputs[0], wiring)
    if user is not None and op_key(user) == "Add":
        other = next((t for t in user.inputs if t.name != layer.y), None)
        if other is not None and not isinstance(other, gs.Constant):
            return replace(layer, other=other.name)
    return layer
