"""remove-noops: what is provably the identity goes, what only looks like it stays."""

from __future__ import annotations

import pytest
from cases import assert_pass

RELU = "g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }"

# each node maps a to b, both float[N,4]; initializers in angle brackets
REMOVED = {
    "identity": ("", "b = Identity(a)"),
    "dropout": ("", "b = Dropout(a)"),
    "dropout with a rate": ("<float r = {0.5}, bool t = {0}>", "b = Dropout(a, r, t)"),
    "cast": ("", "b = Cast<to = 1>(a)"),
    "reshape, all kept": ("<int64[2] s = {0, 0}>", "b = Reshape(a, s)"),
    "reshape, one left": ("<int64[2] s = {-1, 4}>", "b = Reshape(a, s)"),
    "flatten": ("", "b = Flatten<axis = 1>(a)"),
    "transpose": ("", "b = Transpose<perm = [0, 1]>(a)"),
    "pad": ("<int64[4] p = {0, 0, 0, 0}>", "b = Pad(a, p)"),
    "slice": ("<int64[1] s = {0}, int64[1] e = {9223372036854775807}>", "b = Slice(a, s, e)"),
    "slice to the size": ("<int64[1] s = {0}, int64[1] e = {4}, int64[1] i = {-1}>", "b = Slice(a, s, e, i)"),
    "concat": ("", "b = Concat<axis = 0>(a)"),
    "split": ("", "b = Split<axis = 0>(a)"),
    "expand": ("<int64[2] s = {1, 4}>", "b = Expand(a, s)"),
    "tile": ("<int64[2] s = {1, 1}>", "b = Tile(a, s)"),
    "add": ("<float[4] z = {0, 0, 0, 0}>", "b = Add(z, a)"),
    "sub": ("<float z = {0}>", "b = Sub(a, z)"),
    "mul": ("<float[1,1] o = {1}>", "b = Mul(a, o)"),
    "div": ("<float o = {1}>", "b = Div(a, o)"),
    "pow": ("<int64 o = {1}>", "b = Pow(a, o)"),
    "clip": ("", "b = Clip(a)"),
    "sum": ("", "b = Sum(a)"),
    "max": ("", "b = Max(a)"),
    "where": ("<bool[4] c = {1, 1, 1, 1}, float z = {0}>", "b = Where(c, a, z)"),
    "double negation": ("", "c = Neg(a) b = Neg(c)"),
}


@pytest.mark.parametrize("case", REMOVED)
def test_removed(case: str) -> None:
    initializers, nodes = REMOVED[case]
    before = f"g (float[N,4] x) => (float[N,4] y) {initializers} {{ a = Relu(x) {nodes} y = Sigmoid(b) }}"
    assert_pass("remove-noops", before, "g (float[N,4] x) => (float[N,4] y) { a = Relu(x) y = Sigmoid(a) }")


# each node maps a: float[N,4] to y of the shape that is given
KEPT = {
    "add that broadcasts": ("float[5,N,4]", "<float[5,1,1] z = {0, 0, 0, 0, 0}>", "y = Add(a, z)"),
    "add of unknown length": ("float[N,4]", "<float[3,4] z = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}>", "y = Add(a, z)"),
    "mul not all one": ("float[N,4]", "<float[4] o = {1, 1, 1, 2}>", "y = Mul(a, o)"),
    "zero minus": ("float[N,4]", "<float z = {0}>", "y = Sub(z, a)"),
    "cast": ("float16[N,4]", "", "y = Cast<to = 10>(a)"),
    "transpose": ("float[4,N]", "", "y = Transpose(a)"),
    "reshape": ("float[4,N]", "<int64[2] s = {4, -1}>", "y = Reshape(a, s)"),
    "slice backwards": (
        "float[N,4]",
        "<int64[1] s={-1}, int64[1] e={-9999}, int64[1] i={0}, int64[1] t={-1}>",
        "y = Slice(a,s,e,i,t)",
    ),
    "slice": ("float[M,4]", "<int64[1] s = {0}, int64[1] e = {2}>", "y = Slice(a, s, e)"),
    "tile": ("float[M,4]", "<int64[2] s = {2, 1}>", "y = Tile(a, s)"),
    "clip": ("float[N,4]", "<float low = {-1}>", "y = Clip(a, low)"),
    "where of both": ("float[N,4]", "<bool[4] c = {1, 1, 0, 1}, float z = {0}>", "y = Where(c, a, z)"),
    "where that broadcasts": ("float[2,N,4]", "<bool[2,1,1] c = {1, 1}, float z = {0}>", "y = Where(c, a, z)"),
    "reduction": ("float[1,4]", "", "y = ReduceMax<axes = [0], keepdims = 1>(a)"),
}


@pytest.mark.parametrize("case", KEPT)
def test_kept(case: str) -> None:
    shape, initializers, node = KEPT[case]
    assert_pass("remove-noops", f"g (float[N,4] x) => ({shape} y) {initializers} {{ a = Elu(x) {node} }}", None)


