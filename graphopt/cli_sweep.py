"""The command `graphopt sweep`: the curve of quality over size and speed, from which a user picks a point."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.errors import ModelError, OptionError

if TYPE_CHECKING:
    from graphopt.report import PointRow, SweepReport
    from graphopt.sweeps import Sweep

_PATH = click.Path(path_type=Path)
_STDOUT = Path("-")


@click.command(short_help="Prune MODEL to several sizes; show quality against MACs, latency and bytes.")
@click.argument("model", type=_PATH)
@click.option("--keep", required=True, metavar="LIST", help="The shares that stay, as 0.9,0.8,0.7,0.5.")
@click.option("--by", type=click.Choice(["macs", "params"]), help="Of what: MACs or parameters. Default: macs.")
@click.option("--passes", metavar="TEXT", help='The pipeline, {} for the share. Default: "fold, prune-search macs={}, cleanup".')
@click.option("--calib", metavar="PATH", help="Calibration rows: .npz, folder, or module:function.")
@click.option("--eval", "evaluation", metavar="PATH", help="Labelled rows to measure quality on (.npz with 'labels').")
@click.option("--metric", default="top1", show_default=True, help="top1, top5, binary, negative-mse or module:function.")
@click.option(
    "--loss", type=click.FloatRange(min=0), default=0.01, show_default=True, help="Quality that may go, for the first knee."
)
@click.option("--target", default="ort-cpu", show_default=True, help="What the models will run on (see `graphopt targets`).")
@click.option("-o", "--output", type=_PATH, metavar="DIR", help="Write every model there. Default: none is written.")
@click.option("--json", "as_json", type=_PATH, metavar="FILE", help="Write all figures and recipes as JSON; - prints them.")
@click.option("--plot", type=_PATH, metavar="FILE.svg", help="Write the curve as a picture.")
@click.option("--report", type=_PATH, metavar="FILE", help="Write a page (.html), or the same as JSON.")
@click.option("--plugin", type=_PATH, multiple=True, help="A Python file that registers passes; may be repeated.")
@click.option("--measure/--no-measure", default=True, show_default=True, help="Measure latency, all models in turn.")
@click.option("--overwrite", is_flag=True, help="Replace existing output files.")
@click.option("-v", "--verbose", is_flag=True, help="Also show what was removed for every point.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def sweep(
    model: Path,
    output: Path | None,
    as_json: Path | None,
    plot: Path | None,
    report: Path | None,
    overwrite: bool,
    verbose: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Run one pipeline on MODEL for several targets and show what each costs and keeps, so that you can pick a point.

    `graphopt optimize MODEL --passes RECIPE` with the recipe of a point makes the same file.
    """
    from graphopt.progress import bars
    from graphopt.registry import load_plugin
    from graphopt.sweeps import sweep as run_sweep

    for plugin in given.pop("plugin"):
        load_plugin(plugin)
    keep, template = _asked(given)
    if plot is not None and not (given["calib"] or given["evaluation"]):
        raise OptionError("--plot needs labelled rows (--eval) or calibration rows (--calib): there is nothing to draw without")
    files = [p for p in (as_json, plot, report) if p is not None and p != _STDOUT]
    _check_outputs(model, keep, output, files, [given["calib"], given["evaluation"]], overwrite)
    with bars(not quiet and sys.stderr.isatty()) as progress:
        found = run_sweep(model, keep, template, calibration=given.pop("calib"), progress=progress, **given)
    written = found.save(output, overwrite=overwrite) if output is not None else []
    _write(found, as_json, plot, report, overwrite)
    if as_json != _STDOUT and not quiet:
        show_sweep(found.report, [*written, *files], verbose=verbose)


