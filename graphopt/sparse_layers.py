"""Layers whose weights may be stored sparse: which they are, and what is computed behind them in one go.

A layer is a convolution, a Gemm or a MatMul with a constant weight, float32 or int8 behind a DequantizeLinear, with the bias, the
residual sum and the Relu or Clip that follow it. `graphopt.sparse_replace` puts a node in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import Wiring, constant_value, only_user, peek
from graphopt.kernels.sparse_plan import (
    BITS,
    BLOCKS,
    BYTES,
    CONV,
    FLOATS,
    GAPS,
    ROWS,
    SparsePlan,
    Window,
)
from graphopt.model import Model
from graphopt.operands import has_input, operand
from graphopt.shapes import Shapes

OPSET = 11  # the first with ScatterND, CumSum and BitShift
Block = tuple[int, int]
WHOLE = Window()
LARGEST_SCALE = 1e36  # what the engine takes: times 127 it is a float32


@dataclass(frozen=True)
class Storage:
    """How weights are stored: blocks of some shape, or single ones placed by a bitmap."""

    block: Block
    bitmap: bool = False

    @property
    def name(self) -> str:
        """In recipes and reports."""
        return "bitmap" if self.bitmap else "x".join(map(str, self.block))

    def fits(self, layer: Layer) -> bool:
        """Whether it can hold the layer's weights."""
        groups, (n, k) = layer.window.groups, layer.matrix().shape
        return n // groups % self.block[0] == 0 and k % self.block[1] == 0 and (not self.bitmap or layer.kind == ROWS)


STORAGES = (*(Storage(block) for block in BLOCKS), Storage((1, 1), bitmap=True))


@dataclass(frozen=True)
class Layer:
    """`matrix` is the weight as [outputs, inputs] (inputs of one group); `nodes` are all that its replacement is for, sorted."""

    node: gs.Node
    weight: gs.Constant  # float32, or int8 where there are scales
    kind: int
    outputs: int
    inputs: int
    window: Window = WHOLE
    bias: np.ndarray | None = None
    residual: gs.Tensor | None = None
    low: float = float("-inf")
    high: float = float("inf")
    nodes: tuple[gs.Node, ...] = ()
    transposed: bool = False  # the weight is stored [inputs, outputs]
    scales: np.ndarray | None = None  # float32 [outputs]

    @property
    def name(self) -> str:
        """The name of the node, by which recipes and reports call the layer."""
        return str(self.node.name)

    @property
    def output(self) -> gs.Tensor:
        """What the last of the nodes writes."""
        return self.nodes[-1].outputs[0]

    def matrix(self) -> np.ndarray:
        """float32 (or int8, to be scaled) [outputs, inputs / groups * kernel]."""
        values = peek(self.weight)
        return np.ascontiguousarray(values.T) if self.transposed else values.reshape(self.outputs, -1)

    def plan(self, form: Storage) -> SparsePlan:
        """What its replacement computes."""
        biased, summed, numbers = self.bias is not None, self.residual is not None, FLOATS if self.scales is None else BYTES
        limits = self.low, self.high
        places = BITS if form.bitmap else GAPS
        return SparsePlan(
            self.kind, self.outputs, self.inputs, form.block, self.window, biased, summed, *limits, places, numbers
        )  # fmt: skip


@dataclass(frozen=True)
class Site:
    """What finding layers needs to know of the model."""

    model: Model
    shapes: Shapes
    wiring: Wiring
    taken: set[int] = field(default_factory=set)  # id() of nodes that a layer has behind it: a sum of two layers is of the first


@dataclass
class Found:
    """Layers in order of the graph, and why other nodes with weights are none."""

    layers: list[Layer] = field(default_factory=list)
    reasons: list[tuple[gs.Node, str]] = field(default_factory=list)


def find_layers(site: Site) -> Found:
    """The layers of the main graph."""
    found = Found()
    site.taken.clear()
    for node in site.model.graph.nodes:
        rule = None if node.domain else _RULES.get(node.op)
        scaled = None if rule is None or len(node.inputs) < 2 else _dequantize(node.inputs[1])
        weight = scaled.inputs[0] if scaled is not None else node.inputs[1] if len(node.inputs) > 1 else None
        if rule is None or not isinstance(weight, gs.Constant):
            continue
        made = _weight_problem(site, node, weight, scaled) or rule(node, weight)
        if not isinstance(made, str) and scaled is not None:
            made = _scaled(made, scaled)
        if isinstance(made, str):
            found.reasons.append((node, made))
        else:
            found.layers.append(_grown(site, made))
    return found


