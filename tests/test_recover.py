"""recover and prune-search: exact where it can be, never worse, and what it is worth on a real model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_gram import NET, SIZES, weighted

from graphopt.context import Context
from graphopt.data import open_dataset
from graphopt.dims import couple
from graphopt.dims import groups as groups_of
from graphopt.errors import DataError, OptionError, PassError
from graphopt.evaluate import score
from graphopt.feeds import input_specs
from graphopt.model import Model, from_proto, load
from graphopt.passes.prune_blocks import prune_blocks
from graphopt.passes.prune_channels import prune_channels
from graphopt.passes.prune_search import prune_search
from graphopt.passes.recover import recover
from graphopt.pipeline import parse
from graphopt.pipeline import run as run_steps
from graphopt.prune import Request, cut
from graphopt.readers import of_group, readers
from graphopt.runtime import run, session
from graphopt.search import Recipe, search
from graphopt.sensitivity import Trial, curve
from graphopt.surgeon import order
from graphopt.worth import truth


def rows(model: Model, count: int = 64, seed: int = 0) -> Context:
    """A context with random images."""
    x = np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)
    return Context(open_dataset({"x": x}, input_specs(model.interface())))


def outputs(model: Model, seed: int = 5) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((4, 3, 8, 8)).astype(np.float32)
    return np.asarray(run(session(model.proto()), {"x": x})[0])


CHAIN = """g (float[N,3,8,8] x) => (float[N,4] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    b = Relu(a)
    c = Conv<pads=[1,1,1,1]>(b, w2, b2)
    d = Relu(c)
    e = GlobalAveragePool(d)
    f = Flatten(e)
    y = Gemm(f, w3, b3)
}"""


def twins() -> Model:
    """The last four channels of the first convolution are twice the first four: half of them can go without loss."""
    model = weighted(CHAIN, **SIZES)
    constants = {c.name: c for c in model.constants()}
    for name in ("w1", "b1"):
        values = np.array(constants[name].values)
        values[4:] = 2 * values[:4]
        constants[name].values = values
    return model


def test_what_can_be_rebuilt_is_rebuilt() -> None:
    """Removing channels that others determine, then least squares, gives the original back."""
    model = twins()
    expected, context = outputs(model), rows(model)
    dims = couple(model)
    group = next(g for g in groups_of(model, dims) if any(s.tensor == "w1" and s.axis == 0 for s in g.slices))
    cut(model, context, group.units[4:])
    context.drop()
    assert np.abs(outputs(model) - expected).max() > 0.1
    assert recover(model, context) > 0
    np.testing.assert_allclose(outputs(model), expected, rtol=1e-3, atol=1e-3)
    assert context.facts["error_after"] < 1e-4 * context.facts["error_before"]


def test_a_surgeon_removes_what_can_be_rebuilt_first() -> None:
    """Of each pair of twins one goes at no cost; after that every removal costs."""
    model = twins()
    context = rows(model)
    group = next(g for g in groups_of(model, context.get(couple, model)) if any(s.tensor == "w1" for s in g.slices))
    found = order(group, of_group(readers(model, context), group))
    assert found is not None
    assert {int(u) % 4 for u in found.order[:4]} == {0, 1, 2, 3}
    assert found.cost[4] < 0.02 * found.cost[5]


def test_sensitivity_is_measured_with_refitted_readers() -> None:
    model = twins()
    context = rows(model)
    group = next(g for g in groups_of(model, context.get(couple, model)) if any(s.tensor == "w1" for s in g.slices))
    found = readers(model, context)
    best = order(group, of_group(found, group))
    assert best is not None
    counts, errors = curve(group, best.order, of_group(found, group), Trial(model, found, truth(model, context, 32)))
    assert errors[counts == 4] < 1e-3
    assert errors[-1] > 0.01
    assert (np.diff(errors) >= 0).all()


def test_the_sum_behind_a_residual_block_is_the_target() -> None:
    """A channel removed from a stream is missing on the shortcut too: what the branch adds makes up for it."""
    model = weighted(NET, **SIZES)
    expected = outputs(model)
    context = rows(model, 128)
    prune_channels(model, context, ratio=0.25, round_to=1)
    context.drop()
    before = np.square(outputs(model) - expected).mean()
    recover(model, context)
    assert np.square(outputs(model) - expected).mean() < 0.5 * before


def test_what_follows_a_block_left_out_is_refitted() -> None:
    model = weighted(NET, **SIZES)
    expected, context = outputs(model), rows(model, 128)
    assert prune_blocks(model, context, blocks=1) == 1
    model.sort()
    context.drop()
    before = np.square(outputs(model) - expected).mean()
    assert recover(model, context) > 0
    assert np.square(outputs(model) - expected).mean() < before


def test_nothing_to_repair_changes_nothing() -> None:
    model = weighted(CHAIN, **SIZES)
    context = rows(model)
    assert recover(model, context) == 0
    assert "nothing was removed" in context.facts["skipped"]
    context.remember(model)
    kept = outputs(model)
    assert recover(model, context) == 0
    np.testing.assert_array_equal(outputs(model), kept)


def test_a_repair_that_does_not_help_is_not_made() -> None:
    """Rows of zeros teach nothing: the outputs on held-out rows are as before, and the model is left alone."""
    model = weighted(CHAIN, **SIZES)
    data = open_dataset({"x": np.zeros((16, 3, 8, 8), np.float32)}, input_specs(model.interface()))
    context = Context(data)
    prune_channels(model, context, ratio=0.25, round_to=1)
    context.drop()
    before = outputs(model)
    changed = recover(model, context)
    facts = context.facts
    assert facts["error_after"] <= facts["error_before"]
    if not changed:
        np.testing.assert_array_equal(outputs(model), before)


def test_activations_that_are_not_finite_are_an_error() -> None:
    model = weighted(CHAIN, **SIZES)
    constants = {c.name: c for c in model.constants()}
    constants["w1"].values = np.full((8, 3, 3, 3), 3e38, np.float32)
    context = rows(model)
    prune_channels(model, context, ratio=0.25, round_to=1)
    context.drop()
    with pytest.raises(DataError, match="recover: tensor '.*' holds NaN or Inf"):
        recover(model, context, mode="sequential")


def test_a_bias_is_added_where_there_was_none() -> None:
    text = CHAIN.replace("(b, w2, b2)", "(b, w2)")
    model = weighted(text, **{k: v for k, v in SIZES.items() if k != "b2"})
    context = rows(model)
    prune_channels(model, context, ratio=0.5, round_to=1)
    context.drop()
    recover(model, context)
    model.sort()
    model.verify()
    conv = next(n for n in model.graph.nodes if len(n.inputs) > 1 and n.inputs[1].name == "w2")
    assert len(conv.inputs) == 3
    assert np.any(np.asarray(conv.inputs[2].values))


# ---- the shipped model


def prepared(digits: Path) -> tuple[Model, Context]:
    model = load(digits / "digits.onnx")
    context = Context(open_dataset(str(digits / "digits_calib.npz"), input_specs(model.interface())))
    run_steps(model, parse("fold"), context)
    context.keep_baseline = True
    return model, context


def quality(model: Model, digits: Path) -> float:
    data = open_dataset(str(digits / "digits_eval.npz"), input_specs(model.interface()))
    return float(score(session(model.proto()), data, "top1").mean())


def test_repair_on_a_trained_model(digits: Path) -> None:
    model, context = prepared(digits)
    whole = quality(model, digits)
    prune_channels(model, context, macs=0.08, round_to=1)
    context.drop()
    before = quality(model, digits)
    recover(model, context)
    model.verify()
    after = quality(model, digits)
    assert before < whole - 0.05
    assert after > before + 0.5 * (whole - before)


def test_search_takes_the_candidate_nearest_to_the_original(digits: Path) -> None:
    model, context = prepared(digits)
    whole = quality(model, digits)
    removed = prune_search(model, context, macs=0.5, round_to=1)
    model.sort()
    model.verify()
    facts = context.facts
    assert removed == sum(len(g["removed"]) for g in facts["removed"])
    assert facts["macs"][1] <= 0.5 * facts["macs"][0]
    assert facts["tuning"]["error_before"] == min(c["error"] for c in facts["candidates"])
    assert facts["error_after"] <= facts["tuning"]["error_before"]
    assert len({c["recipe"] for c in facts["candidates"]}) >= 3
    assert quality(model, digits) > whole - 0.03


QUICK = (Recipe("obs", "sensitivity", False, 2), Recipe("l2", "uniform", False))


def test_search_is_deterministic(digits: Path) -> None:
    found = []
    for _ in range(2):
        model, context = prepared(digits)
        best, _ = search(model, context, Request("test", macs=0.6, round_to=4), QUICK)
        found.append(best.model.proto().SerializeToString())
    assert found[0] == found[1]


def test_search_by_ratio_removes_that_many(digits: Path) -> None:
    """In steps as in one, to the unit."""
    model, context = prepared(digits)
    units = sum(len(g.units) for g in groups_of(model, couple(model)))
    best, _ = search(model, context, Request("test", ratio=0.3, round_to=1), (Recipe("obs", "sensitivity", True, 2),))
    assert best.units == int(0.3 * units)


def test_search_says_what_it_needs(digits: Path) -> None:
    model, context = prepared(digits)
    with pytest.raises(PassError, match="no candidate reaches the target"):
        search(model, context, Request("test", macs=0.001, round_to=1), QUICK)
    with pytest.raises(OptionError, match="exactly one of"):
        prune_search(model, context)
    with pytest.raises(PassError, match="calibration"):
        prune_search(model, Context(), macs=0.5)


def test_prune_recover_quantize_is_one_pipeline(digits: Path) -> None:
    model = load(digits / "digits.onnx")
    context = Context(open_dataset(str(digits / "digits_calib.npz"), input_specs(model.interface())))
    results = run_steps(model, parse("fold, prune-channels macs=0.7 round_to=4, recover, cleanup, quantize"), context)
    made = {r.name: r for r in results}
    assert made["recover"].changes > 0
    assert made["recover"].facts["error_after"] < made["recover"].facts["error_before"]
    assert quality(from_proto(model.proto()), digits) > 0.8
