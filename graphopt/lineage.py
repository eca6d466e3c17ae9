"""What each pass did to each node: which it removed, which it added, and of which it changed operator, attributes or weights.

A node is the same before and after a pass where its name is, or else its operator and its first output. What it reads may change
without a change of its own: beside a node that goes, all readers read something else.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import op_key
from graphopt.edit import peek
from graphopt.external import LIMIT
from graphopt.model import Model
from graphopt.pipeline import Step, StepResult
from graphopt.report import EditRow, NodeRow, PassRow
from graphopt.text import node_text


@dataclass
class _Life:
    """One node from the run of a pass that added it (None: the original has it) to the one that removed it."""

    name: str
    op: str
    first: str  # its text where it was first seen
    added: int | None = None
    removed: int | None = None
    changed: list[int] = field(default_factory=list)

    def row(self, last: str | None) -> NodeRow:
        told = bool(self.changed) and last is not None
        return NodeRow(
            name=self.name,
            op=self.op,
            added=self.added,
            removed=self.removed,
            changed=self.changed,
            before=self.first if told else None,
            after=last if told else None,
        )


@dataclass(frozen=True)
class _Seen:
    """A node as a pass left it; `own` is what makes it another node's equal."""

    op: str
    output: str
    own: str
    text: str


@dataclass
class Lineage:
    """A hook that follows nodes through passes. Memory: the text of the nodes."""

    seen: dict[str, _Seen] = field(default_factory=dict)
    lives: dict[str, _Life] = field(default_factory=dict)  # those alive, by their present name
    order: list[_Life] = field(default_factory=list)  # the original's nodes
    edits: list[EditRow] = field(default_factory=list)
    runs: int = 0

    def start(self, model: Model) -> None:
        """Take the original."""
        self.seen = _look(model)
        self.lives = {name: _Life(name, s.op, s.text) for name, s in self.seen.items()}
        self.order = list(self.lives.values())

    def __call__(self, model: Model, step: Step, result: StepResult) -> None:
        run, self.runs = self.runs, self.runs + 1
        if not result.changes:
            return
        now = _look(model)
        same = _matched(self.seen, now)
        lives: dict[str, _Life] = {}
        added: Counter[str] = Counter()
        changed: Counter[str] = Counter()
        for name, node in now.items():
            before = same.get(name)
            life = self.lives.pop(before) if before is not None else _Life(name, node.op, node.text, added=run)
            if before is None:
                added[node.op] += 1
            elif self.seen[before].own != node.own:
                life.changed.append(run)
                changed[node.op] += 1
            life.name, life.op = name, node.op
            lives[name] = life
        for life in self.lives.values():
            life.removed = run
        removed = Counter(life.op for life in self.lives.values())
        self.seen, self.lives = now, lives
        if added or changed or removed:
            self.edits.append(EditRow(run=run, added=dict(added), removed=dict(removed), changed=dict(changed)))

    def rows(self) -> list[NodeRow]:
        """The nodes of the original and of the result in one order; what came and went in between is in `edits` only.

        Nodes that are gone stand before the first node of the result that stood behind them in the original.
        """
        place = {id(life): i for i, life in enumerate(self.order)}
        rows: list[NodeRow] = []
        upto = 0
        for name, life in self.lives.items():
            index = place.get(id(life))
            if index is not None and index >= upto:
                rows += [gone.row(None) for gone in self.order[upto:index] if gone.removed is not None]
                upto = index
            rows.append(life.row(self.seen[name].text))
        return rows + [gone.row(None) for gone in self.order[upto:] if gone.removed is not None]


def _look(model: Model) -> dict[str, _Seen]:
    """Nodes by name, in order. Weights are compared by checksum, unless there are over 2 GB of them."""
    light = model.weight_bytes() <= LIMIT
    sums: dict[int, str] = {}
    for constant in model.constants() if light else ():
        array = peek(constant)
        content = repr(array.tolist()).encode() if array.dtype == object else np.ascontiguousarray(array).data
        sums[id(constant)] = f"{zlib.crc32(content):x}"
    return {
        str(n.name): _Seen(op_key(n), next((t.name for t in n.outputs if t.name), ""), _own(n, sums), node_text(n))
        for n in model.nodes()
    }


def _own(node: gs.Node, sums: Mapping[int, str]) -> str:
    """Operator, attributes and constants, but not which tensors it reads and writes."""
    attributes = [f"{k}={v!r}" for k, v in sorted(node.attrs.items()) if not isinstance(v, gs.Graph)]
    reads = [
        f"{np.dtype(t.dtype).name}{list(t.shape)}{sums.get(id(t), '')}" if isinstance(t, gs.Constant) else bool(t.name)
        for t in node.inputs
    ]
    return f"{op_key(node)} {attributes} {reads}"


def _matched(before: Mapping[str, _Seen], after: Mapping[str, _Seen]) -> dict[str, str]:
    """For each node of `after` that was there `before`: its name then."""
    same = {name: name for name in after if name in before}
    gone: dict[tuple[str, str], str] = {(s.op, s.output): n for n, s in before.items() if n not in after and s.output}
    for name, node in after.items():
        old = gone.pop((node.op, node.output), None) if name not in same else None
        if old is not None:
            same[name] = old
    return same


def names_of(passes: Sequence[PassRow]) -> list[str]:
    """A name for each run: the pass's, with a number where it changed the model in several runs."""
    total, count = Counter(p.name for p in passes if p.changes), Counter[str]()
    found = []
    for p in passes:
        count[p.name] += bool(p.changes)
        found.append(f"{p.name} ({count[p.name]})" if p.changes and total[p.name] > 1 else p.name)
    return found
