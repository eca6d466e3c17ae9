"""What a pass may ask for: cached analyses, data, the target; and where it reports what it left alone. Nothing is global."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import onnx_graphsurgeon as gs

if TYPE_CHECKING:
    from graphopt.baseline import Baseline
    from graphopt.data import Dataset
    from graphopt.model import Model
    from graphopt.targets import Target

T = TypeVar("T")
Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass
class Context:
    """Handed to every pass. `calibration` is None where the user gave no data; `here`: the result is to run on this machine, so
    that what is timed here means something; `detail`: a report will show what else a pass can tell cheaply."""

    calibration: Dataset | None = None
    target: Target | None = None
    progress: Progress = lambda what, done, total: None
    here: bool = True
    detail: bool = False
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)  # (reason, op) -> how often, in the running pass
    examples: dict[tuple[str, str], str] = field(default_factory=dict)  # the first node of each
    baseline: Baseline | None = None  # the model before units or weights were removed, which repair aims at
    keep_baseline: bool = True  # whether a later step may want it
    facts: dict[str, Any] = field(default_factory=dict)  # what the running pass tells the report, JSON values only
    _cached: dict[str, Any] = field(default_factory=dict)

    def get(self, analysis: Callable[[Model], T], model: Model) -> T:
        """The analysis of the model, computed once until a pass changes the model without keeping it."""
        return self.cached(analysis.__name__, lambda: analysis(model))

    def cached(self, name: str, make: Callable[[], T]) -> T:
        """The same for what needs more than the model: whatever is stored under that name, made if it is not there."""
        if name not in self._cached:
            self._cached[name] = make()
        value: T = self._cached[name]
        return value

    def fork(self) -> Context:
        """For another run on an equal model (same names, same values): analyses are shared until either run drops its own.

        A pass that asks for an analysis once it has changed the model must `drop` first, as ever: here others would read it.
        """
        baseline = None if self.baseline is None else self.baseline.copy()
        return replace(self, rejected=Counter(), examples={}, facts={}, baseline=baseline)

    def drop(self, keep: frozenset[str] = frozenset()) -> None:
        """Forget every analysis that is not in `keep`."""
        self._cached = {name: value for name, value in self._cached.items() if name in keep}

    def remember(self, model: Model) -> Baseline | None:
        """Before a removal: the model as it is, unless an earlier removal has been remembered.

        None where nothing will repair, and for models over 2 GB, which cannot be run in pieces.
        """
        if self.baseline is None and self.keep_baseline:
            from graphopt.baseline import snapshot
            from graphopt.external import LIMIT

            small = model.weight_bytes() <= LIMIT
            self.baseline = self.cached("baseline", lambda: snapshot(model)).copy() if small else None
        return self.baseline

    def reject(self, node: gs.Node, reason: str) -> None:
        """Record that the running pass matched `node` and left it alone, and why (a short phrase without names)."""
        self.rejected[reason, node.op] += 1
        self.examples.setdefault((reason, node.op), node.name)
