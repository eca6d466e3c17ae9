"""The command `graphopt monitor`."""

from __future__ import annotations

from pathlib import Path

import click

from graphopt.errors import CheckError, OptionError

_PATH = click.Path(path_type=Path)


@click.command(short_help="Whether rows are still like those MODEL was calibrated on.")
@click.argument("model", type=_PATH)
@click.option("--calib", metavar="PATH", help="Calibration rows: make a sentinel.")
@click.option("--sentinel", type=_PATH, required=True, help="The sentinel: written with --calib, read with --data.")
@click.option("--watch", multiple=True, metavar="TENSOR", help="With --calib: tensors inside, beside the inputs; may be repeated.")
@click.option("--data", metavar="PATH", help="Rows to compare with calibration.")
@click.option("--window", type=click.IntRange(min=8), help="With --data: compare every so many rows by themselves.")
@click.option("--overwrite", is_flag=True, help="Replace an existing sentinel.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text, one line for each set of rows.")
def monitor(
    model: Path,
    calib: str | None,
    sentinel: Path,
    watch: tuple[str, ...],
    data: str | None,
    window: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make a sentinel from calibration rows, or compare rows with it: PSI and KS of inputs and of tensors inside, and overflow.

    Exit codes: 0 no drift, 1 user error, 2 the rows drifted.
    """
    from graphopt.monitoring import Sentinel, make

    if calib is None and data is None:
        raise OptionError("give --calib to make a sentinel, --data to compare rows with it, or both")
    if calib is not None:
        made = make(model, calib, watch=watch or None)
        made.save(sentinel, overwrite=overwrite)
        if not as_json:
            click.echo(f"written: {sentinel}, {made.rows} rows, watching {', '.join(made.tensors)}")
    if data is None:
        return
    drifted = 0
    for number, report in enumerate(Sentinel.load(sentinel).check_rows(model, data, window=window)):
        drifted += report.drifted
        if as_json:
            click.echo(report.model_dump_json())
            continue
        click.echo(f"set {number}: {report.rows} rows: {report.advice}")
        for t in report.tensors:
            ks = ", ".join(f"KS {f} {v:.2f} (limit {t.ks_limits[f]:.2f})" for f, v in t.ks.items())
            said = f"ALARM: {', '.join(t.alarms)}" if t.alarms else "as calibrated"
            click.echo(f"  {t.name}: PSI {t.psi:.3f} (limit {t.psi_limit:.3f}), {ks}, overflow {100 * t.overflow:.2f} %: {said}")
    if drifted:
        raise CheckError(f"{drifted} sets of rows are not like those of calibration")
