"""What the command line says of removal and repair, and of smaller models that are not faster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from test_prune_channels import CHAIN, parsed
from test_sweep import rows

import graphopt
from graphopt.cli_pruned import point_lines, pruned_lines
from graphopt.gains import channels, out_of_step, ragged
from graphopt.passes.prune_channels import prune_channels
from graphopt.report import PassRow, PointRow

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


def test_the_units_of_the_last_step_are_not_passed_off_as_all() -> None:
    (line, _) = pruned_lines([row("prune-search", 80, removed=[group("g", 40, [1, 2])])], verbose=False)
    assert line == "prune-search: removed 2 channels of 1 group (the last of several steps; 80 units in all)"


def test_search_names_recipe_candidates_and_the_layers_with_most_error_left() -> None:
    result = graphopt.optimize(parsed(CHAIN).proto(), "prune-search macs=0.6 round_to=1", calibration=rows())
    (found,) = result.report.passes
    short = pruned_lines(result.report.passes, verbose=False)
    assert short[0].startswith("prune-search: removed ")
    (recipe,) = (line for line in short if line.startswith("  recipe: "))
    assert f"{found.facts['recipe']}, {found.facts['mode']}: error {found.facts['error_after']:.4f}" in recipe
    others = sorted(c["error"] for c in found.facts["candidates"] if c["error"] != found.facts["error_after"])
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
    original, exact, round_ = parsed(CHAIN), parsed(CHAIN), parsed(CHAIN)
    prune_channels(exact, graphopt.Context(), macs=0.7, round_to=1)
    prune_channels(round_, graphopt.Context(), macs=0.7)
    names = {layer: counts for layer, counts in channels(exact).items() if counts != channels(original)[layer]}
    assert any(n % 8 for counts in names.values() for n in counts)
    assert ragged(exact, original) == [
        f"{node} ({a} -> {b} channels)" for node, (a, b) in names.items() if (a % 8 and a > 4) or b % 8
    ]
    assert ragged(round_, original) == []
    assert ragged(original, original) == []


@pytest.mark.parametrize(("macs", "time", "said"), [(0.5, 0.62, ""), (0.5, 0.64, "not faster in proportion"), (0.5, 1.2, "SLOWER")])
def test_a_model_that_is_not_faster_in_proportion_is_said_so(macs: float, time: float, said: str) -> None:
    lines = out_of_step(macs, time, [f"c{i} (16 -> 13 channels)" for i in range(6)])
    assert len(lines) == bool(said)
    assert all(said in line and "c3 (16 -> 13 channels) and 2 more; give round_to=8" in line for line in lines)
    assert all("not the reason" in line for line in out_of_step(macs, time, []))
    assert out_of_step(None, 2.0, []) == out_of_step(1.0, 2.0, []) == []


def test_the_report_warns_where_measured_time_does_not_follow(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.measure import Latency

    def timed(models: object, feed: object) -> list[Latency]:
        return [Latency(1.0, 1.0, 10, 1, 1, 1.0), Latency(1.5, 1.5, 10, 1, 1, 1 / 1.5)]

    monkeypatch.setattr("graphopt.gains.latency", timed)
    passes = "fold-bn, prune-channels macs=0.7 scope=global round_to=1"
    result = graphopt.optimize(onnx.load(digits / "digits.onnx"), passes, measure=True)
    (line,) = (w for w in result.report.warnings if "of the time for" in w)
    assert line.startswith("it is SLOWER than the original: 1.50 of the time for 0.7")
    assert "round_to=8" in line
