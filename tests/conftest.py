"""Shared fixtures: the shipped digits model and its data, and the command line run in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest

Run = Callable[..., "tuple[int, str, str]"]


@pytest.fixture(scope="session")
def digits() -> Path:
    """The folder of the shipped model (digits.onnx) and data (digits_calib.npz, digits_eval.npz)."""
    return Path(str(resources.files("graphopt") / "assets"))


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    """Whatever passes a test registers are gone after it."""
    from graphopt.registry import BUILTIN, REGISTRY

    known = set(REGISTRY.passes)
    yield
    for name in set(REGISTRY.passes) - known - set(BUILTIN):
        del REGISTRY.passes[name]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `graphopt ARGUMENTS...` in this process; (exit code, stdout, stderr)."""
    from graphopt.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run
