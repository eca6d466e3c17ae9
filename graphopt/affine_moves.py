"""What a rule says about an affine map that meets a node: where it goes on, what stays behind, which weights change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.affine import Affine, Scene, read
from graphopt.shapes import Shape

SPREAD = 1e4  # largest ratio of scales that may be moved away from a shift: the rest is that much less even


@dataclass(frozen=True)
class Edit:
    """New constants for a node, computed only when the plan is chosen: input slot -> float64 values, along with
    attributes to set and, where the node changes its operator, the new one (`attrs` are then all it has)."""

    node: gs.Node
    compute: Callable[[], dict[int, np.ndarray]]
    attrs: tuple[tuple[str, Any], ...] = ()
    op: str | None = None


@dataclass(frozen=True)
class Move:
    """`onward`: (slot on the far side of the node, map); `rest`: what stays on the near side."""

    onward: tuple[tuple[int, Affine], ...] = ()
    rest: Affine | None = None
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class Site:
    """An affine map that arrives at a node: forward at its input `slot`, backward at its output `slot`."""

    node: gs.Node
    slot: int
    forward: bool
    affine: Affine
    scene: Scene

    def get(self, name: str) -> Any:
        return self.scene.attribute(self.node, name)

    def dims(self, slot: int, *, far: bool) -> Shape | None:
        tensors = self.node.outputs if far == self.forward else self.node.inputs
        return self.scene.dims(tensors[slot])

    def fixed(self, slot: int) -> np.ndarray | None:
        """The values of a constant input; None where it is absent or not constant."""
        tensor = self.node.inputs[slot] if slot < len(self.node.inputs) else None
        return read(tensor) if isinstance(tensor, gs.Constant) else None

    def given(self, slot: int) -> bool:
        return slot < len(self.node.inputs) and bool(self.node.inputs[slot].name)

    def ints(self, name: str, slot: int) -> list[int] | None:
        """Integers that are an attribute in old opsets and an input in new ones; None where unknown or absent."""
        values = self.get(name) if name in self.node.attrs else self.fixed(slot)
        return None if values is None else [int(v) for v in np.asarray(values).ravel()]


Carried = list[tuple[int, Affine]] | str
Carry = Callable[[Site, Affine], Carried]


def split_shift(site: Site) -> tuple[Affine, Affine] | str:
    """(the scale, what stays on the near side) of a map whose shift cannot pass; a reason where nothing is left to move."""
    a = site.affine
    if not a.has_scale:
        return f"a shift does not pass {site.node.op}"
    size = np.abs(a.scale)
    if site.forward and (not size.min() or size.max() > SPREAD * size.min()):
        return f"a shift does not pass {site.node.op} and cannot be parted from scales of 0 or very different size"
    return a.scale_only(), a.shift_only(before=site.forward)


def unmoved(site: Site, a: Affine) -> Carried:
    """The same map on the node's first tensor on the far side."""
    return [(0, a)] if site.slot == 0 else f"it is not the data of {site.node.op}"
