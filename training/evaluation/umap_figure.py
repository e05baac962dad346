"""Cells in two dimensions, coloured by what is known of them: one SVG per column, told apart with any colour vision.

Axis suffixes: `n` cells, `d` width.

Seven colours and three marks make 21 looks, and each class carries its number at its middle; rarer classes share a pale
look and are counted. Columns of numbers are drawn in six quantile steps of one scale. Colours follow the page's theme.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genescale.ingestion.reports.report_figures import escaped, number, percent

SIZE, MARGIN = 560.0, 12.0
MOST_CLASSES = 20
NEIGHBOURS, MIN_DISTANCE = 15, 0.3
LEAST_CELLS = 5
"""A neighbour graph of fewer cells has no shape."""
# Okabe and Ito without yellow and black, which fade on one of the two backgrounds, and a violet; light, then dark page.
COLOURS = (
    ("#0072B2", "#4aa3e0"),
    ("#D55E00", "#f08a4b"),
    ("#009E73", "#35c79a"),
    ("#CC79A7", "#e39cc4"),
    ("#c28400", "#edb64e"),
    ("#4db1e4", "#9bd7f7"),
    ("#5D4E8C", "#a596dd"),
)
# Six steps of cividis (Nuñez et al. 2018): rising lightness for any colour vision.
STEPS = ("#00204c", "#31446b", "#666870", "#958f78", "#cab969", "#ffe945")
MARKS = ("dot", "plus", "triangle")

FIGURE_STYLE = (
    "".join(f".k{i}{{--k:{light}}}" for i, (light, _) in enumerate(COLOURS))
    + "".join(f".s{i}{{--k:{colour}}}" for i, colour in enumerate(STEPS))
    + ".k-other{--k:#b4bac1}.map path{stroke:var(--k);fill:none;stroke-width:1.1;opacity:.75}"
    ".map path.dot{stroke-width:4.2;stroke-linecap:round}.map path.triangle{fill:var(--k);stroke:none}"
    ".map path.plus{stroke-width:1.5}.map{width:100%;max-width:35rem;height:auto;display:block;background:var(--card)}"
    ".map text{font:600 13px system-ui,sans-serif;fill:var(--ink);text-anchor:middle;dominant-baseline:central;"
    "paint-order:stroke;stroke:var(--back);stroke-width:4px;stroke-linejoin:round}"
    ".map-row{display:flex;flex-wrap:wrap;gap:.4rem 1.4rem;align-items:flex-start}"
    ".map-row>svg{flex:1 1 22rem}.map-row>ol{flex:1 1 15rem}"
    ".map-key{list-style:none;margin:0;padding:0;font-size:.86rem;columns:15rem}"
    ".map-key li{break-inside:avoid;display:flex;gap:.45rem;align-items:baseline;line-height:1.5}"
    ".map-key svg{width:1rem;height:1rem;flex:none;align-self:center}"
    ".map-key svg path{stroke:var(--k);fill:none;stroke-width:2}"
    ".map-key svg path.dot{stroke-width:9;stroke-linecap:round}"
    ".map-key svg path.triangle{fill:var(--k);stroke:none}"
    ".map-key b{font-variant-numeric:tabular-nums;min-width:1.3rem;text-align:right}"
    ".map-key small{color:var(--soft);white-space:nowrap;font-variant-numeric:tabular-nums}"
    "@media(prefers-color-scheme:dark){"
    + "".join(f".k{i}{{--k:{dark}}}" for i, (_, dark) in enumerate(COLOURS))
    + ".s0{--k:#2f5c9e}.k-other{--k:#5a636d}}"
    "@media print{" + "".join(f".k{i}{{--k:{light}}}" for i, (light, _) in enumerate(COLOURS)) + "}"
)


def umap_coordinates(
    vectors_nd: np.ndarray, *, seed: int, neighbours: int = NEIGHBOURS, min_distance: float = MIN_DISTANCE
) -> np.ndarray:
    """(n, 2) float32 by UMAP (McInnes et al. 2018), in one thread: the same vectors and seed give the same picture."""
    with warnings.catch_warnings():
        # umap-learn warns at import that its parametric variant would need tensorflow; it is not used here.
        warnings.filterwarnings("ignore", message="Tensorflow not installed", category=ImportWarning)
        from umap import UMAP
    reducer = UMAP(
        n_neighbors=min(neighbours, len(vectors_nd) - 1),
        min_dist=min_distance,
        random_state=seed,
        n_jobs=1,
        # The spectral start needs more cells than components and fails on tiny sets.
        init="spectral" if len(vectors_nd) > neighbours else "random",
    )
    found: np.ndarray = reducer.fit_transform(vectors_nd).astype(np.float32)
    return found


@dataclass(frozen=True)
class Look:
    """One entry of the key: which cells (positions), their name, and how they are drawn."""

    name: str
    cells: np.ndarray
    colour: str
    mark: str
    label: str = ""
    """Number drawn at the middle of the class; empty for none."""


def class_looks(values: Sequence[str]) -> list[Look]:
    """Looks of the classes, the commonest first; classes beyond MOST_CLASSES and missing values share the pale look."""
    values_n = np.array(values, dtype=str)
    names, counts = np.unique(values_n[values_n != ""], return_counts=True)
    order = np.lexsort((names, -counts))
    shown, rest = names[order][:MOST_CLASSES], names[order][MOST_CLASSES:]
    looks = []
    if len(rest):
        looks.append(Look(f"{len(rest):,} rarer values", np.flatnonzero(np.isin(values_n, rest)), "k-other", "dot"))
    if (values_n == "").any():
        looks.append(Look("no value", np.flatnonzero(values_n == ""), "k-other", "plus"))
    for place, name in enumerate(shown):
        colour, mark = f"k{place % len(COLOURS)}", MARKS[place // len(COLOURS)]
        looks.append(Look(str(name), np.flatnonzero(values_n == name), colour, mark, str(place + 1)))
    return looks


def number_looks(values_n: np.ndarray) -> list[Look]:
    """Looks of six quantile steps of a column of numbers; missing values are pale."""
    known_n = ~np.isnan(values_n)
    looks = [Look("no value", np.flatnonzero(~known_n), "k-other", "plus")] if not known_n.all() else []
    edges = np.unique(np.quantile(values_n[known_n], np.linspace(0, 1, len(STEPS) + 1)))
    step_n = np.clip(np.searchsorted(edges, values_n, side="right") - 1, 0, max(len(edges) - 2, 0))
    for step in range(max(len(edges) - 1, 1)):
        low, high = edges[step], edges[min(step + 1, len(edges) - 1)]
        # With few steps, those far apart in lightness are taken.
        colour = f"s{round(step * (len(STEPS) - 1) / max(len(edges) - 2, 1))}"
        looks.append(
            Look(f"{number(low)} to {number(high)}", np.flatnonzero(known_n & (step_n == step)), colour, "dot")
        )
    return looks


def scatter(coordinates_n2: np.ndarray, looks: Sequence[Look], *, label: str) -> str:
    """The figure with its key as HTML; `label` says what it shows to those who cannot see it."""
    places_n2, height = _placed(coordinates_n2)
    drawn = "".join(_path(places_n2[look.cells], look) for look in looks if len(look.cells))
    texts = "".join(_label(places_n2[look.cells], look.label) for look in looks if look.label and len(look.cells))
    total = len(coordinates_n2)
    named = sorted(looks, key=lambda look: look.colour == "k-other")
    key = "".join(_key(look, total) for look in named if len(look.cells))
    return (
        f'<div class="map-row"><svg class="map" viewBox="0 0 {SIZE:g} {height:.0f}" role="img" '
        f'aria-label="{escaped(label)}">{drawn}{texts}</svg><ol class="map-key">{key}</ol></div>'
    )


def _placed(coordinates_n2: np.ndarray) -> tuple[np.ndarray, float]:
    """Positions in the drawing and its height: both axes on one scale, since distances are compared by eye."""
    low, high = coordinates_n2.min(axis=0), coordinates_n2.max(axis=0)
    span = float((high - low).max()) or 1.0
    # A map that is wide and flat gets a flat drawing; a tall one is as tall as it is allowed to be wide.
    height = max(float((high - low)[1]) / span * (SIZE - 2 * MARGIN) + 2 * MARGIN, SIZE / 3)
    scaled = (coordinates_n2 - (low + high) / 2) / span * (SIZE - 2 * MARGIN)
    return np.column_stack([SIZE / 2 + scaled[:, 0], height / 2 - scaled[:, 1]]), height


def _path(places_n2: np.ndarray, look: Look) -> str:
    return f'<path class="{look.mark} {look.colour}" d="{"".join(_mark(x, y, look.mark) for x, y in places_n2)}"/>'


def _mark(x: float, y: float, mark: str) -> str:
    if mark == "plus":
        return f"M{x - 2.6:.1f} {y:.1f}h5.2m-2.6-2.6v5.2"
    return f"M{x:.1f} {y - 2.9:.1f}l2.7 4.8h-5.4z" if mark == "triangle" else f"M{x:.1f} {y:.1f}h0"


def _label(places_n2: np.ndarray, text: str) -> str:
    """The number of a class on the cell nearest to its median place, so that it lies on the class."""
    middle = np.median(places_n2, axis=0)
    x, y = places_n2[int(((places_n2 - middle) ** 2).sum(axis=1).argmin())]
    return f'<text x="{x:.1f}" y="{y:.1f}">{text}</text>'


def _key(look: Look, total: int) -> str:
    shape = {"dot": "M8 8h0", "plus": "M2 8h12m-6-6v12", "triangle": "M8 2l7 12h-14z"}[look.mark]
    sample = f'<svg viewBox="0 0 16 16" aria-hidden="true"><path class="{look.mark} {look.colour}" d="{shape}"/></svg>'
    share = f"{len(look.cells):,} ({percent(len(look.cells) / total)})"
    return f"<li>{sample}<b>{escaped(look.label)}</b><span>{escaped(look.name)} <small>{share}</small></span></li>"
