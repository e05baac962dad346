"""How single genes move under each edit, held against the control edits: from a screen's gene shifts.

Legend: `p` pairs of (edit, affected gene).

Removing a token moves every later gene by one rank, and some genes are moved easily by anything; neither is biology. So
each pair's shift is given as a fold over a baseline, the shift of the very same gene under control edits:

    controls    the edit's own matched controls, in the same cells, where the screen had controls
    other edits where it had none, the other edits of the screen that moved this gene too (nearest in rank, if known)

Changes of masked genes have a sign and may be zero, so their baseline is taken off instead: `fall` is by how much more
the log-probability falls under the edit than under its controls.

Gene shifts are means over cells of all donors, so there are no intervals over donors here; `targets.py` says how lists
of genes are tested all the same.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from genescale.perturbation.statistics.matched_null import Floats
from genescale.platform.errors import InputError, LimitError

NEEDED = ("edit_id", "gene_id", "symbol", "role", "control_of", "affected_gene_id", "n_cells")
OTHER_EDITS = 20
FEWEST_OTHERS = 3
MOST_PAIRS = 100_000_000
CONTROLS, OTHERS = "controls", "other edits"


def gene_folds(gene_shifts: pl.DataFrame, *, edit_ranks: pl.DataFrame | None = None) -> pl.DataFrame:
    """Each (edit, affected gene) with its baseline: `control_mean`, `n_control_cells`, `log2_fold`, `baseline`.

    edit_ranks: `edit_id` and its mean `rank` (`edit_ranks` makes it), by which other edits are matched. A pair without
    a baseline keeps its row with nulls. Raises InputError for columns that the table lacks.
    """
    table = _with_baseline(gene_shifts, "mean_shift", edit_ranks, where="gene_shifts")
    known = (pl.col("control_mean") > 0) & (pl.col("mean_shift") > 0)
    return table.with_columns(log2_fold=pl.when(known).then((pl.col("mean_shift") / pl.col("control_mean")).log(2)))


def masked_gene_falls(masked_genes: pl.DataFrame, *, edit_ranks: pl.DataFrame | None = None) -> pl.DataFrame:
    """As `gene_folds`, of a screen's changes of masked genes: `fall` = control_mean - mean_change, in nats.

    Above 0 the model expects the gene less than it does under the control edits.
    """
    table = _with_baseline(masked_genes, "mean_change", edit_ranks, where="masked_genes")
    return table.with_columns(fall=pl.col("control_mean") - pl.col("mean_change"))


def _with_baseline(pairs: pl.DataFrame, column: str, edit_ranks: pl.DataFrame | None, *, where: str) -> pl.DataFrame:
    """Rows of edits with `control_mean`, `n_control_cells` and `baseline`, of what stands in `column`."""
    needed = (*NEEDED, column)
    for name in needed:
        if name not in pairs.columns:
            raise InputError(f"there is no column '{name}'.", where=where, fix=f"Needed: {', '.join(needed)}.")
    edits = pairs.filter(pl.col("role") == "edit")
    controls = pairs.filter((pl.col("role") == "control") & pl.col("control_of").is_not_null())
    if len(controls):
        weight = pl.col("n_cells")
        of_controls = controls.group_by(edit_id="control_of", affected_gene_id="affected_gene_id").agg(
            control_mean=(pl.col(column) * weight).sum() / weight.sum(), n_control_cells=weight.sum()
        )
        table = edits.join(of_controls, on=["edit_id", "affected_gene_id"], how="left", maintain_order="left")
        name = CONTROLS
    else:
        table, name = _beside_other_edits(edits, column, edit_ranks), OTHERS
    return table.with_columns(baseline=pl.when(pl.col("control_mean").is_not_null()).then(pl.lit(name)))


def edit_ranks(cell_shifts: pl.DataFrame) -> pl.DataFrame:
    """Mean rank of each edit over the cells that have it: `edit_id`, `rank`."""
    found = cell_shifts.filter((pl.col("role") == "edit") & pl.col("rank").is_not_null())
    return found.group_by("edit_id").agg(pl.col("rank").mean()).sort("edit_id")


def affected_genes(gene_shifts: pl.DataFrame, *, edit_ranks: pl.DataFrame | None = None) -> pl.DataFrame:
    """One row per affected gene, most moved first: over how many edits, how far, and by which edit most.

    `mean_shift` weighs edits by their cells; `mean_log2_fold` and `sd_log2_fold` are over edits; `top_edit` has the
    largest fold (or shift, where there is no baseline).
    """
    folds = gene_folds(gene_shifts, edit_ranks=edit_ranks)
    weight = pl.col("n_cells")
    strongest = pl.coalesce("log2_fold", "mean_shift").arg_max()
    names = [name for name in ("affected_symbol",) if name in folds.columns]
    return (
        folds.sort("edit_id")
        .group_by("affected_gene_id", maintain_order=True)
        .agg(
            pl.col(names).first(),
            n_edits=pl.len(),
            n_cells=weight.sum(),
            mean_shift=(pl.col("mean_shift") * weight).sum() / weight.sum(),
            sd_between_edits=pl.col("mean_shift").std(),
            mean_log2_fold=pl.col("log2_fold").mean(),
            sd_log2_fold=pl.col("log2_fold").std(),
            top_edit=pl.col("edit_id").get(strongest),
            top_symbol=pl.col("symbol").get(strongest),
            top_shift=pl.col("mean_shift").get(strongest),
            top_log2_fold=pl.col("log2_fold").get(strongest),
        )
        .sort("mean_shift", "affected_gene_id", descending=[True, False])
    )


def _beside_other_edits(edits: pl.DataFrame, column: str, ranks: pl.DataFrame | None) -> pl.DataFrame:
    """Mean of the same gene under the other edits, weighted by their cells: geometric for shifts, plain for changes."""
    names = edits["edit_id"].unique().sort()
    genes = edits["affected_gene_id"].unique().sort()
    edit_p, gene_p = (
        edits[column].replace_strict(known, range(len(known)), return_dtype=pl.Int64).to_numpy()
        for column, known in (("edit_id", names), ("affected_gene_id", genes))
    )
    if len(names) * len(genes) > MOST_PAIRS:
        raise LimitError(
            f"{len(names):,} edits times {len(genes):,} affected genes are more than {MOST_PAIRS:,} pairs.",
            where="gene_shifts",
            fix="Give the rows of fewer edits, or screen with controls.",
        )
    value_p, cells_p = (edits[name].cast(pl.Float64).to_numpy() for name in (column, "n_cells"))
    geometric = column == "mean_shift"
    usable_p = value_p > 0 if geometric else np.isfinite(value_p)
    values_eg, weights_eg = np.zeros((2, len(names), len(genes)), dtype=np.float32)
    weights_eg[edit_p[usable_p], gene_p[usable_p]] = cells_p[usable_p]
    values_eg[edit_p[usable_p], gene_p[usable_p]] = np.log(value_p[usable_p]) if geometric else value_p[usable_p]
    order = np.argsort(edit_p, kind="stable")
    first_e = np.searchsorted(edit_p[order], np.arange(len(names) + 1))
    mean_p, n_p = np.full((2, len(edits)), np.nan)
    for edit in range(len(names)):
        others = _nearest_edits(edit, names, ranks)
        of_edit = order[first_e[edit] : first_e[edit + 1]]
        at = np.ix_(others, gene_p[of_edit])
        weight, seen = weights_eg[at].sum(axis=0), (weights_eg[at] > 0).sum(axis=0)
        total = (values_eg[at] * weights_eg[at]).sum(axis=0)
        enough = seen >= FEWEST_OTHERS
        mean = np.divide(total, weight, where=weight > 0, out=np.zeros(len(total)))
        mean = np.exp(mean) if geometric else mean
        mean_p[of_edit] = np.where(enough, mean, np.nan)
        n_p[of_edit] = np.where(enough, weight, 0)
    return edits.with_columns(
        control_mean=pl.Series(mean_p, nan_to_null=True), n_control_cells=pl.Series(n_p.astype(np.int64))
    )


def _nearest_edits(edit: int, names: pl.Series, ranks: pl.DataFrame | None) -> np.ndarray:
    """Places of the other edits: the OTHER_EDITS nearest in mean rank, or all where ranks are not given."""
    others = np.delete(np.arange(len(names)), edit)
    if ranks is None:
        return others
    rank_e: Floats = (
        (pl.DataFrame({"edit_id": names}).join(ranks, on="edit_id", how="left", maintain_order="left")["rank"])
        .cast(pl.Float64)
        .fill_null(np.inf)
        .to_numpy()
    )
    with np.errstate(invalid="ignore"):
        distance = np.nan_to_num(np.abs(rank_e[others] - rank_e[edit]), nan=0.0)
    return others[np.argsort(distance, kind="stable")[:OTHER_EDITS]]
