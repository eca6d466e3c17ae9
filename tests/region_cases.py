"""QDQ graphs for the tests of compile-int8, and the judges: onnxruntime on the function body, numpy on the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphopt.context import Context
from graphopt.kernels import plan as p
from graphopt.kernels import reference_plan
from graphopt.model import Model, from_proto
from graphopt.registry import find

Array = np.ndarray


@dataclass
class Graph:
    """A QDQ graph being written down; methods return the name of what they make. All randomness comes from `random`."""

    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))
    opset: int = 17
    nodes: list[Any] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)

    def name(self, base: str) -> str:
        return f"{base}{len(self.nodes)}_{len(self.initializers)}"

    def input(self, *shape: int | str, name: str = "x", kind: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, values: Any, dtype: Any = None) -> str:
        name = self.name("c")
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        names = [self.name(kind.lower()) + f"_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def quantized(self, x: str, scale: float = 0.05, zero: int = 120, dtype: Any = np.uint8) -> str:
        """The integers of x."""
        return str(self.op("QuantizeLinear", x, self.constant(scale, np.float32), self.constant(zero, dtype)))

    def dequantized(self, x: str, scale: float = 0.05, zero: int = 120, dtype: Any = np.uint8) -> str:
        return str(self.op("DequantizeLinear", x, self.constant(scale, np.float32), self.constant(zero, dtype)))

    def q(self, x: str, scale: float = 0.05, zero: int = 120, dtype: Any = np.uint8) -> str:
        """x through QuantizeLinear and DequantizeLinear."""
        return self.dequantized(self.quantized(x, scale, zero, dtype), scale, zero, dtype)

    def weight(self, *shape: int, axis: int = 0, dtype: Any = np.int8, real: bool = False, per_channel: bool = True) -> str:
        """A dequantised weight; `real`: stored in float with a QuantizeLinear, as NNCF does."""
        limits = (-127, 128) if dtype == np.int8 else (0, 256)
        values = self.random.integers(*limits, shape).astype(dtype)
        count = shape[axis] if per_channel else 1
        scales = (0.002 + 0.004 * self.random.random(count)).astype(np.float32)
        zero = np.full(count, 0 if dtype == np.int8 else 128, dtype)
        if not per_channel:
            scales, zero = scales.reshape(()), zero.reshape(())
        names = [self.constant(scales), self.constant(zero)]
        extra: dict[str, Any] = {"axis": axis} if per_channel else {}
        self.scales, self.values = scales, values
        if real:
            spread = scales.reshape([-1 if i == axis else 1 for i in range(len(shape))]) if per_channel else scales
            stored = str(self.op("QuantizeLinear", self.constant(values * spread), *names, **extra))
        else:
            stored = self.constant(values)
        return str(self.op("DequantizeLinear", stored, *names, **extra))

    def bias(self, count: int, scale: float = 0.05, wrong: float = 1.0) -> str:
        """An int32 bias at the scale of the last weight times `scale`."""
        scales = np.broadcast_to(np.float32(scale) * self.scales * np.float32(wrong), count).astype(np.float32)
        values = self.random.integers(-3000, 3000, count).astype(np.int32)
        return str(self.op("DequantizeLinear", self.constant(values), self.constant(scales), axis=0))

    def conv(self, x: str, channels: int, filters: int, kernel: tuple[int, ...] = (3, 3), **attributes: Any) -> str:
        """A Conv of a dequantised x at the usual scale, with pads that keep the size."""
        w = self.weight(filters, channels // attributes.get("group", 1), *kernel)
        attributes.setdefault("pads", [k // 2 for k in kernel] * 2)
        return str(self.op("Conv", x, w, self.bias(filters), **attributes))

    def model(self, *outputs: str, kinds: Mapping[str, int] | None = None) -> onnx.ModelProto:
        infos = [helper.make_tensor_value_info(o, (kinds or {}).get(o, TensorProto.FLOAT), None) for o in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, infos, self.initializers)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        proto = helper.make_model(graph, opset_imports=imports, ir_version=8)
        inferred = onnx.shape_inference.infer_shapes(proto)
        del proto.graph.output[:]
        proto.graph.output.extend(inferred.graph.output)
        return proto


def session(proto: onnx.ModelProto) -> Any:
    """onnxruntime with INT8 kernels that do not saturate, whatever the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def compiled(proto: onnx.ModelProto) -> tuple[Model, Context]:
    """The model with its regions, sorted and verified, and the context with facts and rejections."""
    model, context = from_proto(onnx.ModelProto.FromString(proto.SerializeToString())), Context()
    changes = find("compile-int8").fn(model, context)
    if changes:
        model.sort()
        model.verify()
    assert changes == len(regions(model))
    return model, context


def regions(model: Model) -> list[Any]:
    return [n for n in model.nodes() if n.domain == p.DOMAIN]


def plan_of(node: Any) -> p.Plan:
    return p.decode(node.attrs["plan"], node.attrs["scales"])


def steps(node: Any) -> Counter[int]:
    """Kinds of the steps of a region."""
    return Counter(s.kind for s in plan_of(node).steps)


def feed(proto: onnx.ModelProto, seed: int = 0, **sizes: int) -> dict[str, Array]:
    """Random inputs; `sizes` of the dynamic axes, 2 where not given."""
    random = np.random.default_rng(seed)
    found = {}
    for value in proto.graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else sizes.get(d.dim_param, 2) for d in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        low = -128 if dtype == np.int8 else 0
        real = dtype == np.float32
        found[value.name] = (random.standard_normal(shape) * 3 if real else random.integers(low, low + 256, shape)).astype(dtype)
    return found


def judge(proto: onnx.ModelProto, *, most: float = 0, seeds: int = 2, **sizes: int) -> Model:
    """The body of every region computes what the model did, exactly; its plan, in numpy, the same but for `most`."""
    model, _ = compiled(proto)
    assert regions(model), "nothing was compiled"
    after = model.proto()
    before, bodies = session(proto), session(_opened(after, model))
    constants = {c.name: np.asarray(c.values) for c in model.constants()}
    for seed in range(seeds):
        inputs = feed(proto, seed, **sizes)
        values = dict(zip([o.name for o in bodies.get_outputs()], bodies.run(None, inputs), strict=True)) | inputs
        for output, wanted in zip(before.get_outputs(), before.run(None, inputs), strict=True):
            np.testing.assert_array_equal(values[output.name], wanted)
        for node in regions(model):
            plan = plan_of(node)
            given = [values[t.name] for t in node.inputs[: plan.activations]]
            results = reference_plan.run(plan, given, [constants[t.name] for t in node.inputs[plan.activations :]])
            for tensor, result in zip(node.outputs, results, strict=True):
                wanted = values[tensor.name]
                assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)
                np.testing.assert_allclose(result.astype(np.float64), wanted.astype(np.float64), rtol=0, atol=most)
    return model


def _opened(proto: onnx.ModelProto, model: Model) -> onnx.ModelProto:
    """The model with all that its regions read and write among its outputs."""
    opened = onnx.ModelProto()
    opened.CopyFrom(proto)
    known = {v.name for v in (*opened.graph.output, *opened.graph.input)} | {c.name for c in model.constants()}
    for name in dict.fromkeys(t.name for n in regions(model) for t in (*n.inputs, *n.outputs)):
        if name not in known:
            opened.graph.output.append(onnx.ValueInfoProto(name=name))
    return opened
