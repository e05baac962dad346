"""Rows of marks with intervals: an edit a row, what was measured as a filled mark, what it is held against hollow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from genescale.ingestion.reports.report_figures import escaped
from genescale.perturbation.reports.axes import RIGHT, TOP, WIDTH, Axis, axis_over, short
from genescale.training.evaluation.charts import key, shape

ROW, NAMES, BESIDE, FOOT = 19.0, 118.0, 46.0, 44.0
LONGEST_NAME = 16


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value of one series (its number is its look), with an interval where there is one."""

    series: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: its name, what stands at its right edge, and its marks."""

    name: str
    beside: str
    marks: Sequence[Mark]


def rows_figure(
    rows: Sequence[Row], series: Sequence[str], *, title: str, beside: str, label: str, reference: float = 0.0
) -> str:
    """The rows on one shared axis with a dashed line at `reference`, and a key of the series that occur."""
    values = [v for row in rows for m in row.marks for v in (m.value, m.low, m.high) if v is not None]
    axis = axis_over([*values, reference], title)
    top, bottom = TOP + 10, TOP + 10 + len(rows) * ROW
    grid = "".join(
        f'<line class="grid-line" x1="{_at(axis, t):.1f}" x2="{_at(axis, t):.1f}" '
        f'y1="{top:g}" y2="{bottom:g}"/>'
        f'<text class="soft" x="{_at(axis, t):.1f}" y="{bottom + 15:g}" text-anchor="middle">{axis.text(t)}</text>'
        for t in axis.ticks
    )
    place = f"{_at(axis, reference):.1f}"
    grid += f'<line class="zero" x1="{place}" x2="{place}" y1="{top:g}" y2="{bottom:g}"/>'
    drawn = "".join(_row(row, top + (place + 0.5) * ROW, axis, series) for place, row in enumerate(rows))
    texts = (
        f'<text class="soft small" x="{WIDTH - 2:g}" y="{TOP + 3:g}" text-anchor="end">{escaped(beside)}</text>'
        f'<text class="soft" x="{(NAMES + WIDTH - BESIDE) / 2:g}" y="{bottom + 34:g}" text-anchor="middle">'
        f"{escaped(axis.titled)}</text>"
    )
    used = {mark.series for row in rows for mark in row.marks}
    names = [name for place, name in enumerate(series) if place in used]
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {bottom + FOOT:g}" role="img" aria-label="{escaped(label)}">'
        f"{grid}{texts}{drawn}</svg>" + (key(names, lines=False) if len(names) > 1 else "")
    )


def _at(axis: Axis, value: float) -> float:
    return NAMES + 8 + axis.share(value) * (WIDTH - NAMES - 8 - BESIDE - RIGHT)


def _row(row: Row, y: float, axis: Axis, series: Sequence[str]) -> str:
    drawn = (
        f'<text x="{NAMES:g}" y="{y + 4:.1f}" text-anchor="end">{escaped(short(row.name, LONGEST_NAME))}'
        f"<title>{escaped(row.name)}</title></text>"
        f'<text class="soft small" x="{WIDTH - 2:g}" y="{y + 4:.1f}" text-anchor="end">{escaped(row.beside)}</text>'
    )
    for mark in sorted(row.marks, key=lambda mark: -mark.series):
        interval = ""
        if mark.low is not None and mark.high is not None:
            interval = f" ({mark.low:.3g} to {mark.high:.3g})"
            drawn += (
                f'<line class="whisker q{mark.series}" x1="{_at(axis, mark.low):.1f}" x2="{_at(axis, mark.high):.1f}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
            )
        said = f"{row.name}, {series[mark.series]}: {mark.value:.3g}{interval}"
        drawn += shape(mark.series, _at(axis, mark.value), y, "mark" if mark.series == 0 else "hollow", title=said)
    return drawn
