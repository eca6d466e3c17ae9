"""`graphopt advise`: its figures say how they are known, its verdicts follow from them, and what it advises then really happens."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import zoo

import graphopt
from graphopt.advice import Tried, advise
from graphopt.advice_judge import timed, verdict
from graphopt.advice_machine import Machine, situation
from graphopt.advice_nbits import packed_nbits, to_nbits
from graphopt.advice_report import Advice, AdviceReport, Figure, Quality
from graphopt.advice_rows import rows_for
from graphopt.advice_say import chosen
from graphopt.advice_trials import TECHNIQUES, Made
from graphopt.audit_report import NodeAudit
from graphopt.errors import DataError, ModelError, OptionError
from graphopt.feeds import input_specs
from graphopt.kernels import reference
from graphopt.model import load

Run = Callable[..., "tuple[int, str, str]"]
ENOUGH = 120.0  # seconds: nothing is left out on a busy machine
NAMES = {t.name for t in TECHNIQUES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from importlib import resources

    made = tmp_path_factory.mktemp("advise")
    for name in ("digits.onnx", "digits_calib.npz", "digits_eval.npz"):
        shutil.copyfile(str(resources.files("graphopt") / "assets" / name), made / name)
    return made


@pytest.fixture(scope="module")
def report(folder: Path) -> AdviceReport:
    return advise(folder / "digits.onnx", data=str(folder / "digits_eval.npz"), seconds=ENOUGH)


def the(report: AdviceReport, technique: str) -> Advice:
    return next(a for a in report.advice if a.technique == technique)


def mlp(path: Path, k: int, n: int) -> Path:
    """One product of a row with a constant matrix [k, n]."""
    text = f'<ir_version: 8, opset_import: ["" : 17]> mlp (float[rows, {k}] x) => (float[rows, {n}] y) {{ y = MatMul (x, w) }}'
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((k, n)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, path)
    return path


# ---- figures


def test_every_figure_says_how_it_is_known(report: AdviceReport) -> None:
    assert {a.technique for a in report.advice} == NAMES
    for a in report.advice:
        for figure in (a.speed, a.size):
            assert figure is None or (0 < figure.low <= figure.value <= figure.high and figure.basis == "measured" and figure.of)
        assert a.why
        assert bool(a.commands) == (a.verdict != "refuse")
    order = ["do", "try", "unsure", "refuse"]
    assert [a.verdict for a in report.advice] == sorted((a.verdict for a in report.advice), key=order.index)
    s = report.situation
    assert s is not None
    assert s.arithmetic + s.weights + s.other == pytest.approx(1)
    assert sum(k.share for k in s.kinds) == pytest.approx(1)
    assert all(k.of_peak is None or 0 < k.of_peak <= 1 for k in s.kinds)
    assert "64 rows of 'digits_eval.npz' to calibrate, 132 other labelled rows" in report.data


def test_what_is_known_of_quality(report: AdviceReport) -> None:
    int8 = the(report, "int8").quality
    assert int8 is not None
    assert (int8.metric, int8.rows) == ("top1", 132)
    assert int8.original is not None
    assert int8.original > 0.95
    assert the(report, "prune").quality is None  # what was tried is not as good as what `prune` would make
    assert the(report, "cleanup").verdict == "do"
    assert the(report, "nbits").verdict == "refuse"  # digits has no MatMul


def test_what_it_advises_happens(report: AdviceReport, folder: Path, cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advised commands run, and what is clearly faster by the advice is not slower when it is really made."""
    monkeypatch.chdir(folder)
    ran = 0
    for name in ("cleanup", "int8", "int8-compiled"):
        advice = the(report, name)
        for command in advice.commands:
            code, out, err = cli(*shlex.split(command)[1:], "--json", "--overwrite")
            assert (code, err) == (0, ""), command
            found = json.loads(out)
            assert advice.size is not None
            assert advice.size.value == pytest.approx(found["after"]["file_bytes"] / found["before"]["file_bytes"], rel=0.1)
            assert advice.speed is not None
            assert not (advice.speed.low > 1.15 and found["speedup"] < 0.9), (name, found["speedup"])
            ran += 1
    assert ran >= 2


