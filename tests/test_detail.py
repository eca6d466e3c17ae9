"""What a report measures layer by layer and records pass by pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import zoo

from graphopt import detail as measuring
from graphopt.api import optimize
from graphopt.detail import Recorder
from graphopt.edit import remove_nodes
from graphopt.lineage import Lineage
from graphopt.model import Model, from_proto
from graphopt.pipeline import Step, StepResult
from graphopt.registry import Pass
from graphopt.report import Detail, NodeRow

PRUNED = "fold, prune-channels macs=0.6 criterion=l2, cleanup, quantize"
CHAIN = """<ir_version: 8, opset_import: ["": 17]> g (float[1, 4] x) => (float[1, 4] y) {
    a = Relu (x)
    b = Sigmoid (a)
    c = Tanh (b)
    y = Neg (c)
}"""


def detail_of(source: Any, passes: str, **options: Any) -> Detail:
    found = optimize(source, passes, detail=True, **options).report.detail
    assert found is not None
    return found


@pytest.fixture(scope="module")
def rows(digits: Path) -> dict[str, Any]:
    return {"calibration": digits / "digits_calib.npz", "evaluation": digits / "digits_eval.npz"}


# ---- the nodes


def follow(lineage: Any, model: Model, name: str = "p", *, exact: bool = True, changes: int = 1) -> None:
    lineage(model, Step(Pass(name, lambda m, c: 0, exact=exact)), StepResult(name, {}, changes, 0.0, len(model.nodes())))


def chain() -> tuple[Model, Lineage]:
    proto = onnx.parser.parse_model(CHAIN)
    for node in proto.graph.node:
        node.name = node.op_type.lower()
    model, lineage = from_proto(proto), Lineage()
    lineage.start(model)
    return model, lineage


def fates(nodes: list[NodeRow]) -> list[tuple[str, int | None, int | None, list[int]]]:
    return [(n.name, n.added, n.removed, n.changed) for n in nodes]


def test_what_a_pass_removes_stands_where_it_stood() -> None:
    model, lineage = chain()
    follow(lineage, model, changes=0)
    sigmoid = model.graph.nodes[1]
    model.graph.nodes[2].inputs[0] = sigmoid.inputs[0]
    remove_nodes(model.graph, [sigmoid])
    follow(lineage, model)
    rows = fates(lineage.rows())
    assert rows == [("relu", None, None, []), ("sigmoid", None, 1, []), ("tanh", None, None, []), ("neg", None, None, [])]
    assert [e.model_dump() for e in lineage.edits] == [{"run": 1, "added": {}, "removed": {"Sigmoid": 1}, "changed": {}}]


def test_another_name_is_the_same_node_and_another_operator_is_a_change() -> None:
    model, lineage = chain()
    model.graph.nodes[1].name = "renamed"
    model.graph.nodes[3].op = "Abs"
    follow(lineage, model)
    found = {n.name: n for n in lineage.rows()}
    assert fates(lineage.rows()) == [
        ("relu", None, None, []),
        ("renamed", None, None, []),
        ("tanh", None, None, []),
        ("neg", None, None, [0]),
    ]
    assert (found["neg"].before, found["neg"].after) == ("y = Neg(c)", "y = Abs(c)")
    assert found["renamed"].before is None


def test_weights_that_change_under_the_same_name_are_a_change() -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[1, 2] x) => (float[1, 2] y) <float[2] w = {1, 2}> { y = Add (x, w) }'
    model, lineage = from_proto(onnx.parser.parse_model(text)), Lineage()
    lineage.start(model)
    follow(lineage, model)
    model.graph.nodes[0].inputs[1].values = np.array([1, 3], np.float32)
    follow(lineage, model)
    assert [n.changed for n in lineage.rows()] == [[1]]


def test_what_comes_and_goes_is_counted_but_not_listed() -> None:
    model, lineage = chain()
    tanh = model.graph.nodes[2]
    tanh.name, tanh.op = "other", "Erf"
    follow(lineage, model)
    tanh.name, tanh.op = "tanh", "Tanh"
    follow(lineage, model)
    assert [(n.name, n.added, n.removed) for n in lineage.rows()] == [
        ("relu", None, None), ("sigmoid", None, None), ("tanh", 1, None), ("tanh", None, 0), ("neg", None, None)
    ]  # fmt: skip
    assert [(e.added, e.removed) for e in lineage.edits] == [({"Erf": 1}, {"Tanh": 1}), ({"Tanh": 1}, {"Erf": 1})]


# ---- stages


def test_exact_passes_belong_to_the_stage_before_them() -> None:
    model, _ = chain()
    recorder = Recorder()
    recorder.lineage.start(model)
    for name, exact, changes in (
        ("fold", True, 1),
        ("idle", False, 0),
        ("prune", False, 2),
        ("cleanup", True, 1),
        ("cut", False, 1),
    ):
        follow(recorder, model, name, exact=exact, changes=changes)
    assert [(s.name, s.runs) for s in recorder.stages] == [("exact passes", 1), ("prune", 4), ("cut", 5)]
    assert all(len(onnx.load(s.path).graph.node) == 4 for s in recorder.stages)
    folder = recorder.folder
    del recorder
    assert not folder.exists()


def test_stages_are_measured_like_the_result(digits: Path, rows: dict[str, Any]) -> None:
    result = optimize(digits / "digits.onnx", PRUNED, detail=True, measure=True, **rows)
    report, found = result.report, result.report.detail
    assert found is not None
    assert found.notes == []
    last = found.stages[-1]
    assert (last.quality, last.file_bytes, last.latency) == (report.quality, report.after.file_bytes, report.after.latency)
    assert found.stages[0].error == pytest.approx(0, abs=1e-5)
    assert [s.file_bytes for s in found.stages] == sorted((s.file_bytes for s in found.stages), reverse=True)
    assert found.us == pytest.approx(sum(c.us for c in found.categories), rel=1e-6)
    assert "faster" in found.explanation[0] or "SLOWER" in found.explanation[0] or "as fast" in found.explanation[0]


def test_a_large_model_has_no_stages_and_says_so(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LARGE", 0)
    found = detail_of(digits / "digits.onnx", "fold")
    assert found.stages == []
    assert {n.partition(":")[0] for n in found.notes} == {
        "stages were not measured one by one",
        "errors of layers were not measured",
    }
    assert found.nodes != []


# ---- layers


@pytest.mark.parametrize("name", ["ppocr_cls", "minilm_l3"])
def test_what_is_compared_means_the_same(name: str) -> None:
    """Folding moves BatchNormalization and factors into other layers: errors are what zeros in 1 of 1000 weights bring, no more."""
    path = zoo.model(name)
    found = detail_of(path, "fold, sparsify ratio=0.001", calibration=[zoo.feeds(path)])
    errors = [r.error for r in found.layers if r.error is not None]
    assert len(errors) > 50
    assert 0 < max(errors) < 0.05


def test_layers_that_were_folded_into_each_other_are_not_compared(digits: Path) -> None:
    found = detail_of(digits / "digits.onnx", "fold")
    assert {r.error for r in found.layers} == {None}
    assert "exact passes folded layers into each other" in found.notes[0]
    kept = detail_of(digits / "digits.onnx", "remove-noops")
    assert max(r.error for r in kept.layers if r.error is not None) < 1e-5
    late = detail_of(digits / "digits.onnx", "prune-channels ratio=0.2 criterion=l2, fold, sparsify ratio=0.001")
    assert {r.error_from for r in late.layers if r.error is not None} == {"prune-channels ratio=0.2 criterion=l2"}


def test_layers_of_a_pruned_model_are_compared_with_the_first_stage_of_their_shape(digits: Path, rows: dict[str, Any]) -> None:
    found = {r.name: r for r in detail_of(digits / "digits.onnx", PRUNED, **rows).layers}
    pruned = "prune-channels macs=0.6 criterion=l2"
    assert found["res1.a.conv"].error_from == pruned
    assert 0 < (found["res1.a.conv"].error or 0) < 0.1
    assert found["logits"].error_from is None


def test_errors_do_not_depend_on_how_many_tensors_are_held(
    digits: Path, rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = "fold, quantize"
    first = detail_of(digits / "digits.onnx", passes, **rows)
    monkeypatch.setattr(measuring, "_BUDGET", 1)
    again = detail_of(digits / "digits.onnx", passes, **rows)
    assert [r.error for r in first.layers] == [r.error for r in again.layers]
    monkeypatch.setattr(measuring, "_SECONDS", -1.0)
    late = detail_of(digits / "digits.onnx", passes, **rows)
    assert [r.error for r in late.layers if r.error is not None] == []
    assert "errors of some layers were not measured" in late.notes[0]


def test_zeros_are_counted_in_int8_too(digits: Path, rows: dict[str, Any]) -> None:
    found = {r.name: r for r in detail_of(digits / "digits.onnx", "fold, sparsify ratio=0.5, quantize", **rows).layers}
    layer = found["res2.b.conv"]
    assert layer.base_zeros == 0
    assert layer.zeros is not None
    assert 0.5 < layer.zeros < 0.75  # half were removed, and rounding takes more


def test_ranges_are_those_of_quantize(digits: Path, rows: dict[str, Any]) -> None:
    for method in ("mse", "minmax"):
        result = optimize(digits / "digits.onnx", f"fold, quantize method={method}", detail=True, **rows)
        facts = result.report.passes[-1].facts
        assert "histograms" not in facts
        assert result.report.detail is not None
        for row in result.report.detail.ranges:
            assert [row.low, row.high] == pytest.approx(facts["ranges"][row.tensor])
            assert (row.saturated == 0) == (method == "minmax") or row.saturated < 0.01
            assert min(row.counts) >= 0
        assert len(result.report.detail.ranges) > 10


def test_nothing_is_measured_that_was_not_asked_for(digits: Path) -> None:
    assert optimize(digits / "digits.onnx", "fold").report.detail is None
    found = detail_of(digits / "digits.onnx", "fold", measure=False)
    assert (found.us, found.categories) == (None, [])
    assert all(r.us is None for r in found.layers)
