"""From matched rows to the test of each edit: differences to controls, and the reference genes they are judged by.

Legend: `r` edited rows, `p` rows of the pool of controls, `e` edits, `j` rows of reference genes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from genescale.perturbation.statistics.estimates import Places
from genescale.perturbation.statistics.matched_null import Over, Rows, Sample, Tested, against_matched, sample
from genescale.perturbation.statistics.matching import FEWEST_CONTROLS, Matching

Floats = npt.NDArray[np.float64]
# Added before logarithms as a share of the typical control shift, so that an edit that moves nothing has one too
# (Tukey's started logarithm, "Exploratory Data Analysis", 1977).
LOG_START = 0.01


def matched_test(
    matching: Matching, places: Places, value_r: Floats, value_p: Floats, over: Over, *, logarithmic: bool
) -> tuple[Tested, Floats]:
    """Test of each edit, and each row's log2 fold over its controls (NaN unless the read-out is `logarithmic`)."""
    if logarithmic:
        value_r, value_p = logarithms(value_r, value_p)
    control_r, spread_r = matching.control_moments(value_p)
    rows = Rows(
        gene_r=places.edit_r,
        donor_r=places.donor_r,
        excess_r=value_r - control_r,
        spread_r=spread_r,
        controls_r=matching.n_controls_r.astype(np.float64),
        rank_r=_ranks(matching.rows),
    )
    edits = sample(rows, places.n_edits, places.n_donors, over=over)
    references = _references(matching, value_p, places.n_donors, over) if matching.source == "named" else None
    tested = against_matched(edits, references)
    return tested, rows.excess_r if logarithmic else np.full(len(rows.excess_r), np.nan)


def logarithms(value_r: Floats, value_p: Floats) -> tuple[Floats, Floats]:
    """log2 of both, each with the same small start added; negative values (rounding) count as 0."""
    known = value_p[np.isfinite(value_p) & (value_p > 0)]
    start = LOG_START * float(np.median(known)) if len(known) else 1.0
    return np.log2(np.maximum(value_r, 0.0) + start), np.log2(np.maximum(value_p, 0.0) + start)


def _references(matching: Matching, value_p: Floats, n_donors: int, over: Over) -> Sample | None:
    """Each control gene that is itself not edited, against the other controls of its sets."""
    edited = matching.rows["gene_id"].unique()
    free_p = (~matching.pool["gene_id"].is_in(edited.implode())).to_numpy()
    mean_r, spread_r = matching.control_moments(value_p)
    n_r = matching.n_controls_r
    parts: list[dict[str, npt.NDArray[np.generic]]] = []
    for block, controls_rk in matching.chunks():
        n, mean, spread = n_r[block], mean_r[block], spread_r[block]
        of_r, at_k = np.nonzero((controls_rk >= 0) & (n[:, None] > FEWEST_CONTROLS) & free_p[controls_rk])
        control_j = controls_rk[of_r, at_k]
        # Left out of its own baseline: with it in, controls would seem nearer to each other than they are.
        excess_j = (value_p[control_j] - mean[of_r]) * n[of_r] / (n[of_r] - 1)
        parts.append({"control": control_j, "excess": excess_j, "spread": spread[of_r], "controls": n[of_r] - 1.0})
    if not parts or not sum(len(part["control"]) for part in parts):
        return None
    table = pl.concat([pl.DataFrame(part) for part in parts])
    pool = matching.pool.select("cell", "gene", "donor", rank=pl.Series(_ranks(matching.pool)))
    # The same gene may serve several edits of one cell; it is still one gene in one cell.
    rows = (
        pl.concat([table, pool[table["control"]]], how="horizontal")
        .group_by("gene", "cell", maintain_order=True)
        .agg(pl.col("donor", "rank").first(), pl.col("excess", "spread", "controls").mean())
    )
    codes, gene_j = np.unique(rows["gene"].to_numpy(), return_inverse=True)
    found = Rows(
        gene_r=gene_j.astype(np.int64),
        donor_r=rows["donor"].to_numpy(),
        excess_r=rows["excess"].to_numpy(),
        spread_r=rows["spread"].to_numpy(),
        controls_r=rows["controls"].to_numpy(),
        rank_r=rows["rank"].to_numpy(),
    )
    return sample(found, len(codes), n_donors, over=over)


def _ranks(frame: pl.DataFrame) -> Floats:
    """Rank of each row; edits of genes without one (inserted) stand together behind all others."""
    ranks: Floats = frame["rank"].cast(pl.Float64).fill_null(1e9).to_numpy()
    return ranks