def test_without_time_it_estimates_and_says_so(folder: Path) -> None:
    report = advise(folder / "digits.onnx", seconds=0.001)
    assert the(report, "cleanup").speed is not None  # what is made anyway is timed
    for name in ("int8", "int8-compiled", "prune", "sparse"):
        a = the(report, name)
        assert a.speed is not None
        assert a.size is not None
        assert (a.verdict, a.speed.basis, a.size.basis) == ("unsure", "estimated", "estimated")
        assert a.speed.low <= a.speed.value <= a.speed.high
        assert "% of the time is in nodes that it changes" in a.speed.of
        assert "give more --seconds" in a.why
    assert the(report, "fp16").verdict == "refuse"
    assert any("no rows were given" in w for w in report.warnings)


def test_another_runtime_is_not_timed_here(folder: Path) -> None:
    report = advise(folder / "digits.onnx", target="tensorrt", data=str(folder / "digits_calib.npz"), seconds=ENOUGH)
    assert not report.here
    assert all(a.speed is None for a in report.advice)
    int8 = the(report, "int8")
    assert int8.verdict == "try"
    assert "tensorrt runs these in INT8: " in int8.why
    assert "Conv" in int8.why
    assert "--target tensorrt" in int8.commands[0]
    assert the(report, "int8-compiled").why == "graphopt's library runs inside onnxruntime, not in tensorrt"
    assert any("nothing that runs here says how fast" in w for w in report.warnings)


def test_a_quantised_model_can_only_be_compiled(folder: Path) -> None:
    made = graphopt.optimize(str(folder / "digits.onnx"), "fold, quantize", calibration=str(folder / "digits_calib.npz"))
    made.save(folder / "int8.onnx", overwrite=True)
    report = advise(folder / "int8.onnx", seconds=ENOUGH)
    assert "quantised already" in the(report, "int8").why
    assert {the(report, n).verdict for n in ("int8", "prune", "nbits", "fp16")} == {"refuse"}
    compiled = the(report, "int8-compiled")
    assert compiled.passes == "fold, compile-int8"
    assert all("--calib" not in c for c in compiled.commands)


def test_products_with_large_weights_are_tried_with_four_bits(tmp_path: Path) -> None:
    report = advise(mlp(tmp_path / "wide.onnx", 1024, 512), seconds=ENOUGH)
    a = the(report, "nbits")
    assert a.speed is not None
    assert a.size is not None
    assert (a.speed.basis, a.verdict in ("try", "unsure", "refuse")) == ("measured", True)
    assert a.size.value == pytest.approx(5 / 32, rel=0.05)
    if a.commands:
        assert "matmul_nbits_quantizer" in a.commands[0]
        assert "compile-nbits" in a.commands[1]


def test_what_cannot_be_advised(folder: Path, cli: Run) -> None:
    with pytest.raises(OptionError, match="slack=2"):
        advise(folder / "digits.onnx", slack=2)
    with pytest.raises(OptionError, match="unknown target 'gpu'"):
        advise(folder / "digits.onnx", target="gpu")
    with pytest.raises(ModelError, match=r"gone\.onnx"):
        advise(folder / "gone.onnx")
    with pytest.raises(DataError, match="has no 'labels'"):
        advise(folder / "digits.onnx", evaluation={"image": np.zeros((40, 1, 8, 8), np.float32)})
    with pytest.raises(DataError, match="input 'image' is missing"):
        advise(folder / "digits.onnx", data={"picture": np.zeros((40, 1, 8, 8), np.float32)})
    code, _, err = cli("advise", folder / "gone.onnx")
    assert (code, len(err.splitlines())) == (1, 1)


# ---- verdicts


def figure(low: float, value: float, high: float, basis: Any = "measured") -> Figure:
    return Figure(value=value, low=low, high=high, basis=basis, of="test")


