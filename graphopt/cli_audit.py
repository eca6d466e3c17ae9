"""The command `graphopt audit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli_bench import progress

if TYPE_CHECKING:
    from graphopt.audit_report import AuditReport, Finding

_PATH = click.Path(path_type=Path)
_OPS, _FINDINGS = 8, 12  # shown on the screen; --json and --nodes have all


@click.command(short_help="Which kernels really run MODEL here, and why INT8 fell back to float.")
@click.argument("model", type=_PATH)
@click.option("--base", type=_PATH, help="Compare with this model. Default: the same model in float, if it has QuantizeLinear.")
@click.option("--no-base", is_flag=True, help="Compare with nothing.")
@click.option("--data", metavar="PATH", help="Rows to run: .npz, folder, or module:function. Default: generated.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Rows of a run, if the batch is dynamic.")
@click.option("--threads", type=click.IntRange(min=0), default=1, show_default=True, help="Threads; 0: all cores.")
@click.option("--runs", type=click.IntRange(min=4), default=60, show_default=True, help="Profiled runs.")
@click.option("--require", "wanted", multiple=True, metavar="KEY=N", help="int8=0.9, speed=1.1 or fallbacks=0; else exit code 2.")
@click.option("--nodes", is_flag=True, help="Show every node with its kernel.")
@click.option("--report", "page", type=_PATH, help="Write a page (.html), or the same as JSON.")
@click.option("--overwrite", is_flag=True, help="Replace an existing report.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def audit(
    model: Path,
    no_base: bool,
    base: Path | None,
    wanted: tuple[str, ...],
    nodes: bool,
    page: Path | None,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Profile MODEL in onnxruntime on this machine: which kernel each node ended in, on which type, how long it takes, which
    quantised nodes ran in float all the same, and why.

    Exit codes: 0 done, 1 user error, 2 the model falls short of a --require.
    """
    from graphopt import emit
    from graphopt.auditing import audit as look
    from graphopt.auditing import require
    from graphopt.errors import OptionError

    if no_base and base is not None:
        raise OptionError("give --base or --no-base, not both")
    if page is not None:
        emit.check_target(page, overwrite=overwrite)
    with progress() as shown:
        shown("audit", 0, 0)
        report = look(model, base=False if no_base else base, **given)
    if page is not None:
        from graphopt.html import rendered

        emit.write_text(page, rendered(report, page), overwrite=overwrite)
    if as_json:
        click.echo(report.model_dump_json(indent=2))
    else:
        show_audit(report, nodes=nodes)
    require(report, wanted)


def show_audit(report: AuditReport, *, nodes: bool = False) -> None:
    """Share of INT8, times by kernel, the difference to the base, findings."""
    from rich.markup import escape

    from graphopt.auditing import int8_share
    from graphopt.cli_tables import console, percent, print_table, table

    to = console()
    if nodes:
        listed = table("op", "kernel", "type", "us", "base us", first="node")
        for n in report.nodes:
            base = "-" if n.base_us is None else f"{n.base_us:.1f}"
            listed.add_row(escape(n.name), n.op, n.kernel or f"({n.how})", n.dtype, f"{n.us:.1f}", base)
        print_table(to, listed)
    if report.quantized:
        what = "MACs" if report.int8_macs is not None else "quantised nodes"
        to.print(f"INT8: {report.int8} of {report.quantized} quantised nodes, {percent(int8_share(report))} of the {what}")
    else:
        to.print("INT8: no node is quantised")
    kernels = table("type", "kernels", "us", "share", first="kernel")
    for o in report.by_op[:_OPS]:
        kernels.add_row(o.op, o.dtype, str(o.count), f"{o.us:.0f}", percent(o.share))
    print_table(to, kernels)
    if report.base is not None:
        to.print(f"base: {escape(report.base)}")
    for line in report.explanation:
        to.print(escape(line))
    for (kind, why, fix), group in _grouped(report)[:_FINDINGS]:
        names = [name for f in group for name in f.nodes]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        to.print(f"[yellow]{kind}:[/] {escape(shown)}: {escape(why)} ({escape(group[0].detail)}); {escape(fix)}")
    if len(_grouped(report)) > _FINDINGS:
        to.print(f"and {len(_grouped(report)) - _FINDINGS} more findings (see --json)")
    for warning in report.warnings:
        to.print(f"[yellow]warning:[/] {escape(warning)}")
    to.print("times are profiled, each kernel by itself; for latencies use `graphopt bench`")


def _grouped(report: AuditReport) -> list[tuple[tuple[str, str, str], list[Finding]]]:
    """Findings of the same kind, cause and cure, the most expensive first."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for f in report.findings:
        groups.setdefault((f.kind, f.why, f.fix), []).append(f)
    return list(groups.items())
