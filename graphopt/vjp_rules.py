"""Vector-Jacobian products of elementwise operators, normalisations and reductions. At kinks: a subgradient, 0 where it may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi, sqrt

import numpy as np
from onnx import TensorProto, helper

from graphopt.vjp import Vjp, VjpError, vjp

Results = Sequence[str | None]

# ---- one input: the gradient, from g, x and y

UNARY: dict[str, Callable[[Vjp, str, str, str], str]] = {
    "Abs": lambda s, g, x, y: s.op("Mul", g, s.op("Sign", x)),
    "Cos": lambda s, g, x, y: s.op("Neg", s.op("Mul", g, s.op("Sin", x))),
    "Dropout": lambda s, g, x, y: g,
    "Elu": lambda s, g, x, y: s.op("Where", s.op("Greater", x, 0.0), g, s.op("Mul", g, s.op("Add", y, float(s.attr("alpha"))))),
    "Erf": lambda s, g, x, y: s.op("Mul", g, s.op("Mul", s.op("Exp", s.op("Neg", s.op("Mul", x, x))), 2 / sqrt(pi))),
    "Exp": lambda s, g, x, y: s.op("Mul", g, y),
    "HardSigmoid": lambda s, g, x, y: s.where(_between(s, y, 0.0, 1.0), s.op("Mul", g, float(s.attr("alpha")))),
    "HardSwish": lambda s, g, x, y: s.op("Mul", g, _hard_swish(s, x)),
    "Identity": lambda s, g, x, y: g,
    "LeakyRelu": lambda s, g, x, y: s.op("Where", s.op("Greater", x, 0.0), g, s.op("Mul", g, float(s.attr("alpha")))),
    "Log": lambda s, g, x, y: s.op("Div", g, x),
    "Neg": lambda s, g, x, y: s.op("Neg", g),
    "Reciprocal": lambda s, g, x, y: s.op("Neg", s.op("Mul", g, s.op("Mul", y, y))),
    "Relu": lambda s, g, x, y: s.where(s.op("Greater", y, 0.0), g),
    "Sigmoid": lambda s, g, x, y: s.op("Mul", g, s.op("Mul", y, s.op("Sub", 1.0, y))),
    "Sin": lambda s, g, x, y: s.op("Mul", g, s.op("Cos", x)),
    "Softplus": lambda s, g, x, y: s.op("Mul", g, s.op("Sigmoid", x)),
    "Sqrt": lambda s, g, x, y: s.op("Where", s.op("Greater", y, 0.0), s.op("Div", g, s.op("Mul", y, 2.0)), 0.0),
    "Tanh": lambda s, g, x, y: s.op("Mul", g, s.op("Sub", 1.0, s.op("Mul", y, y))),
}


@vjp(*UNARY)
def unary(site: Vjp) -> Results:
    if site.node.op == "Dropout" and site.has(2) and np.any(site.value(2)):
        raise VjpError("it drops at random")
    site.fixed(*range(1, len(site.node.inputs)))
    return [UNARY[site.node.op](site, site.g, site.x(), site.y)]


def _between(site: Vjp, x: str, low: str | float, high: str | float) -> str:
    return site.op("And", site.op("Greater", x, low), site.op("Less", x, high))


def _hard_swish(site: Vjp, x: str) -> str:
    """The slope of x * min(max(x/6 + 1/2, 0), 1): x/3 + 1/2 inside, 0 and 1 outside."""
    slope = site.op("Add", site.op("Div", x, 3.0), 0.5)
    return site.op("Where", _between(site, x, -3.0, 3.0), slope, site.op("Where", site.op("Greater", x, 0.0), 1.0, 0.0))


@vjp("Gelu", "com.microsoft::Gelu")
def gelu(site: Vjp) -> Results:
    """x Phi(x) (exact), or x/2 (1 + tanh(c (x + 0.044715 x^3))) where the attribute says 'tanh'."""
    x, approximate = site.x(), site.node.attrs.get("approximate", "none")
    square = site.op("Mul", x, x)
    if approximate == "none":
        phi = site.op("Mul", site.op("Add", site.op("Erf", site.op("Mul", x, 1 / sqrt(2))), 1.0), 0.5)
        density = site.op("Mul", site.op("Exp", site.op("Mul", square, -0.5)), 1 / sqrt(2 * pi))
        return [site.op("Mul", site.g, site.op("Add", phi, site.op("Mul", x, density)))]
    c = sqrt(2 / pi)
    inner = site.op("Mul", x, site.op("Add", site.op("Mul", square, 0.044715 * c), c))
    t = site.op("Tanh", inner)
    slope = site.op("Add", site.op("Mul", square, 3 * 0.044715 * c), c)
    bend = site.op("Mul", site.op("Mul", x, slope), site.op("Sub", 1.0, site.op("Mul", t, t)))
    return [site.op("Mul", site.g, site.op("Mul", site.op("Add", site.op("Add", t, 1.0), bend), 0.5))]


@vjp("Clip")
def clip(site: Vjp) -> Results:
    """The gradient passes strictly between the bounds."""
    site.fixed(1, 2)
    bounds = [("Greater", 1), ("Less", 2)]
    inside = [site.op(kind, site.y, site.x(index)) for kind, index in bounds if site.has(index)]
    if not inside:
        return [site.g]
    return [site.where(site.op("And", *inside) if len(inside) > 1 else inside[0], site.g)]


@vjp("Cast", "CastLike")
def cast(site: Vjp) -> Results:
    """Between floats; what was an index or a condition has no gradient."""
    if not site.wants(0):
        return [None]
    dtype = site.shapes.dtype(site.x())
    if dtype is None or dtype.kind != "f":
        raise VjpError("its type is not known" if dtype is None else f"it reads {dtype}")
    return [site.op("Cast", site.g, to=helper.np_dtype_to_tensor_dtype(dtype))]


@vjp("Softmax")
def softmax(site: Vjp) -> Results:
    axis, total = [int(site.attr("axis")) % site.rank()], site.op("Mul", site.g, site.y)
    return [site.op("Sub", total, site.op("Mul", site.y, site.tape.sum(total, axis)))]


@vjp("LogSoftmax")
def log_softmax(site: Vjp) -> Results:
    axis = [int(site.attr("axis")) % site.rank()]
    return [site.op("Sub", site.g, site.op("Mul", site.op("Exp", site.y), site.tape.sum(site.g, axis)))]


# ---- several inputs, broadcast


def _each(site: Vjp, *makers: Callable[[], str]) -> list[str | None]:
    """For each input whose gradient is wanted, what its maker gives, summed to the input's shape."""
    return [site.reduced(make(), i) if site.wants(i) else None for i, make in enumerate(makers)]


