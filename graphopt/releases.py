"""`graphopt release`, `log`, `show`, `verify` and `rollback`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt import release_files as store
from graphopt.errors import CheckError, DataError, ModelError, OptionError
from graphopt.release_card import card, changes
from graphopt.release_files import Event, Facts, Lineage, Release

if TYPE_CHECKING:
    from graphopt.evaluation import EvaluationReport

GOLD = "gold.npz"
GOLD_TOLERANCE = 0.05
_GENERATED_ROWS = 4


@dataclass(frozen=True)
class Released:
    """What a release made."""

    event: Event
    folder: Path
    release: Release


@dataclass(frozen=True)
class ReleaseSettings:
    """See `release`."""

    name: str | None = None
    report: str | Path | None = None
    evidence: Sequence[str | Path] = ()
    data: Any = None
    base: str | Path | None = None
    metric: str = "top1"
    requirements: Sequence[str] = ()
    gold: str | Path | None = None
    gold_tolerance: float = GOLD_TOLERANCE
    notes: str = ""
    mlflow: str | None = None


def release(model: str | Path, registry: str | Path, **options: Any) -> Released:
    """Release a model into a registry; options are the fields of `ReleaseSettings`.

    report: the JSON that `graphopt optimize --report` wrote, for lineage and figures. data, base, metric, requirements: evaluate
    now, and refuse where a requirement is not met. gold: a gold set, by default made of the data, else of generated rows.
    evidence: further JSON files that go with it (bench, audit ...). mlflow: a tracking URI, to which the release is logged once
    it is made. Raises GraphoptError; nothing is released then, but where the message says that only logging failed.
    """
    settings = ReleaseSettings(**options)
    client = None
    if settings.mlflow is not None:
        from graphopt.release_mlflow import connect, log_release

        client = connect(settings.mlflow)
    released = _release(Path(model), Path(registry), settings)
    if client is not None:
        log_release(client, released)
    return released


def _release(source: Path, root: Path, settings: ReleaseSettings) -> Released:
    if not source.is_file():
        raise ModelError(f"no such file: {source}")
    name = store.check_name(settings.name or source.stem)
    report = _json(settings.report) if settings.report is not None else {}
    facts = _facts(source)
    size = (report.get("after") or {}).get("file_bytes")
    if size is not None and size != facts.file_bytes:
        raise DataError(f"{settings.report} is of another model: its result has {size} bytes, {source.name} has {facts.file_bytes}")
    evaluation = _evaluate(source, settings)
    with store.writing(root) as folder:
        _copy(source, folder, settings, evaluation)
        lineage = _lineage(report, evaluation)
        _stamp(folder / source.name, name, lineage)
        history = store.events(root, name)
        previous = store.read(store.find(root, name)[1]) if history else None
        made: dict[str, Any] = {
            "name": name,
            "model": source.name,
            "previous": history[-1].version if history else None,
            "created": store.now(),
            "notes": settings.notes,
            "facts": facts,
            "lineage": lineage,
            "released_with": _environment(),
            "figures": _figures(report, evaluation),
            "gold_tolerance": settings.gold_tolerance,
            "requirements": list(settings.requirements),
            "metric": settings.metric if evaluation else None,
            "changes": [],
            "files": {},
        }
        draft = Release.model_validate(made)
        made["changes"] = changes(previous, draft)
        draft = Release.model_validate(made)
        (folder / "CARD.md").write_text(card(draft))
        (folder / "CHANGES.md").write_text("\n".join(f"- {line}" for line in draft.changes) + "\n")
        digest = store.seal(folder, root, made)
    event = store.append(root, name, "release", digest, note=settings.notes)
    target = root / "objects" / digest
    return Released(event, target, store.read(target))


def rollback(registry: str | Path, name: str, version: int | None = None, *, note: str = "") -> Event:
    """Make another version current, by default the one that was before the current one; the files of the other stay."""
    root = Path(registry)
    history = store.events(root, name)
    if not history:
        raise OptionError(f"registry {root} has no '{name}'; it has {', '.join(store.names(root)) or 'nothing'}")
    known = store.versions(history)
    if version is None:
        current = history[-1].version
        before = [e.version for e in history if e.version != current]
        if not before:
            raise OptionError(f"'{name}' has no version to go back to")
        version = before[-1]
    if version not in known:
        raise OptionError(f"'{name}' has no version {version}; it has {', '.join(map(str, known))}")
    store.check_files(root / "objects" / known[version].object)
    return store.append(root, name, "rollback", known[version].object, version=version, note=note)


def verify(
    registry: str | Path,
    reference: str | None = None,
    *,
    run: bool = True,
    data: Any = None,
    base: str | Path | None = None,
) -> list[str]:
    """Check releases: every file against its hash, the outputs against the gold set (`run`), every requirement on `data`.

    `reference`: `name` or `name@3`; None: all versions of all names. base: what `drop` is measured against; not needed with the
    rows of the release, on which the base's figure was stored. Returns one line a release, which says what was not evaluated.
    Raises CheckError, and OptionError where a requirement cannot be evaluated with what was given.
    """
    root = Path(registry)
    if reference is not None:
        chosen = [store.find(root, reference)]
    else:
        chosen = [
            (e, root / "objects" / e.object) for n in store.names(root) for e in store.versions(store.events(root, n)).values()
        ]
    said = []
    for event, folder in chosen:
        release = store.check_files(folder)
        line = f"{release.name}@{event.version}: {len(release.files)} files as released"
        if run:
            line += f"; {_run_gold(folder, release)}"
        if data is not None and release.metric is not None:
            line += f"; {_gates(folder, release, data, base)}"
        elif data is not None or _of_rows(release):
            missing = ", ".join(_of_rows(release))
            line += f"; NOT evaluated without rows: {missing}" if missing else "; was released without evaluation"
        said.append(line)
    return said


def _of_rows(release: Release) -> list[str]:
    """The requirements that need rows; those of the gold set are met or not without."""
    return [r for r in release.requirements if not r.startswith("gold=")]


def _run_gold(folder: Path, release: Release) -> str:
    from graphopt.evaluation import REQUIREMENTS
    from graphopt.gates import requirement
    from graphopt.gold import against_gold

    found = against_gold(folder / release.model, folder / GOLD)
    limits = [requirement(r, REQUIREMENTS)[1] for r in release.requirements if r.startswith("gold=")]
    allowed = min([release.gold_tolerance, *limits])
    if not found.relative_error <= allowed:
        off = f"{found.relative_error:.3g}"
        raise CheckError(f"{release.name}: outputs are {off} of their scale from the gold set, allowed {allowed:g}")
    return f"gold set within {found.relative_error:.2g}"


def _gates(folder: Path, release: Release, data: Any, base: str | Path | None) -> str:
    """Evaluate every requirement of the release on these rows."""
    from graphopt.evaluation import evaluate, require

    report = evaluate(folder / release.model, data, metric=release.metric, base=base, gold=folder / GOLD)
    known = release.figures.get("evaluation") or {}
    same = known.get("digest") == report.evaluation.digest
    if not same and report.evaluation.preprocessing != release.lineage.preprocessing:
        raise CheckError(f"{release.name}: the rows are preprocessed in another way than those it was released with")
    if base is None and same and known.get("base") is not None:
        report = _with_base(report, float(known["base"]))
    if report.evaluation.paired is None and any(r.startswith("drop=") for r in release.requirements):
        raise OptionError(f"{release.name}: drop cannot be evaluated on other rows than those of the release without --base")
    require(report, release.requirements)
    rows = "the rows of the release" if same else "other rows than at the release"
    met = f", {', '.join(release.requirements)} met" if release.requirements else ""
    return f"{report.metric} {report.evaluation.value:.4f} on {rows}{met}"


def _with_base(report: EvaluationReport, value: float) -> EvaluationReport:
    """With the base's figure as it was stored, of the same rows; lost and won rows are not known."""
    from graphopt.evaluation import PairedRow

    difference = report.evaluation.value - value
    nothing = dict.fromkeys(("low", "high", "lost", "won", "p_value"))
    paired = PairedRow(base="as stored", value=value, difference=difference, **nothing)
    return report.model_copy(update={"evaluation": report.evaluation.model_copy(update={"paired": paired})})


