"""Scale and shift of every channel by the outputs: right derivatives, never worse, and what it is worth on a real model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_gram import NET, SIZES, weighted
from test_recover import prepared, quality, rows

from graphopt.agreement import error, outputs_of
from graphopt.baseline import Baseline, snapshot
from graphopt.context import Context
from graphopt.edit import peek
from graphopt.model import Model, from_proto
from graphopt.passes.prune_channels import prune_channels
from graphopt.recovery import apply, repair, targets
from graphopt.runtime import run, session
from graphopt.tuning import changed, equations, put, retune, solved, tune


def logits(model: Model, context: Context) -> np.ndarray:
    assert context.calibration is not None
    runner = session(model.proto())
    return np.concatenate([run(runner, feed)[0] for feed in context.calibration.batches(16)]).astype(np.float64)


def perturbed(model: Model, seed: int = 3) -> Model:
    """With every convolution's channels scaled and shifted a little."""
    copy, random = from_proto(model.proto()), np.random.default_rng(seed)
    for node in copy.graph.nodes:
        if node.op == "Conv":
            weight, bias = node.inputs[1], node.inputs[2]
            size = weight.shape[0]
            factor = 1 + 0.1 * random.standard_normal(size)
            shift = 0.1 * random.standard_normal(size)
            weight.values = (peek(weight) * factor.reshape(size, 1, 1, 1)).astype(np.float32)
            bias.values = (peek(bias) * factor + shift).astype(np.float32)
    return copy


def test_the_equations_are_the_derivatives_of_the_outputs() -> None:
    model = weighted(NET, **SIZES)
    context, original = rows(model, 16), snapshot(perturbed(model))
    found = equations(model, original, context)
    assert not isinstance(found, str)
    change: np.ndarray = np.random.default_rng(0).normal(0, 1e-4, (found.jacobian.shape[1],))
    moved = from_proto(model.proto())
    put(moved, changed(model, found.layers, change))
    before, after, wanted = (logits(m, context) for m in (model, moved, original.model))
    sized = found.wanted.reshape(-1, 16)  # classes by rows: the rows of one batch, class by class
    gap = wanted - before
    gap -= gap.mean(1, keepdims=True)
    spread = float(np.abs(sized).max() / np.abs(gap).max())  # the unit that outputs are measured in
    np.testing.assert_allclose(sized.T, gap * spread, rtol=1e-3, atol=1e-4 * np.abs(sized).max())
    difference = after - before
    difference -= difference.mean(1, keepdims=True)
    predicted = (found.jacobian @ change).reshape(-1, 16).T
    np.testing.assert_allclose(predicted, difference * spread, rtol=0.05, atol=0.02 * np.abs(predicted).max())


def test_both_forms_of_the_solution_agree() -> None:
    """More equations than unknowns, and fewer; against numpy's least squares with the penalty as further rows."""
    random = np.random.default_rng(1)
    model = weighted(NET, **SIZES)
    found = equations(model, snapshot(perturbed(model)), rows(model, 16))
    assert not isinstance(found, str)
    for count in (20, 400):
        a = random.standard_normal((count, 60)).astype(np.float32)
        b = random.standard_normal(count)
        system = type(found)(found.layers, a, b, np.zeros(count, bool))
        felt = np.square(a, dtype=np.float64).sum(0)
        penalty = np.diag(np.sqrt(0.3 * (0.5 * felt + 0.5 * felt.mean())))
        expected = np.linalg.lstsq(np.concatenate([a, penalty]), np.concatenate([b, np.zeros(60)]), rcond=None)[0]
        np.testing.assert_allclose(solved(system, (0.3,))[0], expected, rtol=1e-3, atol=1e-5)


def test_a_scale_and_a_shift_are_found_again() -> None:
    model = weighted(NET, **SIZES)
    context, original = rows(model, 128), snapshot(perturbed(model))
    tuned = tune(model, original, context)
    assert tuned.strength is not None
    assert tuned.after < 0.3 * tuned.before
    before = np.square(logits(model, rows(model, 64, seed=9)) - logits(original.model, rows(model, 64, seed=9))).sum()
    retune(model, original, context, tuned)
    after = np.square(logits(model, rows(model, 64, seed=9)) - logits(original.model, rows(model, 64, seed=9))).sum()
    assert after < 0.3 * before


def test_what_cannot_be_tuned_is_left_alone() -> None:
    model = weighted(NET, **SIZES)
    context = rows(model, 16)
    same = tune(model, snapshot(model), context)
    assert same.weights == {}
    assert "those of the original" in same.why
    unknown = weighted(NET.replace("y = Gemm(f, w3, b3)", "v = Gemm(f, w3, b3)\n y = Shrink(v)"), **SIZES)
    refused = tune(unknown, snapshot(perturbed(unknown)), context)
    assert refused.after == refused.before
    assert "Shrink" in refused.why


def test_it_is_worth_something_on_a_trained_model(digits: Path) -> None:
    """Beyond layerwise repair: nearer to the original on rows that no fit has seen."""
    model, context = prepared(digits)
    prune_channels(model, context, macs=0.05, round_to=1)
    context.drop()
    original = context.baseline
    assert isinstance(original, Baseline)
    assert context.calibration is not None
    apply(model, repair(model, original, context, targets(model, original), "matched", held_too=False))
    before = quality(model, digits)
    tuned = tune(model, original, context)
    assert tuned.after < 0.9 * tuned.before
    put(model, tuned.weights)
    truth = original.held(context.calibration)
    assert error(truth, outputs_of(model, truth)) == pytest.approx(tuned.after)
    assert quality(model, digits) >= before
