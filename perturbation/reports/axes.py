"""Axes of the screen report's figures: round ticks, powers of ten in the title instead of zeros at every tick.

Figures are SVG text that follows the page's light or dark theme. They are drawn 440 units wide, so that two stand side
by side on a large screen and one fills a small one with letters that can be read on both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from genescale.ingestion.reports.report_figures import escaped
from genescale.training.evaluation.charts import round_ticks, tick_text

WIDTH, HEIGHT = 440.0, 330.0
LEFT, RIGHT, TOP, BELOW = 52.0, 14.0, 12.0, 46.0
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

FIGURE_STYLE = (
    ".pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:.5rem 2rem;align-items:start}"
    ".pair>div{min-width:0}.pair h3{margin:.4rem 0 0}.pair .chart,.one .chart{max-width:36rem}"
    ".chart text.small{font-size:10.5px}.chart .zero{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 4}"
    ".chart .frame{fill:none;stroke:var(--line)}.chart .cloud{fill:none;stroke:var(--q);stroke-linecap:round}"
    ".chart text.label{font-size:11px;paint-order:stroke;stroke:var(--back);stroke-width:3px;stroke-linejoin:round}"
    ".chart .more{fill:var(--fill)}.chart .less{fill:var(--odd)}.chart .none{stroke:var(--soft);opacity:.55}"
    ".chart text.on{fill:#fff}.chart .whisker{stroke:var(--q);stroke-width:2;opacity:.55}"
    ".cloudy{--q:#8b96a1}figure{margin:0 0 1rem}figcaption{color:var(--soft);font-size:.86rem;max-width:40rem}"
    "@media(prefers-color-scheme:dark){.cloudy{--q:#66717d}.chart text.on{fill:#06131d}}"
    "@media(max-width:52rem){.pair{grid-template-columns:minmax(0,1fr)}}"
    "@media print{.cloudy{--q:#8b96a1}.chart .more,.chart .less{print-color-adjust:exact;"
    "-webkit-print-color-adjust:exact}}"
)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis: its ends and ticks in data units, the power of ten its labels leave out, and its title."""

    low: float
    high: float
    ticks: tuple[float, ...]
    power: int
    title: str

    def share(self, value: float) -> float:
        """Where a value lies between the ends: 0 … 1."""
        return (value - self.low) / ((self.high - self.low) or 1.0)

    def text(self, tick: float) -> str:
        """The label of a tick."""
        scaled = [value / 10.0**self.power for value in self.ticks]
        return tick_text(tick / 10.0**self.power, scaled)

    @property
    def titled(self) -> str:
        """The title with the power of ten, if one is left out."""
        return f"{self.title} (× 10{str(self.power).translate(SUPERSCRIPTS)})" if self.power else self.title


def axis_over(values: Iterable[float], title: str, *, zero: bool = False, wished: int = 5) -> Axis:
    """An axis that holds all finite `values` and, with `zero`, zero; an axis around zero when there is none."""
    finite = [float(value) for value in values if math.isfinite(value)] + ([0.0] if zero else [])
    finite = finite or [0.0]
    power = power_of(max(abs(value) for value in finite))
    scaled = [value / 10.0**power for value in finite]
    low, high = min(scaled), max(scaled)
    if low == high:
        low, high = low - 0.5, high + 0.5
    ticks = [tick * 10.0**power for tick in round_ticks(low, high, wished)]
    return Axis(low=min(ticks[0], *finite), high=max(ticks[-1], *finite), ticks=tuple(ticks), power=power, title=title)


def power_of(largest: float) -> int:
    """Power of ten to write once instead of zeros at every tick; 0 where ticks are short anyway."""
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    return power if power < -1 or power > 4 else 0


def across(axis: Axis, value: float) -> float:
    """Place of a value along the plot's width."""
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def up(axis: Axis, value: float) -> float:
    """Place of a value along the plot's height."""
    return TOP + (1 - axis.share(value)) * (HEIGHT - TOP - BELOW)


def panel(drawn: str, x: Axis, y: Axis, *, label: str) -> str:
    """The whole figure: grid, ticks, titles, and what was drawn with `across` and `up`."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BELOW
    grid = "".join(
        f'<line class="grid-line" x1="{LEFT:g}" x2="{right:g}" y1="{up(y, t):.1f}" y2="{up(y, t):.1f}"/>'
        f'<text class="soft" x="{LEFT - 6:g}" y="{up(y, t) + 4:.1f}" text-anchor="end">{y.text(t)}</text>'
        for t in y.ticks
    )
    grid += "".join(
        f'<line class="grid-line" x1="{across(x, t):.1f}" x2="{across(x, t):.1f}" y1="{TOP:g}" y2="{bottom:g}"/>'
        f'<text class="soft" x="{across(x, t):.1f}" y="{bottom + 17:g}" text-anchor="middle">{x.text(t)}</text>'
        for t in x.ticks
    )
    titles = (
        f'<text class="soft" x="{(LEFT + right) / 2:g}" y="{HEIGHT - 10:g}" text-anchor="middle">{escaped(x.titled)}'
        f'</text><text class="soft" transform="translate(13 {(TOP + bottom) / 2:g}) rotate(-90)" text-anchor="middle">'
        f"{escaped(y.titled)}</text>"
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escaped(label)}">'
        f"{grid}{titles}{drawn}</svg>"
    )


def rule(x: Axis, y: Axis, *, at_x: float | None = None, at_y: float | None = None) -> str:
    """A dashed line over the whole plot at a value of one axis."""
    if at_x is not None:
        place = f"{across(x, at_x):.1f}"
        return f'<line class="zero" x1="{place}" x2="{place}" y1="{TOP:g}" y2="{HEIGHT - BELOW:g}"/>'
    place = f"{up(y, at_y or 0.0):.1f}"
    return f'<line class="zero" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{place}" y2="{place}"/>'


def short(text: str, most: int) -> str:
    """A text of at most `most` letters, cut with an ellipsis."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
