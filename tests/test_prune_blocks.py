"""prune-blocks: what counts as a block, which one goes, and that what is left is a valid model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundness
import zoo

from graphopt.blocks import Block, bypass_block, bypassed, find_blocks
from graphopt.context import Context
from graphopt.data import open_dataset
from graphopt.errors import OptionError, PassError
from graphopt.feeds import input_specs
from graphopt.model import Model, load
from graphopt.passes.prune_blocks import prune_blocks
from graphopt.shapes import shapes

MODELS = Path(__file__).parent / "models"
CHAIN = """g (float[N,4] x, float[4,4] w1, float[4,4] w2, float[4,4] w3, float[4,3] w4) => (float[N,3] y)
{ a = MatMul(x, w1)  b = MatMul(a, w2)  c = Relu(b)  d = Add(c, a)  e = MatMul(d, w3)  f = Tanh(e)  h = Add(d, f)
y = MatMul(h, w4) }"""


def scaled(text: str, **factors: float) -> Model:
    """The model with some weights multiplied."""
    model = load(soundness.model(text))
    for constant in model.constants():
        if constant.name in factors:
            constant.values = constant.values * np.float32(factors[constant.name])
    return model


def context_for(model: Model, rows: int = 8, symbols: dict[str, int] | None = None) -> Context:
    feed = soundness.inputs(model.proto(), symbols={"N": rows, "batch": rows, "seq": 5, **(symbols or {})})
    return Context(calibration=open_dataset(feed, input_specs(model.proto())))


def answer(model: Model) -> Any:
    proto = model.proto()
    feed = soundness.inputs(proto, symbols={"N": 3, "batch": 3, "seq": 5})
    if "xmask" in feed:
        feed["xmask"][:] = 1  # fused attention takes a mask to be padding at the end
    return zoo.session(proto.SerializeToString()).run(None, feed)[0]


def found(model: Model) -> list[Block]:
    return find_blocks(model, shapes(model))


def test_the_block_that_contributes_least_goes() -> None:
    for weights, gone, kept in (({"w2": 1e-3}, "w2", "w3"), ({"w3": 1e-3}, "w3", "w2")):
        model = scaled(CHAIN, **weights)
        before, context = answer(model), context_for(model)
        assert prune_blocks(model, context, blocks=1) == 1
        model.verify()
        names = {c.name for c in model.constants()}
        assert gone not in names
        assert kept in names
        assert np.abs(answer(model) - before).max() < 0.01 * np.abs(before).max()
        (row,) = context.facts["removed"]
        assert 0 < row["score"] < 0.01
        assert row["score"] == min(context.facts["contributions"].values())
        assert row["nodes"] == 3
        assert context.facts["macs"][1] == context.facts["macs"][0] - 16


def test_a_macs_target_takes_as_many_as_needed() -> None:
    model = scaled(CHAIN)
    assert prune_blocks(model, context_for(model), macs=0.6) == 2  # 60 MACs: 44 or 28 stay
    assert {c.name for c in model.constants()} == {"w1", "w4"}


def test_bypassing_is_undone() -> None:
    for name in ("bert_torchscript", "bert_fused", "llama_fused_dynamo", "swin_dynamo18"):
        model = load(MODELS / f"{name}.onnx")
        before = model.proto().SerializeToString()
        for block in found(model):
            with bypassed(block):
                assert model.proto().SerializeToString() != before
            assert model.proto().SerializeToString() == before


@pytest.mark.parametrize(
    "name",
    [
        "bert_torchscript",
        "bert_fused",
        "gpt2_dynamo18",
        "gpt2_fused",
        "llama_fused_dynamo",
        "swin_torchscript",
        "vit_fused",
        "t5_dynamo18",
    ],
)
def test_attention_and_mlp_of_every_layer_are_blocks(name: str) -> None:
    path = MODELS / f"{name}.onnx"
    layers = 1 if name.startswith("t5") else 2
    blocks = [b.name for b in found(load(path))]
    assert len(blocks) >= 2 * layers
    for index in range(len(blocks)):
        model = load(path)
        before = answer(model)
        bypass_block(found(model)[index])
        model.verify()
        after = answer(model)
        assert after.shape == before.shape
        assert np.isfinite(after).all()
        assert not np.allclose(after, before, rtol=1e-3, atol=1e-3)


def test_fused_and_plain_blocks_are_the_same() -> None:
    """Without its first attention the fused network still gives what the plain one gives."""
    answers = []
    for name in ("bert_torchscript", "bert_fused"):
        model = load(MODELS / f"{name}.onnx")
        bypass_block(found(model)[0])
        answers.append(answer(model))
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "reasons"),
    [
        ("a = MatMul(x, w)  b = MatMul(a, w)  y = Add(a, b)", ["the sum is an output of the model"]),
        (
            "a = MatMul(x, w)  r = ReduceMax<axes=[0]>(a)  e = Expand(r, twice)  b = MatMul(e, w)  c = Add(r, b)  y = Relu(c)",
            ["the shapes of the sum and of what stays are not known to be equal"],
        ),
        ("a = MatMul(x, w)  b = Pow(a, p)  c = Add(a, b)  y = Relu(c)", []),
        ("a = MatMul(x, w)  b = MatMul(x, w)  c = Add(a, b)  y = Relu(c)", []),
        ("a = MatMul(x, w)  b = MatMul(a, w)  c = Add(a, b)  d = Relu(c)  y = Concat<axis=0>(d, b)", []),
    ],
)
def test_what_is_no_block(body: str, reasons: list[str]) -> None:
    """A sum of another shape, an elementwise polynomial, two branches of one tensor, a branch that something else reads."""
    model = load(
        soundness.model(
            f"g (float[N,4] x, float[4,4] w) => (float[M,4] y) <int64[2] twice = {{2,1}}, float p = {{2}}> {{ {body} }}"
        )
    )
    rejected: list[str] = []
    assert find_blocks(model, shapes(model), lambda node, why: rejected.append(why)) == []
    assert rejected == reasons


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of blocks= and macs="),
        ({"blocks": 1, "macs": 0.5}, "exactly one of"),
        ({"blocks": -1}, "blocks=-1 is how many go"),
        ({"macs": 0.0}, "macs=0 is the share"),
        ({"blocks": 1, "rows": 0}, "rows must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        prune_blocks(scaled(CHAIN), Context(), **options)


def test_out_of_reach_and_without_data() -> None:
    model = scaled(CHAIN)
    with pytest.raises(PassError, match="give --calib"):
        prune_blocks(model, Context(), blocks=1)
    with pytest.raises(PassError, match="blocks=3 cannot be reached: 2 blocks could go"):
        prune_blocks(scaled(CHAIN), context_for(model), blocks=3)
    with pytest.raises(PassError, match=r"macs=0\.1 cannot be reached: with every block gone, 0\.467 stay"):
        prune_blocks(scaled(CHAIN), context_for(model), macs=0.1)
    with pytest.raises(PassError, match="blocks=1 cannot be reached: 0 blocks could go"):
        prune_blocks(scaled(CHAIN), context_for(model), blocks=1, exclude=("*",))


def test_nothing_to_do_changes_nothing() -> None:
    model = scaled(CHAIN)
    before = model.proto().SerializeToString()
    assert prune_blocks(model, context_for(model), blocks=0) == 0
    assert prune_blocks(model, context_for(model), macs=1.0) == 0
    assert model.proto().SerializeToString() == before
