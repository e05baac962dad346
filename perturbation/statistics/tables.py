"""What the statistics read of a screen's table of cell shifts, and its checks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from genescale.platform.errors import InputError, did_you_mean

KEYS = ("edit_id", "gene_id", "symbol", "kind")
NEEDED = ("cell_id", "dataset_id", "donor_id", "n_genes", *KEYS, "role", "control_of", "outcome", "found", "rank")
CHOSEN = "chosen"
"""Why a screen of two passes made this edit; null in any other screen."""
RANDOM = "random"
STATE, CLASS = "toward:", "class:"
EDITED = pl.col("outcome") == "edited"


def checked(cell_shifts: pl.DataFrame, readouts: Sequence[str]) -> pl.DataFrame:
    """The columns that statistics need; InputError for one that the table lacks, or when it has no edit."""
    for name in (*NEEDED, *readouts):
        if name not in cell_shifts.columns:
            fix = did_you_mean(name, cell_shifts.columns) or f"Columns: {', '.join(cell_shifts.columns)}."
            raise InputError(f"there is no column '{name}'.", where="cell_shifts", fix=fix)
    if not (cell_shifts["role"] == "edit").any():
        raise InputError("no row has the role 'edit'.", where="cell_shifts: role", fix="Give a screen that edits.")
    doubled = cell_shifts.filter(pl.col("role") == "edit").group_by("edit_id").agg(pl.col("kind").n_unique())
    if (doubled["kind"] > 1).any():
        name = doubled.filter(pl.col("kind") > 1)["edit_id"].sort()[0]
        raise InputError(
            f"the edit '{name}' has rows of more than one kind.",
            where="cell_shifts: kind",
            fix="Take the statistics of one kind of edit at a time.",
        )
    if CHOSEN not in cell_shifts.columns:
        cell_shifts = cell_shifts.with_columns(pl.lit(None, pl.String).alias(CHOSEN))
    return cell_shifts.select(*NEEDED, CHOSEN, *dict.fromkeys(readouts))


def readouts_of(cell_shifts: pl.DataFrame) -> list[str]:
    """`shift` and every `toward:` and `class:` column, in the table's order."""
    return [name for name in cell_shifts.columns if name == "shift" or name.startswith((STATE, CLASS))]


def numbers(values: pl.Series) -> npt.NDArray[np.float64]:
    """The values as float64, unknown ones as NaN."""
    known: npt.NDArray[np.float64] = values.cast(pl.Float64).fill_null(np.nan).to_numpy()
    return known


def with_codes(cell_shifts: pl.DataFrame) -> pl.DataFrame:
    """The table with whole numbers for `cell`, `donor` (cells without one share one), `edit` and `gene`."""
    return cell_shifts.with_columns(
        cell=_code(pl.col("dataset_id") + "\x1f" + pl.col("cell_id")),
        donor=_code(pl.col("donor_id").fill_null("")),
        edit=_code(pl.col("edit_id")),
        gene=_code(pl.col("gene_id")),
    )


def _code(names: pl.Expr) -> pl.Expr:
    return names.rank("dense").cast(pl.Int64) - 1
