"""What changed between two models: nodes, shapes and initializers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import peek
from graphopt.model import Model
from graphopt.shapes import Shape, shapes
from graphopt.text import node_text


@dataclass(frozen=True)
class Diff:
    """Nodes are matched by their first output's name, tensors and initializers by name."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[tuple[str, str], ...]  # node before, after
    shapes: tuple[tuple[str, str, str], ...]  # tensor, shape before, after
    initializers: tuple[tuple[str, str, str], ...]  # name, before, after; '-' where there is none

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.shapes or self.initializers)


def diff(a: Model, b: Model) -> Diff:
    """Compare two loaded models. Weights are read one at a time, and only where name, shape and dtype agree."""
    before, after = _nodes(a), _nodes(b)
    both = [k for k in before if k in after]
    texts = [(node_text(before[k]), node_text(after[k])) for k in both]
    first, second = shapes(a), shapes(b)
    variables = [name for name, t in a.tensors().items() if name in second.shapes and not isinstance(t, gs.Constant)]
    moved = [(name, _shape(first.shape(name)), _shape(second.shape(name))) for name in variables]
    return Diff(
        added=tuple(node_text(n) for k, n in after.items() if k not in before),
        removed=tuple(node_text(n) for k, n in before.items() if k not in after),
        changed=tuple(pair for pair in texts if pair[0] != pair[1]),
        shapes=tuple(row for row in moved if row[1] != row[2]),
        initializers=tuple(_initializers(a, b)),
    )


def _nodes(model: Model) -> dict[str, gs.Node]:
    return {next((t.name for t in n.outputs if t.name), n.name): n for n in model.nodes()}


def _shape(shape: Shape | None) -> str:
    return "unknown" if shape is None else "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def _initializers(a: Model, b: Model) -> list[tuple[str, str, str]]:
    before, after = ({c.name: c for c in m.constants()} for m in (a, b))
    rows = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        left, right = _described(old), _described(new)
        if left == right and old is not None and new is not None and _digest(old) != _digest(new):
            right += " with other values"
        if left != right:
            rows.append((name, left, right))
    return rows


def _described(constant: gs.Constant | None) -> str:
    return "-" if constant is None else f"{np.dtype(constant.dtype).name}{list(constant.shape)}"


def _digest(constant: gs.Constant) -> bytes:
    array = peek(constant)
    content = repr(array.tolist()).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes()
    return hashlib.sha256(content).digest()
