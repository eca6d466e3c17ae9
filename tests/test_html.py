"""The HTML pages: complete, self-contained, small, and shown without errors by a browser where one is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from pydantic import BaseModel

from graphopt.audit_report import AuditReport
from graphopt.benchmark import BenchReport
from graphopt.evaluation import EvaluationReport
from graphopt.html import rendered
from graphopt.html_charts import Value, Variant, histogram, percent, variants
from graphopt.html_page import Bar, Html, Tile, bars, details, items, page, table, tiles
from graphopt.report import RangeRow, Report, SweepReport

Run = Callable[..., "tuple[int, str, str]"]
VOID = {"meta", "br", "hr", "img", "link"}
LIMIT = 5_000_000  # bytes
EVIL = '<script>alert("x")</script><!--&amp;</style>'
REPORTS: dict[str, type[BaseModel]] = {
    "optimize": Report,
    "audit": AuditReport,
    "bench": BenchReport,
    "evaluate": EvaluationReport,
    "sweep": SweepReport,
}


class Balanced(HTMLParser):
    """Raises where tags do not close in order; keeps names, attributes and what is in a script."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(text: str) -> Balanced:
    """What the parser found in a page that is whole, asks for nothing from elsewhere and runs no code."""
    found = Balanced()
    found.feed(text)
    assert found.open == []
    assert len(text.encode()) < LIMIT
    assert found.scripts == [{"type": "application/json", "id": "report"}]
    assert not [a for a in found.attributes if a[0] == "src" or a[0].startswith("on")]
    assert all(v is not None and v.startswith(("#", "data:,")) for k, v in found.attributes if k == "href")
    assert not re.search(r"@import|url\(|@font-face", text)
    ids = [v for k, v in found.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)
    return found


def data(text: str) -> str:
    """The JSON that a page holds."""
    return str(re.findall(r'<script type="application/json" id="report">(.*?)</script>', text, re.S)[0])


def shown(text: str) -> str:
    """The words of a page, without markup and data."""
    return unescape(re.sub(r"<[^>]+>", " ", text.partition("<body>")[2].partition("<script")[0]))


def run(folder: Path, *command: object) -> None:
    from graphopt.cli import main

    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in command])
    assert not stop.value.code


