"""A trial of 4-bit weights: float32 products become onnxruntime's MatMulNBits, rounded to nearest."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.edit import set_inputs
from graphopt.model import Model
from graphopt.operands import Names

MICROSOFT = "com.microsoft"
_ZERO, _MOST = 8, 7  # the middle of 4 bits, which MatMulNBits takes where no zero points are given


def to_nbits(model: Model, block: int) -> int:
    """Replace, in place, every MatMul of the main graph by a constant float32 matrix [K, N]; returns their number.

    A weight that something else reads too stays: it would be stored twice.
    """
    names, count = Names(model), 0
    for node in model.graph.nodes:
        if node.op != "MatMul" or node.domain or not _alone(node.inputs[1]):
            continue
        weight = node.inputs[1]
        packed, scales = packed_nbits(weight.values, block)
        parts = [names.constant(f"{weight.name}_{part}", v) for part, v in (("nbits", packed), ("scales", scales))]
        k, n = weight.shape
        node.op, node.domain = "MatMulNBits", MICROSOFT
        node.attrs = {"K": int(k), "N": int(n), "bits": 4, "block_size": block}
        set_inputs(node, [node.inputs[0], *parts])
        count += 1
    if count and not any(o.domain == MICROSOFT for o in model.shell.opset_import):
        model.shell.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    return count


def _alone(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and tensor.dtype == np.float32 and len(tensor.shape) == 2 and len(tensor.outputs) == 1


def packed_nbits(weight: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, blocks, block / 2], float32 [N * blocks]) of float32 [K, N]; the first of two weights in the low bits.

    >>> packed, scales = packed_nbits(np.array([[7.0], [-7.0]], np.float32), 16)
    >>> packed.shape, int(packed[0, 0, 0]), scales.tolist()
    ((1, 1, 8), 31, [1.0])
    """
    k, n = weight.shape
    rows = np.zeros((n, -(-k // block) * block), np.float32)
    rows[:, :k] = weight.T
    blocks = rows.reshape(n, -1, block)
    scales = np.abs(blocks).max(-1, keepdims=True) / _MOST
    steps = np.rint(np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0)) + _ZERO
    codes = steps.clip(0, 15).astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales.astype(np.float32).ravel()
