"""Charts of a report as inline SVG: variants as points of quality over cost, and histograms of calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from graphopt.html_page import figure, paragraph, size, table
from graphopt.report import RangeRow

_WIDE, _HIGH = 340, 240  # of a panel, in the pixels of a small phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 40
_FLAT = 0.02  # of a value: less than this is not blown up to fill the picture
_MB = 1_000_000  # bytes from which sizes are in MB
_NEAR = 13.0  # pixels within which numbers would overlap
_AROUND = ((0, -8), (10, 4), (-10, 4), (0, 17), (9, -6), (-9, -6), (9, 14), (-9, 14), (20, 4), (-20, 4), (0, -20), (0, 28))


@dataclass(frozen=True)
class Variant:
    """A model in the plot; `value` is quality, or an error. `cells`: more figures for the table."""

    name: str
    value: float | None
    latency_ms: float | None
    file_bytes: int | None
    cells: tuple[str, ...] = ()


@dataclass(frozen=True)
class Value:
    """What the y axis is."""

    name: str
    higher: bool = True
    show: Callable[[float], str] = lambda v: f"{v:.3g}"


@dataclass(frozen=True)
class Scale:
    """Where a value lies along an axis of so many pixels from `start`; ticks are the first and the last value too."""

    ticks: list[float]
    start: float
    length: float

    def __call__(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return self.start + self.length * (value - low) / (high - low)


def percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def variants(found: Sequence[Variant], value: Value, header: Sequence[str] = ()) -> str:
    """A panel for each cost that is known, and the table that says which number is which model."""
    unit, scale = ("MB", 1e6) if max((v.file_bytes or 0 for v in found), default=0) >= _MB else ("kB", 1e3)
    costs: dict[str, Callable[[Variant], float | None]] = {
        "latency p50, ms": lambda v: v.latency_ms,
        f"file size, {unit}": lambda v: None if v.file_bytes is None else v.file_bytes / scale,
    }
    points: dict[str, list[Point]] = {
        name: [(x, v.value, i) for i, v in enumerate(found) if (x := get(v)) is not None and v.value is not None]
        for name, get in costs.items()
    }
    panels = [_panel(name, p, value) for name, p in points.items() if len(p) > 1]
    best = [_front(p, higher=value.higher) for p in points.values() if len(p) > 1]
    rows = [
        (
            f"{i + 1}. {v.name}",
            "-" if v.value is None else value.show(v.value),
            "-" if v.latency_ms is None else f"{v.latency_ms:.3f}",
            "-" if v.file_bytes is None else size(v.file_bytes),
            *v.cells,
            "yes" if any(i in front for front in best) else "no" if best else "",
        )
        for i, v in enumerate(found)
    ]
    note = "Blue and joined: no other model is at least as good in both. Grey: another one is."
    listed = table(("variant", value.name, "p50, ms", "file", *header, "on a front"), rows, text_columns=(0,))
    plots = f'<div class="panels">{"".join(panels)}</div>' + paragraph(note, soft=True) if panels else ""
    return plots + listed


Point = tuple[float, float, int]  # x, y, number of the variant


def _front(points: Sequence[Point], *, higher: bool) -> list[int]:
    """The numbers of those that no other point beats in one figure and equals or beats in the other."""
    sign = 1 if higher else -1

    def beaten(p: Point) -> bool:
        return any(q[0] <= p[0] and sign * q[1] >= sign * p[1] and q[:2] != p[:2] for q in points)

    return [p[2] for p in sorted(points) if not beaten(p)]


def _panel(name: str, points: Sequence[Point], value: Value) -> str:
    along = Scale(ticks([0.0, *(p[0] for p in points)], 4), _LEFT, _WIDE - _LEFT - _RIGHT)
    up = Scale(ticks([p[1] for p in points]), _HIGH - _BOTTOM, _TOP + _BOTTOM - _HIGH)
    out = []
    for tick in up.ticks:
        y = f"{up(tick):.1f}"
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDE - _RIGHT}" y1="{y}" y2="{y}"/>')
        out.append(f'<text class="dim" x="{_LEFT - 5}" y="{up(tick) + 4:.1f}" text-anchor="end">{escape(value.show(tick))}</text>')
    for number, tick in enumerate(along.ticks):
        x, anchor = along(tick), "middle" if 0 < number < len(along.ticks) - 1 else "start" if number == 0 else "end"
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HIGH - _BOTTOM}"/>')
        out.append(f'<text class="dim" x="{x:.1f}" y="{_HIGH - _BOTTOM + 14}" text-anchor="{anchor}">{figure(tick)}</text>')
    out.append(f'<text x="{_WIDE - _RIGHT}" y="{_HIGH - 6}" text-anchor="end">{escape(name)}</text>')
    out.append(f'<text x="2" y="{_HIGH - 6}">{escape(value.name)} (up)</text>')
    front = _front(points, higher=value.higher)
    spots = {i: (along(x), up(y)) for x, y, i in points}
    line = " ".join("{:.1f},{:.1f}".format(*spots[i]) for i in front)
    out.append(f'<polyline points="{line}" class="front"/>')
    out += [f'<circle class="{"fb" if i in front else "fa"}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>' for i, (x, y) in spots.items()]
    out += _numbers(spots)
    said = f"{value.name} over {name}"
    return f'<svg class="plot" viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{escape(said)}">{"".join(out)}</svg>'


def _numbers(spots: dict[int, tuple[float, float]]) -> list[str]:
    """The numbers beside their points, where they hide neither a point nor each other, if there is such a place."""
    taken = [*spots.values()]
    out = []
    for i, (x, y) in spots.items():

        def room(place: tuple[float, float], x: float = x, y: float = y) -> float:
            at = (x + place[0], y + place[1] - 4)
            inside = _LEFT < at[0] < _WIDE - 4 and 4 < at[1] < _HIGH - _BOTTOM
            return min(math.dist(at, t) for t in taken if t != (x, y)) if inside and len(taken) > 1 else _NEAR * inside

        place = next((p for p in _AROUND if room(p) >= _NEAR), max(_AROUND, key=room))
        taken.append((x + place[0], y + place[1] - 4))
        out.append(f'<text x="{x + place[0]:.1f}" y="{y + place[1]:.1f}" text-anchor="middle" class="halo">{i + 1}</text>')
    return out


def ticks(values: Sequence[float], count: int = 5) -> list[float]:
    """Round numbers that enclose the values."""
    low, high = min(values), max(values)
    raw = max(high - low, abs(high) * _FLAT, 1e-9) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(start, max(end, start + 1) + 1)]


def histogram(row: RangeRow) -> str:
    """Calibration's values as bars (square roots, so that tails can be seen), the range as lines, what is cut off in red."""
    low, high = min(row.low, row.seen_low), max(row.high, row.seen_high)
    span = (high - low) or 1.0
    step = (row.seen_high - row.seen_low) / max(len(row.counts), 1)
    most = math.sqrt(max([*row.counts, 1]))

    def across(value: float) -> float:
        return 240 * (value - low) / span

    drawn = {"fb": [], "fbad": []}  # type: dict[str, list[str]]
    for i, count in enumerate(row.counts):
        left = row.seen_low + i * step
        tall = 52 * math.sqrt(count) / most
        kind = "fbad" if left + step <= row.low or left >= row.high else "fb"
        if count:
            drawn[kind].append(f"M{across(left):.1f} 54v-{max(tall, 1.0):.1f}h{max(240 * step / span, 0.8):.1f}V54z")
    shapes = "".join(f'<path class="{kind}" d="{"".join(d)}"/>' for kind, d in drawn.items() if d)
    ends = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="56" class="end"/>'
        for x in (min(max(across(v), 0.5), 239.5) for v in (row.low, row.high))
    )
    outside = ((0.0, across(row.low)), (across(row.high), 240.0))
    shaded = "".join(f'<rect class="cut" x="{a:.1f}" width="{b - a:.1f}" height="54"/>' for a, b in outside if b - a > 0.1)
    cut = "nothing cut off" if not row.saturated else f"{100 * row.saturated:.2g} % cut off"
    said = f"range {row.low:.3g} to {row.high:.3g}, seen {row.seen_low:.3g} to {row.seen_high:.3g}, {cut}"
    picture = (
        f'<svg viewBox="0 0 240 56" preserveAspectRatio="none" role="img" aria-label="{escape(said)}">{shaded}{shapes}{ends}</svg>'
    )
    return f'<figure>{picture}<figcaption>{escape(row.tensor)}<br><span class="soft">{escape(said)}</span></figcaption></figure>'
