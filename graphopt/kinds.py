"""What the units of a group are: heads of an attention block, neurons between two matrices, channels, or a residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import onnx_graphsurgeon as gs

from graphopt.attributes import op_key
from graphopt.dims import Dims, Group, Slice

Kind = Literal["heads", "neurons", "channels", "residual"]
KINDS: tuple[Kind, ...] = ("heads", "neurons", "channels")  # those whose removal is exact

_PRODUCTS = frozenset({"MatMul", "com.microsoft::FusedMatMul"})
_MATRICES = frozenset(
    "Einsum GRU Gemm LSTM MatMul RNN com.microsoft::Attention com.microsoft::FusedGemm com.microsoft::FusedMatMul".split()
)  # that make neurons of what they read and write
# ops that attend -> the axis of the heads, by the rank of the tensor
_ATTENTION: dict[str, Mapping[int, int]] = {
    "Attention": {3: 2, 4: 1},
    "com.microsoft::Attention": {3: 2},
    "com.microsoft::GroupQueryAttention": {3: 2, 4: 1},
    "com.microsoft::MultiHeadAttention": {3: 2, 4: 1, 5: 2},
}


def kind_of(group: Group, dims: Dims, tensors: Mapping[str, gs.Tensor]) -> Kind:
    """heads: the units lie along an axis over which two activations are multiplied matrix by matrix, or attended.

    neurons: they lie in matrices (or recurrent weights) alone. channels: anything else, first of all filters of convolutions.
    residual: a LayerNormalization takes their mean and norm (`couple` was asked for them).
    """
    if not dims.is_exact(group.units):
        return "residual"
    if any(_is_head_axis(place, dims, tensors) for place in group.activations):
        return "heads"
    weights = [t for s in group.slices if isinstance(t := tensors.get(s.tensor), gs.Constant) and len(t.shape) > 1]
    readers = {op_key(node) for weight in weights for node in weight.outputs}
    return "neurons" if readers & _MATRICES and not any("Conv" in op for op in readers) else "channels"


def _is_head_axis(place: Slice, dims: Dims, tensors: Mapping[str, gs.Tensor]) -> bool:
    tensor, rank = tensors.get(place.tensor), len(dims.axes.get(place.tensor) or ())
    for node in (*tensor.inputs, *tensor.outputs) if tensor is not None else ():
        op = op_key(node)
        if _ATTENTION.get(op, {}).get(rank) == place.axis and (rank > 3 or _in_runs(place)):
            return True
        if op == "Einsum" and _is_batch_letter(node, tensor, place.axis):
            return True
        if op in _PRODUCTS and place.axis < rank - 2 and not any(isinstance(t, gs.Constant) for t in node.inputs):
            return True
    return False


def _in_runs(place: Slice) -> bool:
    """Whether neighbouring indices go together, as the features of a head do where heads and features share an axis."""
    return bool(((place.labels[1:] == place.labels[:-1]) & (place.labels[1:] > 0)).any())


def _is_batch_letter(node: gs.Node, tensor: gs.Tensor | None, axis: int) -> bool:
    """Whether two activations and the result have the letter of this axis of one of them."""
    left, _, right = str(node.attrs.get("equation", "")).replace(" ", "").partition("->")
    sides = left.split(",")
    if len(sides) != len(node.inputs) or any(isinstance(t, gs.Constant) for t in node.inputs):
        return False
    text = next((s for s, t in zip(sides, node.inputs, strict=True) if t is tensor), right)
    return axis < len(text) and len(sides) > 1 and all(text[axis] in side for side in (*sides, right))
