"""Gold sets: outputs that were stored once, to be compared after each export."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from graphopt.compare import differences
from graphopt.errors import DataError
from graphopt.feeds import check_feed, input_specs
from graphopt.report import Row
from graphopt.runtime import run

ROWS = 16
_IN, _OUT = "input:", "output:"


class GoldRow(Row):
    """The model's outputs against those that were stored."""

    file: str
    rows: int
    relative_error: float = Field(description="the largest error of any output, over that output's scale; 1e30 where shapes differ")
    cosine: float = Field(description="of the output that moved most")
    argmax_agreement: float | None


def write_gold(model: str | Path, data: Any, path: str | Path, *, rows: int = ROWS, overwrite: bool = False) -> int:
    """Store the first rows and the model's outputs for them; returns the number of rows. Raises GraphoptError."""
    from graphopt import emit
    from graphopt.data import open_dataset
    from graphopt.model import load
    from graphopt.operators import opened

    target = Path(path)
    emit.check_target(target, overwrite=overwrite)
    dataset = open_dataset(data, input_specs(load(model).interface()))
    session, _ = opened(Path(model), threads=1, fallback=True)
    names = [o.name for o in session.get_outputs()]
    held: dict[str, np.ndarray] = {}
    count = 0
    for number, feed in enumerate(islice(dataset.batches(1), rows)):
        held.update({f"{_IN}{number}:{name}": value for name, value in feed.items()})
        for name, value in zip(names, run(session, feed, names), strict=True):
            held[f"{_OUT}{number}:{name}"] = np.asarray(value)
        count += 1
    content = io.BytesIO()
    np.savez_compressed(content, **held)  # type: ignore[arg-type]
    emit.write_bytes(target, content.getvalue())
    return count


def against_gold(model: str | Path, path: str | Path) -> GoldRow:
    """Run the stored rows and compare. DataError where the file is none of ours, or does not fit the model."""
    from graphopt.model import load
    from graphopt.operators import opened

    feeds, stored = _read(Path(path))
    specs = input_specs(load(model).interface())
    session, _ = opened(Path(model), threads=1, fallback=True)
    names = [o.name for o in session.get_outputs() if o.name in stored[0]]
    if not names:
        raise DataError(f"gold set '{Path(path).name}': has none of the model's outputs")
    pairs = []
    for number, (feed, outputs) in enumerate(zip(feeds, stored, strict=True)):
        given = check_feed(specs, feed, f"'{Path(path).name}' row {number}")
        pairs.append(([outputs[n] for n in names], run(session, given, names)))
    worst = max(differences(names, pairs), key=lambda d: d.relative)
    error = min(worst.relative, 1e30)
    return GoldRow(
        file=str(path), rows=len(feeds), relative_error=error, cosine=worst.cosine, argmax_agreement=worst.argmax_agreement
    )


def _read(path: Path) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {key: file[key] for key in file.files}
    except Exception as error:  # numpy and zipfile raise many kinds
        raise DataError(f"gold set '{path.name}': cannot be read: {' '.join(str(error).split())}") from error
    sides: dict[str, dict[int, dict[str, np.ndarray]]] = {_IN: {}, _OUT: {}}
    for key, value in held.items():
        side, number, name = [*key.split(":", 2), "", ""][:3]
        if f"{side}:" not in sides or not number.isdigit():
            raise DataError(f"gold set '{path.name}': holds '{key}'; write it with `graphopt evaluate --write-gold`")
        sides[f"{side}:"].setdefault(int(number), {})[name] = value
    if not sides[_IN] or sides[_IN].keys() != sides[_OUT].keys():
        raise DataError(f"gold set '{path.name}': rows and outputs do not belong together; write it again")
    order = sorted(sides[_IN])
    return [sides[_IN][n] for n in order], [sides[_OUT][n] for n in order]
