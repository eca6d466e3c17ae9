"""Passes by name: the built-in table is true, clashes are refused, plugins load from files and packages."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.errors import OptionError
from graphopt.pipeline import parse
from graphopt.presets import PRESETS
from graphopt.registry import BUILTIN, find, load_plugin

EXAMPLE = Path(__file__).parent / "plugin_example"


@pytest.mark.parametrize("name", BUILTIN)
def test_each_builtin_is_a_documented_function_with_the_files_name(name: str) -> None:
    entry = find(name)
    assert entry.name == name
    assert entry.fn.__name__ == name.replace("-", "_")
    assert entry.fn.__module__ == BUILTIN[name] == f"graphopt.passes.{entry.fn.__name__}"
    assert len(entry.summary()) > 10
    assert set(entry.after) <= set(BUILTIN)
    assert all(p.default is not p.empty for p in entry.options().values())


def test_the_table_lists_every_file() -> None:
    folder = Path(importlib.import_module("graphopt.passes").__file__ or "").parent
    files = {p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")}
    assert files == {m.rsplit(".", 1)[1] for m in BUILTIN.values()}


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_parses(name: str) -> None:
    assert parse(name)


def test_a_clash_names_both_owners(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from graphopt import register\n@register('fold-bn')\ndef fold_bn(model, context):\n    'Mine.'\n    return 0\n"
    )
    with pytest.raises(
        OptionError, match="two passes are named 'fold-bn': one in graphopt.passes.fold_bn, one in graphopt_plugin_mine"
    ):
        load_plugin(plugin)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("1/0", "cannot be loaded: ZeroDivisionError"), ("import nothing_of_that_name", "cannot be loaded")],
)
def test_a_broken_plugin_file_is_one_clear_error(tmp_path: Path, content: str | None, message: str) -> None:
    plugin = tmp_path / "bad.py"
    if content is not None:
        plugin.write_text(content)
    with pytest.raises(OptionError, match=message):
        load_plugin(plugin)


def test_a_plugin_file_registers_its_passes() -> None:
    assert load_plugin(EXAMPLE / "graphopt_relu6.py") == ["relu-to-relu6"]
    assert parse("relu-to-relu6 limit=3")[0].options == {"limit": 3.0}


def test_a_plugin_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    source = shutil.copytree(EXAMPLE, tmp_path / "source")  # building leaves files beside what it builds
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-t",
        str(tmp_path / "site"),
        str(source),
    ]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode and "setuptools" in done.stderr:
        pytest.skip("setuptools is not installed, so the example package cannot be built")
    assert done.returncode == 0, done.stderr
    program = (
        "import json; from graphopt.registry import REGISTRY, find; "
        "print(json.dumps([REGISTRY.names(), find('relu-to-relu6').summary()]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
    )
    names, summary = json.loads(found.stdout)
    assert "relu-to-relu6" in names
    assert summary.startswith("Relu becomes Clip")
