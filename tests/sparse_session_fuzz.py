"""Models with malformed sparse layers, made into sessions of onnxruntime: run as a script in a process of its own.

    python sparse_session_fuzz.py FIRST COUNT

Each model is one node `graphopt.SparseLayer0` with what `sparse_fuzz` damaged as its attributes and initializers. It must be
refused when the session is made, by an error that names graphopt's node, or run. Prints how many were refused, refused when run,
and ran.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
from onnx import helper, numpy_helper
from sparse_fuzz import damage, draw

import graphopt

DOMAIN = "graphopt"
Array = np.ndarray


def model(row: list[int], scales: list[float], constants: list[Array], inputs: list[Array]) -> bytes:
    """The node between inputs and an output of any shape."""
    names = [f"x{i}" for i in range(len(inputs))]
    stored = [f"c{i}" for i in range(len(constants))]
    node = helper.make_node("SparseLayer0", [*names, *stored], ["y"], "layer", domain=DOMAIN, plan=row, scales=scales)
    given = [helper.make_tensor_value_info(name, 1, array.shape) for name, array in zip(names, inputs, strict=True)]
    initializers = [numpy_helper.from_array(array, name) for array, name in zip(constants, stored, strict=True)]
    output = helper.make_tensor_value_info("y", 1, None)
    graph = helper.make_graph([node], "g", given, [output], initializers)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return bytes(helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString())


def drawn(seed: int) -> tuple[bytes, list[Array]]:
    """A damaged model, and inputs."""
    rng = np.random.default_rng(seed)
    plan, constants, inputs = draw(rng)
    row, scales = plan.encode(), list(plan.scales)
    for _ in range(int(rng.integers(1, 3))):
        if len(constants) > 1 and len(row) > 1:
            damage(rng, row, scales, constants)
    return model(row, scales, constants, inputs), inputs


def main(first: int, count: int) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    graphopt.register(options)
    refused = failed = ran = 0
    for seed in range(first, first + count):
        content, inputs = drawn(seed)
        try:
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if "graphopt" not in str(error) or "layer" not in str(error):
                raise SystemExit(f"{seed}: an error that does not say what is wrong: {error}") from error
            refused += 1
            continue
        try:
            session.run(None, {f"x{i}": array for i, array in enumerate(inputs)})
            ran += 1
        except Exception as error:
            if "graphopt" not in str(error):
                raise SystemExit(f"{seed}: an error that does not say what is wrong: {error}") from error
            failed += 1
    sys.stdout.write(f"{refused} {failed} {ran}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
