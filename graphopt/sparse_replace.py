"""The replacement of a layer: one node `graphopt.SparseLayer<n>`, which graphopt's library runs, and a function of that name for
runtimes without the library, which makes the dense weight from the same stored numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from graphopt.edit import remove_nodes
from graphopt.kernels.sparse_plan import BITS, BYTES, CONV, MAX_LAYERS, PREFIX, ROWS, SparsePlan, stored
from graphopt.model import OWN, Model
from graphopt.operands import Names
from graphopt.sparse_layers import Layer, Site, Storage

IR = 8  # the first IR version with functions


def _decode(plan: SparsePlan, shape: Sequence[int]) -> list[onnx.NodeProto]:
    """Nodes that make the dense weight of this shape, OIHW or [inputs, outputs], from `values`, `places` and `scales`."""
    rows, columns = plan.block
    down, across = plan.outputs_ // rows, plan.columns // columns
    numbers: dict[str, Any] = {
        "size": [down * across, rows * columns], "one": [1], "column": [-1, 1], "cut": [down, across, rows, columns],
        "axis": 0, "whole": [plan.outputs_, plan.columns], "shape": list(shape), "flat": [-1],
    }  # fmt: skip
    nodes = [helper.make_node("Constant", [], [name], value=_integers(value)) for name, value in numbers.items()]
    nodes += _from_bits() if plan.places == BITS else _from_gaps()
    floats = "values"
    if plan.numbers == BYTES:
        nodes.append(helper.make_node("Cast", ["values"], ["floats"], to=onnx.TensorProto.FLOAT))
        floats = "floats"
    nodes += [
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("ScatterND", ["zeros", "indices", floats], ["blocks"]),
        helper.make_node("Reshape", ["blocks", "cut"], ["pieces"]),
        helper.make_node("Transpose", ["pieces"], ["lines"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["lines", "whole"], ["matrix"]),
    ]
    matrix = "matrix"
    if plan.numbers == BYTES:
        nodes.append(helper.make_node("Reshape", ["scales", "column"], ["factors"]))
        nodes.append(helper.make_node("Mul", ["matrix", "factors"], ["scaled"]))
        matrix = "scaled"
    if plan.kind == ROWS:
        return [*nodes, helper.make_node("Transpose", [matrix], ["weight"], perm=[1, 0])]
    return [*nodes, helper.make_node("Reshape", [matrix, "shape"], ["weight"])]


def _from_gaps() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", ["places"], ["steps"], to=onnx.TensorProto.INT64),
        helper.make_node("CumSum", ["steps", "axis"], ["behind"]),
        helper.make_node("Sub", ["behind", "one"], ["indexed"]),
        helper.make_node("Reshape", ["indexed", "column"], ["indices"]),
    ]


def _from_bits() -> list[onnx.NodeProto]:
    """Each byte is shifted by 0 to 7; what is odd then is a weight."""
    shifts, two = (
        helper.make_tensor("", onnx.TensorProto.UINT8, dims, values) for dims, values in (([1, 8], range(8)), ([1], [2]))
    )
    return [
        helper.make_node("Constant", [], ["shifts"], value=shifts),
        helper.make_node("Constant", [], ["two"], value=two),
        helper.make_node("Reshape", ["places", "column"], ["bytes"]),
        helper.make_node("BitShift", ["bytes", "shifts"], ["shifted"], direction="RIGHT"),
        helper.make_node("Mod", ["shifted", "two"], ["odd"]),
        helper.make_node("Reshape", ["odd", "flat"], ["bits"]),
        helper.make_node("Cast", ["bits"], ["kept"], to=onnx.TensorProto.BOOL),
        helper.make_node("NonZero", ["kept"], ["found"]),
        helper.make_node("Transpose", ["found"], ["indices"], perm=[1, 0]),
    ]


def _integers(value: Sequence[int] | int) -> onnx.TensorProto:
    array = np.array(value, np.int64)
    return helper.make_tensor("", onnx.TensorProto.INT64, array.shape, array.reshape(-1).tolist())


def _body(layer: Layer, plan: SparsePlan) -> list[onnx.NodeProto]:
    """What the layer's nodes compute, from x, residual, values, places, scales and bias to y."""
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
    inputs = ["x", *["residual"] * plan.residual, "values", "places", *["scales"] * plan.numbers, *["bias"] * plan.bias]
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


def replace_layer(site: Site, layer: Layer, form: Storage, names: Names) -> str:
    """Put the sparse node in the place of the layer's nodes; "" or why that cannot be. The graph must be sorted afterwards."""
    plan = layer.plan(form)
    operator = _name(site.model, _function(site.model, layer, plan))
    if operator is None:
        return f"there are {MAX_LAYERS} other kinds of sparse layers"
    values, places = stored(layer.matrix(), plan)
    parts = {"values": values, "bits" if form.bitmap else "gaps": places}
    if layer.scales is not None:
        parts["scales"] = layer.scales
    constants = [names.constant(f"{layer.weight.name}_{part}", array) for part, array in parts.items()]
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
