"""The command `graphopt advise`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli_bench import progress

if TYPE_CHECKING:
    from graphopt.advice_machine import Situation
    from graphopt.advice_report import Advice, AdviceReport, Figure

_KINDS = 6  # shown on the screen; --json has all


@click.command(short_help="What each technique would gain on MODEL here, tried, and what would not pay.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", metavar="PATH", help="Typical rows, with or without 'labels': .npz, folder, .toml or module:function.")
@click.option("--eval", "evaluation", metavar="PATH", help="Labelled rows to judge by. Default: every second one of --data.")
@click.option("--metric", default="top1", show_default=True, help="As for `optimize`, where there are labels.")
@click.option("--target", default="ort-cpu+graphopt", show_default=True, help="What the model will run on: see `graphopt targets`.")
@click.option("--slack", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="Quality that may be lost; 0: none.")
@click.option("--seconds", type=click.FloatRange(min=1), default=30.0, show_default=True, help="About what all of it may take.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def advise(model: Path, as_json: bool, **given: Any) -> None:
    """Try cleanup, INT8, 4-bit weights, pruning, sparsity and float16 on MODEL, time what each makes, and say what pays, what does
    not and why, and what to run.

    Every figure says whether it was measured or estimated. The library of graphopt's kernels is built first, once a machine.
    """
    from graphopt.advice import advise as look

    with progress() as shown:
        report = look(model, progress=shown, **given)
    if as_json:
        click.echo(report.model_dump_json(indent=2))
    else:
        show_advice(report)


def show_advice(report: AdviceReport) -> None:
    """Where the time goes, the table, then each reason and the commands."""
    from rich.markup import escape

    from graphopt.cli_tables import console, print_table, table

    to = console()
    to.print(escape(f"{report.model} for {report.target}; {report.data}"))
    if report.situation is not None:
        _show_situation(to, report.situation)
    shown = table("speed", "file", "quality", "verdict", first="technique")
    for a in report.advice:
        shown.add_row(a.technique, _figure(a.speed), _size(a.size), escape(_quality(a)), a.verdict)
    print_table(to, shown)
    if report.noise is not None:
        to.print(f"noise: the original against itself, {_figure(report.noise)}; speeds: measured unless marked ~ (estimated)")
    for a in report.advice:
        to.print(f"\n[bold]{a.technique}: {a.verdict}[/]  " + escape(f"({a.what})"))
        to.print(escape(a.why))
        if a.verdict != "refuse":
            to.print(escape(f"risk to quality: {a.risk}. needs: {a.needs}"))
        for command in a.commands:
            to.print(escape(f"  {command}"), soft_wrap=True)
    for warning in report.warnings:
        to.print(f"[yellow]warning:[/] {escape(warning)}")


def _show_situation(to: Any, s: Situation) -> None:
    from graphopt.cli_tables import print_table, size, table

    shown = table("nodes", "time", "GMAC/s", "of peak", first="kind")
    for k in s.kinds[:_KINDS]:
        speed = ("-", "-") if k.gmacs_per_second is None or k.of_peak is None else (f"{k.gmacs_per_second:.1f}", f"{k.of_peak:.0%}")
        shown.add_row(k.kind, str(k.nodes), f"{k.share:.0%}", *speed)
    print_table(to, shown)
    shares = f"arithmetic {s.arithmetic:.0%}, weights {s.weights:.0%}, other {s.other:.0%}"
    roofs = f"{s.gmacs_per_second:.0f} GMAC/s, {s.gbytes_per_second:.1f} GB/s, cache {size(s.cache_bytes)}"
    to.print(f"{s.latency_ms:.3f} ms a row; bound by {s.bound}: {shares}")
    to.print(f"this machine: {roofs}; weights that are multiplied: {size(s.weight_bytes)}")


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return f"{'~' * (figure.basis == 'estimated')}{figure.value:.2f}x ({figure.low:.2f} .. {figure.high:.2f})"


def _size(figure: Figure | None) -> str:
    return "-" if figure is None else f"{'~' * (figure.basis == 'estimated')}{100 * figure.value:.0f} %"


def _quality(a: Advice) -> str:
    q = a.quality
    if q is None:
        return "not measured" if a.risk != "none: exact" else "the same"
    if q.original is not None and q.result is not None:
        return f"{100 * (q.result - q.original):+.1f} points"
    return "no error" if q.sqnr_db is None else f"SQNR {q.sqnr_db:.0f} dB"
