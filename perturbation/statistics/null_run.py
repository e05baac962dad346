"""A screen against a null run: the same edits in other cells (healthy ones, say, or with another model).

Legend: `r` edited rows (one cell, one edit), `e` edits, `u` donors.

    difference   donor-balanced value in the screen less that in the null run
    compared     `excess` (the value less that of matched controls in the same cells) where both runs have controls,
                 else `value`; column `compared`. Cells of two kinds differ in how easily any edit moves them, which
                 the controls take away and a bare value does not
    p            is the difference zero? The gene is the same on both sides, so what is ordinary about it cancels.
                 Paired by donor where two donors or more are in both runs, else Welch's two-sample t over donors (over
                 cells where each run has one donor); variances are drawn towards those of all edits (see
                 `matched_null.py`). A shift is compared in log2 units (as a factor), signed read-outs as they are
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from genescale.perturbation.statistics.effects import LOG_READOUTS
from genescale.perturbation.statistics.estimates import Drawing
from genescale.perturbation.statistics.intervals import Clustered, donor_balanced, intervals
from genescale.perturbation.statistics.matched_null import (
    Floats,
    Ints,
    Over,
    Sample,
    against_zero,
    sample,
    unmatched,
)
from genescale.perturbation.statistics.matched_test import logarithms
from genescale.perturbation.statistics.matching import match
from genescale.perturbation.statistics.multiple import benjamini_hochberg
from genescale.perturbation.statistics.tables import checked, numbers, readouts_of
from genescale.platform.errors import InputError

FEWEST_PAIRED = 2
NOT_EDITED = "no cell of the {run} was edited"
ONE_DONOR = "the {run} saw it in one donor only: whether other donors agree cannot be told"
ONE_DONOR_EACH = "one donor in each run: this holds for these cells and says nothing of other donors"
ONE_CELL = "the {run} saw it in one cell only"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """One run's rows of the edits that are compared."""

    name: str
    edit_r: Ints
    donor_r: npt.NDArray[np.str_]
    value_r: Floats
    control_r: Floats
    log_value_r: Floats
    log_control_r: Floats
    n_donors: int

    @property
    def controlled(self) -> bool:
        """Whether any row has matched controls."""
        return bool(np.isfinite(self.control_r).any())

    def plain(self, controlled: bool) -> Floats:
        """The read-out, less that of the controls."""
        return self.value_r - self.control_r if controlled else self.value_r

    def scaled(self, controlled: bool) -> Floats:
        """The same on the scale of the test."""
        return self.log_value_r - self.log_control_r if controlled else self.log_value_r


@dataclass(frozen=True, kw_only=True, eq=False)
class _Side:
    """One run's values by edit: over donors (or cells), and donor by donor."""

    sample: Sample
    by_donor: Clustered
    n_cells_e: Ints

    @classmethod
    def of(cls, run: _Run, value_r: Floats, donors: npt.NDArray[np.str_], n_edits: int, over: Over) -> _Side:
        donor_r = np.searchsorted(donors, run.donor_r).astype(np.int64)
        shape = (n_edits, len(donors))
        return cls(
            sample=sample(unmatched(run.edit_r, donor_r, value_r), *shape, over=over),
            by_donor=donor_balanced(run.edit_r, donor_r, value_r, shape),
            n_cells_e=np.bincount(run.edit_r[np.isfinite(value_r)], minlength=n_edits),
        )


