"""Two charts as SVG: rows of marks with intervals, and lines over a logarithmic axis, which follow the page's theme.

Axes are chosen from the data with round ticks; every number also stands in a table or a title.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from genescale.ingestion.reports.report_figures import escaped

Place = Callable[[float], float]
"""From a value to its place along an axis of the drawing."""
# Colour of a series on a light and on a dark page (Okabe and Ito, told apart with any colour vision), and its dashes.
LOOKS = (
    ("#0072B2", "#56B4E9", ""),
    ("#D55E00", "#f08a4b", "6 3"),
    ("#009E73", "#35c79a", "2 3"),
    ("#8a5a83", "#d9a3d1", "8 3 2 3"),
    ("#8a6d00", "#edb64e", "4 4"),
    ("#56616d", "#9fabb7", "1 4"),
    ("#3a7ca5", "#9bd7f7", "10 4"),
)
SHAPES = ("circle", "diamond", "square", "triangle", "circle", "diamond", "square")
WIDTH, ROW, NAMES, AXIS = 760.0, 24.0, 262.0, 44.0
# Characters of a name that fit beside the plot.
MOST_NAME = 27
PLOT_HEIGHT = 330.0
LEFT, RIGHT, TOP = 56.0, 18.0, 12.0

CHART_STYLE = (
    "".join(f".q{i}{{--q:{light}}}" for i, (light, _, _) in enumerate(LOOKS))
    + ".chart{width:100%;max-width:54rem;height:auto;display:block;margin:.6rem 0}"
    ".chart text{font:12px system-ui,sans-serif;fill:var(--ink)}.chart text.soft{fill:var(--soft)}"
    ".chart .grid-line{stroke:var(--line);stroke-width:1}.chart .series{fill:none;stroke:var(--q);stroke-width:2}"
    ".chart .range{stroke:var(--q);stroke-width:2}.chart .mark,.key .mark{fill:var(--q)}"
    ".chart .hollow{fill:var(--back);stroke:var(--q);stroke-width:1.6}"
    ".chart .seed{fill:var(--q);opacity:.35}.chart .band{fill:var(--q);opacity:.14;stroke:none}"
    ".key{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;padding:0;margin:.4rem 0;font-size:.86rem}"
    ".key svg{display:inline-block;width:2.1rem;height:.9rem;vertical-align:-.1rem;margin-right:.35rem}"
    ".key svg.small{width:.9rem}.key .hollow{fill:var(--back);stroke:var(--q);stroke-width:1.6}"
    ".key line{stroke:var(--q);stroke-width:2}"
    "@media(prefers-color-scheme:dark){"
    + "".join(f".q{i}{{--q:{dark}}}" for i, (_, dark, _) in enumerate(LOOKS))
    + "}@media print{"
    + "".join(f".q{i}{{--q:{light}}}" for i, (light, _, _) in enumerate(LOOKS))
    + "}"
)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value of one series, with an interval where there is one."""

    series: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class MarkRow:
    """One row of a chart: its name, what stands softly beside it, and its marks."""

    name: str
    beside: str
    marks: Sequence[Mark]


def mark_rows(rows: Sequence[MarkRow], series: Sequence[str], *, axis_title: str, label: str) -> str:
    """One row of marks per stratum on a shared axis; the first series is drawn last and filled, with its interval."""
    values = [v for row in rows for m in row.marks for v in (m.value, m.low, m.high) if v is not None]
    ticks = round_ticks(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)

    def at(value: float) -> float:
        return NAMES + 12 + (value - low) / ((high - low) or 1.0) * (WIDTH - NAMES - 12 - RIGHT)

    height = TOP + len(rows) * ROW + AXIS
    bottom = TOP + len(rows) * ROW
    lines = "".join(
        f'<line class="grid-line" x1="{at(t):.1f}" x2="{at(t):.1f}" y1="{TOP:g}" y2="{bottom:g}"/>'
        f'<text class="soft" x="{at(t):.1f}" y="{bottom + 16:g}" text-anchor="middle">{tick_text(t, ticks)}</text>'
        for t in ticks
    )
    drawn = "".join(_row(row, TOP + (i + 0.5) * ROW, at, series) for i, row in enumerate(rows))
    title = (
        f'<text class="soft" x="{(NAMES + WIDTH) / 2:g}" y="{bottom + 36:g}" text-anchor="middle">'
        f"{escaped(axis_title)}</text>"
    )
    used = {mark.series for row in rows for mark in row.marks}
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escaped(label)}">'
        f"{lines}{title}{drawn}</svg>{key([name for i, name in enumerate(series) if i in used], lines=False)}"
    )


