"""Zeroing equals removing: on small models for every way in which dimensions couple, and on real ones."""

from __future__ import annotations

from pathlib import Path

import dim_cases
import onnx
import pytest
import soundness
import zoo
from zoo_models import MODELS

from graphopt import dim_rules
from graphopt.dims import couple, groups
from graphopt.model import load

CASES = {**dim_cases.CONVOLUTIONS, **dim_cases.MATRICES, **dim_cases.RECURRENT, **dim_cases.TRANSFORMERS}
FAST = ("basic_pitch", "eeg_a", "silero_vad_sequence", "silero_vad_half", "magika")  # seconds; the others are slow


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    case = CASES[name]
    proto = soundness.model(case.text)
    model = load(proto)
    found = groups(model, couple(model))
    assert tuple(len(g.units) for g in found) == case.units
    assert soundness.findings(proto, [soundness.inputs(proto, symbols=case.symbols)]) == []


def test_digits(digits: Path) -> None:
    path = digits / "digits.onnx"
    assert soundness.findings(path, [zoo.feeds(path, batch=3)]) == []


def real(id: str) -> None:
    path = zoo.model(id)
    batches = [1] if MODELS[id].fixed_batch else [1, 2]
    assert soundness.findings(path, [zoo.feeds(path, batch=b, seed=b) for b in batches]) == []


@pytest.mark.network
@pytest.mark.parametrize("id", FAST)
def test_real_model(id: str) -> None:
    real(id)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("id", [id for id in MODELS if id not in FAST])
def test_large_real_model(id: str) -> None:
    real(id)


def test_finds_a_rule_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax divides by a sum over the axis: were it elementwise, removing a term would change the others."""
    proto = onnx.ModelProto()
    proto.CopyFrom(
        soundness.model(
            "g (float[N,3] x, float[3,4] w1, float[4,2] w2) => (float[N,2] y) "
            "{ a = MatMul(x, w1)  p = Softmax(a)  y = MatMul(p, w2) }"
        )
    )
    feeds = [soundness.inputs(proto)]
    assert groups(load(proto), couple(load(proto))) == []
    monkeypatch.setitem(dim_rules.DIM_RULES, "Softmax", dim_rules.DIM_RULES["Relu"])
    found = soundness.findings(proto, feeds)
    assert [f.units for f in found] == [1, 2]
    assert all("error" in f.message for f in found)
