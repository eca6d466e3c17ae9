"""Models of toy_engine.py nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PLACES = ("toy_engine:FAMILY",)


def toy(
    add: float = 1.0,
    *,
    nodes: int = 1,
    types: tuple[int, ...] = (1,),
    plan: list[int] | None = None,
    scales: tuple[float, ...] = (),
    parallel: bool = False,
    constant: bool = True,
    declared: tuple[int, ...] | None = None,
    name: str = "toy",
    body: bool = False,
) -> onnx.ModelProto:
    """A chain of nodes on float32 [n], the last of which has outputs of these ONNX element types."""
    made, infos = [], []
    for i in range(nodes):
        last = i == nodes - 1
        kinds = types if last else (1,)
        attributes: dict[str, Any] = {"plan": [0, 0, 0, 0, 1, int(parallel), *kinds] if plan is None else plan}
        if scales:
            attributes["scales"] = list(scales)
        outputs = [f"y{j}" for j in range(len(types))] if last else [f"t{i + 1}"]
        operator, label = f"Int8Region{i % 64}", f"{name}{i}" if name else ""
        made.append(helper.make_node(operator, [f"t{i}", "c"], outputs, name=label, domain="graphopt", **attributes))
        if not last:
            infos.append(helper.make_tensor_value_info(f"t{i + 1}", TensorProto.FLOAT, ["n"]))
    inputs = [helper.make_tensor_value_info("t0", TensorProto.FLOAT, ["n"])]
    if not constant:
        inputs.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [1]))
    results = [helper.make_tensor_value_info(f"y{j}", t, ["n"]) for j, t in enumerate(declared or types)]
    weights = [numpy_helper.from_array(np.array([add], np.float32), "c")] if constant else []
    graph = helper.make_graph(made, "toy", inputs, results, weights, value_info=infos)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("graphopt", 1)]
    functions = []
    if body:
        functions = [
            helper.make_function(
                "graphopt", f"Int8Region{i}", ["x", "c"], ["y"], [helper.make_node("Sub", ["x", "c"], ["y"])], opsets[:1], ["plan"]
            )
            for i in range(min(nodes, 64))
        ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)
