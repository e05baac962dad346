"""Means over donors (or cells) with intervals that keep their promise when there are few of them.

Legend: `e` edits, `u` clusters (donors, or blocks of cells), `b` bootstrap draws.

Clusters are drawn with replacement, the same draw for every edit, and the mean is taken again (Efron and Tibshirani,
"An Introduction to the Bootstrap", 1993). The percentile interval of a mean of n clusters is too narrow by
sqrt((n - 1) / n) and by the normal in place of Student's t, so its level is widened to make up for both (the expanded
percentile interval: Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69, 2015,
section 5.3). No bootstrap can reach beyond its data: the range of n values misses the centre they come from with chance
2^(1-n), so below FEWEST_TO_DRAW clusters the interval is Student's t, which is wide there, as it must be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genescale.platform.errors import SettingsError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
FEWEST_TO_DRAW = 8
# Cells of a single donor are drawn in blocks, so that the cost does not grow with cells.
BLOCKS = 64
_MEANS_AT_ONCE = 4_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Clustered:
    """Sums and counts of one value by edit and cluster; a mean weighs cluster u of edit e by `counts_eu`."""

    sums_eu: Floats
    counts_eu: Floats

    @property
    def means_e(self) -> Floats:
        """Weighted mean over clusters; NaN where an edit has none."""
        return _ratio(self.sums_eu.sum(axis=1), self.counts_eu.sum(axis=1))

    @property
    def n_e(self) -> Ints:
        """Clusters in which the edit was seen."""
        return (self.counts_eu > 0).sum(axis=1)

    def take(self, chosen_e: npt.NDArray[np.bool_]) -> Clustered:
        """The chosen edits."""
        return Clustered(sums_eu=self.sums_eu[chosen_e], counts_eu=self.counts_eu[chosen_e])


def donor_balanced(edit_r: Ints, donor_r: Ints, values_r: Floats, shape: tuple[int, int]) -> Clustered:
    """One mean per donor, each of weight 1, so that a donor with many cells counts no more than another."""
    by_cell = by_cluster(edit_r, donor_r, values_r, shape)
    present_eu = (by_cell.counts_eu > 0).astype(np.float64)
    return Clustered(sums_eu=_ratio(by_cell.sums_eu, by_cell.counts_eu, fill=0.0), counts_eu=present_eu)


def by_cluster(edit_r: Ints, cluster_r: Ints, values_r: Floats, shape: tuple[int, int]) -> Clustered:
    """Sums and numbers of the values that are known."""
    known_r = np.isfinite(values_r)
    place_r = edit_r[known_r] * shape[1] + cluster_r[known_r]
    size = shape[0] * shape[1]
    return Clustered(
        sums_eu=np.bincount(place_r, weights=values_r[known_r], minlength=size).reshape(shape).astype(np.float64),
        counts_eu=np.bincount(place_r, minlength=size).reshape(shape).astype(np.float64),
    )


def blocks_of_cells(cell_r: Ints, seed: int) -> tuple[Ints, int]:
    """A block for each row's cell, drawn at random; every cell is its own block while there are few."""
    names, place_r = np.unique(cell_r, return_inverse=True)
    n_blocks = min(BLOCKS, len(names))
    block_n = np.arange(len(names)) % max(n_blocks, 1)
    np.random.default_rng(seed).shuffle(block_n)
    return block_n[place_r].astype(np.int64), n_blocks


def intervals(values: Clustered, *, confidence: float, draws: int, seed: int) -> tuple[Floats, Floats]:
    """Lower and upper ends `(e,)`; NaN for edits seen in fewer than two clusters."""
    check_interval(confidence, draws)
    low_e, high_e = _student(values, confidence)
    many_e = values.n_e >= FEWEST_TO_DRAW
    if draws and many_e.any():
        low_e[many_e], high_e[many_e] = _bootstrap(values.take(many_e), confidence, draws, seed)
    return low_e, high_e


def check_interval(confidence: float, draws: int) -> None:
    """Raise SettingsError for a confidence outside (0, 1) or a negative number of draws."""
    if not 0 < confidence < 1:
        raise SettingsError(f"the confidence is {confidence}.", fix="Use a share between 0 and 1, such as 0.95.")
    if draws < 0:
        raise SettingsError(f"{draws} draws.", fix="Use 0 for Student's t throughout, or for example 2000.")


def _student(values: Clustered, confidence: float) -> tuple[Floats, Floats]:
    """Student's t around the weighted mean, its error from the clusters' residuals (Cochran 1977, section 6.4)."""
    from scipy.stats import t

    mean_e, n_e = values.means_e, values.n_e
    freedom_e = np.maximum(n_e - 1, 1)
    residual_eu = values.sums_eu - values.counts_eu * mean_e[:, None]
    error_e = np.sqrt(_ratio((residual_eu**2).sum(axis=1) * n_e / freedom_e, values.counts_eu.sum(axis=1) ** 2))
    half_e = np.where(n_e > 1, t.ppf((1 + confidence) / 2, freedom_e) * error_e, np.nan)
    return mean_e - half_e, mean_e + half_e


def _bootstrap(values: Clustered, confidence: float, draws: int, seed: int) -> tuple[Floats, Floats]:
    n_clusters = values.sums_eu.shape[1]
    generator = np.random.default_rng(seed)
    taken_bu = generator.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=draws).astype(np.float64)
    level_e = _expanded(confidence, values.n_e)
    low_e, high_e = np.empty((2, len(level_e)))
    step = max(1, _MEANS_AT_ONCE // draws)
    for start in range(0, len(level_e), step):
        block = slice(start, start + step)
        means_eb = _ratio(values.sums_eu[block] @ taken_bu.T, values.counts_eu[block] @ taken_bu.T)
        low_e[block], high_e[block] = _quantiles(means_eb, level_e[block])
    return low_e, high_e


def _expanded(confidence: float, n_e: Ints) -> Floats:
    """Lower percentile at which the bootstrap mean of n normal values has Student's interval."""
    from scipy.stats import norm, t

    wide_e = np.sqrt(n_e / (n_e - 1)) * t.ppf((1 - confidence) / 2, n_e - 1)
    return np.asarray(norm.cdf(wide_e))


def _quantiles(means_eb: Floats, level_e: Floats) -> tuple[Floats, Floats]:
    """Quantiles `level` and `1 - level` of each row by linear interpolation; draws without the edit are left out."""
    # NaN sorts last, so the known draws of a row stand in front.
    sorted_eb = np.sort(means_eb, axis=1)
    known_e = np.isfinite(means_eb).sum(axis=1)
    rows = np.arange(len(level_e))

    def at(share_e: Floats) -> Floats:
        place_e = share_e * (known_e - 1)
        below_e = np.floor(place_e).astype(np.int64)
        above_e = np.minimum(below_e + 1, known_e - 1)
        part_e = place_e - below_e
        return sorted_eb[rows, below_e] * (1 - part_e) + sorted_eb[rows, above_e] * part_e

    return at(level_e), at(1 - level_e)


def _ratio(above: Floats, below: Floats, *, fill: float = np.nan) -> Floats:
    return np.divide(above, below, out=np.full(np.shape(above), fill), where=below > 0)
