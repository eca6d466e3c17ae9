"""Contents of small integer and boolean tensors, followed through shape arithmetic: numbers, symbolic sizes, or unknown elements.

Values are numpy arrays of objects (int, bool, Polynomial or None for an unknown element), so that whatever only moves elements is
the numpy function itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.shape_rules import MAX_VALUES, Site, objects, slice_arguments
from graphopt.symbols import (
    Polynomial,
    Size,
    add,
    divide_exactly,
    floor_divide,
    multiply,
    not_negative,
    positive,
    product,
    subtract,
)

Value = np.ndarray | None
ValueRule = Callable[[Site], Value]


def array(elements: list[Any]) -> np.ndarray:
    """A 1-D array of objects (numpy would make something else of some lists)."""
    result = np.empty(len(elements), object)
    result[:] = elements
    return result


def _boxed(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray) and value.dtype == object:
        return value
    result = np.empty((), object)
    result[()] = value
    return result


# --- elements


def divide(a: Size, b: Size) -> Size:
    """ONNX's integer division rounds towards zero, as C does."""
    if isinstance(a, int) and isinstance(b, int):
        return None if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)
    if isinstance(b, int) and b > 0 and not_negative(a):
        return floor_divide(a, b)
    return divide_exactly(a, b) if positive(b) else None


def modulo(a: Size, b: Size) -> Size:
    """The sign of the divisor, as in Python (Mod with fmod = 0)."""
    if isinstance(a, int) and isinstance(b, int):
        return a % b if b else None
    if isinstance(a, Polynomial) and isinstance(b, int) and b > 0:
        rest = subtract(a, multiply(floor_divide(a, b), b))
        return rest if isinstance(rest, int) else None
    return None


def equal(a: Size, b: Size) -> bool | None:
    """True or False where it holds for every size the symbols can have."""
    if a is None or b is None:
        return None
    difference = subtract(a, b)
    if isinstance(difference, int):
        return difference == 0
    return False if positive(difference) or positive(multiply(difference, -1)) else None


def less(a: Size, b: Size) -> bool | None:
    """a < b where it is the same for every size the symbols can have."""
    if positive(subtract(b, a)):
        return True
    return False if not_negative(subtract(a, b)) else None


def minimum(a: Size, b: Size) -> Size:
    return a if not_negative(subtract(b, a)) else b if not_negative(subtract(a, b)) else None


def maximum(a: Size, b: Size) -> Size:
    return b if not_negative(subtract(b, a)) else a if not_negative(subtract(a, b)) else None


def _or_equal(a: Size, b: Size) -> bool | None:
    return _not(less(b, a))


def _not(a: bool | None) -> bool | None:
    return None if a is None else not a


def _and(a: bool | None, b: bool | None) -> bool | None:
    return False if a is False or b is False else None if a is None or b is None else True


def _or(a: bool | None, b: bool | None) -> bool | None:
    return _not(_and(_not(a), _not(b)))


def _negated(a: Size) -> Size:
    return multiply(a, -1)


def _absolute(a: Size) -> Size:
    return abs(a) if isinstance(a, int) else a if not_negative(a) else None


def _sign(a: Size) -> Size:
    return (a > 0) - (a < 0) if isinstance(a, int) else 1 if positive(a) else None


# --- whole arrays


def elementwise(function: Callable[..., Any]) -> ValueRule:
    """Apply to every element, with broadcasting; unknown inputs give no value, unknown elements stay unknown where they matter."""

    def rule(site: Site) -> Value:
        inputs = [site.value(i) for i in range(len(site.node.inputs))]
        if any(v is None for v in inputs):
            return None
        arrays = [v for v in inputs if v is not None]
        if len(arrays) == 1:
            return _boxed(np.frompyfunc(function, 1, 1)(arrays[0]))
        result = arrays[0]
        for other in arrays[1:]:
            result = _boxed(np.frompyfunc(function, 2, 1)(result, other))
        return result

    return rule


def moved(function: Callable[[Site, np.ndarray], Any]) -> ValueRule:
    """A rule for an operator that only moves the elements of its first input."""

    def rule(site: Site) -> Value:
        value = site.value(0)
        return None if value is None else _boxed(function(site, value))

    return rule


