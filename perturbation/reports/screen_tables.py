"""What a screen's report is made of: its rows, its statistics, and what is known of how it was made.

    OUTPUT/effects.parquet, effects.csv    one row per edit and read-out
    OUTPUT/pairs.parquet, pairs.csv        one row per pair and read-out, where the screen has pairs
    OUTPUT/genes.parquet, genes.csv        one row per affected gene, where gene shifts were recorded
    OUTPUT/targets.parquet, targets.csv    one row per edit, list of genes and read-out, where lists were given
    OUTPUT/report.html

All of them follow from the screen's rows: the same screen gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from genescale.perturbation.statistics.tables import CLASS as CLASS
from genescale.perturbation.statistics.tables import STATE as STATE
from genescale.platform.storage import Store, join

EFFECTS, PAIRS, GENES, TARGETS = "effects", "pairs", "genes", "targets"
SHIFT = "shift"
LEVEL = 0.05
"""False discovery rate below which an effect is called found."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScreenTables:
    """A screen with its statistics. Tables that it has not are None."""

    uri: str
    cell_shifts: pl.DataFrame
    effects: pl.DataFrame
    """Effects of every read-out, stacked; the column `readout` tells them apart."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The screen's record: model, corpus, settings, counts."""
    gene_shifts: pl.DataFrame | None = None
    masked_genes: pl.DataFrame | None = None
    pairs: pl.DataFrame | None = None
    first_pass: pl.DataFrame | None = None
    """Scores of every gene of every cell, of a screen in two passes."""
    genes: pl.DataFrame | None = None
    targets: pl.DataFrame | None = None

    @property
    def readouts(self) -> tuple[str, ...]:
        """The read-outs in their order: the cell shift, states, classes."""
        return tuple(self.effects["readout"].unique(maintain_order=True).to_list())

    def of(self, readout: str) -> pl.DataFrame:
        """Effects of one read-out, by falling excess over the controls (or mean, without controls)."""
        chosen = self.effects.filter(pl.col("readout") == readout)
        return chosen.sort(strength(chosen), "edit_id", descending=[True, False], nulls_last=True)

    @property
    def tested(self) -> bool:
        """Whether any edit could be held against controls."""
        return bool(self.effects["p"].is_not_null().any())


def settings_of(record: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """One part of the settings that a screen's record keeps (`cells`, `readouts`, `two_pass` …); empty without it."""
    found: Any = record
    for name in ("identity", "config", part):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def strength(effects: pl.DataFrame) -> str:
    """The column that edits are ranked by: their excess where there are controls, else their mean."""
    return "excess" if effects["excess"].is_not_null().any() else "mean"


def write_table(table: pl.DataFrame, name: str, uri: str, store: Store) -> None:
    """Write a table as NAME.parquet and NAME.csv; lists are joined by spaces in the CSV."""
    parquet = io.BytesIO()
    table.write_parquet(parquet, compression="zstd", statistics=True)
    store.write(join(uri, f"{name}.parquet"), parquet.getvalue())
    lists = [column for column, kind in table.schema.items() if isinstance(kind, pl.List)]
    flat = table.with_columns(pl.col(column).cast(pl.List(pl.String)).list.join(" ") for column in lists)
    store.write(join(uri, f"{name}.csv"), flat.write_csv().encode())
