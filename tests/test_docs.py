"""The documentation is true: its examples run, its links lead somewhere, the README's commands do what they say."""

from __future__ import annotations

import doctest
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from graphopt.registry import REGISTRY
from graphopt.report import SweepReport, schema

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
Run = Callable[..., tuple[int, str, str]]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", [p for p in PAGES if ">>>" in p.read_text()], ids=lambda p: p.name)
def test_examples_run(page: Path) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, count = doctest.testfile(str(page), module_relative=False, optionflags=flags)
    assert count > 0
    assert failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readmes_commands_work(cli: Run, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = ROOT / "README.md"
    for name, source in (("model.onnx", "digits.onnx"), ("calib.npz", "digits_calib.npz"), ("eval.npz", "digits_eval.npz")):
        shutil.copyfile(digits / source, tmp_path / name)
    plugin = next(b for b in blocks(readme, "python") if "@register" in b)
    (tmp_path / "relu6.py").write_text(plugin)
    assert len(plugin.strip().splitlines()) <= 18  # the imports and the comment, and 15 lines of pass
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(readme, "bash") for line in block.splitlines() if line.startswith("graphopt ")]
    lines.append(plugin.splitlines()[0].partition(": ")[2])
    for line in lines:
        code, _, err = cli(*shlex.split(line, comments=True)[1:])
        assert (code, err) == (0, ""), line
    assert len(lines) > 5
    example = next(b for b in blocks(readme, "python") if "graphopt.optimize(" in b)
    exec(compile(example, "README.md", "exec"), {"print": lambda *shown: None})
    assert (tmp_path / "model.int8.onnx").exists()


def test_the_workflows_commands_work(cli: Run, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in (("model.onnx", "digits.onnx"), ("calib.npz", "digits_calib.npz"), ("eval.npz", "digits_eval.npz")):
        shutil.copyfile(digits / source, tmp_path / name)
    workflow = blocks(ROOT / "docs" / "ci.md", "yaml")[0]
    monkeypatch.chdir(tmp_path)
    lines = [line.partition("run: ")[2] for line in workflow.splitlines() if "run: graphopt" in line]
    for line in lines:
        code, _, err = cli(*shlex.split(line)[1:])
        assert (code, err) == (0, ""), line
    assert len(lines) == 5


def test_setup_is_two_commands_and_ci_runs_the_same() -> None:
    setup = (ROOT / "README.md").read_text().partition("## Set up")[2].partition("## Use")[0]
    commands = [line for line in "\n".join(re.findall(r"```bash\n(.*?)```", setup, re.DOTALL)).splitlines() if line]
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().replace(" -q ", " ")


def test_the_reports_schema_is_published() -> None:
    assert json.loads((ROOT / "docs" / "report.schema.json").read_text()) == schema()


def test_the_schema_of_sweeps_is_published() -> None:
    assert json.loads((ROOT / "docs" / "sweep.schema.json").read_text()) == SweepReport.model_json_schema()


def test_every_pass_is_documented() -> None:
    shown = "\n".join(p.read_text() for p in PAGES)
    assert [name for name in REGISTRY.names() if f"`{name}`" not in shown] == []
