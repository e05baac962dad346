"""Figures of the ingest report as HTML and SVG: stacked bars and small histograms that fit any width and any theme.

They are drawn as text rather than by a plotting library: forty sources stay below a few hundred kilobytes, lines stay
sharp in print, and colours follow the reader's light or dark page. Colours are Okabe and Ito's, told apart with any
colour vision; neighbours are parted by a gap, and every number also stands in a table or a title.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from genescale.ingestion.reports.distribution import Distribution

FATE_COLOURS = {
    "mapped": "#0072B2",
    "renamed": "#56B4E9",
    "symbol": "#009E73",
    "unknown": "#999999",
    "ambiguous": "#E69F00",
    "spike_in": "#F0E442",
    "other_species": "#D55E00",
    "other_feature": "#CC79A7",
    "par_y": "#5D4E8C",
}
FATE_NAMES = {
    "mapped": "by its id",
    "renamed": "by a versioned or retired id",
    "symbol": "by its symbol",
    "unknown": "not in the vocabulary",
    "ambiguous": "ambiguous name",
    "spike_in": "spike-in",
    "other_species": "other species",
    "other_feature": "no gene (antibody, peak, …)",
    "par_y": "second copy on Y",
}
CELL_COLOURS = {
    "kept": "#0072B2",
    "empty_cell": "#999999",
    "no_vocabulary_gene": "#5D4E8C",
    "below_min_genes": "#E69F00",
    "below_min_counts": "#F0E442",
    "mitochondrial_share": "#D55E00",
    "not_primary_data": "#56B4E9",
    "filter_pass": "#009E73",
    "where": "#B8A88A",
    "bad_values": "#A4133C",
    "duplicate_cell": "#CC79A7",
}
CELL_NAMES = {
    "kept": "kept",
    "empty_cell": "no counts",
    "no_vocabulary_gene": "no vocabulary gene",
    "below_min_genes": "too few genes",
    "below_min_counts": "too few counts",
    "mitochondrial_share": "mitochondrial share",
    "not_primary_data": "not primary data",
    "filter_pass": "failed the file's filter",
    "where": "not meeting --where",
    "bad_values": "values that are no counts",
    "duplicate_cell": "duplicate of another cell",
}
STEP_COLOURS = {
    "read": "#0072B2",
    "inflate": "#56B4E9",
    "rank": "#E69F00",
    "obs": "#999999",
    "write": "#009E73",
    "hash": "#CC79A7",
}
OTHER_COLOUR = "#777777"
# Coarser than the eight per doubling that are recorded, so that none of the drawn bins falls between two of them.
MOST_BINS, BINS_PER_DOUBLING = 48, 5
HEIGHT = 30.0


@dataclasses.dataclass(frozen=True)
class Segment:
    """One piece of a stacked bar: its name, its size, what the title says of the size, and its colour."""

    name: str
    size: float
    shown: str
    colour: str


def stacked_bar(segments: Sequence[Segment], *, label: str) -> str:
    """A bar of full width whose pieces are shares of their sum; a pale bar when the sum is 0."""
    total = sum(segment.size for segment in segments)
    drawn = [segment for segment in segments if segment.size > 0] if total else []
    said = "; ".join(f"{segment.name}: {segment.shown}" for segment in drawn) or "nothing"
    pieces = "".join(
        f'<i style="flex-grow:{segment.size / total:.6f};background:{segment.colour}" '
        f'title="{escaped(segment.name)}: {escaped(segment.shown)}"></i>'
        for segment in drawn
    )
    return f'<div class="bar" role="img" aria-label="{escaped(label)}: {escaped(said)}">{pieces}</div>'


def legend(segments: Sequence[Segment], *, values: bool = False) -> str:
    """Colours with their names, and with `values` what they stand for."""
    items = "".join(
        f'<li><i style="background:{segment.colour}"></i>{escaped(segment.name)}'
        + (f" <b>{escaped(segment.shown)}</b></li>" if values else "</li>")
        for segment in segments
    )
    return f'<ul class="legend">{items}</ul>'


@dataclasses.dataclass(frozen=True, eq=False)
class Scale:
    """A logarithmic axis shared by small multiples. edges: limits of the drawn bins, rising, all above 0."""

    edges: npt.NDArray[np.float64]

    @classmethod
    def over(cls, spreads: Sequence[Distribution]) -> Scale | None:
        """An axis that holds all cells of all distributions; None when there is no cell."""
        occupied = [
            limit
            for spread in spreads
            if spread.total
            for limit in (spread.edges[:-1][spread.counts > 0].min(), spread.edges[1:][spread.counts > 0].max())
        ]
        if not occupied:
            return None
        low, high = max(min(occupied), 1.0), max(max(occupied), 2.0)
        low, high = low / 1.05, max(high, low * 4) * 1.05
        bins = min(MOST_BINS, math.ceil(BINS_PER_DOUBLING * math.log2(high / low)))
        return cls(np.geomspace(low, high, bins + 1))

    def at(self, value: float) -> float:
        """Position of a value in percent of the width, held inside the axis."""
        low, high = math.log(self.edges[0]), math.log(self.edges[-1])
        return 100 * min(max((math.log(max(value, 1e-9)) - low) / (high - low), 0.0), 1.0)

    @property
    def ticks(self) -> list[float]:
        """Round numbers inside the axis, as many as have room for their labels."""
        powers = range(math.floor(math.log10(self.edges[0])), math.ceil(math.log10(self.edges[-1])) + 1)
        found: list[float] = []
        for factors in ((1,), (3,), (2, 5)):
            for value in (factor * 10.0**power for power in powers for factor in factors):
                # A label in the outer parts would be cut off.
                if 4 < self.at(value) < 92 and all(abs(self.at(value) - self.at(other)) > 15 for other in found):
                    found.append(value)
        return sorted(found)


def histogram(spread: Distribution, scale: Scale, *, label: str, middle: float | None, outlier: bool = False) -> str:
    """A small histogram on a shared axis, with its own median and, dashed, the median of all sources (`middle`)."""
    shares = spread.rebinned(scale.edges)
    top = float(shares.max(initial=0.0))
    kind = "hist outlier" if outlier else "hist"
    if not top:
        return f'<svg class="{kind}" role="img" aria-label="{escaped(label)}: no cells"></svg>'
    step = 100 / len(shares)
    outline = "".join(
        f"V{HEIGHT * (1 - share / top):.1f}H{(index + 1) * step:.1f}" for index, share in enumerate(shares)
    )
    lines = _rule(scale, middle, "all") + _rule(scale, spread.median, "own")
    said = f"{label}: median {number(spread.median)}, 5 to 95 percent {number(spread.quantile(0.05))} to "
    return (
        f'<svg class="{kind}" viewBox="0 0 100 {HEIGHT:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escaped(said)}{number(spread.quantile(0.95))}">'
        f'<path d="M0 {HEIGHT:g}{outline}V{HEIGHT:g}Z"/>{lines}</svg>'
    )


def axis(scale: Scale) -> str:
    """The tick labels of a shared axis, placed below or above the histograms."""
    marks = "".join(f'<span style="left:{scale.at(tick):.1f}%">{number(tick)}</span>' for tick in scale.ticks)
    return f'<div class="axis" aria-hidden="true">{marks}</div>'


def _rule(scale: Scale, value: float | None, kind: str) -> str:
    if value is None:
        return ""
    at = f"{scale.at(value):.1f}"
    return f'<line class="{kind}" x1="{at}" x2="{at}" y1="0" y2="{HEIGHT:g}"/>'


def fate_segments(values: dict[str, float], *, unit: str) -> list[Segment]:
    """Pieces of a bar of genes or counts by fate, in the order of the fates; shares in the titles."""
    total = sum(values.values())
    order = [*FATE_COLOURS, *(fate for fate in values if fate not in FATE_COLOURS)]
    return [
        Segment(
            FATE_NAMES.get(fate, fate),
            values[fate],
            f"{number(values[fate])} {unit} ({percent(values[fate] / total)})",
            FATE_COLOURS.get(fate, OTHER_COLOUR),
        )
        for fate in order
        if values.get(fate)
    ]


def cell_segments(kept: int, dropped: dict[str, int]) -> list[Segment]:
    """Pieces of a bar of cells: kept, then dropped by reason."""
    values = {"kept": kept, **dropped}
    total = sum(values.values())
    order = [*CELL_COLOURS, *(reason for reason in values if reason not in CELL_COLOURS)]
    return [
        Segment(
            CELL_NAMES.get(reason, reason),
            values[reason],
            f"{number(values[reason])} cells ({percent(values[reason] / total)})",
            CELL_COLOURS.get(reason, OTHER_COLOUR),
        )
        for reason in order
        if values.get(reason)
    ]


def step_segments(seconds: dict[str, float]) -> list[Segment]:
    """Pieces of a bar of work time by step."""
    total = sum(seconds.values())
    order = [*STEP_COLOURS, *(step for step in seconds if step not in STEP_COLOURS)]
    return [
        Segment(
            step,
            seconds[step],
            f"{seconds[step]:,.1f} s ({percent(seconds[step] / total)})",
            STEP_COLOURS.get(step, OTHER_COLOUR),
        )
        for step in order
        if seconds.get(step)
    ]


def number(value: float | None) -> str:
    """A number as a reader expects it: whole numbers whole, three digits otherwise, a dash for nothing."""
    if value is None or value != value:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share as percent; never 0 % or 100 % unless it is exactly that."""
    if share is None or share != share:
        return "–"
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    text = f"{share:.1%}"
    return {"0.0%": "<0.1%", "100.0%": ">99.9%"}.get(text, text)


def size(n_bytes: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB"


def escaped(text: object) -> str:
    """A text as it may stand in a page: in an element or in a quoted attribute."""
    return html.escape(str(text), quote=True)
