"""Parameters that are attributes in old opsets and inputs in new ones (axes, pads, starts ...), read and written alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.edit import constant_value, set_input
from graphopt.errors import ModelError
from graphopt.model import Model


class Operand(NamedTuple):
    """`values` is None where the parameter is absent; `known` is False where it is computed at run time."""

    values: np.ndarray | None
    known: bool

    def integers(self) -> list[int] | None:
        """The values as a flat list; None where absent or computed. ModelError where they are no integers: nothing is guessed."""
        if self.values is None:
            return None
        if self.values.size and self.values.dtype.kind not in "iub":
            raise ModelError(f"a parameter that must be integers holds {self.values.dtype}: {self.values.ravel()[:4].tolist()}")
        return [int(v) for v in self.values.ravel()]


def has_input(node: gs.Node, index: int) -> bool:
    """Whether the optional input is given."""
    return len(node.inputs) > index and bool(node.inputs[index].name)


def operand(node: gs.Node, name: str, index: int) -> Operand:
    """The parameter `name`: the attribute of that name, else the input `index` (ONNX moved many from one to the other)."""
    if name in node.attrs:
        return Operand(np.asarray(node.attrs[name]), True)
    if not has_input(node, index):
        return Operand(None, True)
    values = constant_value(node.inputs[index])
    return Operand(values, values is not None)


class Names:
    """Fresh tensor and node names, without walking the model for each."""

    def __init__(self, model: Model) -> None:
        self.taken = set(model.tensors()) | {n.name for n in model.nodes()}

    def fresh(self, base: str) -> str:
        """`base`, or `base_1`, `base_2` ... : the first that nothing in the model has."""
        name, number = base, 0
        while name in self.taken:
            number += 1
            name = f"{base}_{number}"
        self.taken.add(name)
        return name

    def constant(self, base: str, values: np.ndarray) -> gs.Constant:
        """A new initializer."""
        return gs.Constant(self.fresh(base), values)


def set_operand(node: gs.Node, name: str, index: int, values: Sequence[int], opset: int, names: Names) -> None:
    """Write an int64 parameter where the operator has it at `opset`: as attribute or as a new initializer."""
    if name in onnx.defs.get_schema(node.op, opset, node.domain or "").attributes:
        node.attrs[name] = list(values)
    else:
        node.attrs.pop(name, None)
        set_input(node, index, names.constant(f"{node.name}_{name}", np.array(values, np.int64)))