def _row(row: MarkRow, y: float, at: Place, series: Sequence[str]) -> str:
    shown = row.name if len(row.name) <= MOST_NAME else f"{row.name[: MOST_NAME - 1]}…"
    text = (
        f'<text x="{NAMES - 62:g}" y="{y + 4:.1f}" text-anchor="end">{escaped(shown)}'
        f"<title>{escaped(row.name)}</title></text>"
        f'<text class="soft" x="{NAMES:g}" y="{y + 4:.1f}" text-anchor="end">{escaped(row.beside)}</text>'
    )
    marks = ""
    for mark in sorted(row.marks, key=lambda mark: -mark.series):
        if mark.low is not None and mark.high is not None:
            marks += (
                f'<line class="range q{mark.series}" x1="{at(mark.low):.1f}" x2="{at(mark.high):.1f}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
            )
        kind = "mark" if mark.series == 0 else "hollow"
        said = f"{series[mark.series]}: {mark.value:.4g}" + (
            f" ({mark.low:.4g} to {mark.high:.4g})" if mark.low is not None and mark.high is not None else ""
        )
        marks += shape(mark.series, at(mark.value), y, kind, title=f"{row.name}, {said}")
    return text + marks


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series over the axis: (x, mean, low, high, values of the single seeds) at each point, by rising x."""

    name: str
    points: Sequence[tuple[float, float, float, float, Sequence[float]]]
    faint: bool = False
    """Without the band and the single values: for what stands beside the main lines."""


def log_lines(lines: Sequence[Line], *, x_title: str, y_title: str, label: str) -> str:
    """Lines over a logarithmic axis with their spread: a band from low to high, and a faint dot for each seed."""
    xs = sorted({x for line in lines for x, *_ in line.points})
    ys = [v for line in lines for _, mean, low, high, seeds in line.points for v in (mean, low, high, *seeds)]
    ticks = round_ticks(min(ys), max(ys))
    y_low, y_high = min(ticks[0], *ys), max(ticks[-1], *ys)
    x_low, x_high = math.log(xs[0]) - 0.08, math.log(xs[-1]) + 0.08

    def across(x: float) -> float:
        return LEFT + (math.log(x) - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return TOP + (1 - (y - y_low) / ((y_high - y_low) or 1.0)) * PLOT_HEIGHT

    bottom = TOP + PLOT_HEIGHT
    grid = "".join(
        f'<line class="grid-line" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{up(t):.1f}" y2="{up(t):.1f}"/>'
        f'<text class="soft" x="{LEFT - 8:g}" y="{up(t) + 4:.1f}" text-anchor="end">{tick_text(t, ticks)}</text>'
        for t in ticks
    )
    grid += "".join(
        f'<line class="grid-line" x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{bottom:g}" y2="{bottom + 5:g}"/>'
        f'<text class="soft" x="{across(x):.1f}" y="{bottom + 19:g}" text-anchor="middle">{x:,.0f}</text>'
        for x in _spaced(xs, across)
    )
    titles = (
        f'<text class="soft" x="{(LEFT + WIDTH) / 2:g}" y="{bottom + 40:g}" text-anchor="middle">{escaped(x_title)}'
        f'</text><text class="soft" transform="translate(14 {TOP + PLOT_HEIGHT / 2:g}) rotate(-90)" '
        f'text-anchor="middle">{escaped(y_title)}</text>'
    )
    drawn = "".join(_line(number, line, across, up) for number, line in reversed(list(enumerate(lines))))
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {bottom + AXIS + 6:g}" role="img" aria-label="{escaped(label)}">'
        f"{grid}{titles}{drawn}</svg>{key([line.name for line in lines], lines=True)}"
    )


def _spaced(xs: Sequence[float], across: Place) -> list[float]:
    """The sizes whose labels have room, from the largest down."""
    shown: list[float] = []
    for x in reversed(xs):
        if all(abs(across(x) - across(other)) > 46 for other in shown):
            shown.append(x)
    return shown


def _line(number: int, line: Line, across: Place, up: Place) -> str:
    look = number % len(LOOKS)
    places = [(across(x), up(mean)) for x, mean, *_ in line.points]
    dashes = f' stroke-dasharray="{LOOKS[look][2]}"' if LOOKS[look][2] else ""
    path = "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places))
    drawn = f'<path class="series q{look}" d="{path}"{dashes}/>'
    if not line.faint:
        edge = [(across(x), up(low)) for x, _, low, _, _ in line.points]
        edge += [(across(x), up(high)) for x, _, _, high, _ in reversed(line.points)]
        band = "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(edge))
        seeds = "".join(
            f'<circle class="seed q{look}" cx="{across(x):.1f}" cy="{up(value):.1f}" r="2.6"/>'
            for x, *_, values in line.points
            for value in values
        )
        drawn = f'<path class="band q{look}" d="{band}Z"/>{seeds}{drawn}'
    return drawn + "".join(
        shape(
            look,
            across(x),
            up(mean),
            "mark",
            title=f"{line.name}, {x:,.0f} cells: {mean:.4g} ({low:.4g} to {high:.4g})",
        )
        for x, mean, low, high, _ in line.points
    )


def shape(look: int, x: float, y: float, kind: str, *, title: str = "") -> str:
    """A mark of this series at a place; `kind` is mark (filled) or hollow."""
    said = f"<title>{escaped(title)}</title>" if title else ""
    name = SHAPES[look]
    if name == "circle":
        return f'<circle class="{kind} q{look}" cx="{x:.1f}" cy="{y:.1f}" r="4.6">{said}</circle>'
    path = {
        "diamond": f"M{x:.1f} {y - 5.4:.1f}l5.4 5.4l-5.4 5.4l-5.4-5.4z",
        "square": f"M{x - 4.2:.1f} {y - 4.2:.1f}h8.4v8.4h-8.4z",
        "triangle": f"M{x:.1f} {y - 5.2:.1f}l5 8.6h-10z",
    }[name]
    return f'<path class="{kind} q{look}" d="{path}">{said}</path>'


def key(names: Sequence[str], *, lines: bool) -> str:
    """The series with their looks."""
    items = ""
    for number, name in enumerate(names):
        look = number % len(LOOKS)
        dashes = f' stroke-dasharray="{LOOKS[look][2]}"' if LOOKS[look][2] else ""
        stroke = f'<line x1="0" x2="34" y1="7" y2="7"{dashes}/>' if lines else ""
        kind = "mark" if lines or number == 0 else "hollow"
        size, width = ("", 34) if lines else (" small", 14)
        sample = f'<svg class="q{look}{size}" viewBox="0 0 {width} 14" aria-hidden="true">{stroke}'
        items += f"<li>{sample}{shape(look, width / 2, 7, kind)}</svg>{escaped(name)}</li>"
    return f'<ul class="key">{items}</ul>'


def round_ticks(low: float, high: float, wished: int = 6) -> list[float]:
    """Rising multiples of 1, 2 or 5 times a power of ten from just below `low` to just above `high`."""
    span = (high - low) or max(abs(high), 1.0) * 0.1
    raw = span / wished
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """A tick with as many decimals as its neighbours need."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}"