def _asked(given: dict[str, Any]) -> tuple[list[float], str]:
    """The targets, and the pipeline with a place for them."""
    from graphopt.sweeps import PASSES, plan

    by, template, text = given.pop("by"), given.pop("passes"), given.pop("keep")
    if by is not None and template is not None:
        raise OptionError("give --by or --passes, not both: the pipeline says what its target counts")
    template = template or PASSES[by or "macs"]
    try:
        keep = [float(word) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise OptionError(f"--keep {text}: expected numbers separated by commas, as 0.9,0.7,0.5") from error
    return [target.keep for target in plan(keep, template)], template


def _check_outputs(
    model: Path, keep: Sequence[float], folder: Path | None, files: Sequence[Path], data: Sequence[str | None], overwrite: bool
) -> None:
    """Find out before any work where something could not be written, or would replace what is read."""
    from graphopt import emit
    from graphopt.sweeps import check_folder, file_name

    if not model.is_file():
        raise ModelError(f"{model} is a folder; name a model file" if model.is_dir() else f"no such file: {model}")
    names = [file_name(model.stem, k) for k in keep]
    if folder is not None:
        check_folder(folder, names, overwrite=overwrite)
    for path in files:
        emit.check_target(path, overwrite=overwrite)
    outputs = [*files, *(folder / name for name in names if folder is not None)]
    inputs = [model, *(Path(d) for d in data if d)]
    for path in outputs:
        same = next((i for i in inputs if path.exists() and i.exists() and path.samefile(i)), None)
        if same is not None:
            raise ModelError(f"the output {path} is the input {same}; name another output")
    if len({p.resolve() for p in outputs}) < len(outputs):
        raise ModelError("two outputs have the same name; name another file with --json, --plot or --report")


def _write(found: Sweep, as_json: Path | None, plot: Path | None, report: Path | None, overwrite: bool) -> None:
    from graphopt import emit

    content = json.dumps(found.report.model_dump(), indent=2, allow_nan=False)
    if as_json == _STDOUT:
        click.echo(content)
    elif as_json is not None:
        emit.write_text(as_json, content + "\n", overwrite=overwrite)
    if plot is not None:
        emit.write_text(plot, found.plot(), overwrite=overwrite)
    if report is not None:
        from graphopt.html import rendered

        emit.write_text(report, rendered(found.report, report), overwrite=overwrite)


def show_sweep(report: SweepReport, written: Sequence[Path], *, verbose: bool) -> None:
    """A row a point, the knees with their reasons, what was out of reach, warnings."""
    from rich.markup import escape

    from graphopt.cli_tables import console as new_console
    from graphopt.cli_tables import print_table
    from graphopt.cli_tables import table as new_table

    console = new_console()
    reached = [p for p in report.points if p.failed is None]
    shown = [(head, cells) for head, cells in _columns(report, reached) if any(c != "-" for c in cells[1:])]
    table = new_table(*(head for head, _ in shown), first="keep")
    for row, name in enumerate(["original", *(f"{p.keep:g}" for p in reached)]):
        table.add_row(name, *(cells[row] for _, cells in shown))
    print_table(console, table)
    for line in _lines(report, reached, verbose):
        console.print(escape(line))
    for warning in [*(f"{p.keep:g}: {w}" for p in reached for w in p.warnings), *report.warnings]:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    if written:
        console.print(escape(f"written: {', '.join(map(str, written))}"))


def _lines(report: SweepReport, reached: Sequence[PointRow], verbose: bool) -> Iterator[str]:
    """What the table does not say."""
    from graphopt.cli_pruned import point_lines

    for point in report.points:
        if point.failed is not None:
            yield f"{point.keep:g} was not reached: {point.failed}"
    for knee in report.knees:
        yield f"{knee.rule}: {'-' if knee.keep is None else f'{knee.keep:g}'} ({knee.why})"
    for point in reached:
        yield from (f"{point.keep:g}: {line}" for line in point_lines(point, verbose=verbose))
    picked = next((k.keep for k in report.knees if k.keep is not None), reached[0].keep)
    recipe = next(p.recipe for p in reached if p.keep == picked)
    yield f'{picked:g} again, the same file: graphopt optimize {report.source} --passes "{recipe}" and the same --calib'


def _columns(report: SweepReport, reached: Sequence[PointRow]) -> list[tuple[str, list[str]]]:
    """Header and cells, the original's first; '-' where nothing is known."""
    from graphopt.cli_tables import count as as_count
    from graphopt.cli_tables import percent as as_percent
    from graphopt.cli_tables import size as as_size
    from graphopt.knee import shown_error

    first = report.original

    def column(head: str, start: str, cell: Callable[[PointRow], str]) -> tuple[str, list[str]]:
        return head, [start, *map(cell, reached)]

    def some(value: Any, show: Callable[[Any], str]) -> str:
        return "-" if value is None else show(value)

    quality = as_percent if report.metric != "negative-mse" else (lambda v: f"{v:.4g}")
    return [
        column("MACs", some(first.macs, as_count), lambda p: some(p.macs, as_count)),
        column("of original", "1.000", lambda p: some(p.macs_ratio, lambda v: f"{v:.3f}")),
        column("parameters", as_count(first.parameters), lambda p: some(p.parameters, as_count)),
        column("file", some(first.file_bytes, as_size), lambda p: some(p.file_bytes, as_size)),
        column("quality", some(first.quality, quality), lambda p: some(p.quality, lambda q: quality(q.optimized))),
        column("lost/won", "-", lambda p: some(p.quality, lambda q: f"{q.lost}/{q.won}")),
        column("p", "-", lambda p: some(p.quality, lambda q: f"{q.p_value:.2g}")),
        column("error", "0", lambda p: some(shown_error(p), lambda v: f"{v:.4f}")),
        column("time", "1.00", lambda p: some(p.latency_ratio, lambda v: f"{v:.2f}")),
        column("p50", some(first.latency, _p50), lambda p: some(p.latency, _p50)),
    ]


def _p50(row: Any) -> str:
    return f"{row.p50_ms:.3f} ms"
