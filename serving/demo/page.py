"""A self-contained HTML page from headings, paragraphs, tables and figures; every text is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid #d5dae1; }
p, figcaption { max-width: 46rem; }
.lead, th, figcaption { color: #4a5562; }
.lead { margin-top: 0; }
table { border-collapse: collapse; font-size: .9rem; margin: .8rem 0; }
th, td { text-align: left; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid #e6eaef; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
th { font-weight: 600; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; }
pre { background: #f5f7f9; padding: .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
.wide { overflow-x: auto; }
"""
Cell = str | int | float | None


class Page:
    """Collects parts in reading order; `html()` gives the whole page with its pictures inside."""

    def __init__(self, title: str, lead: str) -> None:
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="lead">{html.escape(lead)}</p>']

    def heading(self, text: str) -> None:
        """A section heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """A block of commands or JSON, shown as it is."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table; a column whose values are all numbers (or missing) is aligned to the right."""
        numeric = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
        kinds = [' class="number"' if flag else "" for flag in numeric]
        head = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td{k}>{html.escape(shown(v))}</td>" for v, k in zip(row, kinds, strict=True)) + "</tr>"
            for row in rows
        )
        self._parts.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def figure(self, image: Path, caption: str) -> None:
        """A PNG picture with its caption, stored inside the page."""
        data = base64.b64encode(image.read_bytes()).decode()
        self._parts.append(
            f'<figure><img alt="{html.escape(caption, quote=True)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def html(self) -> str:
        """The page."""
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{STYLE}</style>'
        viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
        return (
            f'<!doctype html><html lang="en"><head>{head}{viewport}</head><body>{"".join(self._parts)}</body></html>\n'
        )


def shown(value: Cell) -> str:
    """A value as a reader expects it: thousands separated, four significant digits, a dash for nothing."""
    if value is None or value != value:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return value
