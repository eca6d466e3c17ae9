"""One quantised node between conversions, whole and broken in every way that makes onnxruntime run it in float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OUT, IN = 32, 16


@dataclass
class Case:
    """A QDQ model of one Conv, Gemm or MatMul; the fields say how it is quantised."""

    op: str = "Conv"
    activation: Any = np.uint8
    scales: int = 1  # of the activation
    weight: Any = np.int8
    axis: int | None = None  # of the weight's scales
    weight_float: bool = False
    weight_zero: bool = True
    bias_scale: float = 2e-4
    relu: bool = False
    quantized_output: bool = True
    also: str = ""  # "node" or "output" read the float result as well
    attributes: dict[str, Any] = field(default_factory=dict)

    def build(self) -> onnx.ModelProto:
        nodes: list[onnx.NodeProto] = []
        held: dict[str, np.ndarray] = {}
        weight_shape = (OUT, IN, 3, 3) if self.op == "Conv" else (IN, OUT)
        random = np.random.default_rng(0)
        per_channel: dict[str, Any] = {"axis": 1} if self.scales > 1 else {}
        held["xs"], held["xz"] = np.full(self.scales, 0.02, np.float32), np.full(self.scales, 3, self.activation)
        if self.scales == 1:
            held["xs"], held["xz"] = held["xs"].reshape(()), held["xz"].reshape(())
        nodes.append(helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], "qx", **per_channel))
        nodes.append(helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], "dx", **per_channel))
        if self.weight_float:
            held["wd"] = random.standard_normal(weight_shape).astype(np.float32)
        else:
            count = 1 if self.axis is None else weight_shape[self.axis]
            shape: tuple[int, ...] = () if self.axis is None else (count,)
            zero = 0 if self.weight == np.int8 else 128
            held["w"] = (random.integers(-60, 60, weight_shape) + zero).astype(self.weight)
            held["ws"], held["wz"] = np.full(shape, 0.01, np.float32), np.full(shape, zero, self.weight)
            inputs = ["w", "ws", "wz"] if self.weight_zero else ["w", "ws"]
            axis: dict[str, Any] = {} if self.axis is None else {"axis": self.axis}
            nodes.append(helper.make_node("DequantizeLinear", inputs, ["wd"], "dw", **axis))
        inputs = ["xd", "wd"]
        if self.op != "MatMul":
            held["b"], held["bs"] = random.integers(-99, 99, OUT).astype(np.int32), np.array(self.bias_scale, np.float32)
            held["bz"] = np.array(0, np.int32)
            nodes.append(helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], "db"))
            inputs.append("bd")
        nodes.append(helper.make_node(self.op, inputs, ["y"], "op", **self.attributes))
        return self._ended(nodes, held)

    def _ended(self, nodes: list[onnx.NodeProto], held: dict[str, np.ndarray]) -> onnx.ModelProto:
        last, outputs = "y", ["out"]
        if self.relu:
            nodes.append(helper.make_node("Relu", ["y"], ["r"], "relu"))
            last = "r"
        if self.quantized_output:
            held["ys"], held["yz"] = np.array(0.1, np.float32), np.array(5, self.activation)
            nodes.append(helper.make_node("QuantizeLinear", [last, "ys", "yz"], ["yq"], "qy"))
            nodes.append(helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["out"], "dy"))
        else:
            nodes.append(helper.make_node("Tanh", [last], ["out"], "after"))
        if self.also == "node":
            nodes.append(helper.make_node("Abs", [last], ["second"], "reader"))
        outputs += {"node": ["second"], "output": [last], "": []}[self.also]
        shape = [1, IN, 8, 8] if self.op == "Conv" else [4, IN]
        graph = helper.make_graph(
            nodes,
            "case",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
            [numpy_helper.from_array(v, k) for k, v in held.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


Changes = dict[str, Any]
RUN_IN_INT8: Sequence[tuple[str, Changes]] = [
    *((op, {}) for op in ("Conv", "Gemm", "MatMul")),
    *((op, {"weight": np.uint8}) for op in ("Conv", "Gemm", "MatMul")),
    *((op, {"activation": np.int8}) for op in ("Conv", "Gemm", "MatMul")),
    ("Conv", {"axis": 0}),
    ("Gemm", {"axis": 1}),
    ("MatMul", {"axis": 1}),
    ("Gemm", {"quantized_output": False}),
    ("MatMul", {"quantized_output": False}),
]
FALL_BACK: Sequence[tuple[str, Changes, str]] = [
    *((op, {"activation": np.uint16}, "its activation is uint16") for op in ("Conv", "Gemm", "MatMul")),
    *((op, {"scales": IN}, "its activation has 16 scales") for op in ("Conv", "Gemm", "MatMul")),
    *((op, {"weight_float": True}, "its weight is float") for op in ("Conv", "Gemm", "MatMul")),
    *((op, {"also": "node"}, "also read by 'reader' (Abs)") for op in ("Conv", "Gemm", "MatMul")),
    *((op, {"also": "output"}, "is an output of the model as well") for op in ("Conv", "Gemm", "MatMul")),
    *((op, {"relu": True}, "Relu 'relu' lies between") for op in ("Conv", "Gemm", "MatMul")),
    *((op, {"axis": 0}, "scales along axis 0") for op in ("Gemm", "MatMul")),
    ("Conv", {"quantized_output": False}, "its result is not quantised"),
    ("Conv", {"bias_scale": 0.5}, "the scale of its bias"),
    ("Gemm", {"weight_zero": False}, "its weight has no zero point"),
    ("Gemm", {"attributes": {"alpha": 0.5}}, "alpha is 0.5"),
    ("Gemm", {"attributes": {"beta": 0.5}}, "beta is 0.5"),
]
