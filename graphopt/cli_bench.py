"""The command `graphopt bench`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from graphopt.benchmark import BenchReport

_PATH = click.Path(path_type=Path)


class Numbers(click.ParamType[Any]):
    """Whole numbers separated by commas, each at least `least`."""

    name = "N,N,..."

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            found = tuple(dict.fromkeys(int(part) for part in value.split(",")))
        except ValueError:
            self.fail(f"'{value}' is not a list of whole numbers, as 1,8", param, ctx)
        if min(found) < self.least:
            self.fail(f"{min(found)} is too small: at least {self.least}", param, ctx)
        return found


def progress(quiet: bool = False) -> Any:
    """The progress bar, where stderr is a terminal."""
    import sys

    from graphopt.progress import bars

    return bars(not quiet and sys.stderr.isatty())


@click.command(short_help="Time models side by side, with intervals; memory, load time, energy.")
@click.argument("models", type=_PATH, nargs=-1, required=True)
@click.option("--data", metavar="PATH", help="Rows to run: .npz, folder, or module:function. Default: generated.")
@click.option("--batch", "batches", type=Numbers(1), default="1", show_default=True, help="Batch sizes, as 1,8.")
@click.option("--threads", type=Numbers(0), default="1", show_default=True, help="Thread counts, as 1,2; 0: all cores.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="For each batch and thread count.")
@click.option(
    "--provider", "providers", multiple=True, help="Of onnxruntime, or 'openvino'; may be repeated. Default: CPUExecutionProvider."
)
@click.option("--memory/--no-memory", default=True, show_default=True, help="Measure memory in a fresh process for each model.")
@click.option("--eval", "evaluation", metavar="PATH", help="Labelled rows: also score every model on them.")
@click.option("--metric", default="top1", show_default=True, help="As for `graphopt evaluate`.")
@click.option("--report", "page", type=_PATH, help="Write a page (.html), or the same as JSON.")
@click.option("--csv", "table", type=_PATH, help="Write the timings as CSV.")
@click.option("--overwrite", is_flag=True, help="Replace existing output files.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def bench(models: tuple[Path, ...], table: Path | None, page: Path | None, overwrite: bool, as_json: bool, **given: Any) -> None:
    """Time MODELS against the first one: interleaved runs in one process, ratios with 95 % intervals.

    The first model also runs against itself, which shows what the machine's noise is worth.
    """
    from graphopt import emit
    from graphopt.benchmark import DEFAULT_PROVIDER
    from graphopt.benchmark import bench as measure

    for path in filter(None, (table, page)):
        emit.check_target(path, overwrite=overwrite)
    given["providers"] = given["providers"] or (DEFAULT_PROVIDER,)
    with progress() as shown:
        report = measure(models, progress=shown, **given)
    if table is not None:
        emit.write_text(table, timings_csv(report), overwrite=overwrite)
    if page is not None:
        from graphopt.html import rendered

        emit.write_text(page, rendered(report, page), overwrite=overwrite)
    if as_json:
        click.echo(report.model_dump_json(indent=2))
    else:
        show_bench(report)


def timings_csv(report: BenchReport) -> str:
    """One line a timing, with the columns of `Timing`."""
    from graphopt.benchmark import Timing

    text = io.StringIO()
    writer = csv.DictWriter(text, list(Timing.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(t.model_dump() for t in report.timings)
    return text.getvalue()


def show_bench(report: BenchReport) -> None:
    """One table of timings, one of memory, then what the figures cannot carry."""
    from rich.markup import escape

    from graphopt.cli_tables import console, ms, print_table, size, table

    to = console()
    columns = ("batch", "threads", "p50", "p95", "p99", "rows/s", "speed", "95 % interval", "load")
    timings = table(*columns, *_joules(report), first="model")
    for t in report.timings:
        name = t.model if t.provider == "CPUExecutionProvider" else f"{t.model} ({t.provider})"
        times = [ms(v) for v in (t.p50_ms, t.p95_ms, t.p99_ms)]
        ratio = (f"{t.speedup:.2f}x", f"{t.low:.2f} .. {t.high:.2f}", f"{t.load_ms:.1f} ms")
        energy = [] if t.joules is None else [f"{1e3 * t.joules:.3f} mJ"]
        timings.add_row(escape(name), str(t.batch), str(t.threads or "all"), *times, f"{t.rows_per_second:,.0f}", *ratio, *energy)
    print_table(to, timings)
    for c in report.control:
        span = f"{c.speedup:.3f}x ({c.low:.3f} .. {c.high:.3f})"
        to.print(f"noise: the first model against itself, batch {c.batch}, {c.threads or 'all'} threads: {span}")
    measured = any(m.peak_bytes is not None for m in report.memory)
    sizes = table("file", *(("after loading", "after running", "peak") if measured else ()), first="memory" if measured else "size")
    for m in report.memory:
        values = (m.file_bytes, *((m.load_bytes, m.run_bytes, m.peak_bytes) if measured else ()))
        sizes.add_row(escape(m.model), *("-" if v is None else size(v) for v in values))
    print_table(to, sizes)
    for q in report.quality:
        pair = "" if q.lost is None else f"; {q.lost} rows worse, {q.won} better (p = {q.p_value:.2g}, sign test)"
        to.print(escape(f"{q.metric}: {q.model} {q.value:.4f} on {q.rows} rows{pair}"))
    to.print(report.energy)
    for warning in report.warnings:
        to.print(f"[yellow]warning:[/] {escape(warning)}")


def _joules(report: BenchReport) -> Sequence[str]:
    return ["energy"] if any(t.joules is not None for t in report.timings) else []
