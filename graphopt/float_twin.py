"""The same model in float: what a quantised model is measured against where nothing else is given."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.audit_reasons import DQ, Q, is_op
from graphopt.edit import bypass, constant_value, replace_uses
from graphopt.model import Model

_SIGNED = frozenset("Conv ConvTranspose Gemm MatMul Add Sub Mul BatchNormalization".split())


def float_twin(model: Model) -> int:
    """Take away, in place, every pair of QuantizeLinear and DequantizeLinear, and store dequantised weights as floats.

    Returns the number of DequantizeLinear nodes taken away; those behind anything but a QuantizeLinear or a constant stay, and so
    do nodes in bodies.
    """
    wiring = model.wiring()
    taken = 0
    rectified: dict[int, gs.Tensor] = {}  # id of a quantised tensor -> what it was before
    for node in [n for n in model.graph.nodes if is_op(n, DQ)]:
        source = node.inputs[0]
        value = constant_value(source)
        if value is not None:
            weight = _dequantized(node, value)
            if weight is not None and id(node.outputs[0]) not in wiring.outputs:
                replace_uses(node.outputs[0], gs.Constant(f"{node.outputs[0].name}_float", weight))
                taken += 1
        elif len(source.inputs) == 1 and is_op(source.inputs[0], Q):
            taken += bypass(node, rectified.get(id(source)) or _rectified(model, source.inputs[0], rectified), wiring)
    model.graph.cleanup(remove_unused_graph_inputs=False)
    model.sort()
    return taken


def _rectified(model: Model, quantize: gs.Node, known: dict[int, gs.Tensor]) -> gs.Tensor:
    """What is quantised; behind a Relu where quantising cut off negatives that a sum or product can have: the Relu was absorbed."""
    source = quantize.inputs[0]
    zero = constant_value(quantize.inputs[2]) if len(quantize.inputs) > 2 and quantize.inputs[2].name else np.zeros((), np.uint8)
    lowest = zero is not None and zero.dtype.kind in "iu" and bool(np.all(zero == np.iinfo(zero.dtype).min))
    if lowest and len(source.inputs) == 1 and source.inputs[0].op in _SIGNED:
        positive = gs.Variable(f"{quantize.outputs[0].name}_rectified")
        model.graph.nodes.append(gs.Node("Relu", f"{quantize.name}_rectified", inputs=[source], outputs=[positive]))
        source = positive
    known[id(quantize.outputs[0])] = source
    return source


def _dequantized(node: gs.Node, value: np.ndarray) -> np.ndarray | None:
    """(value - zero point) * scale in float32, per tensor or along the axis; None where scales are not constant, or in blocks."""
    scale = constant_value(node.inputs[1])
    zero = constant_value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else np.zeros((), value.dtype)
    if scale is None or zero is None or node.attrs.get("block_size", 0):
        return None
    if scale.size > 1:
        shape = [1] * value.ndim
        shape[int(node.attrs.get("axis", 1))] = -1
        scale, zero = scale.reshape(shape), np.broadcast_to(zero, scale.shape).reshape(shape)
    return np.asarray((value.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32), np.float32)