def quality(original: float | None, result: float | None, p: float | None = None, sqnr: float | None = 30.0) -> Quality:
    lost = None if original is None else 3
    return Quality(
        rows=100, agreement=0.9, sqnr_db=sqnr, metric=None if original is None else "top1", original=original, result=result,
        lost=lost, won=lost and 0, p_value=p,
    )  # fmt: skip


FAST, SLOW, SAME, VAGUE = figure(1.4, 1.5, 1.6), figure(0.7, 0.75, 0.8), figure(0.98, 1.0, 1.02), figure(0.8, 1.1, 1.4)
SMALL, WHOLE = figure(0.3, 0.3, 0.3), figure(1, 1, 1)
GOOD, BAD, DOUBTFUL = quality(0.9, 0.9, 1.0), quality(0.9, 0.8, 0.001), quality(0.9, 0.88, 0.3)


@pytest.mark.parametrize(
    ("speed", "size", "found", "kind", "said"),
    [
        (FAST, SMALL, GOOD, "do", "faster: 1.50x"),
        (FAST, WHOLE, None, "try", "not known"),
        (FAST, SMALL, BAD, "refuse", "loses more quality than the slack"),
        (FAST, SMALL, DOUBTFUL, "try", "within chance"),
        (FAST, SMALL, quality(None, None), "try", "measure with labels"),
        (FAST, SMALL, quality(None, None, sqnr=3.0), "refuse", "the outputs are lost"),
        (SLOW, SMALL, GOOD, "refuse", "slower: 0.75x (0.70 .. 0.80, measured), although the file shrinks to 30 %"),
        (SLOW, WHOLE, GOOD, "refuse", "slower"),
        (SAME, SMALL, GOOD, "do", "as fast: 1.00x"),
        (SAME, WHOLE, GOOD, "refuse", "no gain"),
        (VAGUE, WHOLE, GOOD, "unsure", "do not decide"),
    ],
)
def test_verdicts(speed: Figure, size: Figure, found: Quality | None, kind: str, said: str) -> None:
    got, why = verdict(speed, size, found, exact=False, slack=0.01)
    assert (got, said in why) == (kind, True), why


def test_slack_and_exactness() -> None:
    assert verdict(FAST, SMALL, DOUBTFUL, exact=False, slack=0.03)[0] == "do"
    assert verdict(FAST, SMALL, GOOD, exact=False, slack=0)[0] == "refuse"
    assert verdict(FAST, SMALL, None, exact=True, slack=0)[0] == "do"
    assert verdict(SAME, WHOLE, None, exact=True, slack=0)[0] == "do"
    assert verdict(SLOW, WHOLE, None, exact=True, slack=0)[0] == "refuse"


def test_the_least_share_of_zeros_that_pays_is_taken() -> None:
    sparse = next(t for t in TECHNIQUES if t.name == "sparse")
    made = [Made(Path("x"), 1, "", share) for share in (0.7, 0.8, 0.9)]
    speeds = [figure(0.8, 0.9, 1.0), figure(1.1, 1.2, 1.3), figure(1.5, 1.6, 1.7)]
    assert chosen(Tried(sparse, made, speeds=list(speeds))) == 1
    assert chosen(Tried(sparse, made, speeds=[speeds[0]] * 3)) == 2
    kinds = [Made(Path("x"), 1, ""), Made(Path("y"), 1, "")]
    assert chosen(Tried(sparse, kinds, speeds=[speeds[1], None])) == 0
    assert chosen(Tried(sparse, kinds, speeds=[speeds[0], speeds[1]])) == 1


# ---- parts


def test_a_model_against_itself_and_one_that_does_not_run(folder: Path) -> None:
    broken = folder / "broken.onnx"
    broken.write_bytes(b"nothing")
    path = folder / "digits.onnx"
    found = timed([path, path, broken], {"image": np.zeros((1, 1, 8, 8), np.float32)}, 2.0)
    assert found[2] is None
    for same in found[:2]:
        assert same is not None
        assert same.low <= 1.05
        assert same.high >= 0.95


