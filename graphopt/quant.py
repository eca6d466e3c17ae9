"""How each op is quantised, as a table: which inputs take which type, on which axis, and which tensors share a scale.

The table says what quantisation means for an op; a target (`graphopt.targets`) says whether a runtime has a kernel for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import attribute, op_key
from graphopt.edit import constant_value
from graphopt.model import Model
from graphopt.operands import has_input, operand


@dataclass(frozen=True)
class QTensor:
    """`dtype` "activation" is the target's u8 or s8; s8 are weights, s32 biases. `per_channel`: one scale along `QOp.axis`."""

    dtype: str
    per_channel: bool = False
    symmetric: bool = False


ACTIVATION = QTensor("activation")
WEIGHT = QTensor("s8", per_channel=True, symmetric=True)
BIAS = QTensor("s32", per_channel=True, symmetric=True)


@dataclass(frozen=True)
class QOp:
    """One op. Inputs without a row (shapes, axes, pads) stay as they are; `others` is the row of all inputs not in `inputs`.

    `axis` is the weight's axis of output channels. `shares`: inputs and outputs hold the same values, so they have one scale.
    `heavy`: worth quantising for its own sake; other ops are only where their neighbours are quantised. `absorbed`: the saturation
    of a quantised output does what the op does. `misfit` gives the reason why this node cannot be quantised, or "".
    """

    inputs: Mapping[int, QTensor] = field(default_factory=lambda: {0: ACTIVATION})
    others: QTensor | None = None
    axis: Callable[[gs.Node], int] = lambda node: 0
    shares: bool = False
    heavy: bool = False
    absorbed: bool = False
    misfit: Callable[[gs.Node, int], str] = lambda node, opset: ""

    def row(self, index: int) -> QTensor | None:
        """What input `index` becomes; None: it stays as it is."""
        return self.inputs.get(index, self.others)


# ---- why a node does not fit its row


def _weight_misfit(node: gs.Node, opset: int) -> str:
    if not isinstance(node.inputs[1], gs.Constant):
        return "its weight is not a constant"
    if has_input(node, 2) and not isinstance(node.inputs[2], gs.Constant):
        return "its bias is not a constant"
    return ""


def _transposed_misfit(node: gs.Node, opset: int) -> str:
    if attribute(node, "group", opset) != 1:
        return "the weight of a grouped ConvTranspose has no axis of all output channels"
    return _weight_misfit(node, opset)


def _gemm_misfit(node: gs.Node, opset: int) -> str:
    if attribute(node, "alpha", opset) != 1 or attribute(node, "beta", opset) != 1 or attribute(node, "transA", opset):
        return "alpha, beta or transA is set"
    reason = _weight_misfit(node, opset)
    if not reason and has_input(node, 2):
        channels = node.inputs[1].shape[_gemm_axis(node)]
        if int(np.prod(node.inputs[2].shape)) != channels or node.inputs[2].shape[-1:] != (channels,):
            return "its bias is not one value a column"
    return reason


def _gemm_axis(node: gs.Node) -> int:
    return 0 if node.attrs.get("transB") else 1


def _matmul_misfit(node: gs.Node, opset: int) -> str:
    if not isinstance(node.inputs[1], gs.Constant):
        return "it multiplies two activations (attention): no faster in INT8, and less accurate"
    return "" if len(node.inputs[1].shape) == 2 else "its weight is not a matrix"


def _binary_misfit(node: gs.Node, opset: int) -> str:
    if any(isinstance(t, gs.Constant) for t in node.inputs):
        return "one input is a constant: rounding again for a scale or an offset costs more accuracy than time"
    return "it squares its input" if node.op == "Mul" and node.inputs[0] is node.inputs[1] else ""


def _resize_misfit(node: gs.Node, opset: int) -> str:
    return "" if attribute(node, "mode", opset) == "nearest" else "it interpolates, which has no INT8 kernel"


def _pad_misfit(node: gs.Node, opset: int) -> str:
    mode = attribute(node, "mode", opset)
    if mode in ("reflect", "edge", "wrap"):
        return ""
    fill = operand(node, "value", 2)
    zero = fill.known and (fill.values is None or not np.any(fill.values))
    return "" if mode == "constant" and zero else "it pads with something other than zero"


def _relu_bounds(node: gs.Node) -> tuple[float, float]:
    return 0.0, np.inf


