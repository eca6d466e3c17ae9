"""What the command line says of removal and repair: units by group, the recipe that won, and the error that each layer has left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.report import PassRow, PointRow

_GROUPS, _LAYERS = 4, 3  # named unless everything is asked for
Facts = Mapping[str, Any]


def pruned_lines(passes: Sequence[PassRow], *, verbose: bool) -> list[str]:
    """A few lines for each pass that removed or repaired something; with `verbose` every group, candidate and layer."""
    lines = []
    for row in passes:
        if row.changes:
            parts = [*_removed(row, verbose), *_candidates(row.facts, verbose), *_repaired(row.facts, verbose)]
            lines += [f"{row.name}: {parts[0]}", *(f"  {part}" for part in parts[1:])] if parts else []
    return lines


def point_lines(point: PointRow, *, verbose: bool) -> list[str]:
    """The same for a point of a sweep: one line, or all."""
    if verbose:
        return pruned_lines(point.passes, verbose=True)
    return [f"{row.name}: {row.facts['recipe']}, {row.facts['mode']}" for row in point.passes if row.facts.get("recipe")]


def _removed(row: PassRow, verbose: bool) -> Iterator[str]:
    """Units by kind, then the groups that lost the largest shares."""
    found: list[Facts] = list(row.facts.get("removed", ()))
    if not found:
        return
    kinds: dict[str, list[int]] = {}
    for group in found:
        kinds.setdefault(str(group["kind"]), []).append(len(group["removed"]))
    counts = ", ".join(f"{sum(gone)} {kind} of {len(gone)} group{'s' * (len(gone) > 1)}" for kind, gone in sorted(kinds.items()))
    yield f"removed {counts}"
    ranked = sorted(found, key=lambda g: -len(g["removed"]) / g["units"])
    shown = found if verbose else ranked[:_GROUPS]
    if verbose:
        yield from (f"{_group(g)}: {_indices(g['removed'])}" for g in shown)
    else:
        yield "most of: " + ", ".join(map(_group, shown)) + _more(len(found) - len(shown))


def _group(group: Facts) -> str:
    """'layer1.conv1.weight[0] 16 -> 12'."""
    return f"{group['group']} {group['units']} -> {group['units'] - len(group['removed'])} {group['kind']}"


def _indices(units: Sequence[int]) -> str:
    """'0-3, 7'."""
    runs: list[list[int]] = []
    for unit in sorted(units):
        if runs and unit == runs[-1][-1] + 1:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _candidates(facts: Facts, verbose: bool) -> Iterator[str]:
    """What was chosen, and how near the others came."""
    if "recipe" not in facts:
        return
    others = [c for c in facts["candidates"] if (c["recipe"], c["mode"]) != (facts["recipe"], facts["mode"])]
    others.sort(key=lambda c: c["error"])
    before = facts["tuning"]["error_before"]
    yield f"recipe: {facts['recipe']}, {facts['mode']}: error {before:.4f}{_tuned(facts)} on held-out rows" + (
        f"; the next of {len(others)} others {others[0]['error']:.4f}" if others and not verbose else ""
    )
    if verbose:
        yield from (f"not: {c['recipe']}, {c['mode']}: {c['error']:.4f}, {c['units']} units" for c in others)


def _tuned(facts: Facts) -> str:
    """What scales and shifts of channels brought."""
    return "" if facts["tuning"]["strength"] is None else f", {facts['error_after']:.4f} with channels scaled"


def _repaired(facts: Facts, verbose: bool) -> Iterator[str]:
    """The error at the outputs before and after, then the layers with most left."""
    if "error_before" in facts:
        how = facts["mode"] or "no repair was better than none"
        yield f"repaired: error {facts['error_before']:.4f} -> {facts['error_after']:.4f} on held-out rows ({how})"
    layers: list[Facts] = list(facts.get("layers", ())) if "error_after" in facts else []
    if not layers:
        return
    ranked = sorted(layers, key=lambda layer: -layer["after"])
    if verbose:
        yield from (f"{layer['layer']} ({layer['op']}): {_left(layer)}, {layer['method']}" for layer in layers)
    else:
        shown = ", ".join(f"{layer['layer']} {_left(layer)}" for layer in ranked[:_LAYERS])
        yield f"largest errors left in layers: {shown}{_more(len(layers) - _LAYERS)}"


def _left(layer: Facts) -> str:
    return f"{layer['before']:.4f} -> {layer['after']:.4f}"


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
