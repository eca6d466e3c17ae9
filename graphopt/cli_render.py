"""What the command line prints: rich tables, which become plain text where the output is no terminal."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from graphopt.cli_compiled import region_lines
from graphopt.cli_pruned import pruned_lines
from graphopt.cli_tables import console as _console
from graphopt.cli_tables import count as _count
from graphopt.cli_tables import listing as _listing
from graphopt.cli_tables import ms as _ms
from graphopt.cli_tables import percent as _percent
from graphopt.cli_tables import plural as _plural
from graphopt.cli_tables import print_table as _print_table
from graphopt.cli_tables import size as _size
from graphopt.cli_tables import table as _table

if TYPE_CHECKING:
    from graphopt.compare import OutputDifference
    from graphopt.demo import Stage
    from graphopt.diff import Diff
    from graphopt.groups_view import GroupsView
    from graphopt.registry import Pass
    from graphopt.report import ModelRow, PassRow, QualityRow, Report
    from graphopt.targets import Target

_NODES = "nodes: QuantizeLinear and DequantizeLinear are counted; they vanish where the runtime computes in INT8"
_SHOWN = 3  # outputs named on the screen; the report has all


_FIGURES: tuple[tuple[str, Callable[[ModelRow], Any], Callable[[Any], str]], ...] = (
    ("quality", lambda r: r.quality, _percent),
    ("latency p50", lambda r: r.latency and r.latency.p50_ms, _ms),
    ("latency p95", lambda r: r.latency and r.latency.p95_ms, _ms),
    ("parameters", lambda r: r.parameters, _count),
    ("MACs", lambda r: r.macs, _count),
    ("nodes", lambda r: r.nodes, _count),
    ("file size", lambda r: r.file_bytes, _size),
    ("peak memory", lambda r: r.peak_memory_bytes, _size),
)


def figures_table(names: Sequence[str], rows: Sequence[ModelRow]) -> Table:
    """One column a model, one row a figure that was measured on at least one; the last column compares last with first."""
    table = _table(*names, "change")
    for label, get, show in _FIGURES:
        values = [get(row) for row in rows]
        if any(v is not None for v in values):
            table.add_row(label, *("-" if v is None else show(v) for v in values), _change(label, values[0], values[-1]))
    return table


def _change(label: str, before: Any, after: Any) -> str:
    if before is None or after is None or not before:
        return ""
    if label == "quality":
        return f"{100 * (after - before):+.2f} points"
    return f"{100 * (after / before - 1):+.1f} %"


def show_report(report: Report, *, verbose: bool) -> None:
    """The before/after table, quality, speed, warnings; with `verbose` every pass too."""
    console = _console()
    if verbose:
        _print_table(console, _passes_table(report.passes))
        _print_rejections(console, report.passes)
    else:
        done: dict[str, int] = {}
        for row in report.passes:
            done[row.name] = done.get(row.name, 0) + row.changes
        busy = ", ".join(f"{name} ({_plural(count, 'change')})" for name, count in done.items() if count)
        idle = sum(not count for count in done.values())
        console.print(
            f"passes: {busy or 'nothing to change'}" + (f"; {_plural(idle, 'other')} had nothing to do" if idle and busy else "")
        )
    _print_table(console, figures_table(["original", "optimised"], [report.before, report.after]))
    _print_measured(console, report)
    for line in [*pruned_lines(report.passes, verbose=verbose), *region_lines(report)]:
        console.print(escape(line))
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    console.print(f"written: {escape(str(report.after.path))}")


def _print_measured(console: Console, report: Report) -> None:
    """Under what conditions the figures hold, and what no column of the table can say."""
    if any(p.name == "quantize" and p.changes for p in report.passes):
        console.print(_NODES)
    timed = report.after.latency
    if report.speedup is not None and timed is not None:
        runs = f"{_plural(timed.runs, 'paired run')}, batch {timed.batch}, {_plural(timed.threads, 'thread')}"
        console.print(f"speed: {report.speedup:.2f}x the original (median of {runs})")
    if report.quality is not None:
        console.print(f"{report.quality.metric} on {quality_text(report.quality)}")
    if report.checked_passes:
        console.print(f"checked: {_plural(report.checked_passes, 'exact change')} left the outputs as they were, but for rounding")
    if report.outputs:
        console.print(escape(f"outputs against the original's, on {report.compared_on}:"))
    for output in report.outputs[:_SHOWN]:
        sqnr = "no error" if output.sqnr_db is None else f"SQNR {output.sqnr_db:.1f} dB"
        agreement = "" if output.argmax_agreement is None else f", same argmax on {100 * output.argmax_agreement:.1f} %"
        error = f"max error {output.max_error:.3g} on a scale of {output.scale:.3g}"
        console.print(escape(f"  {output.name}: {sqnr}, {error}{agreement}"))
    if len(report.outputs) > _SHOWN:
        console.print(f"  and {len(report.outputs) - _SHOWN} more (see --report)")


def quality_text(row: QualityRow) -> str:
    """'400 rows: 4 worse, 6 better (p = 0.75, sign test)'."""
    return f"{_plural(row.rows, 'row')}: {row.lost} worse, {row.won} better (p = {row.p_value:.2g}, sign test)"


def _passes_table(passes: Sequence[PassRow]) -> Table:
    table = _table("changes", "seconds", "nodes", "parameters", "MACs", first="pass")
    for row in passes:
        options = " ".join(f"{k}={v}" for k, v in row.options.items())
        macs = "-" if row.macs is None else _count(row.macs)
        name = escape(f"{row.name} {options}".strip())
        table.add_row(name, str(row.changes), f"{row.seconds:.2f}", str(row.nodes), _count(row.parameters), macs)
    return table


def _print_rejections(console: Console, passes: Sequence[PassRow]) -> None:
    seen = {}
    for row in passes:  # the last run of each pass tells what is left
        seen[row.name] = row.rejected
    for name, rejected in seen.items():
        for r in rejected:
            console.print(escape(f"{name} left {r.count} {r.op} alone: {r.reason} (as '{r.example}')"))


def show_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A two-column table."""
    table = _listing()
    for label, value in rows:
        table.add_row(escape(label), escape(value))
    console = _console()
    console.print(f"[bold]{escape(title)}[/]")
    _print_table(console, table)


