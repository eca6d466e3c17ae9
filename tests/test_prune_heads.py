"""prune-heads and prune-neurons: each takes its own kind, whatever the export, and says what went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundness
import zoo

from graphopt.context import Context
from graphopt.cost import costs
from graphopt.errors import OptionError, PassError
from graphopt.groups_view import view
from graphopt.model import Model, load
from graphopt.passes.prune_channels import prune_channels
from graphopt.passes.prune_heads import prune_heads
from graphopt.passes.prune_neurons import prune_neurons

MODELS = Path(__file__).parent / "models"
SIZES = {"batch": 2, "seq": 5}


def prepared(name: str) -> tuple[Model, Context]:
    return load(MODELS / f"{name}.onnx"), Context()


def run(model: Model, seed: int = 1) -> Any:
    proto = model.proto()
    return zoo.session(proto.SerializeToString()).run(None, soundness.inputs(proto, symbols=SIZES, seed=seed))[0]


def shapes_of(model: Model) -> list[tuple[int, ...]]:
    return sorted(tuple(c.shape) for c in model.constants() if len(c.shape) == 2)


def test_heads_go_and_neurons_stay() -> None:
    model, context = prepared("bert_torchscript")
    assert prune_heads(model, context, ratio=0.34) == 2
    model.verify()
    assert shapes_of(model) == sorted([(40, 12), (32, 12), (2, 12), *[(12, 8)] * 6, *[(8, 12)] * 2, *[(12, 20), (20, 12)] * 2])
    assert run(model).shape == (2, 2)


def test_neurons_go_and_heads_stay() -> None:
    model, context = prepared("bert_dynamo18")
    assert prune_neurons(model, context, ratio=0.3) == 8  # multiples of 8 stay
    model.verify()
    assert shapes_of(model) == sorted([(40, 12), (32, 12), (2, 12), *[(12, 12)] * 8, *[(12, 16), (16, 12)] * 2])


def test_the_report_names_what_went_with_its_scores() -> None:
    model, context = prepared("gpt2_torchscript")
    for constant in model.constants():  # head 1 of the first block: nearly nothing reads it
        if constant.name == "blocks.0.proj.weight":
            values = constant.values.copy()
            values[4:8] *= 1e-3
            constant.values = values
    prune_heads(model, context, ratio=0.34)
    first, second = context.facts["removed"]
    assert (first["kind"], first["units"], first["removed"]) == ("heads", 3, [1])
    assert first["group"].startswith("blocks.0.")
    assert 0 < first["scores"][0] < second["scores"][0]
    assert context.facts["units"] == 6


@pytest.mark.parametrize("way", ["torchscript", "dynamo18", "fused"])
def test_the_same_heads_go_whatever_the_export(way: str) -> None:
    """The three files hold the same network: with the same head gone from each block they still give the same."""
    answers = []
    for name in ("gpt2_torchscript", f"gpt2_{way}"):
        model, context = prepared(name)
        prune_heads(model, context, ratio=0.34)
        answers.append((run(model), [r["removed"] for r in context.facts["removed"]]))
    assert answers[0][1] == answers[1][1]
    np.testing.assert_allclose(answers[0][0], answers[1][0], rtol=1e-4, atol=1e-4)


def test_key_heads_take_their_queries_along() -> None:
    model, context = prepared("llama_sdpa_dynamo23")
    assert prune_heads(model, context, ratio=0.5) == 2
    model.verify()
    assert {tuple(n.inputs[0].shape)[1] for n in model.nodes() if n.op == "Attention"} == {2}
    assert [n.attrs["num_heads"] for n in model.nodes() if n.op == "RotaryEmbedding"] == [2, 1, 2, 1]


def test_a_budget_and_the_figures_of_the_result() -> None:
    model, context = prepared("vit_fused")
    before = costs(model)
    prune_heads(model, context, macs=0.8, scope="global")
    after = costs(model)
    assert context.facts["macs"] == [before.macs, after.macs]
    assert after.counted_macs <= 0.8 * before.counted_macs


def test_figures_where_heads_lie_in_the_batch() -> None:
    model, context = prepared("seq2seq_dynamo18")
    before = costs(model)
    assert prune_heads(model, context, ratio=0.34) == 3
    assert context.facts["macs"] == [before.macs, costs(model).macs]
    assert context.facts["parameters"] == [before.parameters, costs(model).parameters]


def test_no_heads_is_nothing_to_do() -> None:
    model, context = prepared("moe_dynamo18")
    before = model.proto().SerializeToString()
    assert prune_heads(model, context, ratio=0.5) == 0
    assert model.proto().SerializeToString() == before
    with pytest.raises(PassError, match=r"prune-heads: macs=0\.5 cannot be reached: no group can be pruned"):
        prune_heads(model, context, macs=0.5)


def test_what_feeds_an_attention_is_no_head() -> None:
    """Eight features of a layer before, three heads, four features of the values of the only head."""
    text = """<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[B,5,6] x, float[6,8] w0, float[8,36] w1, float[12,8] w2, float[8,12] w3, float[4,2] w4) => (float[B,5,2] y)
    { a = MatMul(x, w0)  b = com.microsoft.Attention<num_heads=3>(a, w1)  c = MatMul(b, w2)
    d = com.microsoft.Attention<num_heads=1>(c, w3)  y = MatMul(d, w4) }"""
    found = view(load(soundness.model(text)), round_to=1).groups
    assert sorted((g.kind, g.units) for g in found) == [("heads", 3), ("neurons", 4), ("neurons", 8), ("neurons", 8)]


def test_errors_name_the_pass() -> None:
    model, context = prepared("moe_dynamo18")
    with pytest.raises(OptionError, match="prune-neurons: unknown criterion 'l3'"):
        prune_neurons(model, context, ratio=0.5, criterion="l3")
    with pytest.raises(OptionError, match="prune-heads: give exactly one of"):
        prune_heads(model, context)


def test_the_residual_stream_goes_only_where_asked_for() -> None:
    model, context = prepared("llama_dynamo18")
    assert prune_channels(model, context, ratio=0.0, residual=True) == 0
    assert prune_neurons(model, context, ratio=0.25, round_to=4, residual=True) == 4 + 2 * 4
    model.verify()
    kinds = {r["kind"]: len(r["removed"]) for r in context.facts["removed"]}
    assert kinds == {"residual": 4, "neurons": 4}
    assert context.facts["approximate"] == [r["group"] for r in context.facts["removed"] if r["kind"] == "residual"]
    assert tuple(model.tensors()["words.weight"].shape) == (40, 12)
    assert run(model).shape == (2, 5, 40)
    assert {g.kind for g in view(load(MODELS / "llama_dynamo18.onnx"), round_to=1).groups} == {"heads", "neurons"}


def test_fused_and_plain_attention_cost_the_same() -> None:
    for plain, fused in (
        ("bert_torchscript", "bert_fused"),
        ("vit_dynamo18", "vit_dynamo23"),
        ("llama_dynamo18", "llama_sdpa_dynamo23"),
    ):
        figures = [costs(load(MODELS / f"{name}.onnx")) for name in (plain, fused)]
        assert figures[0].macs == figures[1].macs is not None


def test_models_are_small() -> None:
    files = list(MODELS.glob("*.onnx"))
    assert len(files) >= 24
    assert all(f.stat().st_size < 100_000 for f in files)
    assert all(not n.metadata_props for f in files for n in onnx.load(f).graph.node)
