"""What happens between passes: printing, dumping, counting, numeric checks. Each is a `pipeline.Hook`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from graphopt.compare import EXACT_TOLERANCE, Feed, differences, first_difference
from graphopt.emit import save
from graphopt.errors import CheckError, ModelError
from graphopt.external import LIMIT
from graphopt.model import Model
from graphopt.pipeline import Hook, Step, StepResult
from graphopt.runtime import run, runnable, session
from graphopt.text import text


def print_after(which: str, write: Callable[[str], Any]) -> Hook:
    """Write the graph as text after the pass `which`, or after every pass that changed something ('all')."""

    def hook(model: Model, step: Step, result: StepResult) -> None:
        if which == step.entry.name or (which == "all" and result.changes):
            write(f"# after {result.name}: {result.changes} changes, {result.nodes} nodes\n{text(model)}")

    return hook


def dump_after(folder: Path) -> Hook:
    """Save the model after every pass that changed something, as `NN-pass.onnx`. The folder is made if need be.

    ModelError where it is not empty: the files of an earlier run would be replaced, one of which may be the input.
    """
    numbers = itertools.count(1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as error:
        raise ModelError(f"cannot make the folder {folder}: {error.strerror}") from error
    if used:
        raise ModelError(f"the folder {folder} is not empty; name a new one with --dump-after")

    def hook(model: Model, step: Step, result: StepResult) -> None:
        if result.changes:
            save(model, folder / f"{next(numbers):02d}-{result.name}.onnx", overwrite=True)

    return hook


@dataclass
class NumericCheck:
    """A hook that runs the model after each change and compares its outputs with those before.

    Exact passes may move outputs by `tolerance` of their scale; with `every` all passes are held to it, against the original.
    On a failure CheckError names the pass, the output and the first node whose result differs.
    """

    feeds: Sequence[Feed]
    tolerance: float = EXACT_TOLERANCE
    every: bool = False
    checked: int = 0
    _names: list[str] = field(default_factory=list)
    _last: list[list[Any]] = field(default_factory=list)
    _before: onnx.ModelProto | None = None

    def start(self, model: Model) -> None:
        """Take the original's outputs. Raises ModelError where onnxruntime cannot run it."""
        self._names = [t.name for t in model.graph.outputs]
        self._last = self._outputs(model)
        self._before = self._snapshot(model)

    def __call__(self, model: Model, step: Step, result: StepResult) -> None:
        if not result.changes:
            return
        try:
            outputs = self._outputs(model)
        except ModelError as error:
            raise CheckError(f"{result.name}: the model no longer runs: {error}") from error
        if self.every or step.entry.exact:
            self.checked += 1
            self._judge(model, result.name, outputs)
        if not self.every:
            self._last, self._before = outputs, self._snapshot(model)

    def _judge(self, model: Model, name: str, outputs: list[list[Any]]) -> None:
        rows = differences(self._names, zip(self._last, outputs, strict=True))
        worst = max(rows, key=lambda row: row.relative, default=None)
        if worst is None or worst.relative <= self.tolerance:
            return
        where = ""
        if self._before is not None:
            found = first_difference(self._before, model.proto(), self.feeds, tolerance=self.tolerance)
            where = f"; the first tensor that differs is '{found[1]}', written by node '{found[0]}'" if found else ""
        raise CheckError(
            f"{name} changed output '{worst.name}' by {worst.relative:.3g} of its scale (allowed {self.tolerance:.3g}){where}"
        )

    def _outputs(self, model: Model) -> list[list[Any]]:
        with runnable(model) as content:
            # regions as the functions that they replace: the check is of the rewriting, before onnxruntime's own fusions
            runner = session(content, threads=0, optimize=False, operators=False)
            return [run(runner, feed, self._names) for feed in self.feeds]

    def _snapshot(self, model: Model) -> onnx.ModelProto | None:
        return model.proto() if model.weight_bytes() < LIMIT // 4 else None
