"""A registry of released models: a folder that any number of processes may write to, and that survives a crash at any moment.

    registry/objects/<sha256>/    one release, never changed: model, library, gold set, release.json, CARD.md, CHANGES.md ...
    registry/events/<name>/<n>    what happened to a name, one small file each: a release, or a rollback

The last event says which version is current. An object is written under a temporary name and renamed when it is whole; an event is
written the same way and then linked under the next number, which fails where another process was first, and is tried again with the
number after that. Nothing else is ever written, so that there is no state in between.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from graphopt.errors import CheckError, ModelError, OptionError
from graphopt.report import Environment, Row, Versioned

MANIFEST, SUMS = "release.json", "SHA256SUMS"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
_TEMPORARY = ".writing-"
_STALE = 24 * 3600.0  # seconds after which what a killed process left is removed


class Facts(Row):
    """What the model is made of."""

    file_bytes: int
    nodes: int
    ops: dict[str, int]
    parameters: int
    macs: int | None
    weights: dict[str, int] = Field(description="bytes by dtype")
    quantized: str


class Lineage(Row):
    """How the model was made; null where that was not given."""

    source_sha256: str | None
    pipeline: str | None
    passes: list[dict[str, Any]] = Field(description="name and options of each pass that changed something")
    target: str | None
    calibration: str | None
    preprocessing: str | None
    made_with: Environment | None


class Release(Versioned):
    """release.json: all that is known of one release."""

    name: str
    model: str = Field(description="file name of the model in the release")
    previous: int | None = Field(description="the version that was current when this one was made")
    created: str
    notes: str
    facts: Facts
    lineage: Lineage
    released_with: Environment
    figures: dict[str, Any] = Field(description="measured: quality, latency, size, of the model and of what it came from")
    gold_tolerance: float = Field(description="how far outputs may be from the gold set, over their scale")
    requirements: list[str] = Field(description="gates that `verify --data` evaluates again")
    metric: str | None
    changes: list[str] = Field(description="against the previous version")
    files: dict[str, str] = Field(description="SHA-256 of every other file")


class Event(Row):
    """One entry of a name's history."""

    number: int
    kind: Literal["release", "rollback"]
    version: int = Field(description="the version that is current after it")
    object: str
    time: str
    note: str


def now() -> str:
    """UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def check_name(name: str) -> str:
    if not _NAME.match(name):
        raise OptionError(f"'{name}' is no name for a model: letters, digits, dots, dashes and underscores, at most 100")
    return name


# ---- reading


def names(registry: Path) -> list[str]:
    """The names that something was released under."""
    folder = registry / "events"
    return sorted(d.name for d in folder.iterdir() if d.is_dir() and events(registry, d.name)) if folder.is_dir() else []


def events(registry: Path, name: str) -> list[Event]:
    """The history of a name, oldest first. ModelError where an entry cannot be read."""
    folder = registry / "events" / check_name(name)
    found = []
    for path in sorted(folder.glob("[0-9]*")) if folder.is_dir() else []:
        try:
            found.append(Event.model_validate_json(path.read_text()))
        except (OSError, ValidationError) as error:
            raise ModelError(f"registry: {path} is damaged: {' '.join(str(error).split())[:200]}") from error
    return found


def versions(history: list[Event]) -> dict[int, Event]:
    """The event that released each version."""
    return {e.version: e for e in history if e.kind == "release"}


def find(registry: Path, reference: str) -> tuple[Event, Path]:
    """`name` (its current version) or `name@3`: the release event and its folder. OptionError with what there is."""
    name, at, number = reference.partition("@")
    history = events(registry, name)
    if not history:
        raise OptionError(f"registry {registry} has no '{name}'; it has {', '.join(names(registry)) or 'nothing'}")
    known = versions(history)
    wanted = history[-1].version if not at else int(number) if number.isdigit() else -1
    if wanted not in known:
        raise OptionError(f"'{name}' has no version '{number}'; it has {', '.join(map(str, known))}")
    return known[wanted], registry / "objects" / known[wanted].object


def read(folder: Path) -> Release:
    """The manifest of a release. ModelError where it cannot be read."""
    try:
        return Release.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValidationError) as error:
        raise ModelError(f"registry: {folder / MANIFEST} is damaged: {' '.join(str(error).split())[:200]}") from error


def check_files(folder: Path) -> Release:
    """The manifest, after every file was read and its hash compared. CheckError where something differs or is missing."""
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckError(f"release {folder.name[:12]}: {MANIFEST} is missing") from error
    if hashlib.sha256(content).hexdigest() != folder.name:
        raise CheckError(f"release {folder.name[:12]}: {MANIFEST} was changed")
    release = read(folder)
    for name, digest in release.files.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise CheckError(f"release {folder.name[:12]}: {name} is missing or was changed")
    extra = {p.name for p in folder.iterdir()} - set(release.files) - {MANIFEST, SUMS}
    if extra:
        raise CheckError(f"release {folder.name[:12]}: {min(extra)} does not belong to it")
    return release


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


# ---- writing


@contextmanager
def writing(registry: Path) -> Iterator[Path]:
    """A temporary folder in the registry; what is left of one whose process was killed is removed a day later."""
    try:
        (registry / "objects").mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=registry / "objects"))
    except OSError as error:
        raise ModelError(f"cannot write to the registry {registry}: {error.strerror}") from error
    for old in (registry / "objects").glob(f"{_TEMPORARY}*"):
        try:
            if time.time() - old.stat().st_mtime > _STALE:
                shutil.rmtree(old, ignore_errors=True)
        except OSError:  # its own process removed it meanwhile
            continue
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def seal(folder: Path, registry: Path, manifest: Mapping[str, Any]) -> str:
    """Write manifest and checksums into the folder, and rename it to its hash; returns that."""
    files = {p.name: sha256(p) for p in sorted(folder.iterdir())}
    release = Release.model_validate({**manifest, "files": files})
    content = (release.model_dump_json(indent=2) + "\n").encode()
    digest = hashlib.sha256(content).hexdigest()
    (folder / MANIFEST).write_bytes(content)
    lines = [f"{h}  {n}" for n, h in sorted({**files, MANIFEST: digest}.items())]
    (folder / SUMS).write_text("\n".join(lines) + "\n")
    for path in folder.iterdir():
        _sync(path)
    folder.chmod(0o755)
    _sync(folder)
    target = registry / "objects" / digest
    try:
        folder.rename(target)
    except OSError as error:
        if not target.is_dir():  # else the very same release is there already
            raise ModelError(f"cannot write {target}: {error.strerror}") from error
    _sync(target.parent)
    return digest


def append(
    registry: Path, name: str, kind: Literal["release", "rollback"], digest: str, *, version: int = 0, note: str = ""
) -> Event:
    """Add an event as the next of its name; the version of a release is the next free one. Safe against other writers."""
    folder = registry / "events" / check_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        history = events(registry, name)
        number = len(history) + 1
        chosen = max(versions(history), default=0) + 1 if kind == "release" else version
        event = Event(number=number, kind=kind, version=chosen, object=digest, time=now(), note=note)
        handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=folder)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(json.dumps(event.model_dump()) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.link(temporary, folder / f"{number:06d}")  # fails where it exists: another writer was first
            _sync(folder)
            return event
        except FileExistsError:
            continue
        finally:
            os.unlink(temporary)


def _sync(path: Path) -> None:
    """To the disk; folders cannot be flushed everywhere."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
