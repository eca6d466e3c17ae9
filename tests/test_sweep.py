"""A sweep gives the models that its recipes give, measures each once and shares what does not depend on the target."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx.parser
import pytest
from test_prune_channels import CHAIN, parsed

import graphopt
from graphopt import criteria_data, readers, sensitivity, surgeon, worth
from graphopt.context import Context
from graphopt.errors import OptionError, PassError
from graphopt.knee import CHORD, WITHIN, knees
from graphopt.model import Model
from graphopt.report import ModelRow, PointRow, QualityRow, SweepReport
from graphopt.sweep_plot import plot
from graphopt.sweeps import PASSES, Sweep, plan, shared_steps, sweep

Run = Callable[..., tuple[int, str, str]]
SEARCH = "fold, prune-search macs={} round_to=1, cleanup"
CHANNELS = "fold, prune-channels macs={} scope=global criterion=activation, cleanup"


def rows(count: int = 24, side: int = 8) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((count, 3, side, side)).astype(np.float32)}


def tiny() -> onnx.ModelProto:
    """A stem, a depthwise and a pointwise convolution and a classifier; 8 x 8 is too small for mirrored rows."""
    return parsed(CHAIN).proto()


@pytest.fixture(scope="module")
def searched() -> Sweep:
    return sweep(tiny(), [0.5, 0.9, 0.7], SEARCH, calibration=rows(), measure=False)


def digest(proto: onnx.ModelProto) -> str:
    return hashlib.sha256(proto.SerializeToString()).hexdigest()


# ---- what comes out


def test_every_recipe_makes_the_same_bytes_on_its_own(searched: Sweep) -> None:
    assert [p.keep for p in searched.report.points] == [0.9, 0.7, 0.5]
    for point in searched.report.points:
        alone = graphopt.optimize(tiny(), point.recipe, calibration=rows())
        assert digest(alone.proto()) == point.sha256 == hashlib.sha256(searched.files[point.keep]).hexdigest()
        assert [r.facts.get("recipe") for r in alone.report.passes] == [r.facts.get("recipe") for r in point.passes]
        assert [r.name for r in alone.report.passes] == [r.name for r in point.passes]
        assert alone.report.after.macs == point.macs
        assert point.macs_ratio is not None
        assert point.macs_ratio <= point.keep


def test_a_baseline_from_the_shared_passes_is_what_later_repair_aims_at() -> None:
    template = "prune-channels ratio=0.1 round_to=1, prune-channels macs={} round_to=1, recover"
    found = sweep(tiny(), [0.8, 0.6], template, calibration=rows(), measure=False)
    assert found.report.shared == "prune-channels ratio=0.1 round_to=1"
    for point in found.report.points:
        alone = graphopt.optimize(tiny(), point.recipe, calibration=rows())
        assert alone.report.passes[-1].facts["layers"]
        assert digest(alone.proto()) == point.sha256
        assert point.held_out_error == alone.report.passes[-1].facts["error_after"]


def test_twice_is_the_same(searched: Sweep) -> None:
    again = sweep(tiny(), [0.9, 0.7, 0.5], SEARCH, calibration=rows(), measure=False)

    def steady(found: Any) -> Any:
        if isinstance(found, dict):
            return {k: steady(v) for k, v in found.items() if k != "seconds"}
        return [steady(v) for v in found] if isinstance(found, list) else found

    assert steady(again.report.model_dump()) == steady(searched.report.model_dump())
    assert again.files == searched.files
    assert again.plot() == searched.plot()


def test_errors_grow_as_less_is_kept(searched: Sweep) -> None:
    held = [p.held_out_error for p in searched.report.points]
    whole = [p.error for p in searched.report.points]
    assert None not in held + whole
    assert held == sorted(held, key=lambda e: e or 0)
    assert all(0 < (e or 0) < 1 for e in held + whole)
    kept = sweep(tiny(), [1.0, 0.9], "prune-channels macs={} round_to=1", calibration=rows(), measure=False)
    first = kept.report.points[0]
    assert first.error is not None
    assert first.error < 1e-9
    assert first.macs_ratio == 1.0
    assert first.held_out_error is None


def test_the_name_in_the_package_is_the_function() -> None:
    assert graphopt.sweep is sweep


# ---- what is shared


def whole_size(model: Model) -> int:
    return sum(int(np.prod(c.shape)) for c in model.constants())


def test_analyses_of_the_folded_model_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    counts = dict.fromkeys(("fisher", "orders", "curves"), 0)
    original = readers.input_moments

    def counted(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            counts[name] += 1
            return inner(*given)

        return call

    def measure(model: Model, *given: Any) -> Any:
        measured.append(whole_size(model))
        return original(model, *given)

    monkeypatch.setattr(readers, "input_moments", measure)
    monkeypatch.setattr(criteria_data, "_measured", counted("fisher", criteria_data._measured))
    monkeypatch.setattr(surgeon, "order", counted("orders", surgeon.order))
    monkeypatch.setattr(worth, "curve", counted("curves", sensitivity.curve))
    targets = [0.9, 0.8, 0.7]
    sweep(tiny(), targets, SEARCH, calibration=rows(), measure=False)
    together, folded = dict(counts), max(measured)
    assert measured.count(folded) == 1
    assert together["fisher"] == 1
    counts.update(dict.fromkeys(counts, 0))
    measured.clear()
    for target in targets:
        graphopt.optimize(tiny(), SEARCH.replace("{}", str(target)), calibration=rows())
    assert measured.count(folded) == len(targets)
    assert counts["fisher"] == len(targets)
    assert together["orders"] < counts["orders"]
    assert together["curves"] < counts["curves"]


def test_a_fork_shares_until_one_of_them_drops() -> None:
    first = Context()
    fork = first.fork()
    assert fork.cached("a", lambda: 1) == 1
    assert first.cached("a", lambda: 2) == 1
    fork.drop()
    assert fork.cached("a", lambda: 3) == 3
    assert first.cached("a", lambda: 4) == 1


def test_passes_before_the_target_run_once() -> None:
    steps = plan([0.9, 0.5], CHANNELS)
    count = shared_steps(steps)
    assert steps[0].steps[count].entry.name == "prune-channels"
    assert shared_steps(steps[:1]) == 0
    assert shared_steps(plan([0.9, 0.5], "prune-channels macs={}")) == 0


# ---- targets


def test_a_target_out_of_reach_is_reported_and_the_others_go_on(digits: Path) -> None:
    found = sweep(digits / "digits.onnx", [0.7, 0.001], "fold, prune-channels macs={}", measure=False)
    near, far = found.report.points
    assert near.failed is None
    assert far.failed is not None
    assert "macs=0.001 cannot be reached" in far.failed
    assert (far.sha256, far.macs, far.quality) == (None, None, None)
    assert list(found.files) == [0.7]
    with pytest.raises(PassError, match="no target is reached: prune-channels: macs=0.001"):
        sweep(digits / "digits.onnx", [0.001], "fold, prune-channels macs={}", measure=False)


@pytest.mark.parametrize(
    ("keep", "template", "message"),
    [
        ([], PASSES["macs"], "not none"),
        ([0.5, 1.5], PASSES["macs"], "not 1.5"),
        ([0.0], PASSES["macs"], "not 0"),
        ([float("nan")], PASSES["macs"], "not nan"),
        ([0.5], "fold", "no place for the target"),
        ([0.5], "prune-channels ratio={}", "write ratio={gone}"),
        ([0.5], "prune-chanels macs={}", "did you mean 'prune-channels'"),
    ],
)
def test_targets_that_make_no_sense_are_one_clear_error(keep: list[float], template: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan(keep, template)


def test_gone_is_what_keep_leaves() -> None:
    assert [t.recipe for t in plan([0.9, 0.25], "sparsify ratio={gone}")] == ["sparsify ratio=0.1", "sparsify ratio=0.75"]


# ---- knees


def report_of(values: list[tuple[float, float]], *, original: float | None = 0.9, macs: int | None = 1000) -> SweepReport:
    """Points of (share of the MACs, quality); without an original quality the values are errors."""
    found = sweep(tiny(), [0.9], "prune-channels macs={} round_to=1", measure=False).report
    first = ModelRow(**{**found.original.model_dump(), "quality": original, "macs": macs, "parameters": 1000})
    points = []
    for share, value in values:
        quality = None
        if original is not None:
            quality = QualityRow(metric="top1", rows=100, original=original, optimized=value, lost=0, won=0, p_value=1.0)
        size = int(1000 * share)
        error = None if original is not None else value
        row = PointRow(keep=share, recipe="r", macs=size if macs else None, parameters=size, quality=quality, error=error)
        points.append(row.model_copy(update={"macs_ratio": share if macs else None, "file_bytes": size, "latency_ratio": share}))
    return found.model_copy(update={"original": first, "points": points, "metric": "top1" if original is not None else None})


def test_within_loss_is_the_smallest_model_that_loses_no_more() -> None:
    within, _ = knees(report_of([(0.9, 0.9), (0.7, 0.895), (0.5, 0.85)]), 0.01)
    assert (within.rule, within.keep) == (WITHIN, 0.7)
    assert "chance" not in within.why
    lucky, _ = knees(report_of([(0.9, 0.9), (0.7, 0.88), (0.5, 0.895)]), 0.01)
    assert lucky.keep == 0.5
    assert "1 larger than it is not, so this may be chance" in lucky.why
    assert knees(report_of([(0.9, 0.8)]), 0.01)[0].keep is None
    assert knees(report_of([(0.9, 0.1)], original=None), 0.01)[0].why.startswith("quality was not measured")


@pytest.mark.parametrize("macs", [1000, None])
def test_the_chord_finds_the_corner(macs: int | None) -> None:
    corner = [(0.9, 0.9), (0.6, 0.88), (0.5, 0.6), (0.4, 0.3)]
    _, chord = knees(report_of(corner, macs=macs), 0.01)
    assert (chord.rule, chord.keep) == (CHORD, 0.6)
    assert ("MACs" if macs else "parameters") in knees(report_of(corner, macs=macs), 0.01)[0].why
    errors = report_of([(s, 0.9 - v) for s, v in corner], original=None, macs=macs)
    assert knees(errors, 0.01)[1].keep == 0.6


def test_there_is_no_knee_where_quality_falls_from_the_start() -> None:
    assert knees(report_of([(0.9, 0.5), (0.5, 0.4)]), 0.01)[1].keep is None
    assert knees(report_of([(0.9, 0.9), (0.5, 0.9)]), 0.01)[1].keep is None
    assert knees(report_of([(0.9, 0.5)]), 0.01)[1].keep is None


# ---- the picture


def test_the_plot_is_one_well_formed_file_that_names_every_point() -> None:
    report = report_of([(0.9, 0.9), (0.6, 0.88), (0.4, 0.3)])
    report.knees = knees(report, 0.03)
    report.template = "prune-channels macs={} exclude='a&b<c>'"
    report.points.append(PointRow(keep=0.1, recipe="r", failed="too <small>"))
    root = ElementTree.fromstring(plot(report))
    space = "{http://www.w3.org/2000/svg}"
    texts = ["".join(t.itertext()) for t in root.iter(f"{space}text")]
    assert [texts.count(label) for label in ("original", "0.9", "0.6", "0.4")] == [3, 3, 3, 3]
    assert {"MACs, of the original", "latency, of the original", "file size, of the original"} <= set(texts)
    assert "0.1 not reached: too <small>" in texts
    classes = [c.get("class") for c in root.iter(f"{space}circle")]
    assert (classes.count("within"), classes.count("chord")) == (4, 4)  # three panels and the legend
    assert "prefers-color-scheme: dark" in plot(report)
    assert "href" not in plot(report)


def test_without_quality_the_plot_shows_errors_and_without_both_there_is_none() -> None:
    assert "Error at the outputs" in plot(report_of([(0.9, 0.01), (0.5, 0.2)], original=None))
    with pytest.raises(OptionError, match="nothing to draw"):
        plot(sweep(tiny(), [0.9], "prune-channels macs={} round_to=1", measure=False).report)


# ---- the command


def test_sweep_writes_what_is_asked_for_and_optimize_makes_the_same_file(cli: Run, digits: Path, tmp_path: Path) -> None:
    model, calib, out = digits / "digits.onnx", digits / "digits_calib.npz", tmp_path / "models"
    code, shown, err = cli(
        "sweep", model, "--keep", "0.8,0.5", "--passes", CHANNELS, "--calib", calib, "--eval", digits / "digits_eval.npz",
        "-o", out, "--json", tmp_path / "s.json", "--plot", tmp_path / "s.svg",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert sorted(p.name for p in out.iterdir()) == ["digits.keep-0.5.onnx", "digits.keep-0.8.onnx"]
    report = SweepReport.model_validate_json((tmp_path / "s.json").read_text())
    ElementTree.fromstring((tmp_path / "s.svg").read_text())
    for point in report.points:
        assert point.path is not None
        assert point.latency_ratio is not None
        assert point.quality is not None
        assert point.quality.rows > 500
        again = tmp_path / "again.onnx"
        common = ("optimize", model, "-o", again, "--calib", calib, "--no-measure", "--overwrite", "-q")
        assert cli(*common, "--passes", point.recipe)[0] == 0
        assert hashlib.sha256(again.read_bytes()).hexdigest() == point.sha256
        assert again.read_bytes() == Path(point.path).read_bytes()
    for label in ("keep", "of original", "lost/won", "time", "within loss:", "chord:", "graphopt optimize"):
        assert label in shown


def test_nothing_is_written_unless_asked_and_json_prints_alone(
    cli: Run, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    template = "prune-channels macs={}"
    code, out, err = cli("sweep", digits / "digits.onnx", "--keep", "0.8", "--passes", template, "--no-measure", "--json", "-")
    assert (code, err) == (0, "")
    assert json.loads(out)["points"][0]["recipe"] == "prune-channels macs=0.8"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_sweep_leaves_nothing(cli: Run, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*given: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphopt.sweeps.latency", interrupt)
    code, _, err = cli(
        "sweep", digits / "digits.onnx", "--keep", "0.8", "--passes", "prune-channels macs={}",
        "-o", tmp_path / "models", "--json", tmp_path / "s.json",
    )  # fmt: skip
    assert code == 130
    assert "nothing was written" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--keep", "0.8,x"), "expected numbers separated by commas"),
        (("--keep", "0.8", "--by", "params", "--passes", CHANNELS), "give --by or --passes, not both"),
        (("--keep", "0.8", "--plot", "p.svg"), "nothing to draw"),
        (("--keep", "0.8"), "needs calibration data"),
        (("--keep", "0.8", "--json", "old.json"), "old.json exists; give --overwrite"),
        (("--keep", "0.8", "-o", "models"), "digits.keep-0.8.onnx exists; give --overwrite"),
        (("--keep", "0.8", "--json", "digits.onnx", "--overwrite"), "is the input"),
        (("--keep", "0.8", "--calib", "c.npz", "--json", "p", "--plot", "p"), "two outputs have the same name"),
    ],
)
def test_mistakes_are_found_before_any_work(
    cli: Run, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.onnx").write_bytes((digits / "digits.onnx").read_bytes())
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "digits.keep-0.8.onnx").write_text("old")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, _, err = cli("sweep", "digits.onnx", *given)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
