"""Layers whose weights may be stored sparse: which they are, what is computed behind them in one go, and their replacement.

A layer is a convolution, a Gemm or a MatMul with a constant float32 weight, with the bias, the residual sum and the Relu or Clip
that follow it. Its replacement is one node `graphopt.SparseLayer<n>`, which graphopt's library runs, and a function of that name
for runtimes without the library, which makes the dense weight from the same stored numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from graphopt.edit import Wiring, constant_value, only_user, peek, remove_nodes
from graphopt.kernels.sparse_plan import CONV, MAX_LAYERS, PREFIX, ROWS, SparsePlan, Window, to_sparse
from graphopt.model import OWN, Model
from graphopt.operands import Names, has_input, operand
from graphopt.shapes import Shapes

IR = 8  # the first IR version with functions
OPSET = 11  # the first with ScatterND and CumSum
Block = tuple[int, int]
WHOLE = Window()


@dataclass(frozen=True)
class Layer:
    """`matrix` is the weight as [outputs, inputs] (inputs of one group); `nodes` are all that the replacement stands for."""

    node: gs.Node
    weight: gs.Constant
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

    @property
    def name(self) -> str:
        """The name of the node, by which recipes and reports call the layer."""
        return str(self.node.name)

    @property
    def output(self) -> gs.Tensor:
        """What the last of the nodes writes."""
        return self.nodes[-1].outputs[0]

    def matrix(self) -> np.ndarray:
        """float32 [outputs, inputs / groups * kernel]."""
        values = peek(self.weight)
        return np.ascontiguousarray(values.T) if self.transposed else values.reshape(self.outputs, -1)

    def plan(self, block: Block) -> SparsePlan:
        """What its replacement computes."""
        biased, summed = self.bias is not None, self.residual is not None
        return SparsePlan(self.kind, self.outputs, self.inputs, block, self.window, biased, summed, self.low, self.high)


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
        if rule is None or len(node.inputs) < 2 or not isinstance(node.inputs[1], gs.Constant):
            continue
        made = _weight_problem(site, node) or rule(node)
        if isinstance(made, str):
            found.reasons.append((node, made))
        else:
            found.layers.append(_grown(site, made))
    return found


def _weight_problem(site: Site, node: gs.Node) -> str:
    weight = node.inputs[1]
    if np.dtype(weight.dtype) != np.float32:
        return f"its weight is {np.dtype(weight.dtype)}, not float32"
    if len(weight.outputs) != 1:
        return "its weight is read by other nodes too"
    if 0 in weight.shape:
        return "its weight is empty"
    return f"needs opset {OPSET} or later" if site.model.opset < OPSET else ""


def _conv(node: gs.Node) -> Layer | str:
    weight = node.inputs[1]
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


def _gemm(node: gs.Node) -> Layer | str:
    weight, attrs = node.inputs[1], node.attrs
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


def _matmul(node: gs.Node) -> Layer | str:
    weight = node.inputs[1]
    if len(weight.shape) != 2:
        return f"a product with a weight of {len(weight.shape)} axes"
    return Layer(node, weight, ROWS, int(weight.shape[1]), int(weight.shape[0]), nodes=(node,), transposed=True)


_RULES: dict[str, Callable[[gs.Node], Layer | str]] = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul}


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


# ---- the replacement


def _decode(plan: SparsePlan, shape: Sequence[int]) -> list[onnx.NodeProto]:
    """Nodes that make the dense weight of this shape, OIHW or [inputs, outputs], from `values` and `gaps`."""
    rows, columns = plan.block
    down, across = plan.outputs_ // rows, plan.columns // columns
    numbers: dict[str, Any] = {
        "size": [down * across, rows * columns], "one": [1], "column": [-1, 1], "cut": [down, across, rows, columns],
        "axis": 0, "whole": [plan.outputs_, plan.columns] if plan.kind == ROWS else list(shape),
    }  # fmt: skip
    nodes = [helper.make_node("Constant", [], [name], value=_integers(value)) for name, value in numbers.items()]
    nodes += [
        helper.make_node("Cast", ["gaps"], ["steps"], to=onnx.TensorProto.INT64),
        helper.make_node("CumSum", ["steps", "axis"], ["behind"]),
        helper.make_node("Sub", ["behind", "one"], ["places"]),
        helper.make_node("Reshape", ["places", "column"], ["indices"]),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("ScatterND", ["zeros", "indices", "values"], ["blocks"]),
        helper.make_node("Reshape", ["blocks", "cut"], ["pieces"]),
        helper.make_node("Transpose", ["pieces"], ["lines"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["lines", "whole"], ["matrix" if plan.kind == ROWS else "weight"]),
    ]
    if plan.kind == ROWS:
        nodes.append(helper.make_node("Transpose", ["matrix"], ["weight"], perm=[1, 0]))
    return nodes


def _integers(value: Sequence[int] | int) -> onnx.TensorProto:
    array = np.array(value, np.int64)
    return helper.make_tensor("", onnx.TensorProto.INT64, array.shape, array.reshape(-1).tolist())


def _body(layer: Layer, plan: SparsePlan) -> list[onnx.NodeProto]:
    """What the layer's nodes compute, from x, residual, values, gaps and bias to y."""
    nodes, last = _decode(plan, layer.weight.shape), "x"

    def then(op: str, *inputs: str, **attributes: Any) -> None:
        nonlocal last
        name = f"step{len(nodes)}"
        nodes.append(helper.make_node(op, [last, *inputs], [name], **attributes))
        last = name

    bias = ["bias"] if plan.bias else []
    if plan.kind == CONV:
        kept = {k: v for k, v in layer.node.attrs.items() if k in ("strides", "dilations", "pads", "group", "kernel_shape")}
        then("Conv", "weight", *bias, **kept)
    else:
        then("MatMul", "weight")
        if bias:
            then("Add", "bias")
    if plan.residual:
        then("Add", "residual")
    if (plan.low, plan.high) == (0.0, float("inf")):
        then("Relu")
    elif (plan.low, plan.high) != (float("-inf"), float("inf")):
        for name, value in (("low", plan.low), ("high", plan.high)):
            nodes.append(helper.make_node("Constant", [], [name], value=helper.make_tensor("", 1, [], [value])))
        then("Clip", "low", "high")
    nodes[-1].output[0] = "y"
    return nodes


