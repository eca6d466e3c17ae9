"""What the command line says of compiled models, and the command `graphopt run`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.errors import OptionError

if TYPE_CHECKING:
    from graphopt.api import Result
    from graphopt.library import Progress
    from graphopt.report import Report

_PATH = click.Path(path_type=Path)
_REASONS = 5  # shown of why nodes stayed outside; the report has all


@click.command(short_help="Run MODEL on rows; say how fast, and what ran.")
@click.argument("model", type=_PATH)
@click.option("--data", required=True, metavar="PATH", help="Rows to run: .npz, folder, or module:function.")
@click.option("-o", "--output", type=_PATH, help="Write the outputs as .npz, rows in order.")
@click.option("--threads", type=click.IntRange(min=0), default=1, show_default=True, help="Threads; 0: all cores.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Rows at a time, if the batch is dynamic.")
@click.option("--library", type=_PATH, help="graphopt's operators. Default: those beside MODEL, else compiled here.")
@click.option("--no-library", is_flag=True, help="Leave compiled regions to onnxruntime.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def run(
    model: Path,
    data: str,
    output: Path | None,
    threads: int,
    batch: int,
    library: Path | None,
    no_library: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Run all rows through MODEL and print p50 and p95 latency of a batch, throughput, and what ran its INT8 regions."""
    import json

    import numpy as np

    from graphopt import emit
    from graphopt.execute import run_rows

    if library is not None and no_library:
        raise OptionError("give --library or --no-library, not both")
    if output is not None:
        emit.check_target(output, overwrite=overwrite)
        if any(p.exists() and output.exists() and output.samefile(p) for p in (model, Path(data))):
            raise OptionError(f"the output {output} is an input; name another output")
    done = run_rows(model, data, threads=threads, batch=batch, library=False if no_library else library)
    if output is not None:
        content = io.BytesIO()
        np.savez(content, **done.outputs)  # type: ignore[arg-type]
        emit.write_bytes(output, content.getvalue())
    if as_json:
        click.echo(json.dumps(done.to_dict(), indent=2))
        return
    click.echo(f"rows: {done.rows} in batches of {done.batch}, threads: {done.threads or 'all'}")
    click.echo(f"latency: p50 {done.p50_ms:.3f} ms, p95 {done.p95_ms:.3f} ms a batch; {done.rows_per_second:,.0f} rows/s")
    click.echo(f"regions: {done.regions}; operators: {done.operators}")
    if output is not None:
        click.echo(f"written: {output}")


def prepare_library(
    result: Result, folder: Path, target: str | None, overwrite: bool, progress: Progress
) -> tuple[Path, bytes] | None:
    """The library to write beside a model with regions; None, with a warning in the report, where it cannot be built."""
    from graphopt.library import build, check_library, library_target
    from graphopt.operators import OperatorError, has_regions

    if not has_regions(result.proto()):
        return None
    try:
        chosen = library_target(target)
        content = build(chosen, progress)
    except OperatorError as error:
        result.report.warnings.append(f"no library was written; the model also runs without, slower: {error}")
        return None
    return check_library(folder, chosen, content, overwrite=overwrite), content


def _sparse_lines(report: Report) -> list[str]:
    """What compile-sparse made, in one line; the report has every layer and why."""
    facts: dict[str, Any] = next((dict(p.facts) for p in reversed(report.passes) if p.name == "compile-sparse"), {})
    layers = facts.get("layers", ())
    taken = [row for row in layers if row["format"] != "dense"]
    return (
        [f"sparse: {len(taken)} of {len(layers)} layers (see --report for the format, gain and reason of each)"] if layers else []
    )


def region_lines(report: Report) -> list[str]:
    """One line a region, how they were chosen, what ran them, and why other nodes stayed outside."""
    facts: dict[str, Any] = next((dict(p.facts) for p in reversed(report.passes) if p.facts.get("boundaries")), {})
    chosen = facts.get("boundaries", {"candidates": []})
    speeds = {row["name"]: f"{row['speed']:.2f}x onnxruntime's INT8" for row in chosen["candidates"] if row["speed"]}
    lines = []
    for region in facts.get("regions", ()):
        count, speed = sum(region["nodes"].values()), speeds.get(region["name"])
        ops = ", ".join(f"{n} {op}" for op, n in region["nodes"].items())
        lines.append(
            f"{region['name']}: {count} nodes, {100 * region['share']:.1f} % of the MACs{f', {speed}' if speed else ''} ({ops})"
        )
    for row in (row for row in chosen["candidates"] if not row["taken"]):
        lines.append(f"{row['name']}: left to onnxruntime, {speeds[row['name']]}: {row['reason']}")
    if chosen["candidates"]:
        whole = f"; the whole model: {chosen['speed']:.2f}x" if chosen["speed"] else ""
        lines.append(f"regions chosen: {chosen['how']} ({chosen['why']}){whole}; the same again: {chosen['recipe']}")
    lines += _sparse_lines(report)
    outside = facts.get("outside", ())
    lines += [f"outside: {row['count']} {row['op']}: {row['reason']}" for row in outside[:_REASONS]]
    if len(outside) > _REASONS:
        lines.append(f"outside: {len(outside) - _REASONS} more reasons (see --report)")
    if report.operators is not None:
        lines.append(f"regions ran here: {report.operators.ran}")
        if report.operators.library is not None:
            lines.append(f"library: {report.operators.library}, {(report.operators.library_bytes or 0) / 1e3:.0f} kB")
    return lines
