"""Why onnxruntime's CPU provider left a quantised node in float, from the graph around it, and what would fix it.

The rules are those of onnxruntime's QDQ selectors; tests/test_audit.py breaks a small model in each of these ways and looks at the
kernels in the profile. Where no rule applies, the reason is said not to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import constant_value, producer
from graphopt.targets import ORT_CPU

Q, DQ = "QuantizeLinear", "DequantizeLinear"
WEIGHTED = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}  # op -> axis of a weight's output channels
_FLOAT_OUTPUT = frozenset(("Gemm", "MatMul"))
_BETWEEN = ("Relu", "Clip")
_FUSED_ALL_THE_SAME = frozenset(("Softmax",))  # onnxruntime has the kernel, graphopt advises against it
_INTEGERS = (np.dtype(np.uint8), np.dtype(np.int8))


@dataclass(frozen=True)
class Reason:
    """One cause and what to do about it."""

    why: str
    fix: str


def is_op(node: gs.Node, op: str) -> bool:
    """Whether it is this op, in ONNX's domain or in com.microsoft's."""
    return bool(node.op == op and node.domain in (None, "", "ai.onnx", "com.microsoft"))


def dequantizer(tensor: gs.Tensor) -> gs.Node | None:
    """The DequantizeLinear that writes the tensor."""
    node = producer(tensor) if len(tensor.inputs) == 1 else None
    return node if node is not None and is_op(node, DQ) else None


def on_activation(dq: gs.Node) -> bool:
    """Whether what it dequantises is computed, and no constant."""
    return constant_value(dq.inputs[0]) is None


def meant_for_int8(node: gs.Node) -> bool:
    """Whether QuantizeLinear and DequantizeLinear around the node say that it is to run on integers.

    It reads a dequantised activation, and writes one that is quantised again (behind Relu or Clip as well), or reads a dequantised
    weight. What only reads the float end of an INT8 part is not meant to.
    """
    if is_op(node, Q) or is_op(node, DQ):
        return False
    sources = [d for t in node.inputs if (d := dequantizer(t)) is not None]
    if not any(on_activation(d) for d in sources):
        return False
    weight = node.op in WEIGHTED and len(node.inputs) > 1 and dequantizer(node.inputs[1]) is not None
    return weight or any(is_op(r, Q) for r in _readers(node))


def _readers(node: gs.Node) -> Iterator[gs.Node]:
    """What reads its outputs, through Relu and Clip."""
    for tensor in node.outputs:
        for reader in tensor.outputs:
            if reader.op in _BETWEEN and not reader.domain and reader.inputs[0] is tensor:
                yield from _readers(reader)
            else:
                yield reader


def dtype(tensor: gs.Tensor) -> np.dtype | None:
    """Of quantised data: of a constant, or as the zero point of what writes or reads it says."""
    value = constant_value(tensor)
    if value is not None:
        return value.dtype
    for node in (*tensor.inputs, *tensor.outputs):
        if (is_op(node, Q) or is_op(node, DQ)) and len(node.inputs) > 2:
            zero = constant_value(node.inputs[2])
            if zero is not None:
                return zero.dtype
    return None if tensor.dtype is None else np.dtype(tensor.dtype)


def _sources(node: gs.Node) -> list[gs.Node]:
    return [d for t in node.inputs[:1] if (d := dequantizer(t)) is not None]


def weight_shape(node: gs.Node) -> tuple[int, ...]:
    """Of a Conv, MatMul or Gemm, through the DequantizeLinear in front of its weight; () where it is not known."""
    if len(node.inputs) < 2:
        return ()
    d = dequantizer(node.inputs[1])
    shape = (node.inputs[1] if d is None else d.inputs[0]).shape
    return tuple(shape) if shape and all(isinstance(v, int) for v in shape) else ()


# ---- the rules, in the order in which they are tried; each gives a Reason or None


def _no_kernel(node: gs.Node, outputs: frozenset[int]) -> Reason | None:
    support = ORT_CPU.support(str(node.op))
    if support.on_integers:
        return Reason(
            f"{node.op}: onnxruntime fuses none with QuantizeLinear and DequantizeLinear",
            f"let {node.op} work on the integers, between QuantizeLinear and DequantizeLinear, as graphopt's quantize writes it",
        )
    if (support.int8 or node.op in _FUSED_ALL_THE_SAME) and node.op not in _BETWEEN:
        return None
    fix = "leave it in float: take its QuantizeLinear and DequantizeLinear away"
    reason = support.reason if not support.int8 else "it is not absorbed by a QuantizeLinear behind an INT8 node"
    return Reason(f"{node.op}: {reason}", fix)


def _wide(node: gs.Node, outputs: frozenset[int]) -> Reason | None:
    found = [t for d in _sources(node) if (t := dtype(d.inputs[0])) is not None and t not in _INTEGERS]
    if not found:
        return None
    return Reason(f"its activation is {found[0]}: the INT8 kernels take uint8 or int8", "quantise activations to uint8")


def _channels_of_activation(node: gs.Node, outputs: frozenset[int]) -> Reason | None:
    for d in _sources(node):
        scale = constant_value(d.inputs[1])
        if scale is None:
            return Reason("the scale of its activation is computed at run time", "write scales as constants")
        if scale.size > 1:
            return Reason(f"its activation has {scale.size} scales: kernels take one", "quantise activations per tensor")
    return None


def _float_weight(node: gs.Node, outputs: frozenset[int]) -> Reason | None:
    if node.op not in WEIGHTED or len(node.inputs) < 2 or dequantizer(node.inputs[1]) is not None:
        return None
    return Reason("its weight is float", "quantise the weight to int8, with a DequantizeLinear in front of the node")


def _axis(node: gs.Node, outputs: frozenset[int]) -> Reason | None:
    if node.op not in WEIGHTED or len(node.inputs) < 2:
        return None
    d = dequantizer(node.inputs[1])
    scale = constant_value(d.inputs[1]) if d is not None else None
    if d is None or scale is None or scale.size == 1:
        return None
    rank = len(d.inputs[0].shape or ())
    wanted = 0 if node.op == "Gemm" and node.attrs.get("transB", 0) else WEIGHTED[str(node.op)]
    if node.op == "MatMul":
        wanted = rank - 1
    found = int(d.attrs.get("axis", 1)) % max(rank, 1)
    if found == wanted:
        return None
    return Reason(
        f"its weight has scales along axis {found}: {node.op} takes them along axis {wanted}, the output channels",
        f"quantise the weight per channel with axis={wanted}, or per tensor",
    )


def _zero_point(node: gs.Node, outputs: frozenset[int]) -> Reason | None:
    d = dequantizer(node.inputs[1]) if node.op == "Gemm" and len(node.inputs) > 1 else None
    if d is None or (len(d.inputs) > 2 and d.inputs[2].name):
        return None
    return Reason("its weight has no zero point, and Gemm is fused only with one", "write the zero point 0 of the weight out")


def _factors(node: gs.Node, outputs: frozenset[int]) -> Reason | None:
    odd = [k for k in ("alpha", "beta") if node.op == "Gemm" and float(node.attrs.get(k, 1.0)) != 1.0]
    if not odd or (odd == ["beta"] and len(node.inputs) < 3):
        return None
    return Reason(
        f"{odd[0]} is {node.attrs[odd[0]]:g}: QGemm is fused with 1 only", f"multiply the weight or bias by {odd[0]} first"
    )


def _also_read(node: gs.Node, outputs: frozenset[int]) -> Reason | None:
    for tensor in node.outputs:
        if id(tensor) in outputs and any(is_op(r, Q) for r in tensor.outputs):
            return Reason(f"its float result '{tensor.name}' is an output of the model as well", "give out the dequantised result")
        floats = [r for r in tensor.outputs if not is_op(r, Q)]
        if len(tensor.outputs) > 1 and floats and len(floats) < len(tensor.outputs):
            return Reason(
                f"its float result is also read by '{floats[0].name}' ({floats[0].op})", "let it read the dequantised result"
            )
    return None


def _float_result(node: gs.Node, outputs: frozenset[int]) -> Reason | None:
    if node.op in _FLOAT_OUTPUT or any(is_op(r, Q) for r in _readers(node)):
        return None
    return Reason("its result is not quantised: no QuantizeLinear behind it", "quantise its output too, or leave the node in float")


def _activation_between(node: gs.Node, outputs: frozenset[int]) -> Reason | None:
    for tensor in node.outputs:
        for reader in tensor.outputs:
            if reader.op in _BETWEEN and not reader.domain and any(is_op(r, Q) for r in _readers(reader)):
                what = f"{reader.op} '{reader.name}'"
                why = f"{what} lies between it and its QuantizeLinear, whose range is wider than what {reader.op} lets pass"
                fix = f"quantise the output of {reader.op} with its own range (for Relu zero point 0 of uint8): it is then absorbed"
                return Reason(why, fix)
    return None


def _bias(node: gs.Node, outputs: frozenset[int]) -> Reason | None:
    if node.op != "Conv" or len(node.inputs) < 3:
        return None
    d, x, w = (dequantizer(t) for t in (node.inputs[2], node.inputs[0], node.inputs[1]))
    if d is None or x is None or w is None:
        return None
    bias, first, second = (constant_value(n.inputs[1]) for n in (d, x, w))
    if bias is None or first is None or second is None or np.allclose(bias, first * second, rtol=1e-3):
        return None
    return Reason(
        "the scale of its bias is not that of activation x weight", "quantise the bias to int32 at scale activation x weight"
    )


Rule = Callable[[gs.Node, frozenset[int]], "Reason | None"]
RULES: tuple[Rule, ...] = (
    _wide, _channels_of_activation, _no_kernel, _float_weight, _axis, _zero_point, _factors, _also_read, _float_result,
    _activation_between, _bias,
)  # fmt: skip


def why_float(node: gs.Node, outputs: frozenset[int]) -> Reason:
    """Why a node that is `meant_for_int8` ran in float; `outputs` holds id() of the model's output tensors."""
    for rule in RULES:
        found = rule(node, outputs)
        if found is not None:
            return found
    types = ", ".join(str(dtype(d.inputs[0])) for d in _sources(node))
    return Reason(
        f"not known: no rule explains why this {node.op} (activation {types or 'float'}) stayed in float",
        "compare it with a node of the same op that runs in INT8",
    )


def breaks(nodes: list[gs.Node]) -> list[tuple[gs.Node, Reason]]:
    """Nodes whose weight scales lie along an axis that makes onnxruntime fail when it runs them."""
    return [(n, reason) for n in nodes if (reason := _axis(n, frozenset())) is not None]
