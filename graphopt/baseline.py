"""The model as it was before units or weights went, and which indices of its tensors are still there: what repair aims at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from graphopt.agreement import Answers, answers
from graphopt.data import Dataset
from graphopt.model import Model, from_proto

Kept = dict[str, dict[int, np.ndarray]]  # tensor -> axis -> indices into the baseline's axis, ascending


@dataclass
class Baseline:
    """A copy of the model, and what of each tensor has stayed since; tensors not named are whole."""

    model: Model
    kept: Kept = field(default_factory=dict)
    _held: dict[int, Answers] = field(default_factory=dict)  # of the model, whatever went since: copies share it

    def narrow(self, masks: Mapping[str, Mapping[int, np.ndarray]]) -> None:
        """Record a removal: of each tensor and axis, which of the indices that were left stay (`removal.kept`)."""
        for name, axes in masks.items():
            for axis, mask in axes.items():
                before = self.kept.setdefault(name, {}).get(axis)
                self.kept[name][axis] = np.flatnonzero(mask) if before is None else before[mask]

    def copy(self) -> Baseline:
        """Another record of the same model, to which removals can be added."""
        return Baseline(self.model, {name: dict(axes) for name, axes in self.kept.items()}, self._held)

    def held(self, data: Dataset) -> Answers:
        """What the baseline answers on the rows that are kept from fits."""
        if id(data) not in self._held:
            self._held.clear()
            self._held[id(data)] = answers(self.model, data, held=True)
        return self._held[id(data)]

    def indices(self, name: str, axis: int) -> np.ndarray | None:
        """The indices of that axis that are still there; None for all of them."""
        return self.kept.get(name, {}).get(axis)


def snapshot(model: Model) -> Baseline:
    """Take a copy. Raises ModelError above 2 GB of weights."""
    copy = from_proto(model.proto())
    copy.path = model.path
    return Baseline(copy)