def _function(model: Model, layer: Layer, plan: SparsePlan) -> onnx.FunctionProto:
    inputs = ["x", *["residual"] * plan.residual, "values", "gaps", *["bias"] * plan.bias]
    imports = [o for o in model.shell.opset_import if o.domain in ("", "ai.onnx")]
    made = helper.make_function(OWN, "", inputs, ["y"], _body(layer, plan), imports, ["plan", "scales"])
    made.doc_string = "a layer with sparse weights: what its node computes where the graphopt library is not loaded"
    return made


def _name(model: Model, function: onnx.FunctionProto) -> str | None:
    """The name of an equal function of the model, or a free one for this, which is then added; None where none is free."""
    mine = {f.name: f for f in model.shell.functions if f.domain == OWN and f.name.startswith(PREFIX)}
    for name, known in mine.items():
        function.name = name
        if known.SerializeToString(deterministic=True) == function.SerializeToString(deterministic=True):
            return str(name)
    free = next((f"{PREFIX}{i}" for i in range(MAX_LAYERS) if f"{PREFIX}{i}" not in mine), None)
    if free is not None:
        function.name = free
        model.shell.functions.append(function)
        model.shell.ir_version = max(model.shell.ir_version, IR)
    return free


def replace_layer(site: Site, layer: Layer, block: Block, names: Names) -> str:
    """Put the sparse node in the place of the layer's nodes; "" or why that cannot be. The graph must be sorted afterwards."""
    plan = layer.plan(block)
    operator = _name(site.model, _function(site.model, layer, plan))
    if operator is None:
        return f"there are {MAX_LAYERS} other kinds of sparse layers"
    values, gaps = to_sparse(layer.matrix(), block)
    constants = [names.constant(f"{layer.weight.name}_values", values), names.constant(f"{layer.weight.name}_gaps", gaps)]
    if layer.bias is not None:
        constants.append(names.constant(f"{layer.name}_bias", np.ascontiguousarray(layer.bias, np.float32)))
    activations = [layer.node.inputs[0], *([layer.residual] if layer.residual is not None else [])]
    output = layer.output
    remove_nodes(site.model.graph, layer.nodes)
    shape = site.shapes.shape(output.name)
    output.dtype = output.dtype or np.dtype(np.float32)
    if output.shape is None and shape is not None:
        output.shape = [d if isinstance(d, int) else None for d in shape]
    attributes = {"plan": plan.encode(), "scales": list(plan.scales)}
    node = gs.Node(operator, names.fresh(layer.name), attributes, [*activations, *constants], [output], OWN)
    site.model.graph.nodes.append(node)
    return ""
