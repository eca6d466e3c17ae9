"""What a model costs: parameters, bytes of weights, and multiply-accumulates (MACs) of every node.

The MACs of a node are a sum of `Term`s, each a product of axis sizes. Pruning can thus recount a model whose axes shrank without
looking at the graph again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import op_key
from graphopt.model import Model
from graphopt.nominal import bind, reinferred
from graphopt.proto import subgraphs
from graphopt.shapes import Shapes
from graphopt.shapes import shapes as infer

Axis = tuple[str, int]  # tensor name, axis


@dataclass(frozen=True)
class Term:
    """A product of axis sizes times a constant."""

    axes: tuple[Axis, ...]
    factor: int = 1


@dataclass(frozen=True)
class NodeCost:
    """One node that multiplies and accumulates; its MACs are the sum of its terms."""

    name: str
    op: str
    macs: int
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Costs:
    """Figures of a whole model; see `costs` for what is counted."""

    parameters: int
    weight_bytes: int
    macs: int | None  # None where some node could not be counted
    counted_macs: int  # of the nodes that could
    nodes: tuple[NodeCost, ...]
    sizes: Mapping[Axis, int]  # every axis that a term names
    assumed: Mapping[str, int]  # 'input[axis]' or 'input[symbol]' -> the size taken for a dynamic axis
    uncounted: tuple[tuple[str, str], ...]  # node, why its MACs are not in the sum


class _UnknownError(Exception):
    """The MACs of a node cannot be told; the text says why."""


@dataclass(frozen=True)
class _Node:
    """What a rule sees: the node and the number of axes of its tensors."""

    node: gs.Node
    shapes: Shapes

    def axes(self, tensor: gs.Tensor, *which: int) -> tuple[Axis, ...]:
        """The named axes of a tensor, all of them where none is named; negative ones count from the end."""
        shape = self.shapes.static(tensor.name)
        if shape is None:
            raise _UnknownError(f"the shape of '{tensor.name}' is not known")
        return tuple((tensor.name, axis % len(shape)) for axis in which or range(len(shape)))

    def rank(self, tensor: gs.Tensor) -> int:
        return len(self.axes(tensor))


Rule = Callable[[_Node], list[Term]]


def _conv(x: int, w: int) -> Rule:
    """Each output pixel takes one filter: [N, M, *O] x [M, C/group, *K] (ONNX operator Conv)."""

    def rule(n: _Node) -> list[Term]:
        y = n.node.outputs[0]
        return [Term((*n.axes(y, 0, *range(2, n.rank(y))), *n.axes(n.node.inputs[w])))]

    return rule


def _conv_transpose(n: _Node) -> list[Term]:
    """Each input pixel is spread by one filter: [N, C, *I] x [C, M/group, *K] (ONNX operator ConvTranspose)."""
    x, w = n.node.inputs[:2]
    return [Term((*n.axes(x, 0, *range(2, n.rank(x))), *n.axes(w)))]


def _matmul(a: int, b: int) -> Rule:
    """Each output element sums over the last axis of A (numpy.matmul)."""

    def rule(n: _Node) -> list[Term]:
        y = n.node.outputs[0]
        return [Term((*(n.axes(y) if n.shapes.rank(y.name) else ()), *n.axes(n.node.inputs[a], -1)))]

    return rule


def _gemm(a: int, b: int) -> Rule:
    """[M, K] x [K, N], either transposed (ONNX operator Gemm)."""

    def rule(n: _Node) -> list[Term]:
        inner = 0 if n.node.attrs.get("transA", 0) else 1
        return [Term((*n.axes(n.node.outputs[0]), *n.axes(n.node.inputs[a], inner)))]

    return rule


def _recurrent(n: _Node) -> list[Term]:
    """Every step multiplies by W and by R; X is [steps, batch, input], or [batch, steps, input] (ONNX operators RNN, GRU, LSTM)."""
    x, w, r = n.node.inputs[:3]
    steps = n.axes(x, 0, 1)
    return [Term((*steps, *n.axes(w))), Term((*steps, *n.axes(r)))]


def _einsum(n: _Node) -> list[Term]:
    """The product of the sizes of all letters; operands are taken as multiplied all at once."""
    sides = str(n.node.attrs.get("equation", "")).replace(" ", "").split("->")[0].split(",")
    if "." in "".join(sides) or any(len(side) != n.rank(t) for side, t in zip(sides, n.node.inputs, strict=True)):
        raise _UnknownError("an equation with an ellipsis")
    letters = {letter: (t.name, i) for side, t in zip(sides, n.node.inputs, strict=True) for i, letter in enumerate(side)}
    return [Term(tuple(letters.values()))] if len(sides) > 1 else []


def _matmul_nbits(n: _Node) -> list[Term]:
    """Weights of few bits, unpacked on the fly: the sizes are attributes (com.microsoft.MatMulNBits)."""
    return [Term(n.axes(n.node.inputs[0]), int(n.node.attrs.get("N", 0)))]


def _fused_matmul(n: _Node) -> list[Term]:
    """A MatMul that may swap the last two axes of A first (com.microsoft.FusedMatMul)."""
    return [Term((*n.axes(n.node.outputs[0]), *n.axes(n.node.inputs[0], -2 if n.node.attrs.get("transA") else -1)))]


def _attention(n: _Node) -> list[Term]:
    """Scores and sums over the length of the keys, for each feature of queries and result (Attention and its relatives)."""
    q, y = n.node.inputs[0], n.node.outputs[0]
    k = n.node.inputs[1] if len(n.node.inputs) > 1 and n.node.inputs[1].name else q
    length = n.axes(k, 2 if n.rank(k) == 4 else 1)
    whole = q if k is not q and n.rank(q) == n.rank(y) else y  # queries with keys and values beside them are not all summed
    return [Term((*n.axes(whole), *length)), Term((*n.axes(y), *length))]


def _packed_attention(n: _Node) -> list[Term]:
    """The projection to queries, keys and values, then as above (com.microsoft.Attention)."""
    x, y = n.node.inputs[0], n.node.outputs[0]
    sums = Term((*n.axes(y), *n.axes(x, 1)), 2)
    return [Term((*n.axes(x, 0, 1), *n.axes(n.node.inputs[1]))), sums]


def _no_rule(n: _Node) -> list[Term]:
    raise _UnknownError("no rule counts the MACs of this op")


# by op; what is not here multiplies nothing worth counting (elementwise ops, pooling, normalisation, softmax count as zero)
MAC_RULES: dict[str, Rule] = {
    "Attention": _attention,
    "Conv": _conv(0, 1),
    "ConvInteger": _conv(0, 1),
    "ConvTranspose": _conv_transpose,
    "DeformConv": _conv(0, 1),
    "Einsum": _einsum,
    "GRU": _recurrent,
    "Gemm": _gemm(0, 1),
    "LSTM": _recurrent,
    "MatMul": _matmul(0, 1),
    "MatMulInteger": _matmul(0, 1),
    "QLinearConv": _conv(0, 3),
    "QLinearMatMul": _matmul(0, 3),
    "RNN": _recurrent,
    "com.microsoft::Attention": _packed_attention,
    "com.microsoft::DynamicQuantizeLSTM": _recurrent,
    "com.microsoft::DynamicQuantizeMatMul": _matmul(0, 1),
    "com.microsoft::FusedConv": _conv(0, 1),
    "com.microsoft::FusedGemm": _gemm(0, 1),
    "com.microsoft::FusedMatMul": _fused_matmul,
    "com.microsoft::GroupQueryAttention": _attention,
    "com.microsoft::MatMulIntegerToFloat": _matmul(0, 1),
    "com.microsoft::MatMulNBits": _matmul_nbits,
    "com.microsoft::MultiHeadAttention": _attention,
    "com.microsoft::QGemm": _gemm(0, 3),
    "com.microsoft::QLinearConv": _conv(0, 3),
}
# ops of other domains that are known to multiply nothing worth counting; any other is reported as uncounted
ELEMENTWISE = frozenset(
    f"com.microsoft::{op}"
    for op in (
        "BiasGelu BiasSoftmax BiasSplitGelu DequantizeLinear EmbedLayerNormalization FastGelu Gelu QLinearAdd QLinearAveragePool "
        "QLinearConcat "
        "QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearSigmoid QLinearSoftmax QuantizeLinear QuickGelu "
        "RotaryEmbedding SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization"
    ).split()
)

# inputs that hold settings and not weights, by op: bounds, paddings, scales and zero points
_SETTINGS: dict[str, frozenset[int]] = {
    "Clip": frozenset({1, 2}),
    "ConvInteger": frozenset({2, 3}),
    "DequantizeLinear": frozenset({1, 2}),
    "MatMulInteger": frozenset({2, 3}),
    "Pad": frozenset({1, 2, 3}),
    "QLinearConv": frozenset({1, 2, 4, 5, 6, 7}),
    "QLinearMatMul": frozenset({1, 2, 4, 5, 6, 7}),
    "QuantizeLinear": frozenset({1, 2}),
    "Resize": frozenset({1, 2, 3}),
    "Upsample": frozenset({1}),
    "com.microsoft::DynamicQuantizeLSTM": frozenset({8, 9, 10, 11}),
    "com.microsoft::DynamicQuantizeMatMul": frozenset({2, 3}),
    "com.microsoft::MatMulIntegerToFloat": frozenset({2, 3, 4, 5}),
    "com.microsoft::MatMulNBits": frozenset({2, 3, 4}),
    "com.microsoft::QGemm": frozenset({1, 2, 4, 5, 7, 8}),
    "com.microsoft::QLinearConv": frozenset({1, 2, 4, 5, 6, 7}),
}
# where int32 is a bias and not an index: inputs by op
_INT32_WEIGHTS: dict[str, frozenset[int]] = {
    "DequantizeLinear": frozenset({0}),
    "QLinearConv": frozenset({8}),
    "com.microsoft::QGemm": frozenset({6}),
    "com.microsoft::QLinearConv": frozenset({8}),
}


def weights(model: Model) -> list[gs.Constant]:
    """The constants that are parameters of the model.

    Floating-point constants and integers of at most 8 bits with at least one axis, and int32 biases of quantised ops, each once,
    those of subgraphs too. Not counted: scalars, wider integers (shapes, indices), booleans, strings, and what only sets an op up
    (Clip's bounds, Resize's scales, scales and zero points of quantised ops).
    """
    return [c for c in model.constants() if len(c.shape) and any(_is_weight(c, node) for node in c.outputs)]


def _is_weight(constant: gs.Constant, node: gs.Node) -> bool:
    key, dtype = op_key(node), np.dtype(constant.dtype)
    places = {i for i, t in enumerate(node.inputs) if t is constant}
    if dtype == np.int32:
        return bool(places & _INT32_WEIGHTS.get(key, frozenset()))
    numeric = dtype.kind in "fV" or (dtype.kind in "iu" and dtype.itemsize == 1)  # 'V': bfloat16, float8, int4 of ml_dtypes
    return numeric and bool(places - _SETTINGS.get(key, frozenset()))


def parameters(model: Model) -> int:
    """Elements of all `weights`."""
    return sum(prod(c.shape) for c in weights(model))


def costs(model: Model, shapes: Shapes | None = None, *, sizes: Mapping[str, int] | None = None) -> Costs:
    """Parameters, bytes and MACs of a model; `shapes` spares inferring them.

    Batch is 1. Other dynamic axes take the size `sizes` gives them (by symbol, or as 'input[axis]'), else 224 where they are
    height, width or depth of an input of rank 4 or 5, 512 where they are samples (floats of rank 2), else 64; `Costs.assumed`
    says what was taken. Of the branches of an If the costliest counts; the body of a Loop or Scan counts once.
    """
    bound, assumed = bind(model, shapes or infer(model), sizes or {})
    counted, uncounted, macs = _count_all(model, bound)
    if uncounted and assumed:
        again = reinferred(model, bound)
        better = _count_all(model, again)
        if len(better[1]) < len(uncounted):
            bound, (counted, uncounted, macs) = again, better
    named = {axis for n in counted for term in n.terms for axis in term.axes}
    lengths = {axis: (bound.static(axis[0]) or ())[axis[1]] for axis in named}
    held = weights(model)
    return Costs(
        sum(prod(c.shape) for c in held),
        sum(prod(c.shape) * np.dtype(c.dtype).itemsize for c in held),
        None if uncounted else macs,
        macs,
        tuple(counted),
        lengths,
        assumed,
        tuple(uncounted),
    )


def _count_all(model: Model, shapes: Shapes) -> tuple[list[NodeCost], list[tuple[str, str]], int]:
    counted: list[NodeCost] = []
    uncounted: list[tuple[str, str]] = []
    return counted, uncounted, _count(model.graph, shapes, counted, uncounted)


def _count(graph: gs.Graph, shapes: Shapes, counted: list[NodeCost], uncounted: list[tuple[str, str]]) -> int:
    """Append the costs of the graph's nodes and return their sum; subgraphs as `costs` says."""
    total = 0
    for node in graph.nodes:
        rule = MAC_RULES.get(op_key(node), _no_rule if node.domain and op_key(node) not in ELEMENTWISE else None)
        if rule is not None:
            total += _count_node(node, rule, shapes, counted, uncounted)
        bodies: list[tuple[int, list[NodeCost]]] = []
        for body in subgraphs(node):
            inner: list[NodeCost] = []
            bodies.append((_count(body, shapes, inner, uncounted), inner))
        if bodies:
            costliest = max(bodies, key=lambda b: b[0])
            total += costliest[0]
            counted.extend(costliest[1])
    return total


def _count_node(node: gs.Node, rule: Rule, shapes: Shapes, counted: list[NodeCost], uncounted: list[tuple[str, str]]) -> int:
    try:
        terms = tuple(rule(_Node(node, shapes)))
    except _UnknownError as reason:
        uncounted.append((node.name, str(reason)))
        return 0
    except (ArithmeticError, IndexError, KeyError, TypeError, ValueError):  # a malformed node
        uncounted.append((node.name, f"{node.op} is not as its rule expects"))
        return 0
    macs = sum(t.factor * prod((shapes.static(name) or ())[axis] for name, axis in t.axes) for t in terms)
    if macs:
        counted.append(NodeCost(node.name, op_key(node), macs, terms))
    return macs
