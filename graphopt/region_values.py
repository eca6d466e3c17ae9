"""What QuantizeLinear and DequantizeLinear say about tensors: numbers of activations, weights and biases of a QDQ graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.edit import constant_value, peek, producer
from graphopt.operands import Names, has_input

F = np.float32


@dataclass(frozen=True)
class Numbers:
    """Integers q stand for scale * (q - zero). `signed` ones are written with 128 added, the zero too (see kernels/plan.py)."""

    scale: float
    zero: int
    signed: bool

    def quantise(self, value: float) -> int:
        """The stored integer of a real number, onnxruntime's rounding."""
        with np.errstate(over="ignore"):
            return int(np.clip(np.rint(F(value) / F(self.scale)) + F(self.zero), 0, 255))

    def table(self, to: Numbers) -> np.ndarray:
        """What DequantizeLinear by these numbers and QuantizeLinear by others make of each stored integer."""
        real = (np.arange(256) - self.zero).astype(F) * F(self.scale)
        return np.asarray(np.clip(np.rint(real / F(to.scale)) + F(to.zero), 0, 255), np.uint8)


def numbers(node: gs.Node) -> Numbers | str:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear of an activation, or why they are not usable."""
    if node.attrs.get("block_size"):
        return "its scale is blocked"
    scale = constant_value(node.inputs[1])
    zero = constant_value(node.inputs[2]) if has_input(node, 2) else np.zeros((), _implied(node))
    if scale is None or zero is None:
        return "its scale or zero point is computed"
    if scale.size != 1 or zero.size != 1:
        return "its activation has a scale for each channel"
    if zero.dtype not in (np.uint8, np.int8) or scale.dtype != F:
        return f"its activation is {zero.dtype} with a {scale.dtype} scale, not 8 bits with float32"
    value = float(scale.reshape(()))
    if not (np.isfinite(value) and value > 0):
        return "its scale is not a positive number"
    signed = zero.dtype == np.int8
    return Numbers(value, int(zero.reshape(())) + 128 * signed, signed)


def _implied(node: gs.Node) -> Any:
    kind = node.attrs.get("output_dtype") or onnx.TensorProto.UINT8
    if node.op == "DequantizeLinear" and node.inputs[0].dtype is not None:
        return np.dtype(node.inputs[0].dtype)
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))


def quantised(tensor: gs.Tensor) -> gs.Tensor | None:
    """The activation in integers that a DequantizeLinear turned into `tensor`."""
    node = producer(tensor, "DequantizeLinear")
    return node.inputs[0] if node is not None and constant(node.inputs[0]) is None else None


def constant(tensor: gs.Tensor) -> np.ndarray | None:
    """The value of an initializer, or of one through QuantizeLinear and DequantizeLinear."""
    if isinstance(tensor, gs.Constant):
        return peek(tensor)
    node = producer(tensor, "QuantizeLinear", "DequantizeLinear", "Constant", "Identity")
    if node is None:
        return None
    if node.op == "Constant":
        return constant_value(tensor)
    inputs = [constant(t) if t.name else None for t in node.inputs]
    if any(v is None for t, v in zip(node.inputs, inputs, strict=True) if t.name):
        return None
    return _CONSTANT[node.op](node, inputs)


def _spread(value: np.ndarray, node: gs.Node, rank: int) -> np.ndarray:
    """Scales or zero points along their axis."""
    axis = node.attrs.get("axis", 1) % max(rank, 1)
    return value.reshape(()) if value.size == 1 else value.reshape([-1 if i == axis else 1 for i in range(rank)])


def _quantise(node: gs.Node, inputs: Sequence[np.ndarray | None]) -> np.ndarray | None:
    x, scale = inputs[0], inputs[1]
    assert x is not None
    assert scale is not None
    zero = inputs[2] if len(inputs) > 2 and inputs[2] is not None else np.zeros(1, _implied(node))
    if zero.dtype.kind not in "iu" or zero.dtype.itemsize > 1 or node.attrs.get("block_size"):
        return None
    limits = np.iinfo(zero.dtype)
    real = np.rint(x / _spread(scale, node, x.ndim)) + _spread(zero, node, x.ndim).astype(F)
    return np.asarray(np.clip(real, limits.min, limits.max), zero.dtype)


def _dequantise(node: gs.Node, inputs: Sequence[np.ndarray | None]) -> np.ndarray | None:
    x, scale = inputs[0], inputs[1]
    assert x is not None
    assert scale is not None
    zero = inputs[2] if len(inputs) > 2 and inputs[2] is not None else np.zeros(1, x.dtype)
    if node.attrs.get("block_size"):
        return None
    return np.asarray((x.astype(np.int64) - _spread(zero, node, x.ndim)).astype(F) * _spread(scale, node, x.ndim))


_CONSTANT: Mapping[str, Callable[[gs.Node, Sequence[np.ndarray | None]], np.ndarray | None]] = {
    "QuantizeLinear": _quantise,
    "DequantizeLinear": _dequantise,
    "Identity": lambda node, inputs: inputs[0],
}


@dataclass(frozen=True)
class Given:
    """A constant of a region: what the node is given, and what the body calls it, after the nodes that make it so."""

    tensor: gs.Constant
    name: str
    prologue: tuple[onnx.NodeProto, ...] = ()


@dataclass(frozen=True)
class Weight:
    """int8 weights of zero point 0. `nodes` quantise constants and are needed neither inside nor, perhaps, outside."""

    given: Given
    values: np.ndarray
    scale: gs.Constant
    scales: np.ndarray
    dequantize: gs.Node


def weight(node: gs.Node, axis: int, names: Names, known: dict[int, Given]) -> Weight | str:
    """The weight at input 1, whose output channels lie on `axis`; or why it is not usable."""
    dequantize = producer(node.inputs[1], "DequantizeLinear")
    if dequantize is None:
        return "its weight is not quantised"
    values, scales = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
    if values is None or scales is None or not isinstance(dequantize.inputs[1], gs.Constant):
        return "its weight is not a constant"
    zero = constant(dequantize.inputs[2]) if has_input(dequantize, 2) else np.zeros(1, values.dtype)
    if zero is None or values.dtype not in (np.int8, np.uint8) or scales.dtype != F or dequantize.attrs.get("block_size"):
        return f"its weight is {values.dtype}, not 8 bits with float32 scales"
    if scales.size > 1 and (scales.ndim != 1 or dequantize.attrs.get("axis", 1) % values.ndim != axis):
        return "its weight's scales do not lie along the output channels"
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        return "its weight's scales are not positive numbers"
    middle = 128 if values.dtype == np.uint8 else 0
    if (zero != middle).any():
        return "its weight's zero point is not in the middle"
    source = dequantize.inputs[0]
    if id(source) not in known:
        known[id(source)] = _given(source, values, names)
    return Weight(known[id(source)], _centred(values), dequantize.inputs[1], scales, dequantize)


def _centred(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.int8 else (values ^ np.uint8(128)).view(np.int8)


def _given(tensor: gs.Tensor, values: np.ndarray, names: Names) -> Given:
    """The initializer itself where it holds int8; else a new one, from which the body makes what was there."""
    if values.dtype == np.int8:
        known = isinstance(tensor, gs.Constant)
        return Given(tensor if known else names.constant(f"{tensor.name}_s8", values), tensor.name)
    made = names.constant(f"{tensor.name}_s8", _centred(values))
    kept = names.fresh(f"{made.name}_formal")
    wide, shifted, offset = (names.fresh(f"{made.name}_{part}") for part in ("wide", "shifted", "offset"))
    prologue = (  # onnxruntime folds these before it looks for INT8 operators
        onnx.helper.make_node("Constant", [], [offset], value=onnx.numpy_helper.from_array(np.array(128, np.int32))),
        onnx.helper.make_node("Cast", [kept], [wide], to=onnx.TensorProto.INT32),
        onnx.helper.make_node("Add", [wide, offset], [shifted]),
        onnx.helper.make_node("Cast", [shifted], [tensor.name], to=onnx.TensorProto.UINT8),
    )
    return Given(made, kept, prologue)


def turned(given: Given, values: np.ndarray, names: Names) -> tuple[Given, np.ndarray]:
    """The transpose of a matrix, given in place of it."""
    made = names.constant(f"{given.tensor.name}_t", np.ascontiguousarray(values.T))
    kept = names.fresh(f"{made.name}_formal")
    back = onnx.helper.make_node("Transpose", [kept], [given.name], perm=[1, 0])
    return Given(made, kept, (back, *given.prologue)), np.asarray(made.values)


@dataclass(frozen=True)
class Bias:
    """int32 `values`; `given` is the initializer that holds them. `real`: a float bias in the graph, which the body still adds."""

    given: Given
    values: np.ndarray
    real: gs.Constant | None = None
    dequantize: gs.Node | None = None


def bias(tensor: gs.Tensor, scales: np.ndarray, channels: int, names: Names) -> Bias | str:
    """A bias at `scales` (input times weight), one value a channel; a float one is rounded, as onnxruntime 1.21 and later do it."""
    value, node = constant(tensor), producer(tensor, "DequantizeLinear")
    if value is None:
        return "its bias is not a constant"
    if value.size != channels or value.shape[-1:] != (channels,):
        return "its bias is not one value a channel"
    if node is None:
        if value.dtype != F or not isinstance(tensor, gs.Constant):
            return f"its bias is {value.dtype}, not float32 or int32"
        rounded = np.rint(value / scales.astype(F))
        if not (np.abs(rounded) < 2**31 - 1).all():
            return "its bias does not fit int32"
        made = names.constant(f"{tensor.name}_s32", rounded.astype(np.int32))
        return Bias(Given(made, names.fresh(f"{made.name}_formal")), np.asarray(made.values), tensor)
    integers, given = constant(node.inputs[0]), constant(node.inputs[1])
    if integers is None or integers.dtype != np.int32 or given is None or not isinstance(node.inputs[0], gs.Constant):
        return "its bias is quantised, but not to int32"
    if has_input(node, 2) and np.any(constant(node.inputs[2])):
        return "its bias has a zero point"
    if not np.allclose(given.ravel(), scales.ravel(), rtol=1e-5, atol=0):
        return "its bias is not scaled as input times weight"
    return Bias(Given(node.inputs[0], node.inputs[0].name), integers, None, node)
