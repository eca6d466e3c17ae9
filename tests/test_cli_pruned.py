"""What the command line says of removal and repair, and of smaller models that are not faster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_prune_channels import CHAIN, parsed
from test_sweep import rows

import graphopt
from graphopt.cli_pruned import point_lines, pruned_lines
from graphopt.cost import costs
from graphopt.layers import find_layers
from graphopt.passes.prune_channels import prune_channels
from graphopt.proportion import _layer_times, channels, explain, lagging, out_of_step, profiled, ragged
from graphopt.report import PassRow, PointRow
from graphopt.search import _add

Run = Callable[..., tuple[int, str, str]]


def row(name: str, changes: int, **facts: Any) -> PassRow:
    return PassRow(
        name=name, options={}, changes=changes, seconds=0, nodes=1, parameters=1, macs=1, weight_bytes=4, rejected=[], facts=facts
    )


def group(name: str, units: int, removed: list[int], kind: str = "channels") -> dict[str, object]:
    return {"group": name, "kind": kind, "units": units, "removed": removed, "scores": [0.5] * len(removed)}


def test_units_by_kind_and_the_groups_that_lost_most() -> None:
    gone = [group(f"g{i}", 20, list(range(i))) for i in range(1, 7)] + [group("layer0.query", 12, [3, 0, 1], "heads")]
    short = pruned_lines([row("prune-channels", 24, removed=gone)], verbose=False)
    assert short == [
        "prune-channels: removed 21 channels of 6 groups, 3 heads of 1 group",
        "  most of: g6 20 -> 14 channels, g5 20 -> 15 channels, layer0.query 12 -> 9 heads, g4 20 -> 16 channels and 3 more",
    ]
    whole = pruned_lines([row("prune-channels", 24, removed=gone)], verbose=True)
    assert "  layer0.query 12 -> 9 heads: 0-1, 3" in whole
    assert len(whole) == 8


def test_units_of_several_steps_are_those_of_the_model_as_it_was() -> None:
    """What a later step calls unit 1 may be unit 3 of the original."""
    removed: dict[str, dict[str, Any]] = {}
    _add(removed, [group("g", 6, [0, 2])])
    _add(removed, [group("g", 4, [1, 3]), group("h", 4, [2])])
    assert removed["g"]["removed"] == [0, 2, 3, 5]
    assert removed["g"]["units"] == 6
    assert removed["h"]["removed"] == [2]


def test_search_names_recipe_candidates_and_the_layers_with_most_error_left() -> None:
    result = graphopt.optimize(parsed(CHAIN).proto(), "prune-search macs=0.6 round_to=1", calibration=rows())
    (found,) = result.report.passes
    short = pruned_lines(result.report.passes, verbose=False)
    assert short[0].startswith("prune-search: removed ")
    (recipe,) = (line for line in short if line.startswith("  recipe: "))
    tuning = found.facts["tuning"]
    assert f"{found.facts['recipe']}, {found.facts['mode']}: error {tuning['error_before']:.4f}" in recipe
    assert (f"{found.facts['error_after']:.4f} with channels scaled" in recipe) == (tuning["strength"] is not None)
    others = sorted(c["error"] for c in found.facts["candidates"] if c["error"] != tuning["error_before"])
    assert f"the next of {len(found.facts['candidates']) - 1} others {others[0]:.4f}" in recipe
    worst = max(found.facts["layers"], key=lambda layer: layer["after"])
    assert f"  largest errors left in layers: {worst['layer']} {worst['before']:.4f} -> {worst['after']:.4f}" in short[-1]
    whole = pruned_lines(result.report.passes, verbose=True)
    assert sum(line.startswith("  not: ") for line in whole) == len(found.facts["candidates"]) - 1
    assert len([line for line in whole if f"{worst['method']}" in line]) >= 1
    point = PointRow(keep=0.6, recipe="r", passes=result.report.passes)
    assert point_lines(point, verbose=False) == [f"prune-search: {found.facts['recipe']}, {found.facts['mode']}"]
    assert point_lines(point, verbose=True) == whole


def test_recover_says_what_it_gained() -> None:
    result = graphopt.optimize(parsed(CHAIN).proto(), "prune-channels macs=0.6 round_to=1, recover", calibration=rows())
    facts = result.report.passes[1].facts
    lines = pruned_lines(result.report.passes, verbose=False)
    expected = f"repaired: error {facts['error_before']:.4f} -> {facts['error_after']:.4f} on held-out rows ({facts['mode']})"
    assert f"recover: {expected}" in lines
    assert pruned_lines([row("quantize", 3, layers=[{"layer": "a"}]), row("recover", 0, skipped="x")], verbose=True) == []


def test_optimize_shows_it(cli: Run, digits: Path, tmp_path: Path) -> None:
    common = ("optimize", digits / "digits.onnx", "--no-measure", "--overwrite", "-o", tmp_path / "o.onnx")
    code, out, err = cli(*common, "--passes", "fold-bn, prune-channels macs=0.7 scope=global")
    assert (code, err) == (0, "")
    assert "prune-channels: removed " in out
    assert "most of: " in out
    assert " neurons: " in cli(*common, "--passes", "fold-bn, prune-channels macs=0.7 scope=global", "-v")[1]


def test_channels_that_kernels_do_not_like_are_named() -> None:
    original, exact, rounded = parsed(CHAIN), parsed(CHAIN), parsed(CHAIN)
    prune_channels(exact, graphopt.Context(), macs=0.7, round_to=1)
    prune_channels(rounded, graphopt.Context(), macs=0.7)
    changed = {layer: counts for layer, counts in channels(exact).items() if counts != channels(original)[layer]}
    odd = {n: c for n, c in changed.items() if c[1] % 8 or (c[0] % 8 and c[0] != channels(original)[n][0])}
    assert odd
    assert ragged(exact, original) == {node: f" ({a} -> {b} channels)" for node, (a, b) in odd.items()}
    assert ragged(rounded, original) == ragged(original, original) == {}


def test_out_of_step_is_a_quarter_more_time_than_macs() -> None:
    assert [out_of_step(0.5, t) for t in (0.4, 0.62, 0.63, 1.2)] == [False, False, True, True]
    assert not out_of_step(None, 2.0)
    assert not out_of_step(1.0, 2.0)


def test_layers_that_lag_are_named_with_their_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    original, work = parsed(CHAIN), parsed(CHAIN)
    prune_channels(work, graphopt.Context(), macs=0.5, round_to=1)
    first, last = (find_layers(original)[0][i].node for i in (0, -1))
    before = {n.name: n.macs for n in costs(original).nodes}
    after = {n.name: n.macs for n in costs(work).nodes}
    assert after[first] < before[first]
    times = [{first: 1.0, last: 1.0, "e": 2.0}, {first: 0.9, last: 0.1, "e": 1.0}]
    monkeypatch.setattr("graphopt.proportion.profiled", lambda models, feed: times)
    lags, idle = lagging(original, work, {})
    share = after[first] / before[first]
    assert [(lag.node, lag.time, lag.macs) for lag in lags] == [(first, 0.9, share)]
    assert idle == 0.5
    said = explain(0.5, 1.2, original, work, {})
    assert said.startswith("it is SLOWER than the original: 1.20 of the time for 0.50 of the MACs; layers behind: ")
    assert f"{first}{ragged(work, original)[first]} 0.90 of the time for {share:.2f}" in said
    assert "give round_to=8" in said
    assert said.endswith("50 % of its time is in operators that have no MACs")
    assert explain(0.5, 0.7, original, work, {}).startswith("it is not faster in proportion: 0.70")


def test_every_layer_of_a_real_run_is_found_again(digits: Path) -> None:
    result = graphopt.optimize(digits / "digits.onnx", "fold, prune-channels macs=0.7 scope=global")
    feed = {result.model.graph.inputs[0].name: np.zeros((1, 1, 8, 8), np.float32)}
    (times,) = profiled([result.model], feed, rounds=3)
    assert all(ms > 0 for ms in times.values())
    ((layers, idle),) = _layer_times([result.model], feed)
    assert set(layers) == {layer.node for layer in find_layers(result.model)[0]}
    assert 0 < idle < 1


def test_the_report_warns_where_measured_time_does_not_follow(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.measure import Latency

    def timed(models: object, feed: object, **options: object) -> list[Latency]:
        return [Latency(1.0, 1.0, 10, 1, 1, 1.0), Latency(1.5, 1.5, 10, 1, 1, 1 / 1.5)]

    monkeypatch.setattr("graphopt.gains.latency", timed)
    passes = "fold-bn, prune-channels macs=0.7 scope=global round_to=1"
    result = graphopt.optimize(onnx.load(digits / "digits.onnx"), passes, measure=True)
    (line,) = (w for w in result.report.warnings if "of the time for" in w)
    assert line.startswith("it is SLOWER than the original: 1.50 of the time for 0.7")
    assert "round_to=8" in line
    assert "layers behind" in line or "% of its time" in line
