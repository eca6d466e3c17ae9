"""Writes a plan into the graph: QuantizeLinear/DequantizeLinear pairs, int8 weights and int32 biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import remove_nodes, set_input, set_output
from graphopt.model import Model
from graphopt.operands import Names
from graphopt.quant import BOUNDS, weight_value
from graphopt.quant_bias import shift
from graphopt.quant_numbers import Parameters, Weight, least_scales, quantise_bias, quantise_weight
from graphopt.quant_plan import Plan, Unit
from graphopt.targets import Target


@dataclass
class Inserter:
    """One insertion. `parameters` by tensor id; `means` of channels by name, to correct biases.

    `quantised` and `dequantised` hold the two sides of each pair made so far, by the id of its tensor.
    """

    model: Model
    plan: Plan
    target: Target
    parameters: Mapping[int, Parameters]
    per_channel: bool
    names: Names
    means: Mapping[str, np.ndarray]
    quantised: dict[int, gs.Tensor] = field(default_factory=dict)
    dequantised: dict[int, gs.Tensor] = field(default_factory=dict)
    constants: dict[tuple[str, bytes, tuple[int, ...]], gs.Constant] = field(default_factory=dict)
    weights: dict[tuple[int, int, bytes], tuple[gs.Tensor, Weight]] = field(default_factory=dict)
    dead: list[gs.Node] = field(default_factory=list)

    def constant(self, base: str, values: np.ndarray) -> gs.Constant:
        """One initializer for equal values: scales of a class, zero points."""
        key = (str(values.dtype), values.tobytes(), values.shape)
        if key not in self.constants:
            self.constants[key] = self.names.constant(base, values)
        return self.constants[key]

    def node(self, op: str, base: str, inputs: list[gs.Tensor], output: gs.Tensor, **attributes: int) -> None:
        self.model.graph.nodes.append(gs.Node(op, self.names.fresh(base), attributes, inputs, [output]))

    def numbers(self, tensor: gs.Tensor) -> list[gs.Tensor]:
        """Scale and zero point of the tensor, as initializers."""
        p = self.parameters[id(tensor)]
        kind = "u8" if p.dtype == np.uint8 else "s8"
        zero = self.constant(f"zero_{kind}_{p.zero}", np.array(p.zero, p.dtype))
        return [self.constant(f"{tensor.name}_scale", np.array(p.scale, np.float32)), zero]


def insert(work: Inserter) -> None:
    """Change the graph as planned. Other readers of a float tensor keep reading it; graph inputs and outputs keep name and type."""
    for tensor in work.plan.tensors.values():
        _pair(work, tensor)
    for unit in work.plan.units:
        if "s8" in {row.dtype for row in unit.row.inputs.values()}:
            _weights(work, unit)
        _rewire(work, unit)
    outputs = {id(t) for g in work.model.graphs() for t in g.outputs}
    made = [n for n in work.model.graph.nodes if n.op == "DequantizeLinear"]
    unread = [n for n in made if not n.outputs[0].outputs and id(n.outputs[0]) not in outputs]  # only integers are read there
    remove_nodes(work.model.graph, [*work.dead, *unread])


def _pair(work: Inserter, tensor: gs.Tensor) -> None:
    """Q and DQ on one tensor. What a unit writes is read back through them by all; else only units read behind them."""
    unit = work.plan.written.get(id(tensor))
    if isinstance(tensor, gs.Constant):
        values = np.asarray(tensor.values, np.float32)
        quantised: gs.Tensor = work.names.constant(f"{tensor.name}_q", work.parameters[id(tensor)].quantise(values))
    else:
        quantised = gs.Variable(work.names.fresh(f"{tensor.name}_q"))
    if unit is None:
        dequantised: gs.Tensor = gs.Variable(work.names.fresh(f"{tensor.name}_dq"), tensor.dtype, tensor.shape)
    else:
        dequantised = tensor
    numbers = work.numbers(tensor)
    if unit is not None and unit.support.on_integers:
        set_output(unit.node, list(unit.node.outputs).index(tensor), quantised)
    elif not isinstance(tensor, gs.Constant):
        source = tensor if unit is None else _raw(work, unit, tensor)
        work.node("QuantizeLinear", f"{tensor.name}_Q", [source, *numbers], quantised)
    work.node("DequantizeLinear", f"{tensor.name}_DQ", [quantised, *numbers], dequantised)
    work.quantised[id(tensor)], work.dequantised[id(tensor)] = quantised, dequantised


def _raw(work: Inserter, unit: Unit, tensor: gs.Tensor) -> gs.Variable:
    """What the unit writes instead of `tensor`, which the DequantizeLinear writes from now on; its Relu or Clip goes if it can."""
    raw = gs.Variable(work.names.fresh(f"{tensor.name}_f"), tensor.dtype, tensor.shape)
    last = unit.last
    if unit.activation is not None and _saturates(unit.activation, work.parameters[id(tensor)]):
        set_output(unit.activation, 0, gs.Variable.empty())
        work.dead.append(unit.activation)
        last = unit.bias or unit.node
    set_output(last, next(i for i, t in enumerate(last.outputs) if t is tensor or last is not unit.last), raw)
    return raw


def _saturates(activation: gs.Node, p: Parameters) -> bool:
    """Whether quantising cuts off everything that the Relu or Clip does (up to the rounding of the scale)."""
    bounds = BOUNDS[activation.op](activation)
    slack = float(p.scale) * 1e-3
    return bounds is not None and p.low >= bounds[0] - slack and p.high <= bounds[1] + slack


def _rewire(work: Inserter, unit: Unit) -> None:
    for index, tensor in enumerate(unit.node.inputs):
        row = unit.row.row(index)
        if row is None or row.dtype != "activation" or not tensor.name:
            continue
        side = work.quantised if unit.support.on_integers else work.dequantised
        if side[id(tensor)] is not tensor:
            set_input(unit.node, index, side[id(tensor)])
        if unit.support.on_integers:
            set_input(unit.node, 2, work.numbers(tensor)[1])  # Pad: zero is the zero point


def _weights(work: Inserter, unit: Unit) -> None:
    node = unit.node
    values, place = weight_value(node, 1), unit.bias_input()
    bias = None if place is None else weight_value(*place)
    assert values is not None  # the plan takes only nodes with a constant weight
    if place is None or bias is None:
        set_input(node, 1, _weight(work, unit, values, None)[0])
        return
    holder, index = place
    name, bias, input_scale = holder.inputs[index].name, bias.reshape(-1), work.parameters[id(node.inputs[0])].scale
    integer = work.target.bias == "s32"
    variable, weight = _weight(work, unit, values, least_scales(bias, input_scale) if integer else None)
    mean = work.means.get(node.inputs[0].name)
    if mean is not None:
        bias = bias - shift(node, weight.error(values, unit.row.axis(node)), mean).astype(np.float32)
    if integer:
        set_input(holder, index, _bias(work, name, bias, input_scale, weight))
    elif mean is not None:
        set_input(holder, index, work.names.constant(f"{name}_corrected", bias))
    set_input(node, 1, variable)


def _bias(work: Inserter, name: str, bias: np.ndarray, input_scale: np.float32, weight: Weight) -> gs.Tensor:
    """An int32 bias behind a DequantizeLinear; its zero point must be left out or 0 (ONNX operator DequantizeLinear)."""
    integers, scales = quantise_bias(bias, input_scale, weight.scales)
    variable = gs.Variable(work.names.fresh(f"{name}_dq"), np.float32, integers.shape)
    inputs: list[gs.Tensor] = [work.names.constant(f"{name}_q", integers), work.constant(f"{name}_scale", scales)]
    work.node("DequantizeLinear", f"{name}_DQ", inputs, variable, **({"axis": 0} if scales.ndim else {}))
    return variable


def _weight(work: Inserter, unit: Unit, values: np.ndarray, least: np.ndarray | None) -> tuple[gs.Tensor, Weight]:
    """The dequantised weight as a variable; one for all nodes that read the same constant in the same way."""
    constant, axis = unit.node.inputs[1], unit.row.axis(unit.node)
    weight = quantise_weight(values, axis if work.per_channel else None, bits=work.target.weight_bits, least=least)
    key = (id(constant), axis, weight.scales.tobytes())
    if key not in work.weights:
        name = constant.name
        variable = gs.Variable(work.names.fresh(f"{name}_dq"), np.float32, values.shape)
        # The zero point is explicit: without it onnxruntime does not fuse QGemm, and MatMul + Add runs 60x slower.
        zero = work.constant(f"zero_s8_x{weight.scales.size}", np.zeros(weight.scales.shape, np.int8))
        inputs: list[gs.Tensor] = [
            work.names.constant(f"{name}_q", weight.values),
            work.constant(f"{name}_scale", weight.scales),
            zero,
        ]
        work.node("DequantizeLinear", f"{name}_DQ", inputs, variable, **({"axis": axis} if weight.scales.ndim else {}))
        work.weights[key] = (variable, weight)
    return work.weights[key]