def test_rows_to_judge_by_are_not_those_of_calibration() -> None:
    specs = input_specs(
        onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> m (float[n, 1] x) => (float[n, 1] y) { y = Relu (x) }')
    )
    rows = np.arange(1000, dtype=np.float32)[:, None]
    split = rows_for({"x": rows, "labels": np.arange(1000)}, None, specs, 500)
    assert split.judged is not None
    mine, others = ([float(f["x"][0, 0]) for f in d.batches(1)] for d in (split.calibration, split.judged))
    assert (len(mine), len(others)) == (64, 132)
    assert not set(mine) & set(others)
    assert max(others) > 990  # spread over all of them
    assert split.judged.labels is not None
    assert split.judged.labels.tolist() == others
    both = rows_for({"x": rows}, {"x": rows[:20], "labels": np.arange(20)}, specs, 500)
    assert both.judged is not None
    assert (both.labelled, both.judged.rows is None or both.judged.rows == 20) == (True, True)
    few = rows_for({"x": rows[:20]}, None, specs, 500)
    assert few.judged is None
    assert not rows_for(None, None, specs, 500).given


def test_weights_are_waited_for_only_where_they_do_not_fit(tmp_path: Path) -> None:
    model = load(mlp(tmp_path / "m.onnx", 64, 32))
    name = str(model.graph.nodes[0].name)
    node = NodeAudit(
        name=name, op="MatMul", kernel="MatMul", how="own", dtype="float", shape=[1, 32], us=10.0, base_us=None, macs=None,
        quantized=False, int8=False, reason=None, fix=None,
    )  # fmt: skip
    feed = {"x": np.zeros((1, 64), np.float32)}
    bytes_held = 64 * 32 * 4
    fits = situation(model, [node], Machine(1.0, 1.0, bytes_held), 0.01, feed)
    assert (fits.weights, fits.bound, fits.weight_bytes) == (0.0, "arithmetic", bytes_held)
    assert fits.kinds[0].gmacs_per_second == pytest.approx(64 * 32 / 10 / 1e3)
    waits = situation(model, [node], Machine(1.0, 1.0, bytes_held - 1), 0.01, feed)
    assert waits.weights == pytest.approx(bytes_held / 1e3 / 10)  # at a GB a second, 8.192 us
    assert waits.bound == "reading weights"


def test_four_bits_are_what_the_runtime_reads(tmp_path: Path) -> None:
    path = mlp(tmp_path / "m.onnx", 40, 24)  # the last block of a column is not full
    model = load(path)
    weight = model.graph.nodes[0].inputs[1].values.copy()
    packed, scales = packed_nbits(weight, 32)
    assert to_nbits(model, 32) == 1
    x = np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
    from graphopt.runtime import run, session

    got = run(session(model.proto()), {"x": x})[0]
    wanted = reference.nbits(x, packed, scales.reshape(24, 2), None)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(got - x @ weight).max() < 0.2 * np.abs(x @ weight).max()


# ---- the command line


def test_the_command_line(cli: Run, folder: Path) -> None:
    code, out, err = cli("advise", folder / "digits.onnx", "--seconds", 1, "--slack", 0.02)
    assert (code, err) == (0, "")
    assert "bound by" in out
    assert "int8-compiled" in out
    assert "warning: no rows were given" in out
    code, out, _ = cli("advise", folder / "digits.onnx", "--seconds", 1, "--json")
    assert AdviceReport.model_validate_json(out).slack == 0.01


def test_the_schema_is_published() -> None:
    published = Path(__file__).parent.parent / "docs" / "advise.schema.json"
    assert json.loads(published.read_text()) == AdviceReport.model_json_schema()


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sentence_encoder(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(zoo.model("minilm_l3"), tmp_path / "minilm.onnx")
    random = np.random.default_rng(0)
    ids = random.integers(0, 30000, (40, 64))
    np.savez(tmp_path / "rows.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    monkeypatch.chdir(tmp_path)
    report = advise("minilm.onnx", data="rows.npz", seconds=600)
    compiled = the(report, "int8-compiled")
    assert compiled.speed is not None
    assert compiled.speed.low > 1.2
    code, out, _ = cli(*shlex.split(compiled.commands[0])[1:], "--json")
    assert code == 0
    assert json.loads(out)["speedup"] > 1.1