def against_null_run(
    cell_shifts: pl.DataFrame,
    null_shifts: pl.DataFrame,
    *,
    readouts: Sequence[str] | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """One row per edit of the screen and read-out: values in both runs, difference with interval, p, q.

    readouts: by default all that both tables have. Edits that the null run lacks stay in the table, untested and with
    the reason. Raises InputError when the runs share no edit or no read-out, or edit in different ways.
    """
    drawing = Drawing(confidence=confidence, draws=draws, seed=seed)
    shared = [name for name in readouts_of(cell_shifts) if name in null_shifts.columns]
    readouts = list(readouts) if readouts is not None else shared
    if not readouts:
        raise InputError("the two runs share no read-out.", where="cell_shifts", fix="Compare screens of one kind.")
    runs = [checked(table, readouts) for table in (cell_shifts, null_shifts)]
    names, described = _edits(*runs)
    found = []
    for readout in readouts:
        screen, null = (
            _run(table, name, readout, names) for table, name in zip(runs, ("screen", "null run"), strict=True)
        )
        columns = _compared(screen, null, len(names), readout, drawing)
        found.append(
            described.with_columns(pl.lit(readout).alias("readout"))
            .with_columns(pl.Series(name, values, nan_to_null=True) for name, values in columns.items())
            .sort("p", "edit_id", nulls_last=True)
        )
    return pl.concat(found)


def _edits(screen: pl.DataFrame, null: pl.DataFrame) -> tuple[pl.Series, pl.DataFrame]:
    """Names of the screen's edits, and who they are; InputError where the runs cannot be compared."""
    ours, theirs = (table.filter(pl.col("role") == "edit") for table in (screen, null))
    described = ours.group_by("edit_id").agg(pl.col("gene_id", "symbol", "kind").first()).sort("edit_id")
    both = described.join(theirs.group_by("edit_id").agg(other=pl.col("kind").first()), on="edit_id")
    if not len(both):
        raise InputError(
            "the two runs share no edit.", where="cell_shifts: edit_id", fix="Run both with the same [edits]."
        )
    unlike = both.filter(pl.col("kind") != pl.col("other"))
    if len(unlike):
        name, kind, other = unlike.select("edit_id", "kind", "other").row(0)
        raise InputError(
            f"'{name}' is {kind} in the screen and {other} in the null run.",
            where="cell_shifts: kind",
            fix="Run both with the same kind of edit.",
        )
    return described["edit_id"], described


def _run(table: pl.DataFrame, name: str, readout: str, names: pl.Series) -> _Run:
    matching = match(table)
    value_r, value_p = (numbers(frame[readout]) for frame in (matching.rows, matching.pool))
    control_r, _ = matching.control_moments(value_p)
    log_value_r, log_control_r = value_r, control_r
    if readout in LOG_READOUTS:
        log_value_r, log_value_p = logarithms(value_r, value_p if len(value_p) else value_r)
        log_control_r = matching.control_moments(log_value_p)[0] if len(value_p) else control_r
    place_r = matching.rows["edit_id"].replace_strict(names, range(len(names)), default=None, return_dtype=pl.Int64)
    kept_r = place_r.is_not_null().to_numpy()
    return _Run(
        name=name,
        edit_r=place_r.drop_nulls().to_numpy(),
        donor_r=matching.rows["donor_id"].fill_null("").to_numpy().astype(str)[kept_r],
        value_r=value_r[kept_r],
        control_r=control_r[kept_r],
        log_value_r=log_value_r[kept_r],
        log_control_r=log_control_r[kept_r],
        n_donors=matching.rows["donor_id"].fill_null("").n_unique(),
    )


def _compared(
    screen: _Run, null: _Run, n_edits: int, readout: str, drawing: Drawing
) -> dict[str, npt.NDArray[np.generic] | list[str]]:
    controlled = screen.controlled and null.controlled
    donors = np.unique(np.concatenate([screen.donor_r, null.donor_r]))
    over: Over = "cell" if screen.n_donors == null.n_donors == 1 else "donor"
    plain = [_Side.of(run, run.plain(controlled), donors, n_edits, over) for run in (screen, null)]
    scaled = [_Side.of(run, run.scaled(controlled), donors, n_edits, over) for run in (screen, null)]
    shared_eu = (plain[0].by_donor.counts_eu > 0) & (plain[1].by_donor.counts_eu > 0)
    paired_e = shared_eu.sum(axis=1) >= FEWEST_PAIRED
    welch, pairs = _welch(scaled[0].sample, scaled[1].sample), _paired(scaled, shared_eu)
    contrast = Sample(**{name: np.where(paired_e, getattr(pairs, name), value) for name, value in vars(welch).items()})
    tested = against_zero(contrast)
    differences = _differences(plain, shared_eu)
    low_e, high_e = _welch_interval(plain[0].sample, plain[1].sample, drawing.confidence)
    if paired_e.any():
        ends = intervals(
            differences.take(paired_e), confidence=drawing.confidence, draws=drawing.draws or 0, seed=drawing.seed
        )
        low_e[paired_e], high_e[paired_e] = ends
    n_cells, n_units = [side.n_cells_e for side in plain], [side.sample.n_e for side in plain]
    return {
        "compared": np.full(n_edits, "excess" if controlled else "value"),
        "over": np.full(n_edits, over),
        "screen": plain[0].sample.mean_e,
        "null_run": plain[1].sample.mean_e,
        "difference": np.where(paired_e, differences.means_e, plain[0].sample.mean_e - plain[1].sample.mean_e),
        "ci_low": low_e,
        "ci_high": high_e,
        "log2_ratio": contrast.mean_e if readout in LOG_READOUTS else np.full(n_edits, np.nan),
        "n_cells": n_cells[0],
        "n_cells_null": n_cells[1],
        "n_donors": plain[0].by_donor.n_e,
        "n_donors_null": plain[1].by_donor.n_e,
        "n_donors_paired": np.where(paired_e, shared_eu.sum(axis=1), 0),
        "z": tested.z_e,
        "p": tested.p_e,
        "q": benjamini_hochberg(tested.p_e),
        "testable": np.isfinite(tested.p_e),
        "reason": [
            _reason(cells, cells_null, n, n_null, over)
            for cells, cells_null, n, n_null in zip(*n_cells, *n_units, strict=True)
        ],
    }


def _welch(first: Sample, second: Sample) -> Sample:
    """Difference of two independent means, with Welch's degrees of freedom (Biometrika 34, 1947)."""
    parts = [np.nan_to_num(side.variance_e) for side in (first, second)]
    freedoms = [np.maximum(side.freedom_e, 1.0) for side in (first, second)]
    below_e = sum(part**2 / freedom for part, freedom in zip(parts, freedoms, strict=True))
    least_e = np.minimum(first.freedom_e, second.freedom_e)
    variance_e = parts[0] + parts[1]
    return Sample(
        mean_e=first.mean_e - second.mean_e,
        variance_e=variance_e,
        n_e=np.minimum(first.n_e, second.n_e),
        freedom_e=np.divide(variance_e**2, below_e, out=least_e.copy(), where=below_e > 0),
        per_cell_e=first.per_cell_e + second.per_cell_e,
        per_donor_e=first.per_donor_e + second.per_donor_e,
        controls_e=first.controls_e,
        within_squares_e=first.within_squares_e + second.within_squares_e,
        within_freedom_e=first.within_freedom_e + second.within_freedom_e,
    )


def _welch_interval(first: Sample, second: Sample, confidence: float) -> tuple[Floats, Floats]:
    from scipy.stats import t

    both = _welch(first, second)
    half_e = t.ppf((1 + confidence) / 2, np.maximum(both.freedom_e, 1.0)) * np.sqrt(both.variance_e)
    half_e = np.where(both.n_e > 1, half_e, np.nan)
    return both.mean_e - half_e, both.mean_e + half_e


def _differences(sides: Sequence[_Side], shared_eu: npt.NDArray[np.bool_]) -> Clustered:
    """Difference of the two means of each donor that is in both runs."""
    between_eu = sides[0].by_donor.sums_eu - sides[1].by_donor.sums_eu
    return Clustered(sums_eu=np.where(shared_eu, between_eu, 0.0), counts_eu=shared_eu.astype(np.float64))


def _paired(sides: Sequence[_Side], shared_eu: npt.NDArray[np.bool_]) -> Sample:
    edit_r, donor_r = np.nonzero(shared_eu)
    rows = unmatched(edit_r, donor_r, _differences(sides, shared_eu).sums_eu[edit_r, donor_r])
    return sample(rows, *shared_eu.shape, over="donor")


def _reason(n_cells: int, n_cells_null: int, n: int, n_null: int, over: Over) -> str:
    for run, cells, units in (("screen", n_cells, n), ("null run", n_cells_null, n_null)):
        if not cells:
            return NOT_EDITED.format(run=run)
        if units < 2:
            return (ONE_CELL if over == "cell" else ONE_DONOR).format(run=run)
    return ONE_DONOR_EACH if over == "cell" else ""
