"""Self-contained HTML pages: tables and bar charts as inline SVG, no script, no network, for screens of any width and print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#d9dee5;--a:#9aa7b8;--b:#1f6feb;--bad:#b42318}
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);margin:0 auto;max-width:1000px;padding:16px}
h1{font-size:1.5em;margin:.2em 0;overflow-wrap:anywhere}h2{font-size:1.15em;margin:1.6em 0 .4em}p,li{overflow-wrap:anywhere}
.soft{color:var(--soft)}.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:right;padding:3px 8px;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child{text-align:left}
.text{text-align:left!important}li.bad{color:var(--bad)}
svg{display:block;width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--ink)}
.key span{display:inline-block;width:12px;height:12px;margin:0 4px 0 12px;vertical-align:-1px}
@media(max-width:600px){body{font-size:14px;padding:10px}th,td{padding:3px 5px}.chart svg{min-width:640px}
.cards thead{display:none}.cards tr{display:block;padding:6px 0;border-bottom:1px solid var(--line)}
.cards td{display:block;text-align:left;border:0;padding:1px 0}
.cards td:not(:empty)::before{content:attr(data-h) ": ";color:var(--soft)}}
@media print{body{max-width:none}h2{break-after:avoid}svg,tr{break-inside:avoid}}
"""
_WIDTH, _LABEL, _ROW = 900, 330, 34


@dataclass(frozen=True)
class Bar:
    """One row of a chart: a label and one value, or two; None where there is none."""

    label: str
    value: float | None
    base: float | None = None


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """The whole document."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
    )
    body = f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>{"".join(sections)}'
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>\n'


def section(title: str, *parts: str) -> str:
    """A heading and what is under it; nothing where there is nothing."""
    return f"<h2>{escape(title)}</h2>{''.join(parts)}" if any(parts) else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[int] = ()) -> str:
    """The first column and those in `text` are words, the others figures."""
    if not rows:
        return ""
    kinds = [' class="text"' if i in text else "" for i in range(len(header))]
    heads = [f' data-h="{escape(h)}"' for h in header]
    cells = [[f"<td{k}{d}>{escape(v)}</td>" for k, d, v in zip(kinds, heads, row, strict=True)] for row in rows]
    lines = ["<tr>" + "".join(row) + "</tr>" for row in cells]
    cards = ' class="cards"' if len(text) > 1 else ""  # on a phone each row is a block
    names = "".join(f"<th{k}>{escape(h)}</th>" for k, h in zip(kinds, header, strict=True))
    return f'<div class="wide"><table{cards}><thead><tr>{names}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def items(lines: Sequence[str], *, bad: bool = False) -> str:
    """A list."""
    kind = ' class="bad"' if bad else ""
    return f"<ul>{''.join(f'<li{kind}>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def bars(rows: Sequence[Bar], unit: str, names: tuple[str, str]) -> str:
    """A bar chart, one row a label; grey is the base."""
    values = [v for r in rows for v in (r.value, r.base) if v is not None]
    if not values or max(values) <= 0:
        return ""
    scale = (_WIDTH - _LABEL - 110) / max(values)
    paired = any(r.base is not None for r in rows)
    parts = []
    for i, row in enumerate(rows):
        top = i * _ROW
        label = row.label if len(row.label) <= 40 else "…" + row.label[-39:]
        parts.append(
            f'<text x="{_LABEL - 8}" y="{top + 20}" text-anchor="end">{escape(label)}<title>{escape(row.label)}</title></text>'
        )
        thick = 12 if paired else 18
        for value, offset, colour in ((row.base, 3, "var(--a)"), (row.value, 16 if paired else 5, "var(--b)")):
            if value is None:
                continue
            width = max(1.0, value * scale)
            parts.append(f'<rect x="{_LABEL}" y="{top + offset}" width="{width:.1f}" height="{thick}" fill="{colour}"/>')
            parts.append(
                f'<text x="{_LABEL + width + 5:.1f}" y="{top + offset + thick - 2}">{_figure(value)} {escape(unit)}</text>'
            )
    said = f'<p class="key soft"><span style="background:var(--a)"></span>{escape(names[0])}' if paired else '<p class="key soft">'
    said += f'<span style="background:var(--b)"></span>{escape(names[1])}</p>'
    size = f'viewBox="0 0 {_WIDTH} {len(rows) * _ROW + 4}" role="img" aria-label="{escape(unit)} by row"'
    return f'{said}<div class="wide chart"><svg {size}>{"".join(parts)}</svg></div>'


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
