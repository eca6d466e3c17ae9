"""The command line. Thin: every command calls one library function and prints its result. Nothing heavy is imported at the top."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli_advise import advise as advise_command
from graphopt.cli_audit import audit as audit_command
from graphopt.cli_bench import bench as bench_command
from graphopt.cli_compiled import prepare_library
from graphopt.cli_compiled import run as run_command
from graphopt.cli_evaluate import evaluate as evaluate_command
from graphopt.cli_monitor import monitor as monitor_command
from graphopt.cli_release import COMMANDS as RELEASE_COMMANDS
from graphopt.cli_report import report as report_command
from graphopt.cli_sweep import sweep as sweep_command
from graphopt.errors import CheckError, GraphoptError, ModelError, OptionError

if TYPE_CHECKING:
    from graphopt.api import Result, Settings
    from graphopt.pipeline import Hook

_PATH = click.Path(path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="graphopt")
def cli() -> None:
    """Make ONNX models smaller and faster for onnxruntime, verified and measured.

    Start with `graphopt demo`, or with `graphopt optimize MODEL.onnx`.
    """


@cli.command(short_help="Optimise MODEL; write it and say what was gained and lost.")
@click.argument("model", type=_PATH)
@click.option("-o", "--output", type=_PATH, help="Where to write the result. Default: MODEL.opt.onnx beside the input.")
@click.option("--passes", help='Passes and presets in order, as "cleanup, prune-channels ratio=0.3, quantize". Default: fold.')
@click.option("--preset", help="One preset, by name (see `graphopt presets`).")
@click.option("--pipeline", type=_PATH, help="A TOML file with [[pass]] tables.")
@click.option("--calib", metavar="PATH", help="Calibration rows: .npz, folder, or module:function.")
@click.option("--eval", "evaluation", metavar="PATH", help="Labelled rows to measure quality on (.npz with 'labels').")
@click.option("--metric", default="top1", show_default=True, help="top1, top5, binary, negative-mse or module:function.")
@click.option("--check", is_flag=True, help="Compare the outputs before and after every exact pass.")
@click.option("--target", default="ort-cpu", show_default=True, help="What the model will run on (see `graphopt targets`).")
@click.option("--report", type=_PATH, help="Write the full report as JSON, or as a page where it ends in .html.")
@click.option("--print-after", metavar="PASS", help="Print the graph after this pass, or after 'all' that changed something.")
@click.option("--dump-after", type=_PATH, metavar="DIR", help="Save the model after every pass that changed something.")
@click.option("--plugin", type=_PATH, multiple=True, help="A Python file that registers passes; may be repeated.")
@click.option("--library-target", type=click.Choice(["x86-64", "aarch64"]), help="CPU of the library. Default: this machine's.")
@click.option("--no-library", is_flag=True, help="With compile-int8: write only the model, not the library that runs its regions.")
@click.option("--measure/--no-measure", default=True, show_default=True, help="Measure latency and peak memory of both models.")
@click.option("--overwrite", is_flag=True, help="Replace existing output files.")
@click.option("-v", "--verbose", is_flag=True, help="Show every pass and what it left alone, and why.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@_JSON
def optimize(
    model: Path,
    output: Path | None,
    report: Path | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    no_library: bool,
    library_target: str | None,
    **given: Any,
) -> None:
    """Optimise MODEL and write the result, with a table of what was gained and lost.

    With compile-int8 the library that runs its regions is written beside it as graphopt-ops-<platform>.so.

    Exit codes: 0 done, 1 user error, 2 a check failed (the result is then kept aside as OUT.failed.onnx).
    """
    from graphopt import emit
    from graphopt.api import optimize_with
    from graphopt.library import is_here

    target = output or emit.default_output(model)
    overwrite = bool(given.pop("overwrite"))
    inputs = [model, given["calib"], given["evaluation"], given["pipeline"], *given["plugin"]]
    _check_outputs([target] if report is None else [target, report], [Path(i) for i in inputs if i], overwrite)
    with _progress(not quiet) as progress:
        settings = _settings(given, as_json or quiet, progress)
        settings.here, settings.detail = is_here(library_target), report is not None
        result = optimize_with(model, settings)
        library = None
        if result.failure is None and not no_library:
            library = prepare_library(result, target.parent, library_target, overwrite, progress)
    _write(result, target, report, overwrite, library)
    if as_json:
        click.echo(result.report.model_dump_json(indent=2))
    elif not quiet:
        from graphopt.cli_render import show_report

        show_report(result.report, verbose=verbose)


def _check_outputs(outputs: list[Path], inputs: list[Path], overwrite: bool) -> None:
    """Find out before any work where something could not be written, or would replace what is read."""
    from graphopt import emit

    model = inputs[0]
    if not model.is_file():
        raise ModelError(f"{model} is a folder; name a model file" if model.is_dir() else f"no such file: {model}")
    for path in (*outputs, emit.aside(outputs[0])):
        same = next((i for i in inputs if path.exists() and i.exists() and path.samefile(i)), None)
        if same is not None:
            raise ModelError(f"the output {path} is the input {same}; name another output")
    for path in outputs:
        emit.check_target(path, overwrite=overwrite)
    if len({p.resolve() for p in outputs}) < len(outputs):
        raise ModelError(f"the model and its report would both be {outputs[0]}; name another file with --report")


def _settings(given: dict[str, Any], to_stderr: bool, progress: Callable[[str, int, int], None]) -> Settings:
    from graphopt.api import Settings
    from graphopt.registry import load_plugin

    for plugin in given["plugin"]:
        load_plugin(plugin)
    chosen = [name for name in ("passes", "preset", "pipeline") if given[name] is not None]
    if len(chosen) > 1:
        raise OptionError(f"give one of --passes, --preset and --pipeline, not {' and '.join('--' + c for c in chosen)}")
    passes = given["passes"]
    if given["preset"] is not None:
        passes = _preset(given["preset"])
    settings = Settings(
        passes=passes,
        pipeline=given["pipeline"],
        calibration=given["calib"],
        evaluation=given["evaluation"],
        metric=given["metric"],
        target=given["target"],
        check=given["check"],
        measure=given["measure"],
        progress=progress,
    )
    settings.hooks = _hooks(given["print_after"], given["dump_after"], to_stderr, [s.entry.name for s in settings.steps()])
    return settings


def _hooks(shown: str | None, folder: Path | None, to_stderr: bool, steps: list[str]) -> list[Hook]:
    """Printing and dumping, where asked for."""
    hooks: list[Hook] = []
    if shown:
        from graphopt.hooks import print_after

        if shown not in ("all", *steps):
            raise OptionError(
                f"--print-after {shown}: no such pass in the pipeline; it has {', '.join(dict.fromkeys(steps))}, or give 'all'"
            )
        hooks.append(print_after(shown, lambda text: click.echo(text, err=to_stderr)))
    if folder:
        from graphopt.hooks import dump_after

        hooks.append(dump_after(folder))
    return hooks


def _preset(name: str) -> str:
    from graphopt.presets import PRESETS
    from graphopt.registry import suggest

    if name not in PRESETS:
        raise OptionError(f"unknown preset '{name}'; {suggest(name, PRESETS)}")
    return name


def _write(result: Result, target: Path, report: Path | None, overwrite: bool, library: tuple[Path, bytes] | None = None) -> None:
    from graphopt import emit
    from graphopt.library import write_library

    if result.failure is not None:
        kept = emit.aside(target)
        emit.save(result.model, kept, overwrite=True)
        raise CheckError(f"{result.failure}; the result is kept aside as {kept}")
    files = result.save(target, overwrite=overwrite)
    size = sum(f.stat().st_size for f in files)
    result.report.after = result.report.after.model_copy(update={"path": str(target), "file_bytes": size})
    if library is not None:
        write_library(*library)
        if result.report.operators is not None:
            named = {"library": library[0].name, "library_bytes": len(library[1])}
            result.report.operators = result.report.operators.model_copy(update=named)
    if report is not None:
        from graphopt.html import rendered

        emit.write_text(report, rendered(result.report, report), overwrite=overwrite)


@cli.command(short_help="What MODEL is made of, and what is already quantised.")
@click.argument("model", type=_PATH)
@click.option("--denormals", is_flag=True, help="Also count denormal weights (reads all weights).")
@_JSON
def inspect(model: Path, denormals: bool, as_json: bool) -> None:
    """What is in MODEL: operators, opset, parameters, MACs, dynamic axes, weights, what is already quantised."""
    from graphopt.inspect import inspect as look
    from graphopt.model import load
    from graphopt.shapes import shapes

    loaded = load(model)
    found = look(loaded, shapes(loaded), denormals=denormals)
    if as_json:
        _echo_json(found.to_dict())
    else:
        from graphopt.cli_render import show_rows

        show_rows(str(model), found.rows())


@cli.command(short_help="What can be removed from MODEL together, what not, and why.")
@click.argument("model", type=_PATH)
@_JSON
def groups(model: Path, as_json: bool) -> None:
    """The coupled dimension groups of MODEL: what can be removed together, what it costs, and what is pinned, why and where."""
    from graphopt.groups_view import view
    from graphopt.model import load

    found = view(load(model))
    if as_json:
        _echo_json(found.to_dict())
    else:
        from graphopt.cli_render import show_groups

        show_groups(found)


@cli.command(short_help="How far the outputs of B are from those of A on data.")
@click.argument("a", type=_PATH)
@click.argument("b", type=_PATH)
@click.option("--data", required=True, metavar="PATH", help="Rows to compare on: .npz, folder, or module:function.")
@click.option(
    "--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Rows at a time, where the models' batch is dynamic."
)
@_JSON
def compare(a: Path, b: Path, data: str, batch: int, as_json: bool) -> None:
    """How far the outputs of B are from those of A on data: errors, SQNR, cosine, argmax agreement."""
    from dataclasses import asdict

    from graphopt.compare import compare as differences
    from graphopt.data import open_dataset
    from graphopt.feeds import input_specs
    from graphopt.model import load

    dataset = open_dataset(data, input_specs(load(a).interface()))
    load(b)
    rows = differences(str(a), str(b), dataset.batches(batch))
    if as_json:
        _echo_json([asdict(r) for r in rows])
    else:
        from graphopt.cli_render import show_differences

        show_differences(rows)


@cli.command(short_help="Nodes, shapes and initializers that differ between A and B.")
@click.argument("a", type=_PATH)
@click.argument("b", type=_PATH)
@_JSON
def diff(a: Path, b: Path, as_json: bool) -> None:
    """The nodes, shapes and initializers that differ between A and B."""
    from dataclasses import asdict

    from graphopt.diff import diff as changes
    from graphopt.model import load

    found = changes(load(a), load(b))
    if as_json:
        _echo_json(asdict(found))
    else:
        from graphopt.cli_render import show_diff

        show_diff(found)


@cli.command(short_help="Name the pass and the node that moved MODEL's outputs.")
@click.argument("model", type=_PATH)
@click.option("--passes", required=True, help="The pipeline to search, as for `optimize`.")
@click.option("--data", metavar="PATH", help="Rows to check on. Default: generated from the input types.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-4,
    show_default=True,
    help="How far outputs may move, as a share of their scale (0.05 or more where a pass quantises).",
)
@click.option("--target", default="ort-cpu", show_default=True, help="As for `optimize`.")
def bisect(model: Path, passes: str, data: str | None, tolerance: float, target: str) -> None:
    """Name the pass, and the node, that first moves MODEL's outputs by more than the tolerance. Exit code 2 if there is one."""
    from graphopt.api import bisect as search

    with _progress(True) as progress:
        checked = search(model, passes, calibration=data, tolerance=tolerance, target=target, progress=progress)
    click.echo(f"no pass moved an output by more than {tolerance:g} of its scale ({checked} changes checked)")


