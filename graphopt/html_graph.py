"""The graph before and after, side by side, and what each pass did to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from graphopt.cli_pruned import pruned_lines
from graphopt.html_page import Html, code, details, items, many, paragraph, text
from graphopt.lineage import names_of
from graphopt.report import EditRow, NodeRow, PassRow, Report

_SHORT = 2  # rows of a run that are shown one by one all the same
_KINDS = 5  # operators named in a summary
_OPEN = 60  # lines up to which the list is not folded away
_CONVERT = frozenset({"QuantizeLinear", "DequantizeLinear"})


def passes_section(report: Report, names: Sequence[str]) -> str:
    """Each run of a pass that changed something, then those that found nothing to do, by name."""
    return passes_of(report.passes, names, report.detail.edits if report.detail else ())


def passes_of(passes: Sequence[PassRow], names: Sequence[str] = (), edits: Sequence[EditRow] = ()) -> str:
    """The same of any runs of passes, `names` in their order."""
    called = names or names_of(passes)
    known = {e.run: e for e in edits}
    left: dict[str, PassRow] = {p.name: p for p in passes if p.rejected}  # the last run tells what is left
    shown = [_pass(i, p, called[i], known.get(i)) for i, p in enumerate(passes) if p.changes]
    busy = {p.name for p in passes if p.changes}
    never = list(dict.fromkeys(p.name for p in passes if p.name not in busy))
    said = f"Nothing to do for {', '.join(never)}." if never else ""
    reasons = [f"{p.name}: {many(r.count, r.op + ' node')}: {r.reason} (as {r.example})" for p in left.values() for r in p.rejected]
    alone = details(f"Left alone: {many(len(reasons), 'reason')}", items(reasons)) if reasons else ""
    return "".join(shown) + paragraph(said, soft=True) + alone


def _pass(number: int, row: PassRow, name: str, edit: EditRow | None) -> str:
    options = " ".join(f"{k}={v}" for k, v in row.options.items())
    did = (
        [f"{verb} {_ops(c)}" for verb, c in (("removed", edit.removed), ("added", edit.added), ("changed", edit.changed)) if c]
        if edit
        else []
    )
    told = "; ".join(did) or many(row.changes, "change")
    after = f"{many(row.nodes, 'node')}, {many(row.parameters, 'parameter')}, {row.weight_bytes / 1e3:,.1f} kB of weights after it"
    facts = [f"{k}: {v}" for k, v in row.facts.items() if isinstance(v, str | int | float)] + pruned_lines([row], verbose=False)
    lines = [
        f"run {number + 1}, {many(row.changes, 'change')} in {row.seconds:.2f} s; {after}",
        *([f"options: {options}"] if options else []),
    ]
    return details(Html(f"<b>{text(name)}</b>: {text(told)}"), items([*lines, *facts]))


def _ops(counts: Mapping[str, int]) -> str:
    """'9 Conv, 2 Gemm'."""
    ranked = sorted(counts.items(), key=lambda c: -c[1])
    more = f" and {many(len(ranked) - _KINDS, 'other operator')}" if len(ranked) > _KINDS else ""
    return ", ".join(f"{n} {op}" for op, n in ranked[:_KINDS]) + more


@dataclass
class _Line:
    """A node that stays, or one that is new, and under it what went behind it and what was put behind it."""

    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    by: list[str] = field(default_factory=list)

    def add(self, sides: tuple[str, str], by: str, *, told: bool = False) -> None:
        """`told`: by whom is written beside the node, as there is more than one in this line."""
        tail = f' <span class="soft">· {text(by)}</span>' if told else ""
        for held, side in zip((self.before, self.after), sides, strict=True):
            if side:
                held.append(f"<div>{side}{tail}</div>")
        if by and not told and by not in self.by:
            self.by.append(by)

    def markup(self) -> str:
        cells = "".join(f"<div>{''.join(held)}</div>" for held in (self.before, self.after))
        return f'<div class="node">{cells}<div class="soft">{text(", ".join(self.by))}</div></div>'


def graph_section(nodes: Sequence[NodeRow], names: Sequence[str]) -> str:
    """The nodes in order, the original's on the left, the result's on the right; runs of the same fate folded into one line."""
    if not nodes:
        return ""
    went, came = sum(n.removed is not None for n in nodes), sum(n.added is not None for n in nodes)
    changed = sum(bool(n.changed) and n.removed is None and n.added is None for n in nodes)
    counts = (
        f"{many(len(nodes) - came, 'node')} before, {len(nodes) - went} after: {went} removed, {came} added, {changed} changed."
    )
    head = '<div class="node head"><span>before</span><span>after</span><span>by</span></div>'
    lines = _lines(nodes, names)
    shown = f"{head}{''.join(line.markup() for line in lines)}"
    marks = "− removed, + added, ± changed: operator, attributes or weights. What stands under a node stood behind it."
    listed = details("all nodes", shown, opened=len(lines) <= _OPEN)
    return paragraph(counts) + paragraph(marks, soft=True) + listed


def _lines(nodes: Sequence[NodeRow], names: Sequence[str]) -> list[_Line]:
    """What is removed, and added QuantizeLinear and DequantizeLinear, stand under the node before them."""
    lines: list[_Line] = []
    for (fate, by), run in groupby(nodes, key=lambda n: _fate(n, names)):
        members = list(run)
        converts = fate == "added" and all(n.op in _CONVERT for n in members)
        if lines and converts:
            lines[-1].add(("", f'<span class="new">+ {text(_ops(Counter(n.op for n in members)))}</span>'), by, told=True)
        elif lines and fate == "removed":
            if len(members) > _SHORT:
                lines[-1].add(_folded(members, f"{fate} by {by}", fate), "")
                continue
            for node in members:
                lines[-1].add(_one(node, fate), by, told=True)
        elif fate == "changed" or len(members) <= _SHORT:
            for node in members:
                lines.append(_Line())
                lines[-1].add(_one(node, fate), by)
        else:
            lines.append(_Line())
            lines[-1].add(_folded(members, fate, fate), by)
    return lines


def _fate(node: NodeRow, names: Sequence[str]) -> tuple[str, str]:
    """What became of it, and the passes that did it."""
    if node.removed is not None:
        return "removed", names[node.removed]
    if node.added is not None:
        return "added", ", ".join(names[i] for i in (node.added, *node.changed))
    return ("changed", ", ".join(names[i] for i in node.changed)) if node.changed else ("unchanged", "")


_MARKS = {"removed": ("gone", "− "), "added": ("new", "+ "), "changed": ("other", "± "), "unchanged": ("soft", "")}


def _sides(fate: str, what: str) -> tuple[Html, Html]:
    kind, mark = _MARKS[fate]
    marked, none = Html(f'<span class="{kind}">{mark}{text(what)}</span>'), Html("")
    return {"removed": (marked, none), "added": (none, marked), "changed": (text(what), marked)}.get(fate, (marked, marked))


def _one(node: NodeRow, fate: str) -> tuple[Html, Html]:
    before, after = _sides(fate, Html(f"<b>{text(node.op)}</b> {text(node.name)}"))
    if node.before is not None and node.after is not None:
        after = details(after, paragraph(code(node.before)) + paragraph(code(node.after)), unfold=False)
    return before, after


def _folded(members: Sequence[NodeRow], what: str, fate: str) -> tuple[Html, Html]:
    """One line for all, that unfolds to their names."""
    said = f"{many(len(members), 'node')} {what}: {_ops(Counter(n.op for n in members))}"
    before, after = _sides(fate, said)
    listed = items([f"{n.op} {n.name}" for n in members])
    if fate == "added":
        return before, details(after, listed, unfold=False)
    return details(before, listed, unfold=False), Html("" if fate == "removed" else '<span class="soft">the same</span>')
