"""Graph inputs with default values become constants."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graphopt.context import Context
from graphopt.edit import replace_uses
from graphopt.model import Model
from graphopt.proto import Weights
from graphopt.registry import register


@register("freeze-inputs", keeps={"shapes"}, exact=True)
def freeze_inputs(model: Model, context: Context) -> int:
    """Overridable inputs (initializers that are also graph inputs) take their default for good and leave the interface.

    Exact for everybody who does not feed them; old exporters listed every weight as an input, and no weight can be optimised
    before this pass. An input that is also a graph output stays.
    """
    base = model.path.parent if model.path else None
    kept = {id(t) for g in model.graphs() for t in g.outputs}
    frozen: set[int] = set()
    for tensor in model.graph.inputs:
        default = model.leftovers.defaults.get(tensor.name)
        if default is None:
            continue
        if id(tensor) in kept:
            for node in tensor.outputs[:1]:
                context.reject(node, "its input with a default is also an output of the model")
            continue
        replace_uses(tensor, gs.Constant(tensor.name, Weights(default, base)))
        del model.leftovers.defaults[tensor.name]
        frozen.add(id(tensor))
    model.graph.inputs = [t for t in model.graph.inputs if id(t) not in frozen]
    return len(frozen)
