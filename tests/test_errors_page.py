"""docs/errors.md shows what the commands really print."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_models import BROKEN, good
from test_bad_input import ROWS, contents, folder

Run = Callable[..., "tuple[int, str, str]"]
PAGE = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
SHOWN = [
    pair for block in re.findall(r"```console\n(.*?)```", PAGE, re.S) for pair in re.findall(r"\$ graphopt (.*)\n(.*)\n", block)
]
MODELS = {
    "short": "weight too short",
    "external": "external file missing",
    "cycle": "cycle",
    "ghost": "nobody's tensor",
    "twice": "tensor written twice",
    "old": "opset too old",
}
__all__ = ["folder"]


@pytest.mark.parametrize(("command", "line"), SHOWN)
def test_examples(cli: Run, folder: Path, command: str, line: str) -> None:
    for name, label in MODELS.items():
        proto = good()
        BROKEN[label][0](proto)
        Path(f"{name}.onnx").write_bytes(proto.SerializeToString())
    Path("cut.onnx").write_bytes(good().SerializeToString()[:700])
    labels = np.arange(8, dtype=np.int64)
    np.savez("names.npz", image=ROWS)
    np.savez("shapes.npz", x=ROWS[:, :, :4])
    np.savez("types.npz", x=ROWS.astype(np.int64))
    np.savez("nan.npz", x=np.where(np.arange(8)[:, None, None, None] == 3, np.float32(np.nan), ROWS))
    np.savez("labels.npz", x=ROWS, labels=labels)
    before = contents(folder)
    code, _, err = cli(*shlex.split(command))
    assert code == 1
    assert contents(folder) == before
    shown, cut = line.removesuffix("..."), line.endswith("...")
    assert err.startswith(shown) if cut else err == line + "\n"


def test_every_section_is_looked_at() -> None:
    assert len(SHOWN) == PAGE.count("$ graphopt") >= 20