@vjp("Add", "Sum")
def add(site: Vjp) -> Results:
    return _each(site, *[lambda: site.g] * len(site.node.inputs))


@vjp("Sub")
def sub(site: Vjp) -> Results:
    return _each(site, lambda: site.g, lambda: site.op("Neg", site.g))


@vjp("Mul")
def mul(site: Vjp) -> Results:
    return _each(site, lambda: site.op("Mul", site.g, site.x(1)), lambda: site.op("Mul", site.g, site.x(0)))


@vjp("Div")
def div(site: Vjp) -> Results:
    return _each(
        site,
        lambda: site.op("Div", site.g, site.x(1)),
        lambda: site.op("Neg", site.op("Div", site.op("Mul", site.g, site.y), site.x(1))),
    )


@vjp("Pow")
def power(site: Vjp) -> Results:
    """A constant exponent c: c x^(c - 1), 0 at x = 0 where that is infinite."""
    site.fixed(1)
    c = site.value(1).astype(np.float64)
    if c.size == 1 and c.item() == 2:
        return _each(site, lambda: site.op("Mul", site.g, site.op("Mul", site.x(), 2.0)))
    dtype = site.shapes.dtype(site.x())
    if dtype is None or dtype.kind != "f":
        raise VjpError("its type is not known")
    factor, less = (site.tape.constant(np.asarray(v, dtype)) for v in (c, c - 1))
    slope = site.op("Mul", factor, site.op("Pow", site.x(), less))
    if (c < 1).any():
        slope = site.op("Where", site.op("Equal", site.x(), 0.0), 0.0, slope)
    return _each(site, lambda: site.op("Mul", site.g, slope))


@vjp("Where")
def where(site: Vjp) -> Results:
    return _each(
        site,
        lambda: site.g,  # the condition is boolean: never wanted
        lambda: site.where(site.x(), site.g),
        lambda: site.where(site.op("Not", site.x()), site.g),
    )


@vjp("PRelu")
def prelu(site: Vjp) -> Results:
    positive = site.op("Greater", site.x(), 0.0)
    return _each(
        site,
        lambda: site.op("Where", positive, site.g, site.op("Mul", site.g, site.x(1))),
        lambda: site.op("Where", positive, 0.0, site.op("Mul", site.g, site.x())),
    )


@vjp("Max", "Min")
def extreme(site: Vjp) -> Results:
    """To the inputs that are the result; two of them, equal, would both get all of it, so the first does."""
    if len(site.node.inputs) > 2:
        raise VjpError("more than two inputs")
    if len(site.node.inputs) == 1:
        return [site.g]
    first = site.op("Equal", site.x(0), site.y)
    return _each(site, lambda: site.where(first, site.g), lambda: site.where(site.op("Not", first), site.g))


# ---- normalisations


