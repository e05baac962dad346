"""Which control edits each edit of a cell is compared with, and what is left when they are subtracted.

Legend: `r` edited rows (one cell, one edit), `p` rows that may serve as controls, `k` controls of one row.

A deletion moves a cell for two reasons: what the gene means, and that a token of this rank is gone. Controls are edits
of other genes at near ranks and near expression *in the same cell*, so their mean is the second reason alone. They
come from one of three places, the first that the screen has:

    named       rows of role "control" whose `control_of` names the edit (a screen run with controls)
    drawn       genes that a two-pass screen drew at random (`chosen` is "random"), or controls without an owner
    neighbours  the other genes of the cell, where a screen edits most genes of it (a list of genes that were chosen
                for being alike is no control for itself)

For the last two, the nearest ranks of the same cell are candidates and those nearest in detection rate are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from genescale.perturbation.statistics.tables import CHOSEN, EDITED, RANDOM, with_codes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Source = Literal["named", "drawn", "neighbours"]
CONTROLS = 10
# Of a cell's genes, how far in rank a control may stand when the screen names none.
NEAR_SHARE = 0.1
# Share of a cell's genes that must have been edited for them to be each other's controls.
EVERY_GENE = 0.5
# A mean of one control is no baseline with a known spread.
FEWEST_CONTROLS = 2
_ROWS_AT_ONCE = 100_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Matching:
    """Edited rows of a screen, the rows that serve as their controls, and which belong together."""

    rows: pl.DataFrame
    """Edited rows of role "edit", with the codes `cell`, `donor`, `edit`."""
    pool: pl.DataFrame
    """Edited rows that may serve as controls, with the codes `cell`, `donor`, `gene`."""
    controls_rk: npt.NDArray[np.int32]
    """Positions in `pool`; -1 where there is none."""
    source: Source

    @property
    def n_controls_r(self) -> Ints:
        """Controls of each row."""
        return (self.controls_rk >= 0).sum(axis=1)

    def chunks(self) -> Iterator[tuple[slice, npt.NDArray[np.int32]]]:
        """Controls by blocks of rows, so that their values never stand in memory all at once."""
        for start in range(0, len(self.controls_rk), _ROWS_AT_ONCE):
            block = slice(start, start + _ROWS_AT_ONCE)
            yield block, self.controls_rk[block]

    def control_moments(self, values_p: Floats) -> tuple[Floats, Floats]:
        """Mean and variance (n - 1) of the controls' values of each row; NaN below FEWEST_CONTROLS."""
        mean_r, variance_r = np.full((2, len(self.rows)), np.nan)
        for block, controls_rk in self.chunks():
            known_rk = controls_rk >= 0
            values_rk = np.where(known_rk, values_p[controls_rk], 0.0)
            n_r = known_rk.sum(axis=1)
            enough_r = n_r >= FEWEST_CONTROLS
            mean = values_rk.sum(axis=1) / np.maximum(n_r, 1)
            squares = (np.where(known_rk, values_rk - mean[:, None], 0.0) ** 2).sum(axis=1)
            mean_r[block] = np.where(enough_r, mean, np.nan)
            variance_r[block] = np.where(enough_r, squares / np.maximum(n_r - 1, 1), np.nan)
        return mean_r, variance_r


def match(cell_shifts: pl.DataFrame, *, controls: int = CONTROLS) -> Matching:
    """Controls for every edited row; `controls` is how many are taken where the screen does not name them."""
    table = with_codes(cell_shifts).filter(EDITED)
    rows = table.filter(pl.col("role") == "edit")
    named = table.filter((pl.col("role") == "control") & pl.col("control_of").is_not_null())
    unnamed = (pl.col("role") == "control") & pl.col("control_of").is_null()
    drawn = table.filter(unnamed | (pl.col(CHOSEN) == RANDOM))
    if len(named):
        named = named.unique(["cell", "control_of", "gene"], keep="first", maintain_order=True)
        return Matching(rows=rows, pool=named, controls_rk=_named(rows, named), source="named")
    pool = (drawn if len(drawn) else rows).filter(_one_gene(), pl.col("rank").is_not_null())
    pool = pool.unique(["cell", "gene"], keep="first").sort("cell", "rank", "gene")
    if not len(drawn):
        pool = pool.filter(pl.len().over("cell") >= EVERY_GENE * pl.col("n_genes"))
    chosen_rk = np.full((len(rows), controls if len(pool) else 0), -1, dtype=np.int32)
    single_r = (rows.select(_one_gene() & pl.col("rank").is_not_null()).to_series()).to_numpy()
    if len(pool) and single_r.any():
        chosen_rk[single_r] = _nearest(rows.filter(pl.Series(single_r)), pool, controls)
    return Matching(rows=rows, pool=pool, controls_rk=chosen_rk, source="drawn" if len(drawn) else "neighbours")