# ---- what goes into a release


def _environment() -> dict[str, Any]:
    from graphopt.gains import environment

    return environment().model_dump()


def _json(path: str | Path) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}, expected a report")
    return found


def _evaluate(source: Path, settings: ReleaseSettings) -> Any:
    if settings.data is None:
        if settings.requirements:
            raise OptionError("requirements need rows: give --data")
        return None
    from graphopt.evaluation import evaluate, require

    report = evaluate(source, settings.data, metric=settings.metric, base=settings.base, gold=settings.gold)
    require(report, settings.requirements)
    return report


def _copy(source: Path, folder: Path, settings: ReleaseSettings, evaluation: Any) -> None:
    """The model with its external weights and library, the gold set, the evidence."""
    from graphopt.data import generated
    from graphopt.emit import sources
    from graphopt.feeds import input_specs
    from graphopt.gold import write_gold
    from graphopt.model import load
    from graphopt.operators import has_regions, library_name

    loaded = load(source)
    files = [source, *sources(loaded)]
    library = source.with_name(library_name())
    if library.is_file() and has_regions(source):
        files.append(library)
    if settings.report is not None:
        files.append(Path(settings.report))
    files += map(Path, settings.evidence)
    for file in files:
        if (
            file.name in (GOLD, store.MANIFEST, store.SUMS, "CARD.md", "CHANGES.md", "evaluation.json")
            or (folder / file.name).exists()
        ):
            raise OptionError(f"two files of the release would be named {file.name}; rename {file}")
        if file != source and file.resolve().parent != source.resolve().parent and file in sources(loaded):
            raise ModelError(
                f"external weights in another folder cannot be released: {file}; save the model with its weights beside it"
            )
        shutil.copyfile(file, folder / file.name)
    if evaluation is not None:
        (folder / "evaluation.json").write_text(evaluation.model_dump_json(indent=2) + "\n")
    if settings.gold is not None:
        shutil.copyfile(settings.gold, folder / GOLD)
    else:
        data = settings.data if settings.data is not None else generated(input_specs(loaded.interface()), _GENERATED_ROWS)
        write_gold(source, data, folder / GOLD)
    found = _run_gold_of(source, folder / GOLD)
    if not found <= settings.gold_tolerance:
        raise CheckError(f"outputs are {found:.3g} of their scale from the gold set, allowed {settings.gold_tolerance:g}")


