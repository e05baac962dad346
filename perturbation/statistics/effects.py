"""The effect of each edit of a screen: how large, how sure, and whether it is more than matched genes do.

Legend: `e` edits, `r` edited rows (one cell, one edit), `u` donors or blocks of cells.

    mean      of the read-out, first over the cells of each donor and then over donors (each donor weighs the same)
    excess    the same of: read-out minus the mean of the matched control edits in the same cell
    interval  over donors; over cells only where there is one donor (`over` says which; see `intervals.py`)
    p, q      the null is a matched gene in the same donors (see `matched_null.py`); q is Benjamini-Hochberg over the
              testable edits. `testable` and `reason` say what cannot be asked of these cells, and why

`excess_ci_*` and p answer different questions: the interval says how far the edit lies from the *average* of its
matched genes, p whether it lies farther out than *single* matched genes do. The first leaves zero for nearly every gene
once there are cells enough, because any two genes differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from genescale.perturbation.statistics.estimates import Drawing, Places, estimate
from genescale.perturbation.statistics.matched_null import Over, Tested
from genescale.perturbation.statistics.matched_test import matched_test
from genescale.perturbation.statistics.matching import Matching, match
from genescale.perturbation.statistics.multiple import benjamini_hochberg
from genescale.perturbation.statistics.tables import CHOSEN, checked, numbers, readouts_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
# Movements differ by factors, not by sums, so they are tested as logarithms; signed read-outs are tested as they are.
LOG_READOUTS = ("shift",)
FEW = 3
NOT_EDITED = "no cell was edited"
NO_CONTROLS = "no control edits stand in the same cells: screen it with controls"
ONE_CELL = "one cell only"
ONE_OF_DONORS = "seen in one donor only: whether other donors agree cannot be told"
NO_SPREAD = "its controls do not differ, so there is nothing to measure it by"
# A first pass chose the cells in which this gene would move most, which any test would mistake for an effect.
PRESELECTED = "a first pass chose its cells by what it expected there: screen it by name, with controls, to test it"
ONE_DONOR = "one donor: this holds for these cells and says nothing of other donors"
FEW_DONORS = "{n} donors: the spread between donors is mostly borrowed from other genes"
FEW_DONORS_ALONE = "{n} donors: only a very even and strong effect can be told from chance"


def effects(
    cell_shifts: pl.DataFrame,
    *,
    readout: str = "shift",
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """One row per edit, smallest p first: counts, donor-balanced mean and excess with intervals, p, q.

    cell_shifts: the table of a screen, or any part of it (the cells of one type, say).
    Raises InputError for columns that the table lacks, SettingsError for a confidence or draws out of range.
    """
    return effects_table(cell_shifts, readouts=[readout], confidence=confidence, draws=draws, seed=seed)


def effects_table(
    cell_shifts: pl.DataFrame,
    *,
    readouts: Sequence[str] | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """`effects` of several read-outs, one below the other with a column `readout`; q is taken within each.

    readouts: by default `shift` and every `toward:` and `class:` column. Raises as `effects`.
    """
    readouts = list(readouts) if readouts is not None else readouts_of(cell_shifts)
    table = checked(cell_shifts, readouts)
    config = Drawing(confidence=confidence, draws=draws, seed=seed)
    counts = _counts(table)
    matching = match(table)
    over: Over = "donor" if counts["n_donors_of_screen"][0] > 1 else "cell"
    return pl.concat([_effects_of(table, readout, counts, matching, over, config) for readout in readouts])


def _counts(table: pl.DataFrame) -> pl.DataFrame:
    """Cells by outcome, donors, and in which share of the screen's cells the edit found its genes."""
    n_cells_of_screen = table.select(pl.struct("dataset_id", "cell_id").n_unique()).item()
    tried = table.filter(pl.col("role") == "edit")
    edited = pl.col("outcome") == "edited"
    # Cells of unknown donors might all be of one, so together they are taken for one.
    donor = pl.col("donor_id").fill_null("")
    return (
        tried.group_by("edit_id")
        .agg(
            pl.col("gene_id", "symbol", "kind").first(),
            n_cells=pl.len(),
            n_edited=edited.sum(),
            n_absent=(pl.col("outcome") == "absent").sum(),
            n_undefined=(pl.col("outcome") == "undefined").sum(),
            n_donors=donor.filter(edited).n_unique(),
            detection_rate=pl.col("found").sum() / n_cells_of_screen,
            preselected=pl.col(CHOSEN).is_not_null().any(),
        )
        .with_columns(n_donors_of_screen=pl.lit(tried.select(donor.n_unique()).item()))
        .sort("edit_id")
    )


