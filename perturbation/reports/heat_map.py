"""A table of numbers as shades: one colour above zero and one below, a stroke where there is no number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from genescale.ingestion.reports.report_figures import escaped
from genescale.perturbation.reports.axes import SUPERSCRIPTS, power_of, short

SIDE, LETTER = 27.0, 7.4
LONGEST_NAME = 22
NUMBERS_UP_TO = 14
"""Columns of a map whose numbers are written into its cells."""
STEPS, STEPS_ABOVE_ZERO = (-1.0, -0.5, 0.0, 0.5, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0)


def heat_map(
    values: npt.NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    what: str,
    label: str,
    marked: npt.NDArray[np.bool_] | None = None,
) -> str:
    """Shades of `values` (rows by columns, NaN where there is none) with names and a scale.

    what: what the numbers are, for the scale; marked: cells that get a star. It keeps its size and scrolls on a small
    screen when it is wide.
    """
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    power = power_of(largest)
    letters = max((min(len(name), LONGEST_NAME) for name in rows), default=1)
    heads = max((min(len(name), LONGEST_NAME) for name in columns), default=1)
    left, head = 12 + LETTER * letters, 8 + max(LETTER * heads * 0.72 + 6, 16)
    side = SIDE if len(columns) > 4 else 46.0
    cells = "".join(
        _cell(values[i, j], largest, power, left + j * side, head + i * SIDE, side, f"{row}, {column}", what,
              starred=marked is not None and bool(marked[i, j]), written=len(columns) <= NUMBERS_UP_TO)
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    )  # fmt: skip
    names = "".join(
        f'<text x="{left - 6:.1f}" y="{head + (i + 0.5) * SIDE + 4:.1f}" text-anchor="end">'
        f"{escaped(short(name, LONGEST_NAME))}<title>{escaped(name)}</title></text>"
        for i, name in enumerate(rows)
    ) + "".join(
        f'<text transform="translate({left + (j + 0.5) * side + 4:.1f} {head - 6:.1f}) rotate(-45)">'
        f"{escaped(short(name, LONGEST_NAME))}<title>{escaped(name)}</title></text>"
        for j, name in enumerate(columns)
    )
    scale, scale_width = _scale(values, power, what, left, head + len(rows) * SIDE + 14)
    width = max(left + len(columns) * side + LETTER * heads * 0.72 + 14, scale_width)
    height = head + len(rows) * SIDE + 56
    return (
        f'<div class="wide"><svg class="chart" style="width:{width:.0f}px;max-width:none" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escaped(label)}">'
        f"{cells}{names}{scale}</svg></div>"
    )


def _cell(
    value: float, largest: float, power: int, x: float, y: float, side: float, name: str, what: str,
    *, starred: bool, written: bool,
) -> str:  # fmt: skip
    if not math.isfinite(value):
        said = escaped(f"{name}: no value")
        return (
            f'<path class="none" d="M{x + 5:.1f} {y + SIDE - 6:.1f}L{x + side - 5:.1f} {y + 6:.1f}"><title>{said}'
            "</title></path>"
        )
    shade = abs(value) / largest if largest else 0.0
    said = escaped(f"{name}: {what} {value:.3g}{', q < 0.05' if starred else ''}")
    drawn = (
        f'<rect class="{"more" if value >= 0 else "less"}" x="{x + 0.6:.1f}" y="{y + 0.6:.1f}" '
        f'width="{side - 1.2:.1f}" height="{SIDE - 1.2:.1f}" fill-opacity="{0.04 + 0.96 * shade:.3f}">'
        f"<title>{said}</title></rect>"
    )
    # Adding zero turns a rounded -0.0 into 0.0.
    text = (f"{round(value / 10.0**power, 1) + 0.0:.1f}" if written else "") + ("*" if starred else "")
    if not text:
        return drawn
    ink = " on" if shade > 0.6 else ""
    return drawn + (
        f'<text class="small{ink}" x="{x + side / 2:.1f}" y="{y + SIDE / 2 + 4:.1f}" text-anchor="middle" '
        f'pointer-events="none">{text}</text>'
    )


def _scale(values: npt.NDArray[np.float64], power: int, what: str, left: float, top: float) -> tuple[str, float]:
    """Five shades with their values, what they are, and the width that this needs."""
    shown = f"{what} (× 10{str(power).translate(SUPERSCRIPTS)})" if power else what
    finite = values[np.isfinite(values)]
    largest = float(np.abs(finite).max(initial=0.0))
    drawn, steps = "", STEPS if (finite < 0).any() else STEPS_ABOVE_ZERO
    for place, step in enumerate(steps):
        x = left + place * 44
        drawn += (
            f'<rect class="{"more" if step >= 0 else "less"}" x="{x:.1f}" y="{top:.1f}" width="42" height="11" '
            f'fill-opacity="{0.04 + 0.96 * abs(step):.3f}"/>'
            f'<text class="soft small" x="{x + 21:.1f}" y="{top + 23:.1f}" text-anchor="middle">'
            f"{step * largest / 10.0**power:.2g}</text>"
        )
    drawn += f'<text class="soft small" x="{left:.1f}" y="{top + 37:.1f}">{escaped(shown)}</text>'
    return drawn, left + max(44 * len(steps), LETTER * len(shown)) + 12
