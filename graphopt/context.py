"""What a pass may ask for: cached analyses, data, the target; and where it reports what it left alone. Nothing is global."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import onnx_graphsurgeon as gs

if TYPE_CHECKING:
    from graphopt.data import Dataset
    from graphopt.model import Model
    from graphopt.targets import Target

T = TypeVar("T")
Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass
class Context:
    """Handed to every pass. `calibration` is None where the user gave no data."""

    calibration: Dataset | None = None
    target: Target | None = None
    progress: Progress = lambda what, done, total: None
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)  # (reason, op) -> how often, in the running pass
    examples: dict[tuple[str, str], str] = field(default_factory=dict)  # the first node of each
    facts: dict[str, Any] = field(default_factory=dict)  # what the running pass tells the report, JSON values only
    _cached: dict[str, Any] = field(default_factory=dict)

    def get(self, analysis: Callable[[Model], T], model: Model) -> T:
        """The analysis of the model, computed once until a pass changes the model without keeping it."""
        name = analysis.__name__
        if name not in self._cached:
            self._cached[name] = analysis(model)
        value: T = self._cached[name]
        return value

    def drop(self, keep: frozenset[str] = frozenset()) -> None:
        """Forget every analysis that is not in `keep`."""
        self._cached = {name: value for name, value in self._cached.items() if name in keep}

    def reject(self, node: gs.Node, reason: str) -> None:
        """Record that the running pass matched `node` and left it alone, and why (a short phrase without names)."""
        self.rejected[reason, node.op] += 1
        self.examples.setdefault((reason, node.op), node.name)