def _effects_of(
    table: pl.DataFrame, readout: str, counts: pl.DataFrame, matching: Matching, over: Over, config: Drawing
) -> pl.DataFrame:
    edit_of = {name: at for at, name in enumerate(counts["edit_id"])}
    edit_r = matching.rows["edit_id"].replace_strict(edit_of, return_dtype=pl.Int64).to_numpy()
    places = Places(
        edit_r=edit_r,
        donor_r=matching.rows["donor"].to_numpy(),
        cell_r=matching.rows["cell"].to_numpy(),
        n_edits=len(counts),
        n_donors=int(table["donor_id"].fill_null("").n_unique()),
    )
    value_r, value_p = (numbers(frame[readout]) for frame in (matching.rows, matching.pool))
    control_r, _ = matching.control_moments(value_p)
    mean, excess = (estimate(places, values, over, config) for values in (value_r, value_r - control_r))
    control = estimate(places, np.where(np.isfinite(value_r), control_r, np.nan), over, Drawing(draws=None))
    tested, fold_r = matched_test(matching, places, value_r, value_p, over, logarithmic=readout in LOG_READOUTS)
    fold = estimate(places, fold_r, over, config)
    n_controls_e = np.bincount(edit_r, weights=matching.n_controls_r, minlength=len(counts))
    testable_e, reason_e = _testable(counts, excess.n_cells_e, tested, over)
    p_e = np.where(testable_e, tested.p_e, np.nan)
    columns: dict[str, npt.NDArray[np.generic]] = {
        "mean": mean.mean_e,
        "ci_low": mean.low_e,
        "ci_high": mean.high_e,
        "over": mean.over_e,
        "control_mean": control.mean_e,
        "excess": excess.mean_e,
        "excess_ci_low": excess.low_e,
        "excess_ci_high": excess.high_e,
        "log2_fold": fold.mean_e,
        "log2_fold_ci_low": fold.low_e,
        "log2_fold_ci_high": fold.high_e,
        "z": np.where(testable_e, tested.z_e, np.nan),
        "p": p_e,
        "q": benjamini_hochberg(p_e),
        "n_matched": excess.n_cells_e,
        "n_controls": n_controls_e.astype(np.int64),
        "n_references": np.full(len(counts), tested.n_references),
    }
    return (
        counts.drop("n_donors_of_screen", "preselected")
        .with_columns(pl.lit(readout).alias("readout"))
        .with_columns(pl.Series(name, values, nan_to_null=True) for name, values in columns.items())
        .with_columns(
            test=pl.when(pl.Series(testable_e)).then(pl.lit(tested.test)),
            testable=pl.Series(testable_e),
            reason=pl.Series(reason_e, dtype=pl.String),
        )
        .sort("p", pl.col("excess").abs(), "edit_id", descending=[False, True, False], nulls_last=True)
    )


def _testable(
    counts: pl.DataFrame, n_matched_e: Ints, tested: Tested, over: Over
) -> tuple[npt.NDArray[np.bool_], list[str]]:
    """Whether each edit has a p, and what to know about it."""
    testable, reasons = [], []
    for edited, preselected, donors, matched, p in zip(
        counts["n_edited"],
        counts["preselected"],
        tested.n_e.tolist(),
        n_matched_e.tolist(),
        tested.p_e.tolist(),
        strict=True,
    ):
        why_not = PRESELECTED if preselected and edited else _why_not(edited, donors, matched, p, over)
        testable.append(not why_not)
        reasons.append(why_not or caution(donors, tested, over))
    return np.array(testable, dtype=bool), reasons


def _why_not(n_edited: int, n: int, n_matched: int, p: float, over: Over) -> str:
    if not n_edited:
        return NOT_EDITED
    if not n_matched:
        return NO_CONTROLS
    if n < 2:
        return ONE_OF_DONORS if over == "donor" else ONE_CELL
    return "" if np.isfinite(p) else NO_SPREAD


def caution(n_donors: int, tested: Tested, over: Over) -> str:
    """What to know about a p that rests on one donor or few; empty where nothing is amiss."""
    if over == "cell":
        return ONE_DONOR
    if n_donors > FEW:
        return ""
    return (FEW_DONORS if tested.prior_freedom else FEW_DONORS_ALONE).format(n=n_donors)