def show_groups(found: GroupsView) -> None:
    """Groups, what holds them, then what is pinned."""
    console = _console()
    if found.groups:
        table = _table(*found.HEADER[1:], first=found.HEADER[0])
        for row in found.rows():
            table.add_row(*row)
        _print_table(console, table)
        console.print(
            f"removable: what prune-channels takes at most with round_to={found.round_to}; "
            "shares are of the whole group, and a weight between two groups counts in both"
        )
        _block(console, "groups", found.held_rows())
    else:
        console.print("no group of units can be removed")
    _block(console, "pinned: these axes stay", found.pinned_rows())


def _block(console: Console, title: str, lines: Sequence[str]) -> None:
    """A titled list; lines that do not fit go on under their text."""
    if not lines:
        return
    console.print(f"\n[bold]{title}[/]")
    for line in lines:
        console.print(Padding(escape(line), (0, 0, 0, 2)) if console.is_terminal else "  " + escape(line))


def show_differences(rows: Sequence[OutputDifference]) -> None:
    """One row an output."""
    table = _table("max error", "mean error", "scale", "SQNR", "cosine", "same argmax", first="output")
    for r in rows:
        agreement = "-" if r.argmax_agreement is None else _percent(r.argmax_agreement)
        name = escape(r.name) + ("" if r.same_shape else " (shapes differ)")
        table.add_row(
            name, f"{r.max_error:.4g}", f"{r.mean_error:.4g}", f"{r.scale:.4g}", f"{r.sqnr_db:.1f} dB", f"{r.cosine:.6f}", agreement
        )
    _print_table(_console(), table)


def show_diff(found: Diff) -> None:
    """Lines as in a unified diff."""
    console = _console(wrap=False)
    if not found:
        console.print("no difference in nodes, shapes or initializers")
    for node in found.removed:
        console.print(f"[red]- {escape(node)}[/]")
    for node in found.added:
        console.print(f"[green]+ {escape(node)}[/]")
    for before, after in found.changed:
        console.print(f"[red]- {escape(before)}[/]\n[green]+ {escape(after)}[/]")
    for kind, rows in (("shape", found.shapes), ("initializer", found.initializers)):
        for name, before, after in rows:
            console.print(escape(f"{kind} {name}: {before} -> {after}"))


def show_passes(passes: Sequence[Pass]) -> None:
    """Name, exactness and summary."""
    table = _listing("pass", "results", "what it does")
    for entry in passes:
        table.add_row(entry.name, "the same" if entry.exact else "change", escape(entry.summary()))
    console = _console()
    _print_table(console, table)
    console.print("\n`graphopt passes NAME` describes a pass and its options.")