@cli.command(short_help="List the passes, or describe one with its options.")
@click.argument("name", required=False)
@click.option("--plugin", type=_PATH, multiple=True, help="A Python file that registers passes; may be repeated.")
def passes(name: str | None, plugin: tuple[Path, ...]) -> None:
    """List the passes, or describe the pass NAME with its options."""
    from graphopt.cli_render import show_pass, show_passes
    from graphopt.registry import REGISTRY, find, load_plugin

    for path in plugin:
        load_plugin(path)
    if name:
        show_pass(find(name))
    else:
        show_passes([find(n) for n in REGISTRY.names()])


@cli.command(short_help="List the presets and the passes they stand for.")
def presets() -> None:
    """List the presets and the passes they stand for."""
    from graphopt.cli_render import show_presets

    show_presets()


@cli.command(short_help="List the targets, or describe one with its reasons.")
@click.argument("name", required=False)
def targets(name: str | None) -> None:
    """List the targets, or describe the target NAME: what it runs in INT8, what not, and why."""
    from graphopt.cli_render import show_target, show_targets
    from graphopt.targets import find_target
    from graphopt.targets import targets as all_targets

    if name:
        show_target(find_target(name))
    else:
        show_targets(list(all_targets().values()))


@cli.command(short_help="Prune, quantise and measure a small model that ships with it.")
@click.option("-o", "--output", type=_PATH, default=Path("graphopt-demo"), show_default=True, help="Folder for the files.")
@click.option("--overwrite", is_flag=True, help="Replace the files of an earlier demo.")
def demo(output: Path, overwrite: bool) -> None:
    """Prune, quantise, verify and measure a small model of handwritten digits that ships with graphopt. Needs no network."""
    from graphopt.cli_render import show_demo
    from graphopt.demo import run_demo

    with _progress(True) as progress:
        stages = run_demo(output, overwrite=overwrite, progress=progress)
    show_demo(stages)


