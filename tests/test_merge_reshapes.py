"""merge-reshapes: chains of views, transposes, casts, slices and concats become one node, whatever the axes and opset."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cases import assert_pass, parse
from hypothesis import given
from hypothesis import strategies as st

from graphopt.context import Context
from graphopt.passes.merge_reshapes import compose_spans, holds_exactly, reshape_target
from graphopt.registry import find

# graph inputs -> outputs, initializers, nodes before, initializers, nodes after
MERGED = {
    "reshape of reshape": (
        "(float[N,12] x) => (float[M,6] y)",
        "<int64[3] s = {-1, 3, 4}, int64[2] t = {-1, 6}> { a = Reshape(x, s) y = Reshape(a, t) }",
        "<int64[2] t = {-1, 6}> { y = Reshape(x, t) }",
    ),
    "a target 0 becomes the axis it copied": (
        "(float[2,12] x) => (float[2,3,4] y)",
        "<int64[2] s = {2, 12}, int64[3] t = {0, 3, -1}> { a = Reshape(x, s) y = Reshape(a, t) }",
        "<int64[3] t = {2, 3, 4}> { y = Reshape(x, t) }",
    ),
    "two symbols stay where they were": (
        "(float[N,S,12] x) => (float[N,S,2,6] y)",
        "<int64[4] s = {0, 0, 3, 4}, int64[4] t = {0, 0, 2, 6}> { a = Reshape(x, s) y = Reshape(a, t) }",
        "<int64[4] t = {0, 0, 2, 6}> { y = Reshape(x, t) }",
    ),
    "flatten of unsqueeze": (
        "(float[N,4] x) => (float[N,4] y)",
        "<int64[1] i = {2}> { a = Unsqueeze(x, i) b = Flatten(a) y = Relu(b) }",
        "<int64[2] t = {0, 4}> { b = Reshape(x, t) y = Relu(b) }",
    ),
    "unsqueeze of unsqueeze": (
        "(float[N,S] x) => (float[N,1,1,S] y)",
        "<int64[1] i = {1}, int64[1] j = {2}> { a = Unsqueeze(x, i) y = Unsqueeze(a, j) }",
        "<int64[2] i = {1, 2}> { y = Unsqueeze(x, i) }",
    ),
    "unsqueeze before the first": (
        "(float[N,S] x) => (float[1,N,1,S] y)",
        "<int64[1] i = {1}, int64[1] j = {0}> { a = Unsqueeze(x, i) y = Unsqueeze(a, j) }",
        "<int64[2] i = {0, 2}> { y = Unsqueeze(x, i) }",
    ),
    "squeeze of squeeze": (
        "(float[1,N,1,S] x) => (float[N,S] y)",
        "<int64[1] i = {0}, int64[1] j = {1}> { a = Squeeze(x, i) y = Squeeze(a, j) }",
        "<int64[2] i = {0, 2}> { y = Squeeze(x, i) }",
    ),
    "squeeze undoes unsqueeze": (
        "(float[N,S] x) => (float[N,S] y)",
        "<int64[1] i = {-1}> { a = Unsqueeze(x, i) b = Squeeze(a, i) y = Relu(b) }",
        "{ y = Relu(x) }",
    ),
    "transpose of transpose": (
        "(float[N,3,4] x) => (float[4,N,3] y)",
        "{ a = Transpose<perm = [1, 0, 2]>(x) y = Transpose<perm = [2, 1, 0]>(a) }",
        "{ y = Transpose<perm = [2, 0, 1]>(x) }",
    ),
    "transpose back": (
        "(float[N,3,4] x) => (float[N,3,4] y)",
        "{ a = Relu(x) b = Transpose(a) y = Transpose<perm = [2, 1, 0]>(b) }",
        "{ y = Relu(x) }",
    ),
    "transpose of single axes is a view": (
        "(float[N,1,4] x) => (float[N,2,2] y)",
        "<int64[3] s = {0, 2, 2}> { a = Transpose<perm = [0, 2, 1]>(x) y = Reshape(a, s) }",
        "<int64[3] s = {0, 2, 2}> { y = Reshape(x, s) }",
    ),
    "cast by a wider type": (
        "(float16[N,4] x) => (float[N,4] y)",
        "{ a = Cast<to = 11>(x) y = Cast<to = 1>(a) }",
        "{ y = Cast<to = 1>(x) }",
    ),
    "slices of two axes": (
        "(float[N,8,8] x) => (float[N,4,4] y)",
        """<int64[1] s = {1}, int64[1] e = {9}, int64[1] i = {1}, int64[1] j = {-1}, int64[1] t = {2}>
           { a = Slice(x, s, e, i, t) y = Slice(a, s, e, j, t) }""",
        "<int64[2] s = {1, 1}, int64[2] e = {9, 9}, int64[2] i = {1, 2}, int64[2] t = {2, 2}> { y = Slice(x, s, e, i, t) }",
    ),
    "slices of one axis": (
        "(float[N,8] x) => (float[N,3] y)",
        """<int64[1] s = {2}, int64[1] e = {7}, int64[1] i = {1}, int64[1] t = {1}, int64[1] u = {4}>
           { a = Slice(x, s, e, i) y = Slice(a, t, u, i) }""",
        "<int64[1] s = {3}, int64[1] e = {6}, int64[1] i = {1}> { y = Slice(x, s, e, i) }",
    ),
    "concat of concat": (
        "(float[N,4] x) => (float[N,20] y)",
        """{ a = Relu(x) b = Concat<axis = 1>(a, x) c = Concat<axis = -1>(x, b)
             d = Concat<axis = 1>(a, a) y = Concat<axis = 1>(c, d) }""",
        "{ a = Relu(x) y = Concat<axis = 1>(x, a, x, a, a) }",
    ),
}


@pytest.mark.parametrize("case", MERGED)
def test_merged(case: str) -> None:
    signature, before, after = MERGED[case]
    assert_pass("merge-reshapes", f"g {signature} {before}", f"g {signature} {after}")


KEPT = {
    "two axes unknown": (
        "(float[1,A,B,1] x) => (float[A,B,1,1] y)",
        "<int64[1] i = {0}, int64[1] j = {2}> { a = Squeeze(x, i) y = Unsqueeze(a, j) }",
    ),
    "cast that rounds": ("(int32[N,4] x) => (double[N,4] y)", "{ a = Cast<to = 1>(x) y = Cast<to = 11>(a) }"),
    "cast that cuts": ("(float[N,4] x) => (float[N,4] y)", "{ a = Cast<to = 6>(x) y = Cast<to = 1>(a) }"),
    "slices from both ends": (
        "(float[N,8] x) => (float[N,M] y)",
        """<int64[1] s = {1}, int64[1] e = {-1}, int64[1] i = {1}, int64[1] u = {4}>
           { a = Slice(x, s, e, i) y = Slice(a, s, u, i) }""",
    ),
    "concats of two axes": (
        "(float[4,4] x) => (float[8,8] y)",
        "{ a = Concat<axis = 0>(x, x) y = Concat<axis = 1>(a, a) }",
    ),
    "a concat with two readers": (
        "(float[N,4] x) => (float[N,12] y, float[N,8] z)",
        "{ a = Concat<axis = 1>(x, x) y = Concat<axis = 1>(a, x) z = Relu(a) }",
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_kept(case: str) -> None:
    signature, body = KEPT[case]
    assert_pass("merge-reshapes", f"g {signature} {body}", None)


def test_old_opsets_keep_parameters_in_attributes() -> None:
    before = """g (float[N,8,8] x) => (float[N,1,1,6,6] y) {
        a = Slice<starts = [1], ends = [7], axes = [1]>(x) b = Slice<starts = [1], ends = [7], axes = [2]>(a)
        c = Unsqueeze<axes = [1]>(b) y = Unsqueeze<axes = [1]>(c) }"""
    after = """g (float[N,8,8] x) => (float[N,1,1,6,6] y) {
        b = Slice<starts = [1, 1], ends = [7, 7], axes = [1, 2]>(x) y = Unsqueeze<axes = [1, 2]>(b) }"""
    assert_pass("merge-reshapes", before, after, opset=9)


def test_a_reader_in_a_loop_keeps_the_concat_outside() -> None:
    body = """g (float[N,4] x) => (float[N,12] y) <int64 n = {3}, bool c = {1}> { a = Concat<axis = 1>(x, x)
        y = Loop(n, c, x)<body = b (int64 i, bool c_in, float[N,4] s) => (bool c_out, float[N,12] s_out) {
            c_out = Identity(c_in) s_out = Concat<axis = 1>(a, x) }> }"""
    model = parse(body)
    assert find("merge-reshapes").fn(model, Context()) == 0


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(-8, 9)), min_size=2, max_size=2), st.integers(0, 6))
def test_composed_slices_are_slices_of_slices(spans: list[tuple[int, int]], size: int) -> None:
    (a, b), (c, d) = spans
    composed = compose_spans((a, b, 1), (c, d, 1))
    if composed is not None:
        values = list(range(size))
        assert values[a:b][c:d] == values[composed[0] : composed[1]]


def test_types_that_hold_others() -> None:
    """Against the definition: every value of a small type survives the round trip, or does not."""
    kinds = [np.dtype(t) for t in (np.int8, np.uint8, np.int16, np.uint16, np.float16)]
    targets = [*kinds, *(np.dtype(t) for t in (np.int32, np.float32, np.float64))]
    for source, target in itertools.product(kinds, targets):
        values = np.arange(2 ** (8 * source.itemsize)).astype(f"u{source.itemsize}").view(source)
        values = values[np.isfinite(values)]
        with np.errstate(all="ignore"):
            survives = bool((values.astype(target).astype(source) == values).all())
            survives &= bool((values.astype(target).astype(np.float64) == values.astype(np.float64)).all())
        assert holds_exactly(source, target) == survives, (source, target)
    assert not holds_exactly(np.dtype(np.int64), np.dtype(np.float64))
    assert not holds_exactly(np.dtype(np.int32), np.dtype(np.float32))


def test_reshape_targets() -> None:
    assert reshape_target(("N", 12), ("N", 3, 4)) == [0, 3, 4]
    assert reshape_target(("N", 12), ("M", 6)) == [-1, 6]
    assert reshape_target(None, ("N", "S")) is None
    assert reshape_target((4, 0), (0, 4)) is None