def shape_of(site: Site) -> Value:
    shape = site.shape()
    if shape is None:
        return None
    return array(list(shape[site.attr("start") or 0 : site.node.attrs.get("end")]))


def size_of(site: Site) -> Value:
    shape = site.shape()
    return None if shape is None else _boxed(product(shape))


def cast(site: Site) -> Value:
    value, kind = site.value(0), site.known.dtypes.get(site.node.outputs[0].name)
    if value is None or kind is None or kind.kind not in "iub":
        return None
    if kind.kind == "b":
        return _boxed(np.frompyfunc(lambda v: v if isinstance(v, bool) else _not(equal(v, 0)), 1, 1)(value))
    return _boxed(np.frompyfunc(lambda v: int(v) if isinstance(v, bool) else v, 1, 1)(value))


def gather(site: Site) -> Value:
    value, indices = site.value(0), site.value(1)
    if value is None or indices is None or not all(isinstance(i, int) for i in indices.reshape(-1)):
        return None
    return _boxed(np.take(value, indices.astype(np.int64), axis=site.attr("axis")))


def slice_value(site: Site) -> Value:
    value = site.value(0)
    starts, ends, axes, steps = slice_arguments(site)
    if value is None or starts is None or ends is None or axes is None or steps is None:
        return None
    picked = [slice(None)] * value.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if not (isinstance(start, int) and isinstance(end, int) and isinstance(step, int)) or step == 0:
            return None
        picked[axis] = slice(start, None if step < 0 and end < -value.shape[axis] else end, step)
    return value[tuple(picked)]


def concat(site: Site) -> Value:
    values = [site.value(i) for i in range(len(site.node.inputs))]
    for i, value in enumerate(values):
        sizes = site.sizes(i) if value is None else None
        if sizes is not None:
            values[i] = array(list(sizes))
    parts = [v for v in values if v is not None]
    return np.concatenate(parts, axis=site.attr("axis")) if len(parts) == len(values) else None


def unsqueeze(site: Site) -> Value:
    value, axes = site.value(0), site.ints(1, "axes")
    if value is None or axes is None:
        return None
    return np.expand_dims(value, tuple(a % (value.ndim + len(axes)) for a in axes))


def squeeze(site: Site) -> Value:
    value, axes = site.value(0), site.ints(1, "axes")
    if value is None or (axes is None and site.has(1)):
        return None
    return _boxed(np.squeeze(value, None if axes is None else tuple(axes)))


def to_known_shape(site: Site) -> Value:
    """Reshape and Flatten of a value, once the output's shape is known."""
    value, shape = site.value(0), site.known.sizes.get(site.node.outputs[0].name)
    if value is None or shape is None or not all(isinstance(s, int) for s in shape):
        return None
    return value.reshape(tuple(s for s in shape if isinstance(s, int)))


def expand(site: Site) -> Value:
    value, target = site.value(0), site.ints(1, "shape")
    if value is None or target is None or np.prod(target, dtype=object) > MAX_VALUES:
        return None
    return np.broadcast_to(value, np.broadcast_shapes(value.shape, tuple(target)))


def tile(site: Site) -> Value:
    value, repeats = site.value(0), site.ints(1, "repeats")
    if value is None or repeats is None or np.prod(repeats, dtype=object) * value.size > MAX_VALUES:
        return None
    return np.tile(value, repeats)


def constant(site: Site) -> Value:
    value = site.node.attrs.get("value")
    kept = isinstance(value, gs.Constant) and np.prod(value.shape, dtype=np.int64) <= MAX_VALUES
    return objects(np.asarray(value.values)) if kept and value is not None else None


def constant_of_shape(site: Site) -> Value:
    shape, fill = site.ints(0, "shape"), site.node.attrs.get("value")
    if shape is None or fill is None or np.prod(shape, dtype=object) > MAX_VALUES:
        return None
    result = np.empty(shape, object)
    result[...] = np.asarray(fill.values).reshape(-1)[0].item()
    return result


