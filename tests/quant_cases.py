"""Small models for the quantisation tests: ONNX text with arrays for weights, random rows, and what onnxruntime runs in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser

from graphopt.context import Context
from graphopt.data import open_dataset
from graphopt.feeds import input_specs
from graphopt.gains import DOT_PRODUCTS
from graphopt.measure import cpu_features
from graphopt.model import Model, from_proto
from graphopt.registry import find
from graphopt.runtime import session
from graphopt.targets import ORT_CPU, Target


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Random float32 numbers."""
    return (np.random.default_rng(seed + sum(shape)).standard_normal(shape) * scale).astype(np.float32)


def build(body: str, *, opset: int = 17, **arrays: np.ndarray) -> onnx.ModelProto:
    """The model of a graph's text; `arrays` fill the inputs of that name, which become initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]> {body}')
    kept = [i for i in model.graph.input if i.name not in arrays]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in arrays.items())
    return model


def rows(model: onnx.ModelProto, count: int = 8, *, seed: int = 1, dynamic: int = 6) -> dict[str, np.ndarray]:
    """Random calibration rows; every dynamic axis but the first has size `dynamic`."""
    random = np.random.default_rng(seed)
    shapes = {s.name: [d if isinstance(d, int) else dynamic for d in (s.shape or ())[1:]] for s in input_specs(model)}
    return {name: random.standard_normal([count, *shape]).astype(np.float32) for name, shape in shapes.items()}


def run_quantize(
    proto: onnx.ModelProto, data: dict[str, np.ndarray] | None = None, *, target: Target = ORT_CPU, **options: Any
) -> tuple[Model, Context]:
    """The quantised, sorted and verified model, and the context with its facts."""
    model = from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    context = Context(open_dataset(data or rows(proto), input_specs(proto)), target)
    changes = find("quantize").fn(model, context, **options)
    model.sort()
    model.verify()
    assert (changes > 0) == any(n.op == "QuantizeLinear" for n in model.nodes())
    return model, context


def outputs(proto: onnx.ModelProto, data: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What onnxruntime computes. Its INT8 kernels saturate on CPUs without dot products; there the graph runs as written."""
    exact = bool(DOT_PRODUCTS & set(cpu_features()["features"]))  # type: ignore[call-overload]
    return [np.asarray(value) for value in session(proto, optimize=exact).run(None, data)]


def error(proto: onnx.ModelProto, quantised: Model, data: dict[str, np.ndarray]) -> float:
    """The root mean square difference of the first output over its root mean square."""
    a, b = outputs(proto, data)[0], outputs(quantised.proto(), data)[0]
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2)))


def fused(model: Model | onnx.ModelProto, folder: Path) -> list[str]:
    """The op types that an unmodified onnxruntime runs, in order."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    proto = model if isinstance(model, onnx.ModelProto) else model.proto()
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def initializer(model: Model, name: str) -> np.ndarray:
    """The values of a constant."""
    return np.asarray(next(c for c in model.constants() if c.name == name).values)


def scale_and_zero(model: Model, tensor: str) -> tuple[float, int]:
    """What the DequantizeLinear behind a tensor named `tensor` or `tensor`_dq uses."""
    node = next(n for n in model.nodes() if n.op == "DequantizeLinear" and n.outputs[0].name in (tensor, f"{tensor}_dq"))
    return float(node.inputs[1].values), int(node.inputs[2].values)
