"""prune-channels on small models: what goes, what stays, and that the figures it reports are those of the result."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from graphopt.context import Context
from graphopt.cost import costs
from graphopt.edit import replace_uses
from graphopt.errors import OptionError, PassError
from graphopt.measure import paired
from graphopt.model import Model, from_proto
from graphopt.passes.prune_channels import prune_channels
from graphopt.runtime import run, session


def fill(model: Model, seed: int = 0) -> Model:
    """Give every input called w... random values: real weights are too long for text."""
    random = np.random.default_rng(seed)
    for tensor in [t for t in model.graph.inputs if t.name.startswith("w")]:
        constant = gs.Constant(tensor.name, random.standard_normal(tensor.shape).astype(np.float32))
        replace_uses(tensor, constant)
    model.graph.inputs = [t for t in model.graph.inputs if not t.name.startswith("w")]
    return from_proto(model.proto())


def parsed(text: str) -> Model:
    return fill(from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')))


CHAIN = """g (float[N,3,8,8] x, float[32,3,3,3] w1, float[32] wb, float[32,1,3,3] w2, float[16,32,1,1] w3, float[5,16] w4)
=> (float[N,5] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, wb)
    b = Relu(a)
    c = Conv<group=32,pads=[1,1,1,1]>(b, w2)
    d = Conv(c, w3)
    e = GlobalAveragePool(d)
    f = Flatten(e)
    y = Gemm<transB=1>(f, w4)
}"""

HEADS = """g (float[N,4] x, float[4,16] w1, float[16,16] w2, float[16,2] w3, float[16,16] w4, float[16,2] w5)
=> (float[N,2] left, float[N,2] right) {
    a = MatMul(x, w1)
    b = Relu(a)
    c = MatMul(b, w2)
    d = Relu(c)
    left = MatMul(d, w3)
    e = MatMul(b, w4)
    f = Relu(e)
    right = MatMul(f, w5)
}"""

CONCAT = """g (float[N,3,4,4] x, float[24,3,1,1] w1, float[40,3,1,1] w2, float[2,64,1,1] w3) => (float[N,2,4,4] y) {
    a = Conv(x, w1)
    b = Conv(x, w2)
    c = Concat<axis=1>(a, b)
    y = Conv(c, w3)
}"""


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    return {c.name: tuple(c.shape) for c in model.constants() if c.name.startswith("w")}


def outputs(model: Model, batch: int = 2) -> list[np.ndarray]:
    info = model.graph.inputs[0]
    shape = [batch if i == 0 else size for i, size in enumerate(info.shape)]
    feed = {info.name: np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    return run(session(model.proto()), feed)


def prune(text: str, **options: Any) -> tuple[Model, Context, int]:
    model, context = parsed(text), Context()
    removed = prune_channels(model, context, **options)
    model.sort()
    model.verify()
    assert [o.shape[0] for o in outputs(model, 1) + outputs(model, 3)] == [1] * len(model.graph.outputs) + [3] * len(
        model.graph.outputs
    )
    return model, context, removed


def test_a_ratio_takes_its_share_of_every_group() -> None:
    model, _, removed = prune(CHAIN, ratio=0.5, round_to=1)
    assert shapes_of(model) == {"w1": (16, 3, 3, 3), "wb": (16,), "w2": (16, 1, 3, 3), "w3": (8, 16, 1, 1), "w4": (5, 8)}
    assert removed == 16 + 8
    assert [n.attrs["group"] for n in model.nodes() if "group" in n.attrs] == [16]


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.3, "round_to": 1},
        {"ratio": 0.5},
        {"macs": 0.5, "round_to": 1},
        {"macs": 0.7, "scope": "global", "round_to": 1},
        {"params": 0.6, "scope": "global", "criterion": "l1"},
    ],
)
@pytest.mark.parametrize("text", [CHAIN, HEADS, CONCAT])
def test_the_reported_figures_are_those_of_the_result(text: str, options: dict[str, Any]) -> None:
    before = costs(parsed(text))
    model, context, removed = prune(text, **options)
    after = costs(model)
    assert removed > 0
    assert context.facts["parameters"] == [before.parameters, after.parameters]
    assert context.facts["macs"] == [before.macs, after.macs]
    assert context.facts["units_removed"] == removed
    for kind, figure in (("macs", after.macs), ("params", after.parameters)):
        if kind in options:
            assert figure is not None
            assert figure <= options[kind] * {"macs": before.macs or 0, "params": before.parameters}[kind]


def test_the_units_with_the_smallest_weights_go() -> None:
    model = parsed(HEADS)
    for constant in model.constants():
        if constant.name in ("w1", "w2", "w4"):
            axis = {"w1": 1, "w2": 0, "w4": 0}[constant.name]
            values = constant.values.copy()
            np.moveaxis(values, axis, 0)[[3, 7]] = 0
            constant.values = values
    expected = outputs(model)
    prune_channels(model, Context(), ratio=0.125, round_to=1, include=("w1",))
    assert shapes_of(model)["w1"] == (4, 14)
    for mine, other in zip(outputs(model), expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_rounding_keeps_multiples_in_every_axis_and_says_what_it_cost() -> None:
    model, context, removed = prune(CONCAT, ratio=0.3)
    assert shapes_of(model) == {"w1": (24, 3, 1, 1), "w2": (32, 3, 1, 1), "w3": (2, 56, 1, 1)}
    assert removed == 8
    loose = prune(CONCAT, ratio=0.3, round_to=1)[1].facts
    assert context.facts["without_rounding"] == {
        "units_removed": loose["units_removed"],
        "parameters": loose["parameters"][1],
        "macs": loose["macs"][1],
    }


def test_groups_too_small_to_round_stay_whole() -> None:
    model, _, removed = prune(CHAIN, ratio=0.6, round_to=16)
    assert shapes_of(model)["w3"] == (16, 16, 1, 1)
    assert removed == 16


def test_every_group_keeps_the_minimum() -> None:
    assert shapes_of(prune(CHAIN, ratio=0.9, round_to=1, minimum=12)[0])["w3"] == (12, 12, 1, 1)


def test_include_and_exclude_choose_by_weight_or_node() -> None:
    for options in ({"include": ("w4",)}, {"exclude": ("w1", "w2")}):
        model, context, _ = prune(CHAIN, ratio=0.5, round_to=1, **options)
        assert shapes_of(model)["w1"] == (32, 3, 3, 3)
        assert shapes_of(model)["w4"] == (5, 8)
        assert {reason for reason, _ in context.rejected} == {"not included" if "include" in options else "excluded"}


def test_a_protected_output_does_not_change_while_other_heads_shrink() -> None:
    expected = outputs(parsed(HEADS))
    model, context, _ = prune(HEADS, ratio=0.5, round_to=1, protect=("le*",))
    assert {name: shape for name, shape in shapes_of(model).items() if shape != (16, 16)} == {
        "w1": (4, 16),
        "w3": (16, 2),
        "w4": (16, 8),
        "w5": (8, 2),
    }
    np.testing.assert_array_equal(outputs(model)[0], expected[0])
    assert ("a protected output depends on it", "MatMul") in context.rejected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of ratio=, macs=, params=, bytes= and latency=, not 0"),
        ({"ratio": 0.5, "macs": 0.5}, "exactly one of .* not 2"),
        ({"ratio": 1.0}, "ratio=1 .* below 1"),
        ({"ratio": -0.1}, "ratio=-0.1"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"macs": 0.0}, "macs=0 .* above 0"),
        ({"params": 1.5}, "params=1.5 .* at most 1"),
        ({"latency": 0.0}, "latency=0 .* above 0"),
        ({"ratio": 0.5, "round_to": 0}, "must be at least 1"),
        ({"ratio": 0.5, "criterion": "activations"}, "unknown criterion 'activations'; did you mean 'activation'"),
        ({"ratio": 0.5, "protect": ("rigth",)}, "protect=rigth matches no output; did you mean 'right'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        prune_channels(parsed(HEADS), Context(), **options)


def test_a_target_out_of_reach_says_how_far_it_goes() -> None:
    with pytest.raises(PassError, match=r"macs=0\.01 cannot be reached: with every group at its least, 0\.\d+ stay"):
        prune_channels(parsed(CHAIN), Context(), macs=0.01)
    with pytest.raises(PassError, match="no group can be pruned"):
        prune_channels(parsed(CHAIN), Context(), macs=0.5, exclude=("*",))


def test_a_quantised_model_is_refused() -> None:
    text = """g (float[1,2] x, float[2,4] w1) => (float[1,4] y) <float s = {0.5}, uint8 z = {0}> {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  y = MatMul(d, w1)
    }"""
    with pytest.raises(PassError, match=r"already quantised \(2 QDQ nodes\): prune the float model"):
        prune_channels(parsed(text), Context(), ratio=0.5)


def test_nothing_to_do_is_zero_changes_and_an_untouched_model() -> None:
    model = parsed(CHAIN)
    before = model.proto().SerializeToString()
    assert prune_channels(model, Context(), ratio=0.0) == 0
    assert prune_channels(model, Context(), ratio=0.1) == 0  # rounding keeps everything
    assert model.proto().SerializeToString() == before


def test_a_broken_plugin_is_named() -> None:
    from graphopt.criteria import CRITERIA, criterion

    criterion("negative")(lambda model, context, groups: [np.full(len(g.units), -1.0) for g in groups])
    try:
        with pytest.raises(PassError, match="did not give 32 finite numbers"):
            prune_channels(parsed(CHAIN), Context(), ratio=0.5, criterion="negative")
    finally:
        del CRITERIA["negative"]


def test_macs_of_the_result_are_recounted_for_many_targets() -> None:
    total = costs(parsed(CHAIN)).macs
    assert total == 64 * (32 * 27 + 32 * 9 + 16 * 32) + 5 * 16 == prod([64, 1664]) + 80
    for target in (0.9, 0.6, 0.3):
        model, _, _ = prune(CHAIN, macs=target, round_to=1, scope="global")
        assert (costs(model).macs or 0) <= target * total


def test_a_target_in_bytes_counts_them() -> None:
    model = parsed(CHAIN)
    before = costs(model)
    assert prune_channels(model, (context := Context()), bytes=0.5, round_to=1) > 0
    after = costs(model)
    assert 0.35 * before.weight_bytes < after.weight_bytes <= 0.5 * before.weight_bytes
    assert context.facts["parameters"] == [before.parameters, after.parameters]


WIDE = """g (float[N,3,64,64] x, float[256,3,3,3] w1, float[256,256,3,3] w2, float[5,256] w3) => (float[N,5] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1)
    b = Relu(a)
    c = Conv<pads=[1,1,1,1]>(b, w2)
    d = Relu(c)
    e = GlobalAveragePool(d)
    f = Flatten(e)
    y = Gemm<transB=1>(f, w3)
}"""


def test_a_target_in_milliseconds_is_measured() -> None:
    """The pruned model takes what was asked for; timed again here, with room for noise. The report has asked, planned, measured."""
    model = parsed(WIDE)
    original, context = model.proto(), Context()
    assert prune_channels(model, context, latency=0.5) > 0
    model.sort()
    found = context.facts["latency"]
    assert found["asked"] == 0.5
    assert 0.2 < found["measured"] <= 0.5
    feed = {"x": np.zeros((1, 3, 64, 64), np.float32)}
    again = paired(session(original, threads=1), session(model.proto(), threads=1), feed, seconds=0.5)
    assert again.speed > 1.4
    with pytest.raises(PassError, match="latency=0.001 cannot be reached: .* of the original's time; use macs="):
        prune_channels(parsed(WIDE), Context(), latency=0.001, minimum=64)