_MORE = (
    run_command,
    bench_command,
    advise_command,
    audit_command,
    evaluate_command,
    monitor_command,
    sweep_command,
    report_command,
)
for _command in (*_MORE, *RELEASE_COMMANDS):
    cli.add_command(_command)


def _echo_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False, default=str))


def _progress(shown: bool) -> Any:
    from graphopt.progress import bars

    return bars(shown and sys.stderr.isatty())


def main(arguments: list[str] | None = None) -> None:
    """Entry point: user errors in one line on stderr with exit code 1, failed checks with 2, never a half-written file."""
    given = sys.argv[1:] if arguments is None else arguments
    verbose = "-v" in given or "--verbose" in given
    try:
        code = cli.main(given or ["--help"], prog_name="graphopt", standalone_mode=False)
    except GraphoptError as error:
        _fail(str(error), error.exit_code, verbose)
    except click.exceptions.Abort:
        _fail("interrupted; nothing was written", 130, False)
    except click.ClickException as error:
        usage = f" (see `{error.ctx.command_path} --help`)" if isinstance(error, click.UsageError) and error.ctx else ""
        _fail(error.format_message() + usage, 1, False)
    except BrokenPipeError:
        sys.exit(0)
    except MemoryError:
        _fail("out of memory; nothing was written", 1, verbose)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}", 1, verbose)
    except Exception as error:  # a bug of ours: one line all the same, the traceback with -v
        _fail(f"internal error: {type(error).__name__}: {error}; run with -v for the traceback and report it", 1, verbose)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int, verbose: bool) -> None:
    if verbose:
        import traceback

        traceback.print_exc()
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)