def _one_gene() -> pl.Expr:
    return ~pl.col("gene_id").str.contains("+", literal=True)


def _named(rows: pl.DataFrame, pool: pl.DataFrame) -> npt.NDArray[np.int32]:
    """Controls of each row by (cell, edit), in the order of the pool."""
    pairs = (
        pool.with_row_index("control")
        .select("cell", "control", edit_id="control_of")
        .join(rows.with_row_index("row").select("row", "cell", "edit_id"), on=["cell", "edit_id"])
        .sort("row", "control")
    )
    row_of, control_of = pairs["row"].to_numpy(), pairs["control"].to_numpy()
    counts_r = np.bincount(row_of, minlength=len(rows))
    chosen_rk = np.full((len(rows), int(counts_r.max(initial=0))), -1, dtype=np.int32)
    first_r = np.cumsum(counts_r) - counts_r
    chosen_rk[row_of, np.arange(len(row_of)) - first_r[row_of]] = control_of
    return chosen_rk


def _nearest(rows: pl.DataFrame, pool: pl.DataFrame, controls: int) -> npt.NDArray[np.int32]:
    """Of the nearest `controls` pool rows on either side in rank, those nearest in log detection rate."""
    cell_p, rank_p, gene_p = (pool[name].to_numpy().astype(np.int64) for name in ("cell", "rank", "gene"))
    cell_r, rank_r, gene_r = (rows[name].to_numpy().astype(np.int64) for name in ("cell", "rank", "gene"))
    near_r = np.maximum(controls, NEAR_SHARE * rows["n_genes"].to_numpy())
    often_g = np.bincount(gene_p, minlength=int(max(gene_p.max(), gene_r.max())) + 1)
    often_g = np.log(np.maximum(often_g, 1))
    step = int(max(rank_p.max(), rank_r.max())) + 1
    key_p, key_r = cell_p * step + rank_p, cell_r * step + rank_r
    chosen_rk = np.full((len(rows), controls), -1, dtype=np.int32)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        at_r = np.searchsorted(key_p, key_r[block])
        candidate_rk = at_r[:, None] + np.arange(-controls, controls + 1)
        inside_rk = np.clip(candidate_rk, 0, len(pool) - 1)
        fits_rk = (
            (candidate_rk == inside_rk)
            & (cell_p[inside_rk] == cell_r[block][:, None])
            & (gene_p[inside_rk] != gene_r[block][:, None])
            & (np.abs(rank_p[inside_rk] - rank_r[block][:, None]) <= near_r[block][:, None])
        )
        unlike_rk = np.abs(often_g[gene_p[inside_rk]] - often_g[gene_r[block]][:, None])
        # Among equals in detection the nearer rank is taken, and then the higher one.
        unlike_rk = unlike_rk + 1e-6 * np.abs(rank_p[inside_rk] - rank_r[block][:, None])
        unlike_rk[~fits_rk] = np.inf
        best_rk = np.argsort(unlike_rk, axis=1, kind="stable")[:, :controls]
        taken_rk = np.take_along_axis(inside_rk, best_rk, axis=1)
        usable_rk = np.isfinite(np.take_along_axis(unlike_rk, best_rk, axis=1))
        chosen_rk[block] = np.where(usable_rk, taken_rk, -1)
    return chosen_rk