IMAGES = {
    "pool of one": "b = AveragePool<kernel_shape = [1, 1], strides = [1, 1]>(a)",
    "max pool of one": "b = MaxPool<kernel_shape = [1, 1]>(a)",
    "resize by one": 'b = Resize<mode = "linear">(a, , ones)',
    "depth to space": "b = DepthToSpace<blocksize = 1>(a)",
    "exchange of single axes": "b = Transpose<perm = [1, 0, 2, 3]>(a)",
    "mean of one": "m = ReduceMean<axes = [1], keepdims = 1>(a) b = Identity(m)",
}


@pytest.mark.parametrize("case", IMAGES)
def test_images(case: str) -> None:
    before = (
        f"g (float[1,1,5,6] x) => (float[1,1,5,6] y) <float[4] ones = {{1, 1, 1, 1}}> {{ a = Elu(x) {IMAGES[case]} y = Sin(b) }}"
    )
    assert_pass("remove-noops", before, "g (float[1,1,5,6] x) => (float[1,1,5,6] y) { a = Elu(x) y = Sin(a) }")


@pytest.mark.parametrize(
    "node",
    [
        'y = Resize<mode = "nearest", coordinate_transformation_mode = "tf_half_pixel_for_nn", nearest_mode = "ceil">(a, , ones)',
        "y = AveragePool<kernel_shape = [1, 1], strides = [2, 2]>(a)",
        "y = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(a)",
        "y = LpPool<kernel_shape = [1, 1]>(a)",
        "y = Transpose<perm = [0, 1, 3, 2]>(a)",
    ],
)
def test_images_kept(node: str) -> None:
    before = f"g (float[1,1,6,6] x) => (float[1,1,h,w] y) <float[4] ones = {{1, 1, 1, 1}}> {{ a = Elu(x) {node} }}"
    assert_pass("remove-noops", before, None)


def test_relu_of_what_is_never_negative() -> None:
    before = "g (float[1,2,6,6] x) => (float[1,2,5,5] y) { a = Relu(x) b = Relu(a) c = MaxPool<kernel_shape=[2,2]>(b) y = Relu(c) }"
    after = "g (float[1,2,6,6] x) => (float[1,2,5,5] y) { a = Relu(x) y = MaxPool<kernel_shape=[2,2]>(a) }"
    assert_pass("remove-noops", before, after)


@pytest.mark.parametrize(
    ("opset", "initializers", "nodes"),
    [
        (9, "", "b = Slice<starts = [0], ends = [2147483647], axes = [1]>(a)"),
        (9, "", "b = Pad<pads = [0, 0, 0, 0]>(a)"),
        (9, "", "b = Dropout<ratio = 0.3>(a)"),
        (9, "", "b = Clip(a)"),
        (9, "<float[2] s = {1, 1}>", "b = Upsample(a, s)"),
        (11, "", "b = Split<axis = 1, split = [4]>(a)"),
        (18, "<int64[4] p = {0, 0, 0, 0}>", "b = Pad(a, p)"),
    ],
)
def test_opsets(opset: int, initializers: str, nodes: str) -> None:
    before = f"g (float[N,4] x) => (float[N,4] y) {initializers} {{ a = Relu(x) {nodes} y = Sigmoid(b) }}"
    assert_pass("remove-noops", before, "g (float[N,4] x) => (float[N,4] y) { a = Relu(x) y = Sigmoid(a) }", opset=opset)


def test_clip_with_bounds_in_attributes_stays() -> None:
    assert_pass("remove-noops", "g (float[N,4] x) => (float[N,4] y) { y = Clip<max = 6.0>(x) }", None, opset=9)


def test_graph_outputs_keep_their_names() -> None:
    before = "g (float[N,4] x) => (float[N,4] y, float[N,4] z) { a = Relu(x) y = Identity(a) b = Sin(a) z = Dropout(b) }"
    after = "g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Relu(x) z = Sin(y) }"
    assert_pass("remove-noops", before, after)


@pytest.mark.parametrize(
    "graph",
    [
        "g (float[N,4] x) => (float[N,4] y) { y = Identity(x) }",
        "g (float[N,4] x) => (float[4] y) <float[4] c = {1, 2, 3, 4}> { y = Identity(c) }",
        "g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Relu(x) z = Identity(y) }",
    ],
)
def test_outputs_that_cannot_be_joined_stay(graph: str) -> None:
    context = assert_pass("remove-noops", graph, None)
    assert sum(context.rejected.values()) == 1


def test_dropout_whose_mask_is_read_stays() -> None:
    assert_pass("remove-noops", "g (float[N,4] x) => (float[N,4] y, bool[N,4] m) { a = Relu(x) y, m = Dropout(a) }", None)


BODY = """g (float[N,4] x, bool c) => (float[N,4] y) {{
    a = Relu(x) {0}
    r = If(c)<then_branch = t () => (float[N,4] u) {{ {1} }}, else_branch = e () => (float[N,4] v) {{ v = Identity({2}) }}>
    y = Sin(r) }}"""


def test_bodies() -> None:
    """Inside a body no-ops go; a body output that only hands on an outer tensor must stay."""
    before = BODY.format("b = Identity(a)", "p = Sin(b) u = Identity(p)", "b")
    assert_pass("remove-noops", before, BODY.format("", "u = Sin(a)", "a"))
