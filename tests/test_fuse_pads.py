"""fuse-pads: a Pad joins the window that follows where padding means the same to both."""

from __future__ import annotations

import pytest
from cases import assert_pass

PADS = "int64[8] p = {0, 0, 1, 2, 0, 0, 1, 0}"
WEIGHT = "float[1,2,3,3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 8, 7, 6, 5, 4, 3, 2, 1}"

FUSED = {
    "conv": ("y = Conv(a, w)", "y = Conv<pads = [1, 2, 1, 0]>(r, w)"),
    "conv with pads": ("y = Conv<pads = [0, 1, 2, 3]>(a, w)", "y = Conv<pads = [1, 3, 3, 3]>(r, w)"),
    "conv without automatic padding": ('y = Conv<auto_pad = "VALID">(a, w)', "y = Conv<pads = [1, 2, 1, 0]>(r, w)"),
    "average": (
        "y = AveragePool<kernel_shape = [3, 3]>(a)",
        "y = AveragePool<kernel_shape = [3, 3], pads = [1, 2, 1, 0], count_include_pad = 1>(r)",
    ),
    "max of what is never negative": (
        "y = MaxPool<kernel_shape = [3, 3], strides = [2, 2]>(a)",
        "y = MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 2, 1, 0]>(r)",
    ),
}


@pytest.mark.parametrize("case", FUSED)
def test_fused(case: str) -> None:
    before, after = FUSED[case]
    head = f"g (float[N,2,6,6] x) => (float[N,c,h,w2] y) <{PADS}, {WEIGHT}> {{ r = Relu(x)"
    assert_pass("fuse-pads", f"{head} a = Pad(r, p) {before} }}", f"{head} {after} }}")


KEPT = {
    "automatic padding": (PADS, "Pad(r, p)", 'y = Conv<auto_pad = "SAME_UPPER">(a, w)'),
    "channels": ("int64[8] p = {0, 1, 1, 1, 0, 0, 1, 1}", "Pad(r, p)", "y = MaxPool<kernel_shape = [3, 3]>(a)"),
    "crop": ("int64[8] p = {0, 0, 1, -1, 0, 0, 1, 1}", "Pad(r, p)", "y = Conv(a, w)"),
    "ones": (f"{PADS}, float one = {{1}}", "Pad(r, p, one)", "y = Conv(a, w)"),
    "reflection": (PADS, 'Pad<mode = "reflect">(r, p)', "y = Conv(a, w)"),
    "max of anything": (PADS, "Pad(x, p)", "y = MaxPool<kernel_shape = [3, 3]>(a)"),
    "window inside the padding": (PADS, "Pad(r, p)", "y = MaxPool<kernel_shape = [2, 2]>(a)"),
    "partial windows": (PADS, "Pad(r, p)", "y = AveragePool<kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1>(a)"),
    "two ways of counting": (PADS, "Pad(r, p)", "y = AveragePool<kernel_shape = [4, 4], pads = [1, 1, 1, 1]>(a)"),
    "transposed conv": (PADS, "Pad(r, p)", "y = ConvTranspose(a, v)"),
}


@pytest.mark.parametrize("case", KEPT)
def test_kept(case: str) -> None:
    initializers, pad, window = KEPT[case]
    weights = f"{WEIGHT}, {WEIGHT.replace('[1,2,3,3] w', '[2,1,3,3] v')}"
    before = f"g (float[N,2,6,6] x) => (float[N,c,h,w2] y) <{initializers}, {weights}> {{ r = Relu(x) a = {pad} {window} }}"
    context = assert_pass("fuse-pads", before, None)
    assert bool(context.rejected) == (case != "transposed conv")


def test_minus_infinity_before_max_pool() -> None:
    minus = "float low = {-inf}"
    before = (
        f"g (float[N,2,6,6] x) => (float[N,2,h,w] y) <{PADS}, {minus}> {{ a = Pad(x, p, low) y = MaxPool<kernel_shape=[3,3]>(a) }}"
    )
    after = "g (float[N,2,6,6] x) => (float[N,2,h,w] y) { y = MaxPool<kernel_shape = [3, 3], pads = [1, 2, 1, 0]>(x) }"
    assert_pass("fuse-pads", before, after)


def test_pads_add_up_and_reach_the_conv() -> None:
    before = f"""g (float[N,2,6,6] x) => (float[N,1,h,w2] y, float[N,2,a,b] z) <{PADS}, {WEIGHT}> {{
        a = Pad(x, p) b = Pad(a, p) y = Conv(b, w) z = Relu(b) }}"""
    after = f"""g (float[N,2,6,6] x) => (float[N,1,h,w2] y, float[N,2,a,b] z)
        <int64[8] q = {{0, 0, 2, 4, 0, 0, 2, 0}}, {WEIGHT}> {{ b = Pad(x, q) y = Conv<pads = [2, 4, 2, 0]>(x, w) z = Relu(b) }}"""
    assert_pass("fuse-pads", before, after)


def test_pads_by_the_edge_add_up() -> None:
    before = """g (float[N,4] x) => (float[N,m] y) <int64[4] p = {0, 1, 0, 2}> {
        a = Pad<mode = "edge">(x, p) y = Pad<mode = "edge">(a, p) }"""
    after = 'g (float[N,4] x) => (float[N,m] y) <int64[4] p = {0, 2, 0, 4}> { y = Pad<mode = "edge">(x, p) }'
    assert_pass("fuse-pads", before, after)


@pytest.mark.parametrize(
    ("opset", "initializers", "pad"),
    [
        (9, "", "Pad<pads = [0, 0, 1, 2, 0, 0, 1, 0]>(x)"),
        (18, "int64[4] p = {1, 2, 1, 0}, float zero = {0}, int64[2] i = {2, -1},", "Pad(x, p, zero, i)"),
    ],
)
def test_opsets(opset: int, initializers: str, pad: str) -> None:
    before = f"g (float[N,2,6,6] x) => (float[N,1,h,w2] y) <{initializers} {WEIGHT}> {{ a = {pad} y = Conv(a, w) }}"
    after = f"g (float[N,2,6,6] x) => (float[N,1,h,w2] y) <{WEIGHT}> {{ y = Conv<pads = [1, 2, 1, 0]>(x, w) }}"
    assert_pass("fuse-pads", before, after, opset=opset)
