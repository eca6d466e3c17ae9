"""The model as it was before units or weights went, and which indices of its tensors are still there: what repair aims at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from graphopt.model import Model, from_proto

Kept = dict[str, dict[int, np.ndarray]]  # tensor -> axis -> indices into the baseline's axis, ascending


@dataclass
class Baseline:
    """A copy of the model, and what of each tensor has stayed since; tensors not named are whole."""

    model: Model
    kept: Kept = field(default_factory=dict)

    def narrow(self, masks: Mapping[str, Mapping[int, np.ndarray]]) -> None:
        """Record a removal: of each tensor and axis, which of the indices that were left stay (`removal.kept`)."""
        for name, axes in masks.items():
            for axis, mask in axes.items():
                before = self.kept.setdefault(name, {}).get(axis)
                self.kept[name][axis] = np.flatnonzero(mask) if before is None else before[mask]

    def indices(self, name: str, axis: int) -> np.ndarray | None:
        """The indices of that axis that are still there; None for all of them."""
        return self.kept.get(name, {}).get(axis)


def snapshot(model: Model) -> Baseline:
    """Take a copy. Raises ModelError above 2 GB of weights."""
    copy = from_proto(model.proto())
    copy.path = model.path
    return Baseline(copy)
