"""Interactions: what a set of genes does together beyond the sum of what each does alone, cell by cell.

On every read-out that a screen recorded (shift, movement toward each state, change of each class probability):

    interaction = combined - (single A + single B + …)

in one cell. It is positive where the genes together move the cell more than they would if their effects added up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from genescale.platform.errors import InputError

if TYPE_CHECKING:
    import polars as pl

CELL_KEY = ("dataset_id", "source_row", "cell_id")
FIXED_READOUTS = ("shift",)
READOUT_PREFIXES = ("toward:", "class:")
SINGLES, INTERACTION = "singles:", "interaction:"
_TOGETHER = "+"


def readout_columns(cell_shifts: pl.DataFrame) -> list[str]:
    """The columns of a screen's table that hold a read-out of one edit in one cell."""
    return [name for name in cell_shifts.columns if name in FIXED_READOUTS or name.startswith(READOUT_PREFIXES)]


def interactions(cell_shifts: pl.DataFrame) -> pl.DataFrame:
    """The rows of a screen that edit several genes together, with their interactions.

    For each read-out X come `singles:X`, the sum of the single edits of the same genes in the same cell, and
    `interaction:X`, X minus that sum; `no_interaction` says why they are null: `absent` (the cell lacks a gene),
    `undefined` (an edit left nothing to compare) or `single missing` (a gene was not edited alone in this cell).
    Control rows are no part of it. Raises InputError when no row edits genes together, or none of their genes was
    edited alone.
    """
    import polars as pl

    edits = cell_shifts.filter(pl.col("role") == "edit")
    together = edits.filter(pl.col("gene_id").str.contains(_TOGETHER, literal=True)).with_row_index("row")
    if not len(together):
        raise InputError("no edit has several genes, so there is no interaction.", fix="Screen pairs of genes.")
    readouts = readout_columns(cell_shifts)
    genes = together.select("row", *CELL_KEY, "kind", pl.col("gene_id").str.split(_TOGETHER)).explode("gene_id")
    # A set of one gene is that gene's single edit under another name, so rows are found by gene and taken once.
    singles = edits.unique(subset=[*CELL_KEY, "kind", "gene_id"], keep="first", maintain_order=True)
    singles = singles.select(*CELL_KEY, "kind", "gene_id", "outcome", *readouts)
    found = genes.join(singles, on=[*CELL_KEY, "kind", "gene_id"], how="left", nulls_equal=True)
    if found["outcome"].null_count() == len(found):
        raise InputError(
            "none of the genes that were edited together was edited alone.",
            fix="Screen pairs with [edits] pairs, which edits each gene alone as well.",
        )
    sums = found.group_by("row").agg(_why_not(pl.col("outcome")), *(pl.col(name).sum() for name in readouts))
    sums = sums.rename({name: SINGLES + name for name in readouts})
    joined = together.join(sums, on="row", how="left").sort("row").drop("row")
    joined = joined.with_columns(
        pl.when(pl.col("outcome") == "edited").then("no_interaction").otherwise("outcome").alias("no_interaction")
    )
    defined = pl.col("no_interaction").is_null()
    joined = joined.with_columns(pl.when(defined).then(pl.col(SINGLES + name)) for name in readouts)
    return joined.with_columns((pl.col(name) - pl.col(SINGLES + name)).alias(INTERACTION + name) for name in readouts)


def _why_not(outcome: pl.Expr) -> pl.Expr:
    """Null where all single edits of a group were made; else the first reason why not."""
    import polars as pl

    return (
        pl.when(outcome.is_null().any())
        .then(pl.lit("single missing"))
        .when((outcome == "absent").any())
        .then(pl.lit("absent"))
        .when((outcome != "edited").any())
        .then(pl.lit("undefined"))
        .alias("no_interaction")
    )
