"""What a screen of two passes says of all genes: mean shifts with estimates in the gaps, and how much was missed.

Both functions read the tables of a finished screen: `first_pass` (one row per cell and gene, with its score) and
`cell_shifts` (one row per deletion that was made, with `chosen` and `chance`).
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from genescale.perturbation.screening.two_pass import RANDOM
from genescale.platform.errors import InputError

CELL = ("dataset_id", "cell_id", "source_row")
# Upper end of the one-sided interval of how many deletions were missed.
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class RecallEstimate:
    """How many of the deletions that move a cell most were made, estimated from those drawn at random."""

    share: float
    """The strongest deletions of a cell that are asked for, as a share of its genes."""
    recall: float
    """Of these, how many were made."""
    at_least: float
    """Lower end of its interval of 95 %."""
    n_random: int
    """Deletions drawn at random that this rests on."""


def gene_means(first_pass: pl.DataFrame, cell_shifts: pl.DataFrame) -> pl.DataFrame:
    """Per gene its mean shift over all cells that have it: exact where it was deleted, estimated in the other cells.

    Columns: gene_id, n_cells, n_exact, mean (strongest first). Estimates are scores times one factor, by which scores
    and exact shifts of the random deletions differ; so scores have to be estimated shifts (the first pass `cotangents`,
    ranked by `shift`). Raises InputError when they are not positive or no deletion was drawn at random.
    """
    pairs = _with_exact(first_pass, cell_shifts)
    drawn = pairs.filter(pl.col("chosen") == RANDOM, pl.col("shift").is_not_null())
    total = float(drawn["score"].sum())
    if not len(drawn) or total <= 0.0:
        raise InputError(
            "the scores cannot be turned into shifts.",
            where="first_pass",
            fix="Rank by 'shift' with the first pass 'cotangents', and give control_fraction above 0.",
        )
    factor = float(drawn["shift"].sum()) / total
    return (
        pairs.with_columns(value=pl.coalesce("shift", pl.col("score") * factor))
        .group_by("gene_id")
        .agg(n_cells=pl.len(), n_exact=pl.col("shift").count(), mean=pl.col("value").mean())
        .sort("mean", "gene_id", descending=[True, False])
    )


def recall_estimate(first_pass: pl.DataFrame, cell_shifts: pl.DataFrame, *, share: float) -> RecallEstimate:
    """Of the strongest `share` of each cell's deletions, how many the screen made.

    The bar of a cell is the shift of its last deletion within `share`, among those made. A random deletion above it
    stands for 1 / chance that were missed. A missed one would raise the bar, so the estimate errs to the low side.
    Raises InputError when nothing was drawn at random or fewer deletions than `share` were made.
    """
    from scipy.stats import chi2

    pairs = _with_exact(first_pass, cell_shifts)
    wanted = pl.len() * share
    bars = pairs.group_by(CELL).agg(
        wanted=wanted.ceil().cast(pl.Int64),
        made=pl.col("shift").count(),
        bar=pl.col("shift")
        .drop_nulls()
        .sort(descending=True)
        .get((wanted.ceil() - 1).cast(pl.Int64), null_on_oob=True),
    )
    random = pairs.filter(pl.col("chosen") == RANDOM, pl.col("shift").is_not_null())
    if not len(random) or bars["bar"].null_count():
        raise InputError(
            "too few deletions were made to say what was missed.",
            where="cell_shifts",
            fix="Give a larger control_fraction, a larger top_fraction, or ask for a smaller share.",
        )
    above = random.join(bars, on=list(CELL)).filter(pl.col("shift") > pl.col("bar"))
    each = float((1.0 / random["chance"]).mean())  # type: ignore[arg-type]
    n_wanted, missed = float(bars["wanted"].sum()), float((1.0 / above["chance"] - 1.0).sum())
    most = max(missed, float(chi2.ppf(CONFIDENCE, 2 * (len(above) + 1)) / 2) * (each - 1.0))
    return RecallEstimate(
        share=share,
        recall=n_wanted / (n_wanted + missed),
        at_least=n_wanted / (n_wanted + most),
        n_random=len(random),
    )


def _with_exact(first_pass: pl.DataFrame, cell_shifts: pl.DataFrame) -> pl.DataFrame:
    """Rows of the first pass with `shift` and `chance` where the deletion was made."""
    keys = [*CELL, "gene_id"]
    made = cell_shifts.filter(pl.col("chosen").is_not_null(), pl.col("outcome") == "edited")
    return first_pass.join(made.select(*keys, "shift", "chance"), on=keys, how="left")
