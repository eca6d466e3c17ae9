"""An example plugin: Relu becomes Clip(0, 6), as mobile NPUs like it."""

import numpy as np
import onnx_graphsurgeon as gs

from graphopt import Context, Model, PassError, register
from graphopt.edit import set_inputs


@register("relu-to-relu6")
def relu_to_relu6(model: Model, context: Context, *, limit: float = 6.0) -> int:
    """Relu becomes Clip(0, limit): not exact, activations above the limit are cut."""
    if model.opset < 11:
        raise PassError("relu-to-relu6", f"needs opset 11 or later, the model has {model.opset}")
    relus = [node for node in model.nodes() if node.op == "Relu"]
    for node in relus:
        low, high = (gs.Constant(f"{node.outputs[0].name}_{k}", np.array(v, np.float32)) for k, v in (("low", 0), ("high", limit)))
        node.op = "Clip"
        set_inputs(node, [node.inputs[0], low, high])
    return len(relus)
