"""Folding random graphs: the result computes the same, never has more nodes, and 0 changes means untouched."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from fold_graphs import graphs
from hypothesis import HealthCheck, assume, given, settings

from graphopt.context import Context
from graphopt.errors import ModelError
from graphopt.model import Model, from_proto
from graphopt.registry import find
from graphopt.runtime import session
from graphopt.shapes import shapes

PASSES = ("fold-bn", "fold-scales")


def folded(proto: onnx.ModelProto) -> Model:
    """After both passes, each held to its promises."""
    model = from_proto(proto)
    for name in PASSES:
        context = Context()
        context.get(shapes, model)  # reading constants may already write them in another encoding
        before, nodes = model.proto().SerializeToString(), len(model.nodes())
        changes = find(name).fn(model, context)
        model.sort()
        model.verify()
        assert (changes == 0) == (model.proto().SerializeToString() == before)
        assert len(model.nodes()) <= nodes - (changes > 0 and not any(n.op == "Identity" for n in model.nodes()))
    assert find("fold-scales").fn(model, Context()) == 0
    return model


def run(proto: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(v) for v in session(proto, optimize=False).run(None, {"x": x})]


def check(proto: onnx.ModelProto) -> None:
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    everything = onnx.ModelProto()
    everything.CopyFrom(proto)
    outputs = {o.name for o in proto.graph.output}
    inner = [n.output[0] for n in proto.graph.node if n.output[0] not in outputs]
    everything.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in inner)
    try:
        wanted = run(everything, x)
    except (ModelError, RuntimeError):
        assume(False)  # onnxruntime lacks a kernel, or refuses the padding
    scale = 1 + max(float(np.abs(v).max()) for v in wanted)  # float32 rounds relative to the largest tensor on the way
    for a, b in zip(wanted, run(folded(proto).proto(), x), strict=False):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * scale)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs())
def test_random_graphs(proto: onnx.ModelProto) -> None:
    check(proto)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs())
def test_many_random_graphs(proto: onnx.ModelProto) -> None:
    check(proto)
