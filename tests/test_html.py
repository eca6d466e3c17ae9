"""The HTML pages: complete, self-contained, small, and shown without errors by a browser where one is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from graphopt.html_page import Bar, bars, items, page, section, table

Run = Callable[..., "tuple[int, str, str]"]
VOID = {"meta", "br", "hr", "img", "link"}


class Balanced(HTMLParser):
    """Raises where tags do not close in order; keeps names and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(text: str) -> Balanced:
    found = Balanced()
    found.feed(text)
    assert found.open == []
    assert len(text) < 5_000_000
    assert "script" not in found.seen
    assert not [a for a in found.attributes if a[0] in ("src", "href") or a[0].startswith("on")]
    assert not re.search(r"https?:|@import|url\(", text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from importlib import resources

    from graphopt.cli import main

    assets, folder = Path(str(resources.files("graphopt") / "assets")), tmp_path_factory.mktemp("html")
    rows = ["--calib", assets / "digits_calib.npz", "--eval", assets / "digits_eval.npz"]
    commands = {
        "optimize": ["optimize", assets / "digits.onnx", "-o", folder / "o.onnx", "--passes", "fold, quantize", "-q", *rows],
        "audit": ["audit", folder / "o.onnx", "--runs", "4"],
    }
    for name, command in commands.items():
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in (*command, "--report", folder / f"{name}.html")])
        assert not stop.value.code
    return {name: folder / f"{name}.html" for name in commands}


def test_the_report_is_whole(pages: dict[str, Path]) -> None:
    text = pages["optimize"].read_text()
    found = checked(text)
    assert found.seen.count("svg") == 2
    for said in ("Before and after", "latency p50", "file, bytes", "top1 on 540 rows", "quantize", "How it was made", "SHA-256"):
        assert said in text


def test_the_audit_is_whole(pages: dict[str, Path]) -> None:
    text = pages["audit"].read_text()
    found = checked(text)
    assert found.seen.count("svg") == 2
    for said in ("By layer", "QLinearConv", "the same model in float", "By kind of node", "In short"):
        assert said in text


def test_names_of_tensors_cannot_break_the_page() -> None:
    evil = '<script>alert("x")</script>&'
    text = page(
        evil,
        evil,
        [section(evil, table((evil, "n"), [(evil, "1")]), items([evil]), bars([Bar(evil, 2.0, 1.0)], evil, (evil, evil)))],
    )
    checked(text)
    assert "<script" not in text


def test_bars_are_as_long_as_their_values() -> None:
    widths = [
        float(w) for w in re.findall(r'width="([\d.]+)" height', bars([Bar("a", 10.0, 5.0), Bar("b", None, 2.5)], "us", ("x", "y")))
    ]
    assert widths[0] * 2 == pytest.approx(widths[1])
    assert widths[2] * 4 == pytest.approx(widths[1])
    assert bars([Bar("a", 0.0)], "us", ("x", "y")) == bars([], "us", ("x", "y")) == ""


@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("name", ["optimize", "audit"])
def test_a_browser_shows_it(pages: dict[str, Path], name: str, width: int, tmp_path: Path) -> None:
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    shot = tmp_path / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1600", "--enable-logging=stderr"]
    command = [browser, *options, f"--screenshot={shot}", pages[name].as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr  # no message of the page's own
    assert shot.stat().st_size > 10_000
