"""Everything onnx tests itself with, and real models, through the exact passes: no crash, the same outputs, still valid."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import onnx
import pytest
import robustness
import zoo

from graphopt.context import Context
from graphopt.errors import ModelError
from graphopt.model import from_proto
from graphopt.registry import find

EXACT = "cleanup, fold-bn, fold-scales"
AT_LEAST = {"node": 1500, "simple": 20, "pytorch-converted": 50, "pytorch-operator": 25}  # onnx 1.17 and later


@cache
def cases(kind: str) -> list[zoo.NodeTest]:
    return list(zoo.node_tests([kind]))


def check(kind: str, passes: str) -> None:
    outcomes = [robustness.check_node_test(test, passes) for test in cases(kind)]
    assert not [o for o in outcomes if o.status == "failed"]
    counts = Counter(o.status for o in outcomes)
    assert len(outcomes) >= AT_LEAST[kind] * 0.8
    assert counts["onnxruntime"] + counts["reference"] >= 0.8 * (len(outcomes) - counts["refused"]), counts


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_onnx_backend_tests_survive_loading_and_saving(kind: str) -> None:
    check(kind, "")


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_onnx_backend_tests_survive_the_exact_passes(kind: str) -> None:
    check(kind, EXACT)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_a_second_run_changes_nothing(kind: str) -> None:
    """0 changes is a promise, and what a pass did is done."""
    restless = []
    for test in cases(kind)[:: 5 if kind == "node" else 1]:
        try:
            model = robustness.optimized(test.model, "fold-constants, flush-denormals, dead-code")
        except ModelError:  # too old; the tests above judge that
            continue
        before = model.proto().SerializeToString(deterministic=True)
        changes = [find(name).fn(model, Context()) for name in ("fold-constants", "flush-denormals", "dead-code")]
        if any(changes) or model.proto().SerializeToString(deterministic=True) != before:
            restless.append((test.name, changes))
    assert not restless


@pytest.mark.network
@pytest.mark.parametrize("id", zoo.MODELS)
def test_real_models_keep_their_outputs(id: str) -> None:
    path = zoo.model(id)
    feeds = [zoo.feeds(path, batch=batch, seed=batch, id=id) for batch in (1, 2)]
    outcome = robustness.check_real(path, EXACT, feeds)
    assert outcome.status == "onnxruntime", outcome
    assert outcome.nodes[1] <= outcome.nodes[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.light_models())
def test_light_models_keep_their_outputs(name: str) -> None:
    path = zoo.light_models()[name]
    outcome = robustness.check_real(path, EXACT, [zoo.feeds(path)])
    assert outcome.status == "onnxruntime", outcome


# --- the harness itself can fail

SCALE = """<ir_version: 9, opset_import: ["" : 17]> scale (float[2] x) => (float[2] y) <float w = {FACTOR}> { y = Mul(x, w) }"""


def node_test(expected: list[float]) -> zoo.NodeTest:
    data = ({"x": np.array([1, 2], np.float32)}, [np.array(expected, np.float32)])
    return zoo.NodeTest("scale", "node", onnx.parser.parse_model(SCALE.replace("FACTOR", "2.0")), (data,), 1e-3, 1e-7)


def test_the_harness_accepts_what_is_right() -> None:
    assert robustness.check_node_test(node_test([2, 4]), EXACT).status == "onnxruntime"


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        (SCALE.replace("FACTOR", "2.1"), "differ"),
        (SCALE.replace("FACTOR", "2.0").replace("y", "z"), "outputs changed"),
        (SCALE.replace("FACTOR", "2.0").replace("w)", "w, w)"), "not valid"),
    ],
)
def test_the_harness_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch, text: str, detail: str) -> None:
    monkeypatch.setattr(robustness, "optimized", lambda source, passes: from_proto(onnx.parser.parse_model(text)))
    outcome = robustness.check_node_test(node_test([2, 4]), EXACT)
    assert outcome.status == "failed"
    assert detail in outcome.detail


def test_distances_are_relative_and_strict_about_nan() -> None:
    a = np.array([10.0, np.nan, np.inf], np.float32)
    assert robustness.distance(a, a) == 0
    assert robustness.distance(a, np.array([11, np.nan, np.inf], np.float32)) == pytest.approx(0.1)
    assert robustness.distance(a, np.array([10, 1, np.inf], np.float32)) == np.inf
    assert robustness.distance(a, np.array([10, np.nan, -np.inf], np.float32)) == np.inf
    assert robustness.distance(a, a.astype(np.float64)) == np.inf


def test_lists_and_strings_are_compared_too() -> None:
    assert robustness.same([[np.array(["a"])], None], [[np.array(["a"])], None], 0, 0)
    assert not robustness.same([[np.array(["a"])]], [[np.array(["b"])]], 0, 0)
    assert not robustness.same([None], [np.array(1)], 0, 0)
