"""Self-contained HTML pages, for screens of any width, light and dark, and for print: no script, nothing from the network.

Text goes through `escape`; what is markup already is `Html`. Bars are inline SVG that stretches, so that labels stay text that
wraps. The style is assets/report.css.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources


class Html(str):
    """Markup: not escaped again."""

    __slots__ = ()


@dataclass(frozen=True)
class Bar:
    """One row of a chart: a label and one value, or two; None where there is none."""

    label: str
    value: float | None
    base: float | None = None


@dataclass(frozen=True)
class Tile:
    """The answer to one question; `tone` is good, warn, bad or empty."""

    question: str
    answer: str
    note: str
    tone: str = ""


def text(value: str) -> Html:
    """Escaped, unless it is markup."""
    return value if isinstance(value, Html) else Html(escape(value))


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]], data: str) -> str:
    """The whole document: sections by title, without those that are empty, and the data as JSON in an element that is not shown."""
    style = (resources.files("graphopt") / "assets" / "report.css").read_text("utf8")
    shown = [(f"s{i}", name, content) for i, (name, content) in enumerate(sections) if content]
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in shown)
    parts = "".join(f'<section id="{key}"><h2>{escape(name)}</h2>{content}</section>' for key, name, content in shown)
    # the data must not end the element that holds it: "<" is written as JSON's own escape
    held = json.dumps(json.loads(data), separators=(",", ":")).replace("<", "\\u003c")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{style}</style>'
    )
    body = f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p><nav>{links}</nav>{parts}'
    store = f'<script type="application/json" id="report">{held}</script>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}{store}</body></html>\n'


def tiles(found: Sequence[Tile]) -> str:
    inner = [f'<span>{text(t.question)}</span><b class="{t.tone}">{text(t.answer)}</b><span>{text(t.note)}</span>' for t in found]
    cells = [f'<div class="tile">{i}</div>' for i in inner]
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: Sequence[int] = (), fixed: bool = False) -> str:
    """The first column and `text_columns` are words, the others figures. On a phone, rows of many columns or words become blocks.

    `fixed`: columns of equal width, for cells that hold bars.
    """
    if not rows:
        return ""
    kinds = [' class="text"' if i in text_columns else "" for i in range(len(header))]
    heads = [f' data-h="{escape(h)}"' for h in header]
    cells = [[f"<td{k}{d}>{text(v)}</td>" for k, d, v in zip(kinds, heads, row, strict=True)] for row in rows]
    lines = ["<tr>" + "".join(row) + "</tr>" for row in cells]
    blocks = len(text_columns) > 1 or len(header) > 4 or fixed
    names = " ".join(["cards"] * blocks + ["fixed"] * fixed)
    top = "".join(f"<th{k}>{text(h)}</th>" for k, h in zip(kinds, header, strict=True))
    return f'<div class="wide"><table class="{names}"><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def items(lines: Sequence[str], *, tone: str = "") -> str:
    """A list."""
    kind = f' class="{tone}"' if tone else ""
    return f"<ul>{''.join(f'<li{kind}>{text(line)}</li>' for line in lines)}</ul>" if lines else ""


def paragraph(words: str, *, soft: bool = False) -> str:
    return f"<p{' class=soft' if soft else ''}>{text(words)}</p>" if words else ""


def heading(title: str, content: str) -> str:
    """A part of a section; nothing where it is empty."""
    return f"<h3>{text(title)}</h3>{content}" if content else ""


def details(summary: str, content: str, *, unfold: bool = True, opened: bool = False) -> Html:
    """Folded away until it is clicked, unless `opened`; `unfold`: not in print."""
    state = f"{' class=unfold' * unfold}{' open' * opened}"
    return Html(f"<details{state}><summary>{text(summary)}</summary>{content}</details>")


def code(words: str) -> Html:
    return Html(f"<code>{escape(words)}</code>")


def key(*names: tuple[str, str]) -> str:
    """What the colours mean: (CSS variable, meaning)."""
    marks = [f'<i><span style="background:var(--{c})"></span>{escape(n)}</i>' for c, n in names if n]
    return f'<p class="key soft">{"".join(marks)}</p>'


def bar(value: float | None, most: float, said: str, kind: str = "fb") -> str:
    """One bar, as long as its share of `most`, and the figure behind it."""
    if value is None:
        return ""
    width = 0.0 if most <= 0 else max(0.6 if value else 0.0, 100 * value / most)
    track = '<rect class="track" width="100" height="9"/>'
    drawn = (
        f'<svg viewBox="0 0 100 9" preserveAspectRatio="none">{track}<rect class="{kind}" width="{width:.1f}" height="9"/></svg>'
    )
    return f'<div class="line">{drawn}<span>{text(said)}</span></div>'


def bars(rows: Sequence[Bar], unit: str, names: tuple[str, str]) -> str:
    """A bar chart, one row a label; grey is the base."""
    values = [v for r in rows for v in (r.value, r.base) if v is not None]
    if not values or max(values) <= 0:
        return ""
    paired, most = any(r.base is not None for r in rows), max(values)
    lines = []
    for row in rows:
        pair = [(row.base, "fa"), (row.value, "fb")]
        drawn = "".join(bar(v, most, f"{figure(v)} {unit}", kind) for v, kind in pair if v is not None)
        lines.append(f'<div class="bar"><div>{text(row.label)}</div><div>{drawn}</div></div>')
    colours = key(("a", names[0]), ("b", names[1])) if paired else ""
    return f"{colours}{''.join(lines)}"


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def size(value: float) -> str:
    """Bytes for people."""
    return f"{value / 1e6:.2f} MB" if value >= 100_000 else f"{value / 1e3:.1f} kB"


def many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
