"""The commands `graphopt release`, `log`, `show`, `verify` and `rollback`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
_REGISTRY = click.argument("registry", type=_PATH)


@click.command(short_help="Release MODEL into a registry: versioned, with lineage, card and gold set.")
@click.argument("model", type=_PATH)
@click.option("--to", "registry", type=_PATH, required=True, help="The registry, a folder; made where it is not there.")
@click.option("--name", help="Default: the file's name without .onnx.")
@click.option("--report", type=_PATH, help="What `graphopt optimize --report` wrote: lineage and figures.")
@click.option("--evidence", type=_PATH, multiple=True, help="Further files that go with it (bench, audit ...); may be repeated.")
@click.option("--data", metavar="PATH", help="Labelled rows: evaluate now, and store the figures.")
@click.option("--base", type=_PATH, help="With --data: pair MODEL with this one.")
@click.option("--metric", default="top1", show_default=True, help="With --data.")
@click.option(
    "--require", "requirements", multiple=True, metavar="KEY=N", help="As for `graphopt evaluate`; else nothing is released."
)
@click.option("--gold", type=_PATH, help="A gold set. Default: made from --data, else from generated rows.")
@click.option("--notes", default="", help="A sentence for the card.")
@click.option(
    "--mlflow", metavar="URI", help="Log the release to this MLflow tracking server too (pip install 'graphopt[mlflow]')."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def release(model: Path, registry: Path, as_json: bool, **given: Any) -> None:
    """Release MODEL: a folder named by its content with the model, its library, lineage, model card, changelog and gold set.

    Exit codes: 0 released, 1 user error, 2 a requirement is not met (nothing is released).
    """
    from graphopt.releases import release as make

    made = make(model, registry, **given)
    if as_json:
        click.echo(json.dumps({"version": made.event.version, "folder": str(made.folder), **made.release.model_dump()}, indent=2))
        return
    click.echo(f"released: {made.release.name}@{made.event.version} in {made.folder}")
    for line in made.release.changes:
        click.echo(f"  {line}")


@click.command(short_help="The history of a registry.")
@_REGISTRY
@click.argument("name", required=False)
def log(registry: Path, name: str | None) -> None:
    """What was released and rolled back in REGISTRY, newest first; the current version of each name is marked with a star."""
    from graphopt.errors import OptionError
    from graphopt.release_files import events, names

    known = names(registry)
    if name is not None and name not in known:
        raise OptionError(f"registry {registry} has no '{name}'; it has {', '.join(known) or 'nothing'}")
    for each in [name] if name else known:
        history = events(registry, each)
        current = history[-1].version
        for event in reversed(history):
            mark = "*" if event is history[-1] else " "
            what = f"{event.kind} of {event.version}" if event.kind == "release" else f"rollback to {event.version}"
            click.echo(f"{mark} {each}@{event.version}  {event.time}  {what}  {event.object[:12]}  {event.note}".rstrip())
        click.echo(f"current: {each}@{current}")


@click.command(short_help="The card of a released version.")
@_REGISTRY
@click.argument("reference", metavar="NAME[@VERSION]")
@click.option("--json", "as_json", is_flag=True, help="Print release.json.")
def show(registry: Path, reference: str, as_json: bool) -> None:
    """The model card of NAME's current version, or of NAME@VERSION, and where its files are."""
    from graphopt.release_files import find, read

    event, folder = find(registry, reference)
    if as_json:
        click.echo(read(folder).model_dump_json(indent=2))
        return
    click.echo((folder / "CARD.md").read_text())
    click.echo(f"version {event.version}, files: {folder}")


@click.command(short_help="Check releases: hashes, gold set, requirements.")
@_REGISTRY
@click.argument("reference", required=False, metavar="[NAME[@VERSION]]")
@click.option("--data", metavar="PATH", help="Labelled rows: every requirement is evaluated again.")
@click.option("--base", type=_PATH, help="With --data: what a required drop is measured against, on other rows than the release's.")
@click.option("--no-run", is_flag=True, help="Do not run the gold set.")
def verify(registry: Path, reference: str | None, data: str | None, base: Path | None, no_run: bool) -> None:
    """Check every file of a release against its hash, run the gold set, and with --data every requirement. Default: all releases.

    A line a release says what was checked, and which requirements were not for want of rows.

    Exit codes: 0 all is as released, 1 user error, 2 something differs.
    """
    from graphopt.releases import verify as check

    for line in check(registry, reference, run=not no_run, data=data, base=base):
        click.echo(line)


@click.command(short_help="Make an earlier version current again.")
@_REGISTRY
@click.argument("name")
@click.argument("version", type=int, required=False)
@click.option("--note", default="", help="Why, for the log.")
def rollback(registry: Path, name: str, version: int | None, note: str) -> None:
    """Make VERSION of NAME current; by default the one before. No file is removed, and the log keeps what happened."""
    from graphopt.releases import rollback as back

    event = back(registry, name, version, note=note)
    click.echo(f"current: {name}@{event.version}")


COMMANDS = (release, log, show, verify, rollback)