def range_value(site: Site) -> Value:
    start, limit, delta = (site.ints(i, "") for i in range(3))
    if not start or not limit or not delta or delta[0] == 0:
        return None
    count = len(range(start[0], limit[0], delta[0]))
    return array(list(range(start[0], limit[0], delta[0]))) if count <= MAX_VALUES else None


def where(site: Site) -> Value:
    condition, yes, no = site.value(0), site.value(1), site.value(2)
    if condition is None or yes is None or no is None:
        return None

    def pick(c: bool | None, a: Size, b: Size) -> Size:
        return a if c is True else b if c is False else a if a == b else None

    return _boxed(np.frompyfunc(pick, 3, 1)(condition, yes, no))


def reduced(function: Callable[[Any, Any], Any], start: int | None = None) -> ValueRule:
    """A reduction over all elements (over all axes, or the one axis there is)."""

    def rule(site: Site) -> Value:
        value, axes = site.value(0), site.ints(1, "axes")
        if value is None or value.ndim > 1 or (site.has(1) and not axes) or (value.size == 0 and start is None):
            return None
        if not axes and site.attr("noop_with_empty_axes"):
            return value
        elements = value.reshape(-1).tolist()
        total = elements[0] if start is None else start
        for element in elements[1:] if start is None else elements:
            total = function(total, element)
        return array([total]) if site.attr("keepdims") and value.ndim else _boxed(total)

    return rule


VALUE_RULES: dict[str, ValueRule] = {
    "Abs": elementwise(_absolute),
    "Add": elementwise(add),
    "And": elementwise(_and),
    "Cast": cast,
    "Concat": concat,
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "Div": elementwise(divide),
    "Equal": elementwise(equal),
    "Expand": expand,
    "Flatten": to_known_shape,
    "Gather": gather,
    "Greater": elementwise(lambda a, b: less(b, a)),
    "GreaterOrEqual": elementwise(lambda a, b: _or_equal(b, a)),
    "Identity": moved(lambda site, value: value),
    "Less": elementwise(less),
    "LessOrEqual": elementwise(_or_equal),
    "Max": elementwise(maximum),
    "Min": elementwise(minimum),
    "Mod": lambda site: None if site.attr("fmod") else elementwise(modulo)(site),
    "Mul": elementwise(multiply),
    "Neg": elementwise(_negated),
    "Not": elementwise(_not),
    "Or": elementwise(_or),
    "Range": range_value,
    "ReduceMax": reduced(maximum),
    "ReduceMin": reduced(minimum),
    "ReduceProd": reduced(multiply, 1),
    "ReduceSum": reduced(add, 0),
    "Reshape": to_known_shape,
    "Shape": shape_of,
    "Sign": elementwise(_sign),
    "Size": size_of,
    "Slice": slice_value,
    "Squeeze": squeeze,
    "Sub": elementwise(subtract),
    "Tile": tile,
    "Transpose": moved(lambda site, value: np.transpose(value, site.node.attrs.get("perm"))),
    "Unsqueeze": unsqueeze,
    "Where": where,
    "Xor": elementwise(lambda a, b: None if a is None or b is None else operator.xor(a, b)),
}


def split_values(site: Site) -> list[Value]:
    """The parts of a Split of a value, by the sizes of the outputs."""
    value, names = site.value(0), [t.name for t in site.node.outputs]
    if value is None or value.ndim == 0:
        return [None] * len(names)
    axis, parts, start = site.attr("axis") % value.ndim, [], 0
    for name in names:
        shape = site.known.sizes.get(name)
        size = shape[axis] if shape is not None else None
        if not isinstance(size, int) or start is None:
            return [None] * len(names)
        parts.append(np.take(value, range(start, start + size), axis=axis))
        start += size
    return list(parts)


def checked(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The value with elements outside the type's range made unknown: the runtime would have wrapped them around."""
    if dtype.kind == "b":
        return value
    limits = np.iinfo(dtype)
    low, high = int(limits.min), int(limits.max)

    def keep(element: Any) -> Any:
        if isinstance(element, Polynomial):
            return element if low < 0 or not_negative(element) else None
        return None if element is not None and not low <= element <= high else element

    return _boxed(np.frompyfunc(keep, 1, 1)(value)) if value.size else value
