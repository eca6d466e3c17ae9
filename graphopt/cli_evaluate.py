"""The command `graphopt evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli_bench import progress

if TYPE_CHECKING:
    from graphopt.evaluation import EvaluationReport, GroupRow, SetRow

_PATH = click.Path(path_type=Path)
_ROWS, _GROUPS = 10, 5  # shown on the screen; --json has all


@click.command(short_help="Quality of MODEL on labelled rows, paired with its base; hard set, gold set, groups.")
@click.argument("model", type=_PATH)
@click.option(
    "--data", required=True, metavar="PATH", help="Labelled rows: .npz, folder, .toml of preprocessing, or module:function."
)
@click.option("--metric", default="top1", show_default=True, help="As `graphopt evaluate --metric help` lists, or module:function.")
@click.option("--base", type=_PATH, help="Pair MODEL with this one, row by row.")
@click.option("--hard", metavar="PATH", help="Hard rows, scored apart.")
@click.option("--groups", type=_PATH, help="A .npy with one value a row; the worst group is reported.")
@click.option("--gold", type=_PATH, help="Compare with the outputs stored in this file.")
@click.option("--write-gold", type=_PATH, help="Store the first 16 rows and MODEL's outputs for --gold.")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Rows at a time, if the batch is dynamic.")
@click.option("--require", "wanted", multiple=True, metavar="KEY=N", help="value, drop, worst or gold; else exit code 2.")
@click.option("--report", "page", type=_PATH, help="Write a page (.html), or the same as JSON.")
@click.option("--overwrite", is_flag=True, help="Replace an existing gold file or report.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def evaluate(
    model: Path,
    data: str,
    wanted: tuple[str, ...],
    write_gold: Path | None,
    page: Path | None,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Score MODEL on labelled rows. With --base: the rows lost and won, whether that is significant, and the interval of the
    difference.

    Exit codes: 0 done, 1 user error, 2 the model falls short of a --require.
    """
    from graphopt import emit
    from graphopt.evaluation import evaluate as score
    from graphopt.evaluation import require
    from graphopt.gold import write_gold as store
    from graphopt.metrics import names

    if given["metric"] == "help":
        click.echo("\n".join(names()))
        return
    if page is not None:
        emit.check_target(page, overwrite=overwrite)
    with progress(as_json) as shown:
        report = score(model, data, progress=shown, **given)
    if write_gold is not None:
        store(model, data, write_gold, overwrite=overwrite)
    if page is not None:
        from graphopt.html import rendered

        emit.write_text(page, rendered(report, page), overwrite=overwrite)
    if as_json:
        click.echo(report.model_dump_json(indent=2))
    else:
        show_evaluation(report)
        if write_gold is not None:
            click.echo(f"written: {write_gold}")
    require(report, wanted)


def show_evaluation(report: EvaluationReport) -> None:
    """The figure, the pairing, the groups, the hard set and the gold set."""
    from rich.markup import escape

    from graphopt.cli_tables import console

    to = console()
    for line in (*_lines(report.metric, report.evaluation), *(_lines("hard set", report.hard) if report.hard else ())):
        to.print(escape(line))
    if report.gold is not None:
        g = report.gold
        agreement = "" if g.argmax_agreement is None else f", same argmax on {100 * g.argmax_agreement:.1f} %"
        to.print(escape(f"gold set: {g.rows} rows, error {g.relative_error:.3g} of the scale, cosine {g.cosine:.6f}{agreement}"))
    for warning in report.warnings:
        to.print(f"[yellow]warning:[/] {escape(warning)}")


def _lines(name: str, found: SetRow) -> list[str]:
    lines = [f"{name}: {found.value:.4f} on {found.rows} rows of {found.data}"]
    if found.paired is not None:
        p = found.paired
        span = "" if p.low is None else f" (95 % interval {p.low:+.4f} .. {p.high:+.4f})"
        lines.append(f"  base: {p.value:.4f}; difference {p.difference:+.4f}{span}")
        if p.lost is not None and p.won is not None:
            lines.append(
                f"  lost {len(p.lost)}: {_some(p.lost)}; won {len(p.won)}: {_some(p.won)}; p = {p.p_value:.2g} (sign test)"
            )
    if found.worst is not None:
        lines.append(f"  worst group: {_group(found.worst)}")
    lines += [f"  {_group(g)}" for g in sorted(found.groups, key=lambda g: g.value)[:_GROUPS]]
    lines.append(f"  rows: sha256 {found.digest[:16]}; preprocessing: {(found.preprocessing or 'none declared')[:16]}")
    return lines


def _group(group: GroupRow) -> str:
    base = "" if group.base is None else f", base {group.base:.4f}"
    return f"{group.group}: {group.value:.4f} on {group.rows} rows{base}"


def _some(rows: list[int]) -> str:
    return (", ".join(map(str, rows[:_ROWS])) + (" ..." if len(rows) > _ROWS else "")) or "none"
