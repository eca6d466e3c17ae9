"""The progress bar: nothing for short work, one bar at a time, gone at the end."""

from __future__ import annotations

import re

import pytest

from graphopt import progress


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, delay: float) -> str:
    monkeypatch.setattr(progress, "_DELAY", delay)
    monkeypatch.setenv("FORCE_COLOR", "1")  # draw as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    with progress.bars(True) as update:
        update("folding", 0, 9)
        update("calibrate", 5, 10)
        update("calibrate", 10, 10)
        update("measure", 0, 0)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)


def test_short_work_shows_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(capsys, monkeypatch, 60.0).strip() == ""


def test_the_bar_is_that_of_what_is_done_now(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    last = shown(capsys, monkeypatch, 0.0).splitlines()
    drawn = [line for line in last if line.strip()]
    assert "measure" in drawn[-1]
    assert "0/9" not in drawn[-1]
    assert all(len([w for w in ("folding", "calibrate", "measure") if w in line]) <= 1 for line in drawn)
