"""What a screen says about each gene: how many cells, how large the shift, how sure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl

from genescale.platform.errors import InputError

# Cells of one donor are no independent witnesses: with this many donors the interval is over donors.
DONORS_FOR_INTERVAL = 3


def summarise(
    cell_shifts: pl.DataFrame,
    *,
    by: Sequence[str] = (),
    over: Literal["cell", "donor"] | None = None,
    confidence: float = 0.95,
) -> pl.DataFrame:
    """One row per edit (and per value of the columns `by`), largest mean shift first.

    `over` says what counts as one observation: a cell, or a donor (the mean of its cells). By default it is donors
    where the screen has at least three, else cells. `mean_shift` is the mean of the observations, `ci_low` and
    `ci_high` its Student-t interval, empty below two observations; `sd_shift` is always between cells. Cells that lack
    the gene of a deletion, and cells with nothing left to compare, are counted in `n_absent` and `n_undefined` and
    enter no mean.
    Raises InputError for columns that the table lacks.
    """
    keys = ["gene_id", "symbol", "kind", *by]
    if missing := [name for name in keys if name not in cell_shifts.columns]:
        raise InputError(
            f"the shifts have no column '{missing[0]}'.", fix=f"Columns: {', '.join(cell_shifts.columns)}."
        )
    over = over or _unit_of_observation(cell_shifts)
    edited = cell_shifts.filter(pl.col("outcome") == "edited")
    counts = cell_shifts.group_by(keys).agg(
        n_cells=pl.len(),
        **{f"n_{outcome}": (pl.col("outcome") == outcome).sum() for outcome in ("edited", "absent", "undefined")},
    )
    between_cells = edited.group_by(keys).agg(
        sd_shift=pl.col("shift").std(),
        n_donors=pl.col("donor_id").drop_nulls().n_unique(),
        mean_goal_shift=pl.col("goal_shift").mean(),
    )
    summary = (
        counts.join(between_cells, on=keys, how="left", nulls_equal=True)
        .join(_means(edited, keys, over), on=keys, how="left", nulls_equal=True)
        .with_columns(pl.col("n_donors", "n_observations").fill_null(0), over=pl.lit(over))
    )
    half = pl.Series(_half_widths(summary["n_observations"].to_numpy(), confidence)) * summary["standard_error"]
    summary = summary.with_columns(ci_low=summary["mean_shift"] - half, ci_high=summary["mean_shift"] + half)
    return summary.drop("standard_error").sort(
        ["mean_shift", *keys], descending=[True, *(False for _ in keys)], nulls_last=True
    )


def _unit_of_observation(cell_shifts: pl.DataFrame) -> Literal["cell", "donor"]:
    donors = cell_shifts["donor_id"]
    return "donor" if not donors.has_nulls() and donors.n_unique() >= DONORS_FOR_INTERVAL else "cell"


def _means(edited: pl.DataFrame, keys: list[str], over: Literal["cell", "donor"]) -> pl.DataFrame:
    observations = edited if over == "cell" else edited.group_by([*keys, "donor_id"]).agg(pl.col("shift").mean())
    # Sorted, because a sum in parallel order would differ in its last bits from run to run.
    return (
        observations.sort([*keys, "shift"])
        .group_by(keys, maintain_order=True)
        .agg(
            mean_shift=pl.col("shift").mean(),
            n_observations=pl.len(),
            standard_error=pl.col("shift").std() / pl.len().sqrt(),
        )
    )


def _half_widths(n_observations: np.ndarray, confidence: float) -> np.ndarray:
    """Student-t quantiles by which a standard error is multiplied; NaN below two observations."""
    from scipy.stats import t

    freedom = n_observations.astype(np.float64) - 1
    return np.where(freedom > 0, t.ppf((1 + confidence) / 2, np.maximum(freedom, 1)), np.nan)
