"""Optional inputs that only repeat the operator's default are dropped, and with them what computed them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import op_key
from graphopt.context import Context
from graphopt.edit import producer, set_input
from graphopt.model import Model
from graphopt.operands import has_input
from graphopt.proto import Weights
from graphopt.registry import register

# zeros stay zeros through these; the other inputs only say where
_MOVES = (
    "Identity",
    "Slice",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Expand",
    "Tile",
    "Transpose",
    "Flatten",
    "Gather",
    "Split",
    "Cast",
)
_SMALL = 1 << 16  # elements worth reading


def zeros(tensor: gs.Tensor) -> bool:
    """Provably all zero: a constant, or a ConstantOfShape, moved around."""
    node = producer(tensor, *_MOVES)
    while node is not None:
        tensor = node.inputs[0]
        node = producer(tensor, *_MOVES)
    if isinstance(tensor, gs.Constant):
        return _all_zero(tensor)
    filled = producer(tensor, "ConstantOfShape")
    if filled is None:
        return False
    value = filled.attrs.get("value")
    return value is None or _all_zero(value)


def _all_zero(constant: gs.Constant) -> bool:
    if np.prod(constant.shape, dtype=np.int64) > _SMALL or np.dtype(constant.dtype).kind not in "biuf":
        return False
    values = constant._values
    return not np.any(values.load() if isinstance(values, Weights) else constant.values)


# initial states are zero where they are not given (ONNX operators RNN, GRU, LSTM)
DEFAULTS: dict[str, dict[int, Callable[[gs.Tensor], bool]]] = {
    "RNN": {5: zeros},
    "GRU": {5: zeros},
    "LSTM": {5: zeros, 6: zeros},
    "com.microsoft::DynamicQuantizeLSTM": {5: zeros, 6: zeros},
}


@register("drop-defaults", exact=True, keeps={"shapes"})
def drop_defaults(model: Model, context: Context) -> int:
    """LSTM(x, ..., ConstantOfShape(...)) becomes LSTM(x, ...): initial states of zeros are what there is without them.

    The nodes that computed the states, often a long chain from Shape to ConstantOfShape, are left dead.
    """
    dropped = 0
    for node in model.nodes():
        for index, is_default in DEFAULTS.get(op_key(node), {}).items():
            if has_input(node, index) and is_default(node.inputs[index]):
                set_input(node, index, gs.Variable.empty())
                dropped += 1
    return dropped