def _clip_bounds(node: gs.Node) -> tuple[float, float] | None:
    """(low, high) of a Clip with constant bounds; None where they are computed."""
    low, high = operand(node, "min", 1), operand(node, "max", 2)
    if not (low.known and high.known):
        return None
    values = [bound for bound in (low.values, high.values) if bound is not None]
    if any(np.size(v) != 1 for v in values):
        return None
    return (
        -np.inf if low.values is None else np.asarray(low.values).item(),
        np.inf if high.values is None else np.asarray(high.values).item(),
    )


BOUNDS: Mapping[str, Callable[[gs.Node], tuple[float, float] | None]] = {"Relu": _relu_bounds, "Clip": _clip_bounds}


def _clip_misfit(node: gs.Node, opset: int) -> str:
    bounds = BOUNDS[node.op](node)
    if bounds is None:
        return "its bounds are not constants"
    return "" if bounds[0] <= 0 <= bounds[1] else "its bounds exclude zero"


# ---- the table

_MOVE = QOp(shares=True)
_WEIGHTED = QOp({0: ACTIVATION, 1: WEIGHT, 2: BIAS}, heavy=True, misfit=_weight_misfit)

QOPS: Mapping[str, QOp] = {
    "Conv": _WEIGHTED,
    "ConvTranspose": QOp(_WEIGHTED.inputs, axis=lambda node: 1, heavy=True, misfit=_transposed_misfit),
    "Gemm": QOp(_WEIGHTED.inputs, axis=_gemm_axis, heavy=True, misfit=_gemm_misfit),
    "MatMul": QOp({0: ACTIVATION, 1: WEIGHT}, axis=lambda node: 1, heavy=True, misfit=_matmul_misfit),
    "Add": QOp(others=ACTIVATION, misfit=_binary_misfit),
    "Mul": QOp(others=ACTIVATION, misfit=_binary_misfit),
    **dict.fromkeys(("Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Gelu", "Elu", "LeakyRelu"), QOp()),
    "ReduceMean": QOp(),
    "Softmax": QOp(),
    "AveragePool": QOp(),
    "GlobalAveragePool": QOp(),
    "Relu": QOp(absorbed=True, misfit=_clip_misfit),
    "Clip": QOp(absorbed=True, misfit=_clip_misfit),
    "Concat": QOp(others=ACTIVATION, shares=True),
    "MaxPool": QOp(shares=True, misfit=lambda node, opset: "its second output holds indices" if len(node.outputs) > 1 else ""),
    "ReduceMax": _MOVE,
    "ReduceMin": _MOVE,
    "Reshape": _MOVE,
    "Transpose": _MOVE,
    "Flatten": _MOVE,
    "Squeeze": _MOVE,
    "Unsqueeze": _MOVE,
    "Slice": _MOVE,
    "Split": _MOVE,
    "Gather": _MOVE,
    "Expand": _MOVE,
    "Tile": _MOVE,
    "DepthToSpace": _MOVE,
    "SpaceToDepth": _MOVE,
    "Resize": QOp(shares=True, misfit=_resize_misfit),
    "Pad": QOp(shares=True, misfit=_pad_misfit),
}

UNLISTED = "no quantisation rule for this op"

# ---- is it quantised already?

_INTEGER = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"})
_PREFIXES = (
    "QLinear",
    "DynamicQuantize",
    "QAttention",
    "QEmbed",
    "QGemm",
    "QMoE",
    "MatMulInteger",
    "MatMulNBits",
    "MatMulBnb4",
    "Quantize",
    "Dequantize",
)


def quantised_ops(model: Model) -> Counter[str]:
    """The quantised ops of the model, subgraphs included, with their number: QDQ, QLinear, Integer and dynamic forms.

    >>> import onnx.parser
    >>> from graphopt.model import load
    >>> text = '<ir_version: 8, opset_import: ["" : 13]> g (float[1] x, float s) => (uint8[1] y) {y = QuantizeLinear(x, s)}'
    >>> quantised_ops(load(onnx.parser.parse_model(text)))
    Counter({'QuantizeLinear': 1})
    """
    return Counter(op_key(n) for n in model.nodes() if n.op in _INTEGER or n.op.startswith(_PREFIXES) or n.domain == "graphopt")


def weight_value(node: gs.Node, index: int) -> np.ndarray | None:
    """The constant at the input, as float32."""
    value = constant_value(node.inputs[index])
    return None if value is None else value.astype(np.float32, copy=False)
