"""Mean of a read-out for each edit, balanced over donors, with its interval.

Legend: `r` edited rows (one cell, one edit), `e` edits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genescale.perturbation.statistics.intervals import (
    Clustered,
    blocks_of_cells,
    by_cluster,
    check_interval,
    donor_balanced,
    intervals,
)
from genescale.perturbation.statistics.matched_null import Over

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Level and draws of the intervals; `draws` None computes none, 0 takes Student's t throughout."""

    confidence: float = 0.95
    draws: int | None = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        check_interval(self.confidence, self.draws or 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Which edit, donor and cell each row is of, as codes."""

    edit_r: Ints
    donor_r: Ints
    cell_r: Ints
    n_edits: int
    n_donors: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """One value for each edit."""

    mean_e: Floats
    low_e: Floats
    high_e: Floats
    over_e: npt.NDArray[np.str_]
    """What the interval draws: `donor`, or `cell` where one donor is all there is."""
    n_cells_e: Ints


def estimate(places: Places, values_r: Floats, over: Over, drawing: Drawing) -> Estimate:
    """Mean over donors of the mean over their cells; where there is one donor, over cells."""
    known_r = np.isfinite(values_r)
    n_cells_e = np.bincount(places.edit_r[known_r], minlength=places.n_edits)
    clustered = donor_balanced(places.edit_r, places.donor_r, values_r, (places.n_edits, places.n_donors))
    lone_e = clustered.n_e < 2 if over == "donor" else np.ones(places.n_edits, dtype=bool)
    low_e, high_e = np.full((2, places.n_edits), np.nan)
    mean_e = clustered.means_e
    if drawing.draws is not None and not lone_e.all():
        low_e[~lone_e], high_e[~lone_e] = _ends(clustered.take(~lone_e), drawing)
    if lone_e.any():
        by_cell = _over_cells(places, values_r, lone_e, drawing)
        mean_e[lone_e] = by_cell.means_e
        if drawing.draws is not None:
            low_e[lone_e], high_e[lone_e] = _ends(by_cell, drawing)
    over_e = np.where(lone_e, "cell", "donor")
    return Estimate(mean_e=mean_e, low_e=low_e, high_e=high_e, over_e=over_e, n_cells_e=n_cells_e)


def _ends(values: Clustered, drawing: Drawing) -> tuple[Floats, Floats]:
    return intervals(values, confidence=drawing.confidence, draws=drawing.draws or 0, seed=drawing.seed)


def _over_cells(places: Places, values_r: Floats, lone_e: npt.NDArray[np.bool_], drawing: Drawing) -> Clustered:
    chosen_r = lone_e[places.edit_r]
    place_e = np.cumsum(lone_e) - 1
    block_r, n_blocks = blocks_of_cells(places.cell_r[chosen_r], drawing.seed)
    shape = (int(lone_e.sum()), max(n_blocks, 1))
    return by_cluster(place_e[places.edit_r[chosen_r]], block_r, values_r[chosen_r], shape)