@pytest.fixture(scope="module")
def pages(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each command, by name."""
    folder = tmp_path_factory.mktemp("html")
    model, int8 = digits / "digits.onnx", folder / "o.onnx"
    calib, labelled = digits / "digits_calib.npz", digits / "digits_eval.npz"
    rows = ["--calib", calib, "--eval", labelled]
    passes = "fold, prune-channels macs=0.6 criterion=l2, cleanup, quantize"
    commands: dict[str, list[object]] = {
        "optimize": ["optimize", model, "-o", int8, "--passes", passes, "-q", *rows],
        "audit": ["audit", int8, "--runs", "4"],
        "bench": ["bench", model, int8, "--seconds", "0.5", "--eval", labelled],
        "evaluate": ["evaluate", int8, "--base", model, "--data", labelled, "--hard", labelled],
        "sweep": ["sweep", model, "--keep", "0.8,0.5", "--passes", "fold, prune-channels macs={}, cleanup", "-q", *rows],
    }
    for name, command in commands.items():
        run(folder, *command, "--report", folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in commands}


SECTIONS = {
    "optimize": (
        *("Is it good enough?", "top1 on 540 rows", "Is it faster?", "Before and after", "latency p50", "Variants", "1. original"),
        *("2. exact passes", "3. then prune-channels", "4. then quantize", "Where the time goes", "Precision", "Layer by layer"),
        *("zero weights", "Ranges", "cut off", "What each pass did", "removed 9 BatchNormalization", "The graph, before and after"),
        *("How to go back", "--passes", "SHA-256", "How it was made"),
    ),
    "audit": ("By layer", "QLinearConv", "the same model in float", "By kind of node", "In short"),
    "bench": ("Variants", "quality (top1)", "lost/won", "95 % interval", "Memory", "against itself"),
    "evaluate": ("Is it good enough?", "Variants", "Rows lost and won", "Classes", "Hard set", "preprocessing"),
    "sweep": ("Variants", "keep 0.5", "Where to stop", "Make one of them", "graphopt optimize", "What was done for each"),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_page_is_whole_and_asks_for_nothing(pages: dict[str, Path], name: str) -> None:
    text = pages[name].read_text()
    found = checked(text)
    assert "svg" in found.seen
    assert [said for said in SECTIONS[name] if said not in shown(text)] == []


@pytest.mark.parametrize("name", SECTIONS)
def test_a_page_holds_the_same_data_as_json(pages: dict[str, Path], name: str) -> None:
    text = pages[name].read_text()
    report = REPORTS[name].model_validate_json(data(text))
    assert rendered(report, Path("again.html")) == text
    assert json.loads(rendered(report, Path("again.json"))) == json.loads(data(text))


def test_every_layer_and_node_of_the_models_is_there(pages: dict[str, Path], digits: Path) -> None:
    report = Report.model_validate_json(data(pages["optimize"].read_text()))
    detail = report.detail
    assert detail is not None
    result = onnx.load(pages["optimize"].with_name("o.onnx"))
    assert [n.name for n in detail.nodes if n.removed is None] == [n.name for n in result.graph.node]
    before = [n.name for n in onnx.load(digits / "digits.onnx").graph.node if n.op_type != "Constant"]
    assert [n.name for n in detail.nodes if n.added is None] == before
    layers = {r.name for r in detail.layers}
    assert layers >= {n.name for n in result.graph.node if n.op_type in ("Conv", "Gemm")}
    timed = [r for r in detail.layers if r.us]
    assert sum(r.us or 0 for r in timed) <= (detail.us or 0)
    assert any(r.int8 for r in timed)
    assert all(r.error is not None and r.error < 0.1 for r in detail.layers if r.op == "Conv" and r.name != "stem.conv")


def test_bars_are_as_long_as_their_values() -> None:
    drawn = bars([Bar("a", 10.0, 5.0), Bar("b", None, 2.5)], "us", ("x", "y"))
    widths = [float(w) for w in re.findall(r'class="f[ab]" width="([\d.]+)"', drawn)]
    assert widths == [50.0, 100.0, 25.0]
    assert bars([Bar("a", 0.0)], "us", ("x", "y")) == bars([], "us", ("x", "y")) == ""


def test_the_front_is_what_nothing_beats() -> None:
    found = [
        *(Variant("best", 0.9, 4.0, None), Variant("beaten", 0.8, 4.5, None), Variant("fast", 0.7, 1.0, None)),
        *(Variant("equal", 0.7, 1.0, None), Variant("unknown", None, 0.5, None)),
    ]
    drawn = variants(found, Value("quality", True, percent))
    assert re.findall(r'<circle class="(\w+)"', drawn) == ["fb", "fa", "fb", "fb"]
    rows = re.findall(r"<td[^>]*>([^<]*)</td></tr>", drawn)
    assert rows == ["yes", "no", "yes", "yes", "no"]
    lower = variants([Variant("a", 0.1, 2.0, None), Variant("b", 0.2, 3.0, None)], Value("error", False))
    assert re.findall(r'<circle class="(\w+)"', lower) == ["fb", "fa"]


def test_numbers_of_near_points_do_not_cover_each_other() -> None:
    near = [Variant(str(i), 0.9 + i * 1e-4, 10 + i * 0.05, None) for i in range(4)]
    drawn = variants([Variant("far", 0.5, 1.0, None), *near], Value("quality"))
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="middle" class="halo">', drawn)
    numbers = [(float(x), float(y)) for x, y in found]
    assert len(numbers) == 5
    assert min(abs(a[0] - b[0]) + abs(a[1] - b[1]) for i, a in enumerate(numbers) for b in numbers[:i]) > 7


def test_a_histogram_shows_what_is_cut_off() -> None:
    row = RangeRow(tensor="t", low=0.0, high=2.0, seen_low=-2.0, seen_high=4.0, saturated=0.25, counts=[1, 0, 2, 2, 0, 1])
    drawn = histogram(row)
    inside, outside = (re.findall(rf'<path class="{kind}" d="([^"]*)"', drawn)[0].count("M") for kind in ("fb", "fbad"))
    assert (inside, outside) == (2, 2)
    assert "range 0 to 2, seen -2 to 4, 25 % cut off" in drawn
    assert "nothing cut off" in histogram(row.model_copy(update={"saturated": 0.0, "low": -2.0, "high": 4.0}))


def test_the_models_of_several_reports_come_into_one_plot(pages: dict[str, Path], cli: Run, tmp_path: Path) -> None:
    given = [pages[n] for n in ("optimize", "sweep", "evaluate", "audit")]
    (tmp_path / "b.json").write_text(data(pages["bench"].read_text()))
    out = tmp_path / "all.html"
    assert cli("report", *given, tmp_path / "b.json", "-o", out)[0] == 0
    text = out.read_text()
    checked(text)
    assert len(json.loads(data(text))) == 5
    for said in ("1. original", "keep 0.5", "then quantize", "digits.onnx", "sweep.html", "b.json", "measured at different times"):
        assert said in shown(text)
    assert cli("report", pages["sweep"], "-o", tmp_path / "again.html")[0] == 0
    assert (tmp_path / "again.html").read_text() == pages["sweep"].read_text()


def test_what_is_no_report_is_refused(cli: Run, pages: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    for given, said in (("x.json", "is no report of optimize"), ("y.json", "cannot read the report")):
        code, _, err = cli("report", tmp_path / given, "-o", tmp_path / "x.html")
        assert (code, said in err) == (1, True)
    assert "must end in .html" in cli("report", pages["sweep"], "-o", tmp_path / "x.pdf")[2]
    assert "no two models" in cli("report", pages["audit"], pages["audit"], "-o", tmp_path / "x.html")[2]
    assert not (tmp_path / "x.html").exists()


# ---- names that would break a page


def test_words_cannot_break_the_page() -> None:
    parts = [
        table((EVIL, "n"), [(EVIL, "1")]),
        items([EVIL]) + tiles([Tile(EVIL, EVIL, EVIL)]) + details(EVIL, items([EVIL])),
        bars([Bar(EVIL, 2.0, 1.0)], EVIL, (EVIL, EVIL))
        + variants([Variant(EVIL, 1.0, 1.0, 1), Variant(EVIL, 2.0, 2.0, 2)], Value(EVIL)),
        histogram(RangeRow(tensor=EVIL, low=0, high=1, seen_low=0, seen_high=1, saturated=0, counts=[1, 2])),
    ]
    text = page(EVIL, EVIL, [(EVIL, p) for p in parts], json.dumps({EVIL: EVIL}))
    checked(text)
    assert "<script>" not in text
    assert json.loads(data(text)) == {EVIL: EVIL}
    assert Html("<b>") in items([Html("<b>")])


@pytest.fixture(scope="module")
def evil(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a model whose nodes and tensors are named to break it."""
    folder = tmp_path_factory.mktemp("evil")
    proto = onnx.load(digits / "digits.onnx")
    for number, node in enumerate(proto.graph.node):
        node.name = f"{EVIL}{number}" + "x" * 300
        node.output[:] = [o if o in {t.name for t in proto.graph.output} else f"{EVIL}{o}" for o in node.output]
        known = {t.name for t in (*proto.graph.input, *proto.graph.initializer)}
        node.input[:] = [i if i in known or not i else f"{EVIL}{i}" for i in node.input]
    del proto.graph.value_info[:]
    onnx.save(proto, folder / "evil.onnx")
    rows = ["--calib", digits / "digits_calib.npz", "--eval", digits / "digits_eval.npz"]
    run(folder, "optimize", folder / "evil.onnx", "--passes", "fold, quantize", "-q", *rows, "--report", folder / "evil.html")
    return folder / "evil.html"


def test_names_of_nodes_cannot_break_the_page(evil: Path) -> None:
    text = evil.read_text()
    checked(text)
    assert "<script>" not in text
    assert EVIL in shown(text)


# ---- in a browser


def browser() -> str:
    found = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


def opened(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    common += ["--allow-file-access-from-files"]
    done = subprocess.run([browser(), *common, *options, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr  # no message of the page's own
    return done


@pytest.mark.parametrize("name", SECTIONS)
def test_a_browser_shows_and_prints_it(pages: dict[str, Path], name: str, tmp_path: Path) -> None:
    shot, pdf = tmp_path / "shot.png", tmp_path / "page.pdf"
    opened(pages[name], "--window-size=1280,1600", f"--screenshot={shot}")
    assert shot.stat().st_size > 10_000
    opened(pages[name], f"--print-to-pdf={pdf}")
    assert pdf.read_bytes()[:4] == b"%PDF"


MEASURE = """<!doctype html><body></body><script>
const widths = WIDTHS, said = []
async function look() {
  for (const width of widths) {
    const frame = document.createElement("iframe")
    frame.style.cssText = `border:0;width:${width}px;height:600px`
    frame.src = "PAGE"
    document.body.append(frame)
    await new Promise(done => { frame.onload = done })
    const page = frame.contentDocument
    page.querySelectorAll("details").forEach(d => { d.open = true })
    said.push(page.documentElement.scrollWidth)
  }
  document.title = JSON.stringify(said)
}
look()
</script>"""


@pytest.mark.parametrize("name", [*SECTIONS, "evil"])
def test_no_page_scrolls_sideways(pages: dict[str, Path], name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """On phones of 320 and 360 pixels, a tablet and a desk, everything unfolded."""
    path: Path = request.getfixturevalue("evil") if name == "evil" else pages[name]
    widths, frame = [320, 360, 768, 1280], tmp_path / "frame.html"
    frame.write_text(MEASURE.replace("WIDTHS", str(widths)).replace("PAGE", path.as_uri()))
    done = opened(frame, "--virtual-time-budget=20000", "--dump-dom")
    found = re.findall(r"<title>(.*?)</title>", done.stdout)
    assert found, done.stderr
    assert json.loads(found[0]) == widths


# ---- what is measured for it


def test_ranges_add_up() -> None:
    from graphopt.observers import observe
    from graphopt.ranges import BINS, summary

    values = np.linspace(-1, 3, 4001, dtype=np.float32)
    row = RangeRow(tensor="t", **summary(observe(values, histogram=True), -0.5, 2.0))  # type: ignore[arg-type]
    assert (len(row.counts), sum(row.counts)) == (BINS, 4001)
    assert (row.seen_low, row.seen_high) == (-1, 3)
    assert row.saturated == pytest.approx((500 + 1000) / 4001, abs=0.002)
    assert max(row.counts) - min(row.counts) <= 4
    assert summary(observe(values), -0.5, 2.0) is None
