"""The wheel holds everything that the checkout has, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def sources() -> set[str]:
    """Every file of the three packages as the wheel should name it."""
    own = {
        f"graphopt/{p.name}" for p in (ROOT / "graphopt").iterdir() if p.suffix in (".py", ".typed", ".json") and not p.is_symlink()
    }
    assets = {f"graphopt/assets/{p.name}" for p in (ROOT / "graphopt" / "assets").iterdir()}
    return (
        own
        | assets
        | {f"graphopt/{d}/{p.name}" for d in ("passes", "kernels") for p in (ROOT / d).iterdir() if p.suffix in (".py", ".c")}
    )


def test_the_wheel_holds_every_file(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools is not installed, so no wheel can be built")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True, env={**os.environ, "PIP_NO_INDEX": "1"})
    (wheel,) = tmp_path.glob("*.whl")
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert packed == sources()


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_the_folders_cannot_be_imported_by_a_second_name(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"import this package as graphopt.{name}" in done.stderr
