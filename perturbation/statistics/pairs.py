"""Pairs of genes that act together: what both edits do beyond the sum of the two single ones.

Legend: `r` rows (one cell, one pair), `e` pairs.

    interaction   combined - (single A + single B), cell by cell, balanced over donors
    excess        the same, minus the interaction of the matched controls in the same cells: the mean of the pair's
                  controls less the means of both singles' controls. A shift is no sum even for genes that have nothing
                  to do with each other (1 - cosine grows with the square of a movement), and this is how much
    p             for `shift` of log2(combined / (A + B)), which is free of the size of the singles; for signed
                  read-outs of the interaction itself; both less the same of the controls where there are some.
                  Against the other pairs of the screen where they are many (an ordinary pair is the null), else
                  against zero (additivity, or the additivity of matched controls), as the column `test` says
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from genescale.perturbation.readouts.interactions import CELL_KEY, INTERACTION, SINGLES, interactions
from genescale.perturbation.statistics.effects import LOG_READOUTS, caution
from genescale.perturbation.statistics.estimates import Drawing, Places, estimate
from genescale.perturbation.statistics.matched_null import (
    FEWEST_REFERENCES,
    Over,
    Tested,
    against_matched,
    against_zero,
    sample,
    unmatched,
)
from genescale.perturbation.statistics.matching import match
from genescale.perturbation.statistics.multiple import benjamini_hochberg
from genescale.perturbation.statistics.tables import checked, numbers, readouts_of

Floats = npt.NDArray[np.float64]
NO_PAIR = "no cell has the pair and both single edits"
ONE_UNIT = "seen in one {unit} only"
# Keeps the logarithm of a ratio of two shifts finite when one is nothing.
TINY = 1e-12


def pair_effects(
    cell_shifts: pl.DataFrame,
    *,
    readouts: Sequence[str] | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """One row per pair (or larger set) and read-out, smallest p first: interaction with interval, p, q.

    Raises InputError when no edit has several genes or none of their genes was edited alone, SettingsError for a
    confidence or draws out of range.
    """
    drawing = Drawing(confidence=confidence, draws=draws, seed=seed)
    readouts = list(readouts) if readouts is not None else readouts_of(cell_shifts)
    checked(cell_shifts, readouts)
    table = interactions(cell_shifts)
    names = table["edit_id"].unique().sort()
    places = Places(
        edit_r=table["edit_id"].replace_strict(names, range(len(names)), return_dtype=pl.Int64).to_numpy(),
        donor_r=_codes(table["donor_id"].fill_null("")),
        cell_r=_codes(table["dataset_id"] + "\x1f" + table["cell_id"]),
        n_edits=len(names),
        n_donors=table["donor_id"].fill_null("").n_unique(),
    )
    controls = _control_means(cell_shifts, table, readouts)
    return pl.concat([_of_readout(table, names, places, controls, readout, drawing) for readout in readouts])


def _codes(names: pl.Series) -> npt.NDArray[np.int64]:
    return np.unique(names.to_numpy(), return_inverse=True)[1].astype(np.int64)


def _of_readout(
    table: pl.DataFrame, names: pl.Series, places: Places, controls: pl.DataFrame, readout: str, drawing: Drawing
) -> pl.DataFrame:
    over: Over = "donor" if places.n_donors > 1 else "cell"
    combined_r, singles_r, together_r = (numbers(table[n]) for n in (readout, SINGLES + readout, INTERACTION + readout))
    control_r, control_singles_r = (numbers(controls[n]) for n in (readout, SINGLES + readout))
    matched_r = together_r - (control_r - control_singles_r)
    plain = Drawing(draws=None)
    combined, singles = (
        estimate(places, np.where(np.isfinite(together_r), v, np.nan), over, plain) for v in (combined_r, singles_r)
    )
    interaction, excess = (estimate(places, values, over, drawing) for values in (together_r, matched_r))
    has_controls = bool(np.isfinite(matched_r).any())
    if readout in LOG_READOUTS:
        value_r = np.where(np.isfinite(together_r), _log_ratio(combined_r, singles_r), np.nan)
        value_r = value_r - (_log_ratio(control_r, control_singles_r) if has_controls else 0.0)
    else:
        value_r = matched_r if has_controls else together_r
    tested, fold_e = _test(places, value_r, over)
    reasons = [_reason(n, tested, over, p) for n, p in zip(tested.n_e.tolist(), tested.p_e.tolist(), strict=True)]
    counts = table.group_by("edit_id").agg(
        pl.col("gene_id", "symbol", "kind").first(),
        n_cells=pl.len(),
        n_edited=pl.col(INTERACTION + readout).is_not_null().sum(),
        n_donors=pl.col("donor_id").fill_null("").filter(pl.col(INTERACTION + readout).is_not_null()).n_unique(),
    )
    columns = {
        "combined": combined.mean_e,
        "sum_of_singles": singles.mean_e,
        "interaction": interaction.mean_e,
        "ci_low": interaction.low_e,
        "ci_high": interaction.high_e,
        "over": interaction.over_e,
        "excess": excess.mean_e,
        "excess_ci_low": excess.low_e,
        "excess_ci_high": excess.high_e,
        "log2_ratio": fold_e if readout in LOG_READOUTS else np.full(len(names), np.nan),
        "z": tested.z_e,
        "p": tested.p_e,
        "q": benjamini_hochberg(tested.p_e),
    }
    testable_e = np.isfinite(tested.p_e)
    return (
        pl.DataFrame({"edit_id": names})
        .join(counts, on="edit_id", how="left", maintain_order="left")
        .with_columns(pl.lit(readout).alias("readout"))
        .with_columns(pl.Series(name, values, nan_to_null=True) for name, values in columns.items())
        .with_columns(
            test=pl.when(pl.Series(testable_e)).then(pl.lit(tested.test)),
            testable=pl.Series(testable_e),
            reason=pl.Series(reasons, dtype=pl.String),
        )
        .sort("p", "edit_id", nulls_last=True)
    )


def _test(places: Places, value_r: Floats, over: Over) -> tuple[Tested, Floats]:
    """Test of each pair and the mean of what was tested."""
    pairs = sample(unmatched(places.edit_r, places.donor_r, value_r), places.n_edits, places.n_donors, over=over)
    mean_e = pairs.mean_e
    if pairs.usable_e.sum() < FEWEST_REFERENCES:
        return against_zero(pairs), mean_e
    centred = vars(pairs) | {"mean_e": mean_e - np.median(mean_e[pairs.usable_e])}
    return against_matched(type(pairs)(**centred), None), mean_e


def _reason(n: int, tested: Tested, over: Over, p: float) -> str:
    if n == 0:
        return NO_PAIR
    return caution(n, tested, over) if np.isfinite(p) else ONE_UNIT.format(unit=over)


def _control_means(cell_shifts: pl.DataFrame, table: pl.DataFrame, readouts: Sequence[str]) -> pl.DataFrame:
    """For each row of `table`: means of the controls of the pair, and sums of those of its singles; NaN without."""
    matching = match(checked(cell_shifts, readouts))
    keyed = cell_shifts.filter((pl.col("role") == "edit") & (pl.col("outcome") == "edited"))
    means = keyed.select(*CELL_KEY, "kind", "gene_id", "edit_id").with_columns(
        pl.Series(name, matching.control_moments(numbers(matching.pool[name]))[0]) for name in readouts
    )
    rows = table.with_row_index("row").select("row", *CELL_KEY, "kind", "gene_id", "edit_id")
    combined = rows.join(
        means.drop("gene_id", "kind"), on=[*CELL_KEY, "edit_id"], how="left", nulls_equal=True, maintain_order="left"
    )
    singles = (
        rows.with_columns(pl.col("gene_id").str.split("+"))
        .explode("gene_id")
        .join(
            means.drop("edit_id").unique([*CELL_KEY, "kind", "gene_id"], keep="first", maintain_order=True),
            on=[*CELL_KEY, "kind", "gene_id"],
            how="left",
            nulls_equal=True,
        )
        .group_by("row")
        .agg(pl.col(name).fill_null(np.nan).sum().alias(SINGLES + name) for name in readouts)
        .sort("row")
    )
    return pl.concat([combined.select(readouts), singles.drop("row")], how="horizontal")


def _log_ratio(above_r: Floats, below_r: Floats) -> Floats:
    return np.log2(np.maximum(above_r, 0.0) + TINY) - np.log2(np.maximum(below_r, 0.0) + TINY)