def _run_gold_of(source: Path, gold: Path) -> float:
    from graphopt.gold import against_gold

    return against_gold(source, gold).relative_error


def _stamp(path: Path, name: str, lineage: Lineage) -> None:
    """Lineage in the metadata of the ONNX file itself; external weights stay where they are."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    kept = {p.key: p.value for p in proto.metadata_props}
    said = {"name": name, "source_sha256": lineage.source_sha256, "pipeline": lineage.pipeline, "calibration": lineage.calibration}
    kept.update({f"graphopt.{k}": v for k, v in said.items() if v})
    del proto.metadata_props[:]
    for key, value in kept.items():
        proto.metadata_props.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def _facts(source: Path) -> Facts:
    from graphopt.emit import sources
    from graphopt.inspect import inspect
    from graphopt.model import load
    from graphopt.shapes import shapes

    loaded = load(source)
    found = inspect(loaded, shapes(loaded))
    return Facts(
        file_bytes=source.stat().st_size + sum(f.stat().st_size for f in sources(loaded)),
        nodes=found.nodes,
        ops=dict(found.ops),
        parameters=found.parameters,
        macs=found.macs,
        weights={k: v.bytes for k, v in found.weights.items()},
        quantized=found.verdict,
    )


def _lineage(report: dict[str, Any], evaluation: Any) -> Lineage:
    passes = [{"name": p["name"], "options": p["options"]} for p in report.get("passes", []) if p.get("changes")]
    return Lineage(
        source_sha256=report.get("source_sha256"),
        pipeline=report.get("pipeline"),
        passes=passes,
        target=report.get("target"),
        calibration=report.get("calibration"),
        preprocessing=evaluation.evaluation.preprocessing if evaluation is not None else None,
        made_with=report.get("environment"),
    )


def _figures(report: dict[str, Any], evaluation: Any) -> dict[str, Any]:
    found: dict[str, Any] = {k: report[k] for k in ("before", "after", "speedup", "quality", "warnings") if k in report}
    if evaluation is not None:
        e = evaluation.evaluation
        found["evaluation"] = {"metric": evaluation.metric, "rows": e.rows, "value": e.value, "digest": e.digest}
        if e.paired is not None:
            p = e.paired
            lost, won = (None if v is None else len(v) for v in (p.lost, p.won))
            found["evaluation"] |= {"base": p.value, "lost": lost, "won": won, "p_value": p.p_value}
    return found
