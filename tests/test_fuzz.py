"""Damaged models never see anything but success or one GraphoptError; see `fuzz_judge` for what else must hold.

`pytest -m slow tests/test_fuzz.py` runs the larger profile. Examples are derived from the test alone, so a failure repeats itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fuzzing
import onnx
import pytest
from fuzz_judge import Judge, accepted, rows, same_outputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.model import load

NUMBER = st.integers(0, 63)
MUTATIONS = st.lists(st.tuples(st.integers(0, len(fuzzing.KINDS) - 1), NUMBER, NUMBER, NUMBER), min_size=1, max_size=3)
DAMAGE = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=3)
SEED = st.integers(0, len(fuzzing.SEEDS) - 1)
EXAMPLES = {"structure": 1000, "bytes": 600}
COMMON: dict[str, Any] = {
    "derandomize": True, "database": None, "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}  # fmt: skip


@pytest.fixture(scope="module")
def process() -> Iterator[Judge]:
    made = Judge()
    yield made
    made.close()


@pytest.fixture
def judge(process: Judge) -> Judge:
    """The module's process, with its counts at zero."""
    process.seen.clear()
    return process


@pytest.mark.parametrize("name", fuzzing.SEEDS)
def test_undamaged_models_go_all_the_way(judge: Judge, name: str) -> None:
    content = fuzzing.seed(fuzzing.SEEDS.index(name)).SerializeToString()
    assert judge(content) == ""
    assert {"loaded", "valid", "compared"} <= set(judge.seen)
    assert judge.seen["pruned"] == judge.seen["quantized"] == (name != "quantized")
    assert not judge.seen["crashed"]


def structure(judge: Judge, examples: int) -> None:
    @settings(max_examples=examples, **COMMON)
    @given(seed=SEED, mutations=MUTATIONS)
    def damaged(seed: int, mutations: list[fuzzing.Mutation]) -> None:
        problem = judge(fuzzing.mutate(fuzzing.seed(seed), mutations).SerializeToString())
        assert not problem, problem

    damaged()
    enough(judge, examples, refused=0.2, loaded=0.2, compared=0.05, quantized=0.05)


def bytewise(judge: Judge, examples: int) -> None:
    @settings(max_examples=examples, **COMMON)
    @given(seed=SEED, changes=DAMAGE)
    def damaged(seed: int, changes: list[tuple[int, int, int]]) -> None:
        problem = judge(fuzzing.damage(fuzzing.seed(seed).SerializeToString(), changes))
        assert not problem, problem

    damaged()
    enough(judge, examples, undecodable=0.1, loaded=0.05)


def enough(judge: Judge, examples: int, **shares: float) -> None:
    """A fuzzer that never gets anywhere proves nothing; one that crashes onnxruntime all the time neither."""
    assert all(judge.seen[stage] >= share * examples for stage, share in shares.items()), judge.seen
    assert judge.seen["crashed"] <= 0.01 * examples, judge.seen


def test_damaged_structure(judge: Judge) -> None:
    structure(judge, EXAMPLES["structure"])


def test_damaged_bytes(judge: Judge) -> None:
    bytewise(judge, EXAMPLES["bytes"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_much_damaged_structure(judge: Judge) -> None:
    structure(judge, 40 * EXAMPLES["structure"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_much_damaged_bytes(judge: Judge) -> None:
    bytewise(judge, 40 * EXAMPLES["bytes"])


# ---- the fuzzer itself can fail


def test_every_kind_of_mutation_changes_a_model() -> None:
    for kind in range(len(fuzzing.KINDS)):
        changed = 0
        for number in range(60):
            seed = fuzzing.seed(number)
            changed += fuzzing.mutate(fuzzing.seed(number), [(kind, number, number // 2, number // 3)]) != seed
        assert changed > 10, fuzzing.KINDS[kind].__name__


def test_the_judge_sees_a_changed_output() -> None:
    proto = fuzzing.seed(0)
    wrong = fuzzing.seed(0)
    wrong.graph.node[-1].attribute.append(onnx.helper.make_attribute("alpha", 2.0))
    data = rows(load(proto))
    assert data is not None
    with pytest.raises(AssertionError, match="moved by"):
        same_outputs(proto, wrong, list(data.batches(1)), lambda stage: None)
    assert accepted(proto)


def test_the_judge_survives_a_death(judge: Judge) -> None:
    content = fuzzing.seed(0).SerializeToString()
    assert judge(content) == ""
    judge.process.kill()
    judge.process.join()
    assert judge(content) == ""