def _channels(site: Vjp, values: str) -> str:
    """A vector over axis 1, shaped to broadcast against the input."""
    return site.op("Reshape", values, site.tape.integers(-1, *[1] * (site.rank() - 2)))


@vjp("BatchNormalization")
def batch_normalization(site: Vjp) -> Results:
    """With the statistics of training: a factor a channel."""
    if site.attr("training_mode"):
        raise VjpError("it is in training mode")
    site.fixed(1, 2, 3, 4)
    root = site.op("Sqrt", site.op("Add", site.x(4), float(site.attr("epsilon"))))
    return [site.op("Mul", site.g, _channels(site, site.op("Div", site.x(1), root)))]


def _normalized(site: Vjp, axes: Sequence[int], epsilon: float) -> tuple[str, str]:
    """(x - mean) / root, and 1 / root, with root = sqrt(variance + epsilon), over these axes."""
    centred = site.op("Sub", site.x(), site.tape.mean(site.x(), axes))
    variance = site.tape.mean(site.op("Mul", centred, centred), axes)
    inverse = site.op("Reciprocal", site.op("Sqrt", site.op("Add", variance, epsilon)))
    return site.op("Mul", centred, inverse), inverse


def _denormalize(site: Vjp, scaled: str, x: str, inverse: str, axes: Sequence[int]) -> str:
    """The gradient through (x - mean) / root, from the gradient of its result."""
    along = site.op("Mul", x, site.tape.mean(site.op("Mul", scaled, x), axes))
    return site.op("Mul", inverse, site.op("Sub", site.op("Sub", scaled, site.tape.mean(scaled, axes)), along))


@vjp("LayerNormalization")
def layer_normalization(site: Vjp) -> Results:
    axes = list(range(int(site.attr("axis")) % site.rank(), site.rank()))
    x, inverse = _normalized(site, axes, float(site.attr("epsilon")))
    data = _denormalize(site, site.op("Mul", site.g, site.x(1)), x, inverse, axes) if site.wants(0) else None
    return [data, *_each(site, lambda: site.g, lambda: site.op("Mul", site.g, x), lambda: site.g)[1:]]


@vjp("InstanceNormalization")
def instance_normalization(site: Vjp) -> Results:
    site.fixed(1, 2)
    axes = list(range(2, site.rank()))
    x, inverse = _normalized(site, axes, float(site.attr("epsilon")))
    return [_denormalize(site, site.op("Mul", site.g, _channels(site, site.x(1))), x, inverse, axes)]


# ---- reductions


def _kept(site: Vjp, values: str) -> tuple[str, list[int]]:
    """A tensor of the output's shape with the reduced axes as axes of size 1, and those axes."""
    given = site.integers("axes", 1)
    if not given and site.attr("noop_with_empty_axes"):
        raise VjpError("it reduces nothing")
    axes = site.axes(given or None, site.rank())
    return (values if site.attr("keepdims") else site.op("Unsqueeze", values, site.tape.integers(*axes))), axes


@vjp("ReduceSum")
def reduce_sum(site: Vjp) -> Results:
    return [site.spread(_kept(site, site.g)[0], site.x())]


@vjp("ReduceMean")
def reduce_mean(site: Vjp) -> Results:
    return [_shared(site, _kept(site, site.g)[0])]


@vjp("GlobalAveragePool")
def global_average_pool(site: Vjp) -> Results:
    return [_shared(site, site.g)]


def _shared(site: Vjp, g: str) -> str:
    """The gradient of a mean: each element of the input gets the same share."""
    sizes = [site.op("Cast", site.tape.op("Size", t), to=TensorProto.DOUBLE) for t in (site.y, site.x())]
    share = site.op("CastLike", site.op("Div", *sizes), g)
    return site.spread(site.op("Mul", g, share), site.x())


@vjp("ReduceL2")
def reduce_l2(site: Vjp) -> Results:
    """x / y, 0 where y is."""
    ratio = site.op("Where", site.op("Greater", site.y, 0.0), site.op("Div", site.g, site.y), 0.0)
    return [site.op("Mul", site.x(), _kept(site, ratio)[0])]


@vjp("ReduceMax", "ReduceMin")
def reduce_extreme(site: Vjp) -> Results:
    """In equal shares to the elements that are the result."""
    (g, axes), (y, _) = _kept(site, site.g), _kept(site, site.y)
    return [_to_equal(site, g, y, axes)]


@vjp("GlobalMaxPool")
def global_max_pool(site: Vjp) -> Results:
    return [_to_equal(site, site.g, site.y, list(range(2, site.rank())))]


def _to_equal(site: Vjp, g: str, y: str, axes: Sequence[int]) -> str:
    found = site.op("CastLike", site.op("Equal", site.x(), y), g)
    return site.op("Mul", found, site.op("Div", g, site.tape.sum(found, axes)))
