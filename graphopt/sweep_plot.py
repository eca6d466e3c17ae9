"""A sweep as one self-contained SVG: quality, or the error at the outputs, against MACs, latency and file size."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from graphopt.errors import OptionError
from graphopt.evaluate import METRICS
from graphopt.html_charts import Scale
from graphopt.html_charts import ticks as round_ticks
from graphopt.knee import CHORD, WITHIN, shown_error
from graphopt.report import PointRow, SweepReport

_WIDE, _HIGH, _LEFT, _TOP, _GAP = 270, 230, 70, 64, 46  # of a panel, and the margins around panels, in pixels
_STYLE = """
svg { --paper: #ffffff; --ink: #1c2128; --dim: #626b76; --grid: #dfe3e8; --line: #1769aa; --mark: #b3470a; --curve: #23803d; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #14181d; --ink: #e6e9ed; --dim: #9aa4af; --grid: #2d343c; --line: #6cb6ff; --mark: #ff9d5c; --curve: #6fd08c; }
}
text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.title { font-size: 15px; font-weight: 600; }
.dim { fill: var(--dim); font-size: 11px; }
.paper { fill: var(--paper); }
.grid { stroke: var(--grid); stroke-width: 1; }
.line { fill: none; stroke: var(--line); stroke-width: 1.6; }
.dot { fill: var(--line); }
.first { fill: var(--paper); stroke: var(--line); stroke-width: 2; }
.within { fill: none; stroke: var(--mark); stroke-width: 2; }
.chord { fill: none; stroke: var(--curve); stroke-width: 2; stroke-dasharray: 3 2; }
"""
_RINGS = {WITHIN: ("within", 7), CHORD: ("chord", 10)}  # class and radius
_LETTER = 6  # pixels, about
_FLAT = 0.02  # of a value: less than this is not blown up to fill the picture
Show = Callable[[float], str]


@dataclass(frozen=True)
class _Mark:
    """A model: its share of the original's cost, its value, and the rules that name it."""

    x: float
    y: float
    label: str
    rules: tuple[str, ...] = ()


def plot(report: SweepReport) -> str:
    """The picture. OptionError where there is neither quality nor error to draw."""
    what, first, value, show = _values(report)
    panels = [(title, _marks(report, first, value, share)) for title, share in _shares(report)]
    panels = [(title, marks) for title, marks in panels if len(marks) > 1]
    if not panels:
        raise OptionError("sweep: nothing to draw: give labelled rows (--eval) or calibration rows (--calib)")
    width = _LEFT + len(panels) * (_WIDE + _GAP)
    ticks = round_ticks([m.y for _, marks in panels for m in marks])
    body = [f'<text class="title" x="20" y="26">{what} against what the model costs</text>']
    body.append(f'<text class="dim" x="20" y="44">{escape(textwrap.shorten(report.template, width // _LETTER))}</text>')
    for number, (title, marks) in enumerate(panels):
        body += _panel(title, marks, _LEFT + number * (_WIDE + _GAP), ticks, show if number == 0 else None)
    notes, height = _notes(report, width)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">\n'
        f"<title>{what} against MACs, latency and file size</title>\n<style>{_STYLE}</style>\n"
        f'<rect class="paper" width="{width}" height="{height}"/>\n' + "\n".join([*body, *notes]) + "\n</svg>\n"
    )


def _values(report: SweepReport) -> tuple[str, float, Callable[[PointRow], float | None], Show]:
    """What the y axis is, the original's value, a point's, and how one is written."""
    quality = report.original.quality
    if quality is None:
        return "Error at the outputs", 0.0, shown_error, lambda v: f"{v:.3g}"
    share = report.metric in METRICS and report.metric != "negative-mse"
    show: Show = (lambda v: f"{100 * v:.3g} %") if share else (lambda v: f"{v:.3g}")
    return escape(f"Quality ({report.metric})"), quality, lambda p: p.quality and p.quality.optimized, show


def _shares(report: SweepReport) -> list[tuple[str, Callable[[PointRow], float | None]]]:
    """The x axes: shares of the original's."""
    size = report.original.file_bytes
    return [
        ("MACs", lambda p: p.macs_ratio),
        ("latency", lambda p: p.latency_ratio),
        ("file size", lambda p: p.file_bytes / size if size and p.file_bytes is not None else None),
    ]


def _marks(
    report: SweepReport, first: float, value: Callable[[PointRow], float | None], share: Callable[[PointRow], float | None]
) -> list[_Mark]:
    found = [_Mark(1.0, first, "original")]
    for point in report.points:
        x, y = share(point), value(point)
        if x is not None and y is not None:
            rules = tuple(k.rule for k in report.knees if k.keep == point.keep)
            found.append(_Mark(x, y, f"{point.keep:g}", rules))
    return found


def _panel(title: str, marks: Sequence[_Mark], left: float, ticks: list[float], show: Show | None) -> list[str]:
    """One plot; `show` writes the values of the y axis, which the others share."""
    along = Scale(round_ticks([m.x for m in marks]), left, _WIDE)
    up = Scale(ticks, _TOP + _HIGH, -_HIGH)
    out = []
    for tick in ticks:
        y = up(tick)
        out.append(f'<line class="grid" x1="{left}" x2="{left + _WIDE}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if show is not None:
            out.append(f'<text class="dim" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(show(tick))}</text>')
    for tick in along.ticks:
        x = along(tick)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + _HIGH}"/>')
        out.append(f'<text class="dim" x="{x:.1f}" y="{_TOP + _HIGH + 16}" text-anchor="middle">{100 * tick:.3g} %</text>')
    middle = left + _WIDE / 2
    out.append(f'<text x="{middle:.1f}" y="{_TOP + _HIGH + 34}" text-anchor="middle">{title}, of the original</text>')
    spots = [(along(m.x), up(m.y), m) for m in marks]
    out.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)}"/>')
    for number, (x, y, mark) in enumerate(spots):
        out += _dot(x, y, mark, first=number == 0, right=x > middle, rises=marks[-1].y > marks[0].y)
    return out


def _dot(x: float, y: float, mark: _Mark, *, first: bool, right: bool, rises: bool) -> list[str]:
    rings = [f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>' for name, r in map(_RINGS.__getitem__, mark.rules)]
    dot = f'<circle class="{"first" if first else "dot"}" cx="{x:.1f}" cy="{y:.1f}" r="{5 if first else 4}"/>'
    # quality falls to the left and errors rise, so names go where there is room: beside points, and over or under the original
    dx, dy, anchor = (9, -9, "start") if rises else (-9, -9, "end")
    if first:
        dx, dy, anchor = 0, (-28 if rises else 22), "end" if right else "start"
    label = f'<text class="dim" x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">{mark.label}</text>'
    return [*rings, dot, label]


def _notes(report: SweepReport, width: int) -> tuple[list[str], int]:
    """Under the plots: what the rings mean and what is missing; and the height of the picture."""
    y, out = _TOP + _HIGH + 62, []
    named = [(k.rule, f"{k.rule}: " + (f"{k.keep:g}, {k.why}" if k.keep is not None else k.why)) for k in report.knees]
    missing = [("", f"{p.keep:g} not reached: {p.failed}") for p in report.points if p.failed is not None]
    for rule, text in [*named, *missing]:
        if rule:
            name, radius = _RINGS[rule]
            out.append(f'<circle class="{name}" cx="30" cy="{y - 4}" r="{min(radius, 8)}"/>')
        for line in textwrap.wrap(text, (width - 60) // _LETTER):
            out.append(f'<text class="dim" x="46" y="{y}">{escape(line)}</text>')
            y += 18
        y += 6
    return out, y