def show_pass(entry: Pass) -> None:
    """The whole docstring, then the options with types and defaults."""
    console = _console()
    console.print(f"[bold]{entry.name}[/]  ({entry.fn.__module__})\n")
    described = inspect.getdoc(entry.fn) or "no description"
    console.print(escape(_reflowed(described) if console.is_terminal else described))
    notes = ["exact: outputs move by rounding only"] if entry.exact else ["not exact: outputs change; measure with --eval"]
    notes += ["needs calibration data (--calib)"] * entry.needs_data
    notes += [f"must come after {', '.join(sorted(entry.after))}, where the pipeline has them"] * bool(entry.after)
    console.print("\n" + "\n".join(notes))
    types = entry.types()
    if types:
        console.print("\noptions:")
    for name, parameter in entry.options().items():
        console.print(escape(f"  {name}: {_kind(types[name])}, {_default(parameter.default)}"))


def _reflowed(text: str) -> str:
    """Paragraphs and list items on one line each, so that the terminal's width breaks them, not the source's."""
    return re.sub(r"\n +(?=\S)|\n(?=[^\s-])", lambda m: " ", text.replace("\n\n", "\0")).replace("\0", "\n\n")


def _kind(hint: Any) -> str:
    """A type as a user writes its values."""
    parts = [part for part in get_args(hint) if part not in (type(None), ...)]
    if get_origin(hint) is Literal:
        return " or ".join(map(str, parts))
    if get_origin(hint) is tuple:
        return "one, or several as 'a,b'"
    if parts:
        return " or ".join(map(_kind, parts))
    return {bool: "true or false", str: "text", int: "whole number", float: "number"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or value == ():
        return "not set by default"
    return f"default {str(value).lower() if isinstance(value, bool) else value}"


def show_presets() -> None:
    """Name, what for, the passes."""
    from graphopt.presets import PRESETS

    table = _listing("preset", "what for", "passes")
    for name, preset in PRESETS.items():
        table.add_row(name, escape(preset.summary), preset.passes + (" (until nothing changes)" if preset.repeat else ""))
    _print_table(_console(), table)


def show_targets(targets: Sequence[Target]) -> None:
    """Name and summary."""
    table = _listing("target", "what it is")
    for target in targets:
        table.add_row(target.name, escape(target.summary))
    console = _console()
    _print_table(console, table)
    console.print("\n`graphopt targets NAME` says what runs in INT8 there, what not, and why.")


def show_target(target: Target) -> None:
    """Its settings and every op's row, each with the reason."""
    settings = {
        "activation": f"{target.activation}, {'symmetric' if target.symmetric else 'with a zero point'}",
        "weight_bits": f"{target.weight_bits} bits",
        "per_channel": "weights per channel" if target.per_channel else "weights per tensor",
        "bias": target.bias,
    }
    rows = [(name, f"{value}: {dict(target.why).get(name, '')}") for name, value in settings.items()]
    rows += [(op, f"{'INT8' if s.int8 else 'float'}: {s.reason}") for op, s in sorted(target.ops.items())]
    show_rows(f"{target.name}: {target.summary}", [*rows, ("any other op", f"float: {target.unlisted}")])


def show_demo(stages: Sequence[Stage]) -> None:
    """The demo's table and where its files are."""
    from graphopt.demo import PAGE

    console = _console()
    console.print("[bold]a small network for handwritten digits, 8x8[/]")
    _print_table(console, figures_table([s.name for s in stages], [s.row for s in stages]))
    for stage in stages:
        if stage.report is None:
            continue
        verified = f"{_plural(stage.report.checked_passes, 'exact change')} checked"
        if stage.report.quality is not None:
            verified += f"; {quality_text(stage.report.quality)}"
        console.print(f"{stage.name}: {stage.speedup:.2f}x the baseline's speed; {verified}")
        console.print(f"  passes: {escape(stage.report.pipeline)}")
        for warning in stage.report.warnings:
            console.print(f"  [yellow]warning:[/] {escape(warning)}")
    console.print(_NODES)
    console.print("files (the reports of how each was made are beside them, as .json):")
    for stage in stages:
        console.print(f"  {escape(str(stage.row.path))}")
    page = Path(str(stages[-1].row.path)).with_name(PAGE)
    console.print(f"what was done, layer by layer, as a page for your browser:\n  {escape(str(page))}")
