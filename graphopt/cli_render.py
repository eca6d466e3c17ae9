"""What the command line prints: rich tables, which become plain text where the output is no terminal."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from graphopt.compare import OutputDifference
    from graphopt.demo import Stage
    from graphopt.diff import Diff
    from graphopt.registry import Pass
    from graphopt.report import ModelRow, PassRow, Report
    from graphopt.targets import Target


def _console(*, wrap: bool = True) -> Console:
    """Files and pipes get a fixed width, not that of a terminal they are not; without `wrap` lines stay whole."""
    console = Console(highlight=False, soft_wrap=not wrap)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=not wrap, width=160)


def _table(title: str, *columns: str, first: str = "") -> Table:
    table = Table(title=escape(title) or None, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _ms(value: float) -> str:
    return f"{value:.3f} ms"


def _size(value: int) -> str:
    return f"{value / 1e6:.2f} MB" if value >= 100_000 else f"{value / 1e3:.1f} kB"


def _count(value: int) -> str:
    return f"{value / 1e6:,.2f} M" if value >= 1_000_000 else f"{value:,}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


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


def figures_table(title: str, names: Sequence[str], rows: Sequence[ModelRow]) -> Table:
    """One column a model, one row a figure that was measured on at least one; the last column compares last with first."""
    table = _table(title, *names, "change")
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
        console.print(_passes_table(report.passes))
        _print_rejections(console, report.passes)
    else:
        done: dict[str, int] = {}
        for row in report.passes:
            done[row.name] = done.get(row.name, 0) + row.changes
        busy = ", ".join(f"{name} ({count} changes)" for name, count in done.items() if count)
        idle = sum(not count for count in done.values())
        console.print(f"passes: {busy or 'nothing to change'}" + (f"; {idle} others found nothing to do" if idle and busy else ""))
    console.print(figures_table("", ["original", "optimised"], [report.before, report.after]))
    if report.speedup is not None:
        console.print(f"speed: {report.speedup:.2f}x the original (median of paired runs)")
    if report.quality is not None:
        q = report.quality
        console.print(f"{q.metric} on {q.rows} rows: {q.lost} lost, {q.won} won, p = {q.p_value:.2g}")
    if report.checked_passes:
        console.print(f"checked: outputs unchanged by all {report.checked_passes} exact changes")
    for output in report.outputs[:3]:
        sqnr = "no error" if output.sqnr_db is None else f"SQNR {output.sqnr_db:.1f} dB"
        agreement = "" if output.argmax_agreement is None else f", argmax agrees on {100 * output.argmax_agreement:.1f} %"
        console.print(escape(f"output {output.name}: {sqnr}, max error {output.max_error:.3g} of {output.scale:.3g}{agreement}"))
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    console.print(f"written: {escape(str(report.after.path))}")


def _passes_table(passes: Sequence[PassRow]) -> Table:
    table = _table("", "changes", "seconds", "nodes", "parameters", "MACs", first="pass")
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
    table = Table(title=escape(title), title_justify="left", box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for label, value in rows:
        table.add_row(escape(label), escape(value))
    _console().print(table)


def show_groups(found: Any) -> None:
    """Groups, then what is pinned."""
    console = _console()
    table = Table(title="removable groups", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in found.HEADER:
        table.add_column(column)
    for row in found.rows():
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    console.print("\npinned")
    for line in found.pinned_rows():
        console.print("  " + escape(line))


def show_differences(rows: Sequence[OutputDifference]) -> None:
    """One row an output."""
    table = _table("", "max error", "mean error", "scale", "SQNR", "cosine", "argmax agreement", first="output")
    for r in rows:
        agreement = "-" if r.argmax_agreement is None else _percent(r.argmax_agreement)
        name = escape(r.name) + ("" if r.same_shape else " (shapes differ)")
        table.add_row(
            name, f"{r.max_error:.4g}", f"{r.mean_error:.4g}", f"{r.scale:.4g}", f"{r.sqnr_db:.1f} dB", f"{r.cosine:.6f}", agreement
        )
    _console().print(table)


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
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("pass", "kind", "what it does"):
        table.add_column(column)
    for entry in passes:
        kind = "exact" if entry.exact else ("needs data" if entry.needs_data else "changes results")
        table.add_row(entry.name, kind, escape(entry.summary()))
    _console().print(table)


def show_pass(entry: Pass) -> None:
    """The whole docstring, then the options with types and defaults."""
    console = _console()
    console.print(f"[bold]{entry.name}[/]  ({entry.fn.__module__})\n")
    console.print(escape(inspect.getdoc(entry.fn) or "no description"))
    if entry.after:
        console.print(f"\nmust come after: {', '.join(sorted(entry.after))}")
    types = entry.types()
    if types:
        console.print("\noptions:")
    for name, parameter in entry.options().items():
        kind = getattr(types[name], "__name__", None) if isinstance(types[name], type) else str(types[name])
        default = "required" if parameter.default is inspect.Parameter.empty else f"default {parameter.default!r}"
        console.print(escape(f"  {name}: {str(kind).replace('typing.', '')}, {default}"))


def show_presets() -> None:
    """Name, what for, the passes."""
    from graphopt.presets import PRESETS

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("preset", "what for", "passes"):
        table.add_column(column)
    for name, preset in PRESETS.items():
        table.add_row(name, escape(preset.summary), preset.passes + (" (until nothing changes)" if preset.repeat else ""))
    _console().print(table)


def show_targets(targets: Sequence[Target]) -> None:
    """Name and summary."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("target", "what it is"):
        table.add_column(column)
    for target in targets:
        table.add_row(target.name, escape(target.summary))
    _console().print(table)


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
    console = _console()
    console.print(figures_table("handwritten digits, 8x8", [s.name for s in stages], [s.row for s in stages]))
    for stage in stages:
        if stage.report is None:
            continue
        q = stage.report.quality
        verified = f"{stage.report.checked_passes} exact changes checked"
        if q is not None:
            verified += f"; {q.rows} labelled rows: {q.lost} lost, {q.won} won (p = {q.p_value:.2g})"
        console.print(f"{stage.name}: {stage.speedup:.2f}x the baseline's speed; {verified}")
        console.print(f"  passes: {escape(stage.report.pipeline)}")
        for warning in stage.report.warnings:
            console.print(f"  [yellow]warning:[/] {escape(warning)}")
    console.print("files:")
    for stage in stages:
        console.print(f"  {escape(str(stage.row.path))}")
