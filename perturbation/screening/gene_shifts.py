"""How every gene answers to every edit, averaged over cells: merged from what the units kept.

Legend: `p` pairs of (edit, affected gene).

Merging goes through the edits in passes of bounded memory, each over the sums of all units in their order, so the same
units give the same bits however many passes it takes.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from genescale.perturbation.screening.edit_codes import EditCodes
from genescale.perturbation.screening.moments import Moments, fold
from genescale.perturbation.screening.plan import Plan
from genescale.perturbation.screening.results import (
    GENE_MOMENTS,
    GENE_SHIFTS_FILE,
    MASKED_GENES_FILE,
    MASKED_MOMENTS,
    unit_file,
)
from genescale.platform.storage import Store, join

ROWS_PER_PASS = 8_000_000
MOMENTS_SCHEMA = pa.schema(
    [
        ("edit", pa.int32()),
        ("token", pa.int32()),
        ("count", pa.int64()),
        ("mean", pa.float64()),
        ("squares", pa.float64()),
    ]
)
TEXT_COLUMNS = ("edit_id", "gene_id", "symbol", "role", "control_of", "affected_gene_id", "affected_symbol")


@dataclass(frozen=True, kw_only=True)
class PairTable:
    """A table of (edit, affected gene): where the sums behind it lie, and what it tells."""

    folder: str
    file: str
    quantity: str
    """What `mean_` and `sd_` in the names of its columns are of."""
    of_cosines: bool
    """The sums are of cosines `c`, and the table tells 1 - c."""

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""
        numbers = [(f"{name}_{self.quantity}", pa.float64()) for name in ("mean", "sd")]
        return pa.schema([*((name, pa.string()) for name in TEXT_COLUMNS), ("n_cells", pa.int64()), *numbers])


GENE_SHIFTS = PairTable(folder=GENE_MOMENTS, file=GENE_SHIFTS_FILE, quantity="shift", of_cosines=True)
MASKED_GENES = PairTable(folder=MASKED_MOMENTS, file=MASKED_GENES_FILE, quantity="change", of_cosines=False)


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The file that was written."""

    rows: int
    left_out: int
    """Pairs below `min_cells`, or beyond the `top_k` of their edit."""
    sha256: str


def moments_table(moments: Moments) -> pa.Table:
    """The sums of one unit, by rising (edit, token)."""
    columns = (moments.edit_p, moments.token_p, moments.count_p, moments.mean_p, moments.squares_p)
    return pa.table([pa.array(column) for column in columns], schema=MOMENTS_SCHEMA)


def merge_pairs(
    table: PairTable, plan: Plan, uri: str, store: Store, *, n_observed: int, top_k: int = 0, min_cells: int = 1
) -> Merged:
    """Merge the sums of all units and write the table below `uri`; `n_observed` are the rows of those sums.

    Of each edit the `top_k` largest means are kept (0: all), among genes that at least `min_cells` cells showed;
    its controls, taken together, keep the same genes.
    """
    codes = EditCodes.of(plan)
    edges = np.linspace(0, codes.n_edits, max(1, -(-n_observed // ROWS_PER_PASS)) + 1).astype(int)
    rows = left_out = 0
    with tempfile.TemporaryDirectory(prefix="genescale-") as scratch:
        path = Path(scratch) / table.file
        with pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True) as writer:
            for first, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                pairs = _merged_pairs(table, plan, uri, store, codes, first, stop)
                kept = _kept(pairs, codes, top_k=top_k, min_cells=min_cells)
                writer.write_table(_named(kept, table, plan, codes))
                rows, left_out = rows + len(kept), left_out + len(pairs) - len(kept)
        store.upload(path, join(uri, table.file))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Merged(rows=rows, left_out=left_out, sha256=digest)


def _merged_pairs(
    table: PairTable, plan: Plan, uri: str, store: Store, codes: EditCodes, first: int, stop: int
) -> pl.DataFrame:
    """Sums over all units of the edits `first` to `stop` and of their controls."""
    merged = fold(
        _read_range(unit_file(uri, table.folder, unit), store, begin, end)
        for begin, end in ((first, stop), (codes.of_controls(first), codes.of_controls(stop)))
        for unit in range(plan.n_units)
    )
    return pl.DataFrame(
        {
            "edit": merged.edit_p,
            "token": merged.token_p,
            "n_cells": merged.count_p,
            "mean": 1.0 - merged.mean_p if table.of_cosines else merged.mean_p,
            "sd": pl.Series(merged.deviation_p).fill_nan(None),
        }
    )


def _read_range(uri: str, store: Store, first: int, stop: int) -> Moments:
    """The sums of a unit whose edits lie from `first` up to `stop`."""
    with store.open(uri) as file:
        table = pq.read_table(file, filters=[("edit", ">=", first), ("edit", "<", stop)])
    return Moments(
        edit_p=table["edit"].to_numpy(),
        token_p=table["token"].to_numpy(),
        count_p=table["count"].to_numpy(),
        mean_p=table["mean"].to_numpy(),
        squares_p=table["squares"].to_numpy(),
    )


def _kept(pairs: pl.DataFrame, codes: EditCodes, *, top_k: int, min_cells: int) -> pl.DataFrame:
    of_edits = pairs.filter(pl.col("edit") < codes.n_edits, pl.col("n_cells") >= min_cells)
    if top_k:
        by_shift = of_edits.sort("edit", "mean", "token", descending=[False, True, False])
        of_edits = by_shift.group_by("edit", maintain_order=True).head(top_k).sort("edit", "token")
    elif min_cells == 1:
        return pairs
    of_controls = pairs.filter(pl.col("edit") >= codes.n_edits).join(
        of_edits.select(pl.col("edit") + codes.n_edits, "token"), on=["edit", "token"], how="semi"
    )
    return pl.concat([of_edits, of_controls])


def _named(pairs: pl.DataFrame, table: PairTable, plan: Plan, codes: EditCodes) -> pa.Table:
    vocabulary = plan.edits.vocabulary
    edits = codes.names(pairs["edit"].unique().to_list(), plan.edits)
    affected = [vocabulary.gene_of_token(token) for token in pairs["token"].unique().to_list()]
    genes = pl.DataFrame(
        {
            "token": pairs["token"].unique(),
            "affected_gene_id": affected,
            "affected_symbol": [vocabulary.symbol_of(gene) for gene in affected],
        },
        schema={"token": pl.Int32, "affected_gene_id": pl.String, "affected_symbol": pl.String},
    )
    joined = pairs.join(edits, on="edit", maintain_order="left").join(genes, on="token", maintain_order="left")
    joined = joined.rename({name: f"{name}_{table.quantity}" for name in ("mean", "sd")})
    return joined.select(table.schema.names).to_arrow().cast(table.schema)


def remove_moments(plan: Plan, uri: str, store: Store) -> None:
    """Delete the sums of the units: what was wanted of them stands in the merged tables."""
    for table, genes in ((GENE_SHIFTS, plan.affected), (MASKED_GENES, plan.masked)):
        if genes is not None:
            store.delete_folder(join(uri, table.folder))
