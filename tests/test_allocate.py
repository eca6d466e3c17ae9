"""Plans on small made-up groups: rounding, scopes, budgets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.allocate import Candidate, by_budget, by_ratio, candidate, meter
from graphopt.cost import Term


def group(score: list[float], name: str = "w", *, step: int = 1, minimum: int = 1) -> Candidate:
    return candidate(np.array(score), {(name, 0): np.ones(len(score), int)}, step=step, minimum=minimum)


@pytest.mark.parametrize(
    ("size", "step", "minimum", "wanted", "removed"),
    [
        (16, 8, 1, 7, 0),  # 9 would stay: rounded up to 16
        (16, 8, 1, 8, 8),
        (30, 8, 1, 1, 0),  # 29 would stay: no multiple of 8 up to 30 holds them
        (30, 8, 1, 6, 6),
        (8, 8, 1, 7, 0),
        (6, 8, 1, 3, 0),
        (10, 1, 4, 9, 6),
        (10, 1, 1, 10, 9),
        (2, 1, 5, 1, 0),
    ],
)
def test_what_stays_is_a_multiple_and_never_less_than_asked(size: int, step: int, minimum: int, wanted: int, removed: int) -> None:
    assert group([1.0] * size, step=step, minimum=minimum).removable(wanted) == removed


def test_the_weakest_go_first_and_ties_by_position() -> None:
    assert group([3, 1, 2, 1]).order.tolist() == [1, 3, 2, 0]


def test_no_group_is_emptied_by_a_global_ranking() -> None:
    weak, strong = group([1e-6] * 8, "a"), group([1e6] * 8, "b")
    assert by_ratio([weak, strong], 0.5, scope="global") == (4, 4)


def test_dead_units_go_before_all_others() -> None:
    assert by_ratio([group([0, 0, 5, 5], "a"), group([1, 1, 1, 1], "b")], 0.25, scope="global") == (2, 0)


TERMS = [Term((("a", 0), ("b", 0)), 3), Term((("b", 0), ("k", 0))), Term((("k", 0),))]
SIZES = {("a", 0): 16, ("b", 0): 32, ("k", 0): 9}


@given(
    st.integers(0, 15),
    st.integers(0, 31),
)
def test_the_meter_recounts_like_counting_anew(first: int, second: int) -> None:
    groups = [group([1.0] * 16, "a"), group([1.0] * 32, "b")]
    left, right = 16 - first, 32 - second
    assert meter(TERMS, SIZES, groups).read(groups, (first, second)) == 3 * left * right + right * 9 + 9


@given(st.floats(0.1, 1.0), st.sampled_from(["uniform", "global"]), st.sampled_from([1, 2, 8]), st.integers(0, 1000))
def test_a_budget_is_met_and_one_step_less_would_not_meet_it(fraction: float, scope: str, step: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    groups = [group(random.random(16).tolist(), "a", step=step), group(random.random(32).tolist(), "b", step=step)]
    gauge = meter(TERMS, SIZES, groups)
    budget = fraction * gauge.read(groups, (0, 0))
    plan = by_budget(groups, gauge, budget, scope=scope)
    if plan is None:
        assert gauge.read(groups, tuple(g.removable(10**6) for g in groups)) > budget
        return
    assert gauge.read(groups, plan) <= budget
    assert all((len(g.order) - k) % step == 0 for g, k in zip(groups, plan, strict=True) if k)
    less = [tuple(max(k - step, 0) if i == j else k for i, k in enumerate(plan)) for j in range(2) if plan[j]]
    assert not less or any(gauge.read(groups, other) > budget for other in less)


def test_a_budget_out_of_reach_is_none() -> None:
    groups = [group([1.0] * 16, "a", step=8), group([1.0] * 32, "b", step=8)]
    assert by_budget(groups, meter(TERMS, SIZES, groups), 10, scope="uniform") is None
