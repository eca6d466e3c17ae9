"""The command `graphopt report`."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command(short_help="A page of reports that were written before; several: their models in one plot.")
@click.argument("reports", type=_PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=_PATH, required=True, help="The page (.html) to write.")
@click.option("--overwrite", is_flag=True, help="Replace an existing page.")
def report(reports: tuple[Path, ...], output: Path, overwrite: bool) -> None:
    """Make a page of REPORTS, which optimize, sweep, bench, evaluate or audit wrote as JSON or as pages with --report or --json.

    One report: its own page. Several: the models of all of them in one plot of quality over latency and size.
    """
    from graphopt import emit
    from graphopt.errors import OptionError
    from graphopt.html import SUFFIXES, combined, read_report, rendered

    if output.suffix.lower() not in SUFFIXES:
        raise OptionError(f"-o {output}: a page is written, so its name must end in {' or '.join(SUFFIXES)}")
    emit.check_target(output, overwrite=overwrite)
    content = rendered(read_report(reports[0]), output) if len(reports) == 1 else combined(reports)
    emit.write_text(output, content, overwrite=overwrite)
    click.echo(f"written: {output}")
