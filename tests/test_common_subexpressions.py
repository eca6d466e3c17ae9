"""common-subexpressions: what computes the same becomes one; random, unknown and output nodes keep their own."""

from __future__ import annotations

import pytest
from cases import assert_pass

MERGED = {
    "same inputs": (
        "=> (float[N,4] y) { a = Relu(x) b = Relu(x) y = Add(a, b) }",
        "=> (float[N,4] y) { a = Relu(x) y = Add(a, a) }",
    ),
    "chains": (
        "=> (float[N,4] y) { a = Relu(x) b = Relu(x) c = Sin(a) d = Sin(b) y = Sub(c, d) }",
        "=> (float[N,4] y) { a = Relu(x) c = Sin(a) y = Sub(c, c) }",
    ),
    "order does not matter to a sum": (
        "=> (float[N,4] y) { a = Relu(x) b = Add(a, x) c = Add(x, a) y = Sub(b, c) }",
        "=> (float[N,4] y) { a = Relu(x) b = Add(a, x) y = Sub(b, b) }",
    ),
    "equal small constants": (
        "=> (float[N,4] y) <float[1] p = {2}, float[1] q = {2}> { a = Mul(x, p) b = Mul(x, q) y = Add(a, b) }",
        "=> (float[N,4] y) <float[1] p = {2}> { a = Mul(x, p) y = Add(a, a) }",
    ),
    "an output takes over": (
        "=> (float[N,4] y, float[N,4] z) { a = Relu(x) y = Relu(x) z = Sin(a) }",
        "=> (float[N,4] y, float[N,4] z) { y = Relu(x) z = Sin(y) }",
    ),
    "several outputs": (
        "=> (float[N,4] y) { a, b = Split<axis = 1>(x) c, d = Split<axis = 1>(x) e = Concat<axis = 1>(a, c) "
        "f = Concat<axis = 1>(b, d) y = Add(e, f) }",
        "=> (float[N,4] y) { a, b = Split<axis = 1>(x) e = Concat<axis = 1>(a, a) f = Concat<axis = 1>(b, b) y = Add(e, f) }",
    ),
    "a body sees what is around it": (
        "=> (float[N,4] y) <bool c = {1}> { a = Relu(x) b = If(c)<then_branch = t () => (float[N,4] u) { d = Relu(x) u = Sin(d) }, "
        "else_branch = e () => (float[N,4] v) { v = Sin(x) }> y = Add(a, b) }",
        "=> (float[N,4] y) <bool c = {1}> { a = Relu(x) b = If(c)<then_branch = t () => (float[N,4] u) { u = Sin(a) }, "
        "else_branch = e () => (float[N,4] v) { v = Sin(x) }> y = Add(a, b) }",
    ),
}


@pytest.mark.parametrize("case", MERGED)
def test_merged(case: str) -> None:
    before, after = MERGED[case]
    assert_pass("common-subexpressions", f"g (float[N,4] x) {before}", f"g (float[N,4] x) {after}")


KEPT = {
    "attributes differ": "=> (float[N,4] y) { a = Elu<alpha = 1.0>(x) b = Elu<alpha = 2.0>(x) y = Add(a, b) }",
    "order matters": "=> (float[N,4] y) { a = Relu(x) b = Sub(a, x) c = Sub(x, a) y = Add(b, c) }",
    "constants differ": "=> (float[N,4] y) <float p = {2}, float q = {3}> { a = Mul(x, p) b = Mul(x, q) y = Add(a, b) }",
    "types differ": "=> (float[N,4] y) <int32 p = {2}, int64 q = {2}> { a = Pow(x, p) b = Pow(x, q) y = Add(a, b) }",
    "both are outputs": "=> (float[N,4] y, float[N,4] z) { y = Relu(x) z = Relu(x) }",
    "siblings": "=> (float[N,4] y) <bool c = {1}> { y = If(c)<then_branch = t () => (float[N,4] u) { u = Sin(x) }, "
    "else_branch = e () => (float[N,4] v) { v = Sin(x) }> }",
}


@pytest.mark.parametrize("case", KEPT)
def test_kept(case: str) -> None:
    assert_pass("common-subexpressions", f"g (float[N,4] x) {KEPT[case]}", None)


def test_random_numbers_stay_independent() -> None:
    graph = """g (float[2,2] x) => (float[2,2] y) {
        a = RandomNormalLike<seed = 1.0>(x) b = RandomNormalLike<seed = 1.0>(x) c = Sub(a, b) d = Sub(c, c) y = Add(d, x) }"""
    assert_pass("common-subexpressions", graph, None)


def test_unknown_domains_stay() -> None:
    graph = "g (float[N,4] x) => (float[N,4] y) { a = com.microsoft.Gelu(x) b = com.microsoft.Gelu(x) y = Add(a, b) }"
    assert_pass("common-subexpressions", graph, None, imports=', "com.microsoft" : 1')