def _dequantize(tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes a weight float32, if that is what makes it."""
    node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    return node if node is not None and node.op == "DequantizeLinear" and not node.domain and len(node.inputs) > 1 else None


def _weight_problem(site: Site, node: gs.Node, weight: gs.Constant, scaled: gs.Node | None) -> str:
    dtype = np.dtype(weight.dtype)
    if dtype != (np.float32 if scaled is None else np.int8):
        return f"its weight is {dtype}, not float32" if scaled is None else f"its quantised weight is {dtype}, not int8"
    if len(weight.outputs) != 1 or len(node.inputs[1].outputs) != 1:
        return "its weight is read by other nodes too"
    if 0 in weight.shape:
        return "its weight is empty"
    if scaled is not None and _dequantize(node.inputs[0]) is not None:
        return "its input is quantised too: see compile-int8"
    return f"needs opset {OPSET} or later" if site.model.opset < OPSET else ""


def _scaled(layer: Layer, node: gs.Node) -> Layer | str:
    """The layer with the scales of its outputs; or why its DequantizeLinear is another thing than that."""
    scale = constant_value(node.inputs[1])
    zero = constant_value(node.inputs[2]) if has_input(node, 2) else np.zeros(1, np.int8)
    if scale is None or scale.dtype != np.float32 or zero is None or zero.any() or node.attrs.get("block_size", 0):
        return "its weight has computed scales, a zero point or blocks"
    rank, axis = len(layer.weight.shape), int(node.attrs.get("axis", 1))
    if scale.size > 1 and axis % rank != int(layer.transposed):
        return "its weight has scales on another axis than that of the outputs"
    scales = np.ascontiguousarray(np.broadcast_to(scale.reshape(-1), (layer.outputs,)))
    if not ((scales > 0) & (scales < LARGEST_SCALE)).all():
        return f"a scale of its weight is not above 0 and below {LARGEST_SCALE}"
    return replace(layer, scales=scales, nodes=(node, *layer.nodes))


def _conv(node: gs.Node, weight: gs.Constant) -> Layer | str:
    spatial = len(weight.shape) - 2
    if spatial not in (1, 2):
        return f"a convolution of {spatial} spatial axes"
    if str(node.attrs.get("auto_pad", "NOTSET")) not in ("NOTSET", "VALID"):
        return "its auto_pad is not resolved; run the preset fold first"
    groups = int(node.attrs.get("group", 1))

    def pair(name: str) -> tuple[int, int]:
        values = [int(v) for v in node.attrs.get(name, [1] * spatial)]
        return (1, values[0]) if spatial == 1 else (values[0], values[1])

    pads = [int(p) for p in node.attrs.get("pads", [0] * 2 * spatial)]
    top, left, bottom, right = (0, pads[0], 0, pads[1]) if spatial == 1 else pads
    if min(pads) < 0:
        return "its pads are negative"
    kernel = (1, weight.shape[2]) if spatial == 1 else (weight.shape[2], weight.shape[3])
    window = Window(kernel, pair("strides"), pair("dilations"), (top, left, bottom, right), groups)
    bias = None
    if has_input(node, 2):
        bias = constant_value(node.inputs[2])
        if bias is None:
            return "its bias is computed"
    return Layer(node, weight, CONV, int(weight.shape[0]), int(weight.shape[1]) * groups, window, bias, nodes=(node,))


def _gemm(node: gs.Node, weight: gs.Constant) -> Layer | str:
    attrs = node.attrs
    if attrs.get("transA", 0) or attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0:
        return "it has transA, alpha or beta"
    flipped = not attrs.get("transB", 0)
    outputs, inputs = weight.shape[::-1] if flipped else weight.shape
    layer = Layer(node, weight, ROWS, int(outputs), int(inputs), nodes=(node,), transposed=flipped)
    if not has_input(node, 2):
        return layer
    bias = constant_value(node.inputs[2])
    if bias is None or bias.size not in (1, outputs) or (bias.ndim > 1 and bias.shape[-1] != bias.size):
        return "its third input is no bias"
    return replace(layer, bias=np.broadcast_to(bias.reshape(-1), (int(outputs),)))


def _matmul(node: gs.Node, weight: gs.Constant) -> Layer | str:
    if len(weight.shape) != 2:
        return f"a product with a weight of {len(weight.shape)} axes"
    return Layer(node, weight, ROWS, int(weight.shape[1]), int(weight.shape[0]), nodes=(node,), transposed=True)


_RULES: dict[str, Callable[[gs.Node, gs.Constant], Layer | str]] = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul}


# ---- what follows


def _grown(site: Site, layer: Layer) -> Layer:
    """The layer with the bias, the residual and the limits behind it."""
    for step in (_with_bias, _with_residual, _with_limits):
        layer = step(site, layer)
    site.taken.update(id(n) for n in layer.nodes)
    return layer


def _next(site: Site, layer: Layer, *ops: str) -> gs.Node | None:
    """The only reader of the layer's output, if it is one of these in the main graph."""
    node = only_user(layer.output, site.wiring)
    inside = node is not None and site.wiring.home.get(id(node)) == id(site.model.graph)
    fits = node is not None and inside and not node.domain and node.op in ops and id(node) not in site.taken
    return node if fits else None


def _other(node: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
    return node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]


def _with_bias(site: Site, layer: Layer) -> Layer:
    node = _next(site, layer, "Add")
    if node is None or layer.kind != ROWS or layer.bias is not None:
        return layer
    value = constant_value(_other(node, layer.output))
    rank = site.shapes.rank(layer.output.name)
    if value is None or value.dtype != np.float32 or value.size != layer.outputs or value.ndim > (rank or 0):
        return layer
    if value.shape[-1:] != (layer.outputs,):
        return layer
    return replace(layer, bias=value.reshape(-1), nodes=(*layer.nodes, node))


def _with_residual(site: Site, layer: Layer) -> Layer:
    node = _next(site, layer, "Add")
    if node is None:
        return layer
    other = _other(node, layer.output)
    mine, theirs = site.shapes.shape(layer.output.name), site.shapes.shape(other.name)
    if constant_value(other) is not None or mine is None or mine != theirs or None in mine:
        return layer
    return replace(layer, residual=other, nodes=(*layer.nodes, node))


def _with_limits(site: Site, layer: Layer) -> Layer:
    node = _next(site, layer, "Relu", "Clip")
    if node is None:
        return layer
    if node.op == "Relu":
        return replace(layer, low=0.0, nodes=(*layer.nodes, node))
    limits = []
    for index, (name, default) in enumerate((("min", -np.inf), ("max", np.inf)), 1):
        found = operand(node, name, index)
        if not found.known:
            return layer
        limits.append(float(default if found.values is None else found.values.reshape(-1)[0]))
    if not limits[0] <= limits[1]:
        return layer
    return replace(layer, low=limits[0], high=limits[1], nodes=(*layer.nodes, node))
