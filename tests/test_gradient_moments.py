"""Moments of gradients, where gradients stop, and the criteria that are made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from graphopt.context import Context
from graphopt.criteria import find_criterion, l2
from graphopt.data import Dataset, input_specs, open_dataset
from graphopt.dims import couple, groups
from graphopt.errors import DataError, PassError
from graphopt.gradient_moments import moments
from graphopt.gradients import Spot, heads, program
from graphopt.model import Model, from_proto, load
from graphopt.runtime import session
from graphopt.shapes import shapes

RESIDUAL = """g (float[N,2,5,5] x) => (float[N,3] y)
<float[4,2,1,1] a = {1,2, -1,1, 0.5,-2, 1,-1}, float[4] ab = {0.5, 0.1, 0.2, -0.3}, float[4,1,3,3] d = {1},
 float[4] db = {0, 1, 0.2, -1}, float[4,4,1,1] p = {1,0,2,1, -1,1,0,0.5, 2,1,-1,0, 0.3,1,1,-1},
 float[4,3] w = {1,2,3, -1,0,1, 2,2,-2, 0.5,-1,1}> {
    s = Conv(x, a, ab)  e = Conv<group=4, pads=[1,1,1,1]>(s, d, db)  f = Relu(e)  h = Conv(f, p)  t = Add(s, h)
    m = GlobalAveragePool(t)  v = Flatten(m)  l = MatMul(v, w)  y = Softmax(l)
}"""


def model(text: str, opset: int = 17) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')
    for tensor in proto.graph.initializer:
        if len(tensor.float_data) == 1 < np.prod(tensor.dims, dtype=int):  # '{1}' of more elements: random numbers
            numbers = np.random.default_rng(7).normal(size=tensor.dims).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(numbers, tensor.name))
    return from_proto(proto)


def data(m: Model, rows: np.ndarray) -> Dataset:
    return open_dataset({"x": rows.astype(np.float32)}, input_specs(m.proto()))


def images(rows: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(rows, 2, 5, 5)).astype(np.float32)


def outputs(m: Model, rows: np.ndarray, name: str) -> np.ndarray:
    proto = m.proto()
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return np.asarray(session(proto).run([name], {"x": rows})[0], np.float64)


def signs(rows: int, classes: int, draw: int, seed: int = 0) -> np.ndarray:
    found = np.where(np.random.default_rng([seed, draw, 0]).random((rows, classes)) < 0.5, -1.0, 1.0)
    return np.asarray(found - found.mean(1, keepdims=True))


def test_moments_of_a_linear_end_are_those_computed_by_hand() -> None:
    m, rows = model(RESIDUAL), images(40)
    found = moments(m, Context(calibration=data(m, rows)), [("t", 1), ("v", -1)], draws=2)
    t, weights = outputs(m, rows, "t"), next(c.values for c in m.constants() if c.name == "w").astype(np.float64)
    g = np.stack([signs(40, 3, draw) @ weights.T for draw in (0, 1)])  # of v; of t it is spread over 25 positions
    whole = t.mean((2, 3)) * g
    for place, positions in ((("t", 1), 25), (("v", -1), 1)):
        mine = found[place]
        assert (mine.positions, mine.rows) == (positions, 80)
        np.testing.assert_allclose(mine.square, (g**2).mean((0, 1)) / positions**2, rtol=1e-4)
        np.testing.assert_allclose(mine.mask_square, (whole**2).mean((0, 1)), rtol=1e-4)
        np.testing.assert_allclose(mine.mask_magnitude, np.abs(whole).mean((0, 1)), rtol=1e-4)


def test_moments_do_not_depend_on_batches_nor_on_padding_to_a_fixed_batch() -> None:
    m, rows = model(RESIDUAL), images(5)

    def one_by_one() -> Iterator[dict[str, np.ndarray]]:
        return ({"x": row[None]} for row in rows)

    whole = moments(m, Context(calibration=data(m, rows)), [("s", 1)])["s", 1]
    single = moments(m, Context(calibration=open_dataset(one_by_one, input_specs(m.proto()))), [("s", 1)])["s", 1]
    again = moments(m, Context(calibration=data(m, rows)), [("s", 1)])["s", 1]
    fixed = model(RESIDUAL.replace("[N,", "[2,"))
    padded = moments(fixed, Context(calibration=data(fixed, rows)), [("s", 1)])["s", 1]
    np.testing.assert_array_equal(whole.square, again.square)
    np.testing.assert_allclose(whole.mask_square, single.mask_square, rtol=1e-5)
    # a fixed batch draws for the padding too, so only the first rows have the same signs: likelihood has none
    a, b = (moments(n, Context(calibration=data(n, rows)), [("s", 1)], scalar="likelihood")["s", 1].mask_square for n in (m, fixed))
    assert padded.rows == 10
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_rows_are_found_where_they_are_not_the_first_axis_or_merged_with_another() -> None:
    text = """g (float[N,3,4] x) => (float[N,3,2] y) <float[4,5] u = {1}, float[5,2] w = {1}, int64[2] s = {-1, 5}> {
        a = MatMul(x, u)  t = Transpose<perm=[1,0,2]>(a)  b = Transpose<perm=[1,0,2]>(t)  f = Reshape(b, s)
        c = MatMul(f, w)  r = Shape<start=0, end=2>(x)  k = Constant<value_ints=[2]>()  z = Concat<axis=0>(r, k)  y = Reshape(c, z)
    }"""
    m, rows = model(text), np.random.default_rng(0).normal(size=(6, 3, 4))
    found = moments(m, Context(calibration=data(m, rows)), [("a", 2), ("t", 2), ("f", 1)])
    for place in (("t", 2), ("f", 1)):
        assert (found[place].rows, found[place].positions) == (12, 3)
        np.testing.assert_allclose(found[place].mask_square, found["a", 2].mask_square, rtol=1e-5)


def stops(m: Model, rows: np.ndarray, *places: tuple[str, int]) -> tuple[list[str], list[str]]:
    found = program(m, Context(calibration=data(m, rows)), [Spot(*place) for place in places])
    return [f"{s.op}: {s.why}" for s in found.stops], [s.tensor for s in found.spots]


def test_upstream_of_an_op_without_a_rule_nothing_is_known_even_by_way_of_another_path() -> None:
    text = """g (float[N,4] x) => (float[N,4] y) <float[4,4] u = {1}, float[4,4] w = {1}> {
        a = MatMul(x, u)  b = Relu(a)  d = Round(b)  e = Add(b, d)  f = MatMul(e, w)  h = Tanh(f)  y = Add(h, a)
    }"""
    why, known = stops(model(text), np.ones((2, 4)), ("a", 1), ("b", 1), ("e", 1), ("h", 1))
    assert why == ["Round: the op has no rule"]
    assert known == ["e", "h"]


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("q = QuantizeLinear(a, s, z)  b = DequantizeLinear(q, s, z)", "DequantizeLinear: the op has no rule"),
        ("q = Cast<to=6>(a)  b = Cast<to=1>(q)", "Cast: it reads int32"),
        ("k = ReduceMean<keepdims=0>(a)  p = Greater(k, s)  b = If(p) <then_branch = g1 () => (float[N,4] c) { c = Neg(a) }, "
         "else_branch = g2 () => (float[N,4] d) { d = Abs(a) }>", "If: the op has no rule"),
        ("m = Conv(v, a4)  b = Reshape(m, r)", "Conv: no gradient for input 1, which is computed"),
    ],
)  # fmt: skip
def test_what_passes_no_gradient_is_named(nodes: str, reason: str) -> None:
    extra = "a4 = Reshape(a, r4)  " if "a4" in nodes else ""
    text = f"""g (float[N,4] x) => (float[N,4] y) <float[4,4] u = {{1}}, float s = {{0.1}}, int8 z = {{0}},
        int64[2] r = {{-1, 4}}, int64[4] r4 = {{-1, 1, 1, 1}}, float[1,1,1,1] v = {{2}}> {{
        a = MatMul(x, u)  {extra}{nodes}  c = Add(a, b)  y = MatMul(c, u)
    }}"""
    why, known = stops(model(text), np.ones((2, 4)), ("a", 1), ("c", 1))
    assert why == [reason]
    assert known == ["c"]


def test_old_opsets_are_raised_and_composed_operators_written_out() -> None:
    body = "g (float[N,2,6,6] x) => (float[N,2] y) <float[2,2,1,1] u = {1,2,3,4}> { a = Conv(x, u)  %s  y = Flatten(g) }"
    old = model(body % "b = Relu(a)  c = MaxPool<kernel_shape=[3,3], strides=[1,1]>(b)  g = GlobalAveragePool(c)", 11)
    assert stops(old, np.ones((2, 2, 6, 6)), ("a", 1)) == ([], ["a"])
    assert old.opset == 11
    try:
        onnx.inliner.inline_selected_functions(old.proto(), [], False, True)
    except TypeError:
        pytest.skip("this onnx does not write out operators")
    mish = model(body % "b = Mish(a)  g = GlobalAveragePool(b)", 18)
    rows = np.random.default_rng(0).normal(size=(3, 2, 6, 6))
    found = moments(mish, Context(calibration=data(mish, rows)), [("a", 1)], draws=1)["a", 1]
    a, step = outputs(mish, rows.astype(np.float32), "a"), 1e-5

    def mish_of(x: np.ndarray) -> np.ndarray:
        return np.asarray(x * np.tanh(np.log1p(np.exp(x))))

    slope = (mish_of(a + step) - mish_of(a - step)) / (2 * step) / 36
    np.testing.assert_allclose(found.square, (slope**2).mean((0, 2, 3)), rtol=1e-3)


def test_heads_are_what_goes_into_softmax_logits_and_other_floats() -> None:
    text = """g (float[N,4] x) => (float[N,3] p, float[N,3] q, float[N,1] r, float[N,4] s, int64[N] i)
        <float[4,3] u = {1}, float[4,1] v = {1}> {
        a = MatMul(x, u)  p = Softmax(a)  q = MatMul(x, u)  r = MatMul(x, v)  s = Tanh(x)  i = ArgMax<axis=1, keepdims=0>(a)
    }"""
    m = model(text)
    assert [(h.tensor, h.classes) for h in heads(m, shapes(m))] == [("a", 1), ("q", 1), ("r", None), ("s", None)]


def test_gradients_that_are_not_finite_and_missing_data_are_errors() -> None:
    m = model("g (float[N,2] x) => (float[N,2] y) <float[2,2] u = {1,0,0,1}> { a = MatMul(x, u)  b = Exp(a)  y = Mul(b, b) }")
    with pytest.raises(DataError, match="batch 0 makes the gradient of 'a' NaN or infinite"):
        moments(m, Context(calibration=data(m, np.full((2, 2), 70))), [("a", 1)])
    with pytest.raises(PassError, match="calibration data is needed"):
        moments(m, Context(), [("a", 1)])
    for name in ("fluctuation", "first-order", "fisher"):
        with pytest.raises(PassError, match=f"criterion '{name}' needs calibration data"):
            find_criterion(name)(m, Context(), [])


# ---- criteria


def test_fluctuation_is_the_variance_times_the_squared_norm_of_the_readers() -> None:
    m = model("g (float[N,2] x) => (float[N,2] y) <float[2,3] u = {1,2,0, 1,-2,1}, float[3,2] w = {1,2, 3,0, -1,1}> "
              "{ a = MatMul(x, u)  b = Tanh(a)  y = MatMul(b, w) }")  # fmt: skip
    rows, context = np.random.default_rng(0).normal(size=(40, 2)), Context()
    context.calibration = data(m, rows)
    (score,) = find_criterion("fluctuation")(m, context, groups(m, couple(m)))
    energy = np.tanh(rows @ [[1, 2, 0], [1, -2, 1]]).var(0) * [5, 9, 2]
    np.testing.assert_allclose(score, np.sqrt(energy / energy.mean()), rtol=1e-4)


def without(m: Model, unit: int, share: float) -> Model:
    """The model with everything that reads the unit scaled by 1 - share."""
    changed = load(m.proto())
    for constant in changed.constants():
        if constant.name in ("p", "w"):
            values = constant.values.copy()
            values[(slice(None), unit) if constant.name == "p" else unit] *= 1 - share
            constant.values = values
    return changed


def log_likelihood(m: Model, rows: np.ndarray, best: np.ndarray) -> np.ndarray:
    logits = outputs(m, rows, "l")
    return np.asarray(logits[np.arange(len(rows)), best] - np.log(np.exp(logits).sum(1)))


def test_first_order_and_fisher_are_derivatives_by_masks_on_what_is_read() -> None:
    """A stream that the depthwise convolution and the dense layer read; another group between depthwise and pointwise ones."""
    m, rows = model(RESIDUAL.replace("t = Add(s, h)", "t = Identity(h)")), images(30)
    context, found = Context(calibration=data(m, rows)), groups(m, couple(m))
    (group,) = [g for g in found if any(s.tensor == "d" for s in g.slices)]
    best, step = outputs(m, rows, "l").argmax(1), 1e-3
    only_p = [without(m, u, s) for u in range(4) for s in (step, -step)]
    for changed in only_p:  # this group is read by the pointwise convolution alone
        next(c for c in changed.constants() if c.name == "w").values = next(c for c in m.constants() if c.name == "w").values
    moved = [
        (log_likelihood(a, rows, best) - log_likelihood(b, rows, best)) / (2 * step)
        for a, b in zip(only_p[::2], only_p[1::2], strict=True)
    ]
    (score,) = find_criterion("first-order")(m, context, [group])
    np.testing.assert_allclose(score**2, np.abs(moved).mean(1), rtol=2e-2)
    logits = [(outputs(a, rows, "l") - outputs(b, rows, "l")) / (2 * step) for a, b in zip(only_p[::2], only_p[1::2], strict=True)]
    drawn = [[(change * signs(30, 3, draw)).sum(1) for draw in (0, 1)] for change in logits]
    (score,) = find_criterion("fisher")(m, context, [group])
    np.testing.assert_allclose(score**2, np.square(drawn).mean((1, 2)), rtol=2e-2)
    assert context.facts == {"groups_without_gradients": 0, "gradients_stop": []}


def test_where_gradients_stop_criteria_fall_back_and_say_so() -> None:
    text = """g (float[N,4] x) => (float[N,2] y) <float[4,3] u = {1}, float[3,4] v = {1}, float[4,2] w = {1}> {
        a = MatMul(x, u)  b = MatMul(a, v)  c = Round(b)  y = MatMul(c, w)
    }"""
    m = model(text)
    context, found = Context(calibration=data(m, np.random.default_rng(0).normal(size=(8, 4)))), groups(m, couple(m))
    first, second = find_criterion("fisher")(m, context, found)
    np.testing.assert_array_equal(first, l2(m, context, found)[0])
    assert not np.allclose(second, l2(m, context, found)[1])
    assert context.facts == {"groups_without_gradients": 1, "gradients_stop": ["Round: the op has no rule"]}
    np.testing.assert_array_equal(second, find_criterion("fisher")(m, context, found)[1])


def test_the_gradient_of_a_whole_network_is_its_slope_along_random_directions(digits: Path) -> None:
    """Every float tensor of the shipped model with smooth activations, moved by an input of its own."""
    m = load(digits / "digits.onnx")
    for node in m.graph.nodes:
        node.op = {"Relu": "Tanh", "MaxPool": "AveragePool"}.get(node.op, node.op)
    known, random = shapes(m), np.random.default_rng(0)
    (head,) = heads(m, known)
    proto = m.proto()
    names = [n.outputs[0].name for n in m.graph.nodes if known.dtype(n.outputs[0].name) == np.float32]
    names = [n for n in names if n not in (head.tensor, *(t.name for t in m.graph.outputs))]
    assert len(names) > 5
    assert find_slopes(m, proto, names, head.tensor, random) < 3e-3


def find_slopes(m: Model, proto: onnx.ModelProto, names: list[str], head: str, random: np.random.Generator) -> float:
    """The largest difference between gradient and slope, relative to the gradient's norm."""
    from test_gradients import differentiated

    whole, found = differentiated(m, names, head)
    assert set(found.tensors) == set(names)
    whole.graph.output.extend([onnx.ValueInfoProto(name=n) for n in (head, *names)])
    spec = input_specs(proto)[0]
    feed = {spec.name: random.normal(size=[2, *(d for d in spec.shape or () if isinstance(d, int))]).astype(np.float32)}
    forward = load(proto).proto()
    if head not in {o.name for o in forward.graph.output}:
        forward.graph.output.append(onnx.ValueInfoProto(name=head))
    v = random.normal(size=session(forward).run([head], feed)[0].shape).astype(np.float32)
    runner, worst = session(whole), 0.0
    for name in names:
        g, y = runner.run([found.tensors[name], name], {**feed, "v": v})
        moved = onnx.ModelProto()
        moved.CopyFrom(forward)
        for node in moved.graph.node:
            node.input[:] = [f"{name} moved" if i == name else i for i in node.input]
        place = next(i for i, node in enumerate(moved.graph.node) if name in node.output)
        moved.graph.node.insert(place + 1, onnx.helper.make_node("Add", [name, "step"], [f"{name} moved"]))
        moved.graph.input.append(onnx.helper.make_tensor_value_info("step", onnx.TensorProto.FLOAT, [None] * y.ndim))
        direction = random.normal(size=y.shape).astype(np.float32)
        step, steps = np.float32(1e-2 * y.std()), session(moved)
        up, down = (steps.run([head], {**feed, "step": sign * step * direction})[0].astype(np.float64) for sign in (1, -1))
        slope = float(((up - down) * v).sum() / (2 * step))
        worst = max(worst, abs(slope - float((g.astype(np.float64) * direction).sum())) / float(np.linalg.norm(g)))
    return worst
