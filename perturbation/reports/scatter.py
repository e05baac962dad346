"""Many points on two axes: clouds of faint dots, and names beside those that matter where there is room.

Legend: `p` points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genescale.ingestion.reports.report_figures import escaped, number
from genescale.perturbation.reports.axes import (
    BELOW,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    across,
    panel,
    rule,
    short,
    up,
)

LETTER, LINE = 6.1, 12.0
LONGEST_NAME = 16
MOST_NAMES = 14
# A path of more dots is thinned by place: two dots on one pixel look like one.
PIXEL = 1.2
GREY = "cloudy"


@dataclass(frozen=True, kw_only=True, eq=False)
class Cloud:
    """Points `(p,)` of one look: a colour class of the page (`q0` … or `cloudy`), and the size of a dot."""

    name: str
    look: str
    x_p: npt.NDArray[np.float64]
    y_p: npt.NDArray[np.float64]
    size: float = 4.5
    opacity: float = 0.7


@dataclass(frozen=True, kw_only=True)
class Named:
    """A point with its name, in the order of importance."""

    name: str
    x: float
    y: float
    look: str
    said: str = ""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Values of the axes at which a dashed line is drawn."""

    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()


def scatter(
    clouds: Sequence[Cloud], named: Sequence[Named], x: Axis, y: Axis, *, label: str, rules: Rules | None = None
) -> str:
    """The figure with a key that counts the points of each cloud; names that would overlap are left out."""
    rules = rules or Rules()
    lines = "".join(rule(x, y, at_x=value) for value in rules.x) + "".join(rule(x, y, at_y=v) for v in rules.y)
    dots = "".join(_cloud(cloud, x, y) for cloud in clouds if len(cloud.x_p))
    texts = _names(named[:MOST_NAMES], x, y)
    return panel(lines + dots + texts, x, y, label=label) + _key(clouds)


def _cloud(cloud: Cloud, x: Axis, y: Axis) -> str:
    x_p = LEFT + (cloud.x_p - x.low) / ((x.high - x.low) or 1.0) * (WIDTH - LEFT - RIGHT)
    y_p = TOP + (y.high - cloud.y_p) / ((y.high - y.low) or 1.0) * (HEIGHT - TOP - BELOW)
    places_p2 = np.column_stack([x_p, y_p])
    _, first = np.unique(np.round(places_p2 / PIXEL).astype(np.int64), axis=0, return_index=True)
    path = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in places_p2[np.sort(first)].tolist())
    return f'<path class="cloud {cloud.look}" stroke-width="{cloud.size:g}" opacity="{cloud.opacity:g}" d="{path}"/>'


def _names(named: Sequence[Named], x: Axis, y: Axis) -> str:
    """Texts beside their points, each where it covers no other text, no named point and no edge."""
    points = [(across(x, one.x), up(y, one.y)) for one in named]
    taken = [(px - 3, py - 3, px + 3, py + 3) for px, py in points]
    drawn = ""
    for one, (px, py) in zip(named, points, strict=True):
        said = f"<title>{escaped(one.said or one.name)}</title>"
        drawn += f'<circle class="mark {one.look}" cx="{px:.1f}" cy="{py:.1f}" r="3.2">{said}</circle>'
        text = short(one.name, LONGEST_NAME)
        wide = LETTER * len(text)
        for left, base, anchor in (
            (px + 6, py + 4, "start"),
            (px - 6 - wide, py + 4, "end"),
            (px - wide / 2, py - 7, "middle"),
            (px - wide / 2, py + 15, "middle"),
        ):
            box = (left, base - LINE + 2, left + wide, base + 2)
            own = (px - 3, py - 3, px + 3, py + 3)
            if _inside(box) and not any(_overlap(box, other) for other in taken if other != own):
                taken.append(box)
                at = {"start": left, "end": left + wide, "middle": left + wide / 2}[anchor]
                drawn += (
                    f'<text class="label" x="{at:.1f}" y="{base:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'
                )
                break
    return drawn


Box = tuple[float, float, float, float]


def _inside(box: Box) -> bool:
    return box[0] > LEFT and box[1] > TOP - 8 and box[2] < WIDTH - RIGHT + 10 and box[3] < HEIGHT - BELOW + 2


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _key(clouds: Sequence[Cloud]) -> str:
    items = "".join(
        f'<li><svg class="{cloud.look} small" viewBox="0 0 14 14" aria-hidden="true">'
        f'<circle class="mark" cx="7" cy="7" r="4"/></svg>{escaped(cloud.name)} ({number(len(cloud.x_p))})</li>'
        for cloud in clouds
    )
    return f'<ul class="key">{items}</ul>'
