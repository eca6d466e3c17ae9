"""Numbers for dynamic axes: what they are taken as where a figure (MACs, memory) needs one."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping

import numpy as np

from graphopt.errors import ModelError
from graphopt.model import Model, from_proto
from graphopt.shapes import Shapes
from graphopt.shapes import shapes as infer

BATCH, IMAGE, SAMPLES, OTHER = 1, 224, 512, 64  # first axes, height and width (rank 4, 5), samples (floats of rank 2), all others


def bind(model: Model, shapes: Shapes, sizes: Mapping[str, int]) -> tuple[Shapes, dict[str, int]]:
    """Shapes with every dynamic axis of the inputs at its nominal size, and 'input[axis]' or 'input[symbol]' -> the size taken.

    `sizes` overrides them by symbol or as 'input[axis]'. Axes that depend on more than the inputs' sizes stay as they are.
    """
    symbols: dict[str, int] = {}
    assumed: dict[str, int] = {}
    for tensor in model.graph.inputs:
        shape = shapes.shape(tensor.name) or ()
        for axis, dim in enumerate(shape):
            if not isinstance(dim, int) and dim not in symbols:
                default = _default(axis, len(shape), shapes.dtype(tensor.name))
                size = sizes.get(f"{tensor.name}[{axis}]", sizes.get(dim, default) if isinstance(dim, str) else default)
                if isinstance(dim, str):
                    symbols[dim] = size
                named = isinstance(dim, str) and not dim.startswith("?")  # '?x:1' is a size without a name
                assumed[f"{tensor.name}[{dim if named else axis}]"] = size
    if not symbols:
        return shapes, assumed
    pattern = _names(symbols)
    values: dict[str, int | None] = {}

    def number(dim: int | str | None) -> int | str | None:
        if not isinstance(dim, str):
            return dim
        if dim not in values:
            values[dim] = evaluate(pattern.sub(lambda found: str(symbols[found[0]]), dim))
        value = values[dim]
        return dim if value is None else value

    bound = {name: tuple(number(d) for d in shape) for name, shape in shapes.shapes.items()}
    return Shapes(bound, shapes.dtypes), assumed


def reinferred(model: Model, bound: Shapes) -> Shapes:
    """Shapes inferred anew from inputs of the sizes in `bound`: slower, and finds what depends on more than formulas can say.

    Where the model contradicts these sizes, `bound` comes back as it is.
    """
    proto = model.skeleton()
    inputs = {t.name for t in model.graph.inputs}
    for info in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") or dim.dim_value < 0:
                size = (bound.shape(info.name) or ())[axis] if info.name in inputs else None
                dim.Clear()
                if isinstance(size, int):
                    dim.dim_value = size
    try:
        found = infer(from_proto(proto))
    except ModelError:
        return bound
    return Shapes({**bound.shapes, **{name: s for name, s in found.shapes.items() if found.static(name) is not None}}, bound.dtypes)


def _default(axis: int, rank: int, dtype: np.dtype | None) -> int:
    if axis == 0:
        return BATCH
    if rank in (4, 5) and axis >= 2:
        return IMAGE
    return SAMPLES if rank == 2 and dtype is not None and dtype.kind == "f" else OTHER


def _names(symbols: Mapping[str, int]) -> re.Pattern[str]:
    """Matches the symbols as whole words of an expression; they may hold almost any character."""
    words = "|".join(re.escape(s) for s in sorted(symbols, key=len, reverse=True))
    return re.compile(rf"(?<![^\s(*/])(?:{words})(?![^\s)*/,])")


_FUNCTIONS: dict[str, Callable[..., int]] = {"broadcast": max, "floor": int, "min": min}
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Div: lambda a, b: a // b,  # only ever written inside floor()
    ast.Mult: lambda a, b: a * b,
    ast.Sub: lambda a, b: a - b,
}


def evaluate(text: str) -> int | None:
    """The value of an expression as `graphopt.symbols` writes them, once its symbols are numbers; None where it is not one.

    >>> evaluate("2*floor((224 + 1)/2) - 3")
    221
    >>> evaluate("2*height")
    """
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _FUNCTIONS[node.func.id](*(_value(a) for a in node.args))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    raise ValueError("not a size")
