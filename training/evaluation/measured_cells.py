"""Which cells a model is measured on, what is known of them, and what intervals resample.

Axis suffixes: `n` measured cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
import pyarrow as pa

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.schema import METADATA_COLUMNS
from genescale.platform.errors import CorpusError, SettingsError
from genescale.training.cells import NO_DONOR
from genescale.training.embedder import TOKENS_PER_BATCH, Layer, Pooling
from genescale.training.labels.selection import check_columns, select_cells

PARTS = ("hidden_genes", "neighbourhoods", "mixing", "umap")
LEAST_GROUPS = 5
"""Fewer donors are not resampled: an interval over three donors means nothing."""
LEAST_KNOWN = 0.5
"""Share of the cells that must have a donor for donors to be the batches, unless they are asked for."""
MOST_VALUES = 30
"""Values of a column that are shown, the commonest; the others are put together and counted."""
NUMBER_COLUMNS = ("n_genes", "total_counts", "length")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which cells a model is measured on, and how."""

    where: str = ""
    """Polars SQL over the corpus' cell columns; empty means all."""
    max_cells: int = 2_000
    """Cells that are measured, drawn at random; 0 means all."""
    by: tuple[str, ...] = ()
    """Columns whose values are scored apart and coloured; empty takes those that the corpus has filled."""
    label: str = "cell_type"
    """Column with the cell types, for mixing."""
    batch: str = ""
    """Column with donors or batches, for mixing and intervals; empty takes donor_id where most cells have one, else
    dataset_id."""
    genes: str = ""
    """Address of gene lists, for neighbourhoods; empty takes the most frequent genes."""
    neighbours: int = 10
    min_cells_per_gene: int = 20
    """Genes that occur in fewer of the measured cells are not compared."""
    most_genes: int = 40
    """Genes whose neighbours are listed."""
    layer: Layer = "second_to_last"
    pooling: Pooling = "mean_genes"
    mask_fraction: float = 0.15
    bootstrap: int = 1_000
    seed: int = 0
    """Of the draw of cells, the hidden genes, the bootstrap and the map."""
    device: str = "auto"
    tokens_per_batch: int = TOKENS_PER_BATCH
    skip: tuple[str, ...] = ()
    """Parts to leave out: hidden_genes, neighbourhoods, mixing, umap."""

    def __post_init__(self) -> None:
        least = {"max_cells": 0, "neighbours": 1, "min_cells_per_gene": 1, "most_genes": 1, "bootstrap": 0, "seed": 0}
        for name, bound in (*least.items(), ("tokens_per_batch", 1)):
            if getattr(self, name) < bound:
                raise SettingsError(f"{getattr(self, name)} is too small.", where=name, fix=f"Use {bound} or more.")
        if not 0.0 < self.mask_fraction < 1.0:
            raise SettingsError(f"{self.mask_fraction} is no fraction.", where="mask_fraction", fix="Use 0.15.")
        if self.layer not in get_args(Layer):
            fix = f"Use one of {', '.join(get_args(Layer))}."
            raise SettingsError(f"'{self.layer}' is not a layer.", where="layer", fix=fix)
        for part in self.skip:
            if part not in PARTS:
                raise SettingsError(f"there is no part '{part}'.", where="skip", fix=f"Parts: {', '.join(PARTS)}.")
        if set(self.skip) == set(PARTS):
            raise SettingsError("everything is left out.", where="skip", fix="Leave one part at least.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Cells:
    """The measured cells and what is known of them."""

    index_n: np.ndarray
    """(n) int64 rising global indices."""
    table: pa.Table
    """Their columns; texts, and NUMBER_COLUMNS."""
    by: tuple[str, ...]
    """Columns of texts that are scored apart."""
    batch: str
    group_n: np.ndarray
    """(n) int64: what is resampled."""
    resampled: str
    """In words."""
    left_out: Mapping[str, int]
    """Cells of the corpus that are not measured, by reason."""

    def texts(self, column: str) -> np.ndarray:
        """(n) texts of a column; empty where there is no value."""
        return texts(self.table, column)


def measured_cells(corpus: Corpus, config: EvaluateConfig) -> Cells:
    """The cells that `config` selects, with their columns; CorpusError for unknown columns, or without cells."""
    fixed = ["cell_id", "dataset_id", *NUMBER_COLUMNS]
    wanted = [*config.by, config.label, *([config.batch] if config.batch else [])]
    check_columns(corpus, wanted)
    selected = select_cells(corpus, config.where)
    if not len(selected):
        raise CorpusError("there are no cells to measure.", where=corpus.uri, fix="Ingest some, or change --where.")
    index_n = selected
    if config.max_cells and len(selected) > config.max_cells:
        generator = np.random.default_rng([config.seed, len(selected)])
        index_n = np.sort(generator.choice(selected, config.max_cells, replace=False))
    columns = list(dict.fromkeys([*fixed, *METADATA_COLUMNS, *wanted]))
    table = corpus.cells(columns).take(pa.array(index_n))
    by = config.by or tuple(name for name in ("dataset_id", *METADATA_COLUMNS) if 2 <= _values(table, name) <= 200)
    known_n = texts(table, "donor_id") != ""
    donors = _values(table, "donor_id") >= 2 and known_n.mean() >= LEAST_KNOWN
    batch = config.batch or ("donor_id" if donors else "dataset_id")
    group_n, resampled = _groups(table, config.batch or "donor_id")
    left_out = {"not selected by where": corpus.n_cells - len(selected), "not drawn": len(selected) - len(index_n)}
    return Cells(
        index_n=index_n,
        table=table,
        by=by,
        batch=batch,
        group_n=group_n,
        resampled=resampled,
        left_out={reason: count for reason, count in left_out.items() if count},
    )


def texts(table: pa.Table, column: str) -> np.ndarray:
    """A column as texts; empty for null and for words that mean no value."""
    values = table.column(column).cast(pa.string()).fill_null("").to_pylist()
    return np.array(["" if value.strip().lower() in NO_DONOR else value.strip() for value in values], dtype=str)


def _values(table: pa.Table, column: str) -> int:
    return len(set(texts(table, column).tolist()) - {""})


def _groups(table: pa.Table, batch: str) -> tuple[np.ndarray, str]:
    """What intervals resample: donors, with the cells of a dataset without donors as one; else cells."""
    donors, datasets = texts(table, batch), texts(table, "dataset_id")
    names = np.where(donors != "", np.char.add("of ", donors), np.char.add("in ", datasets))
    known, codes_n = np.unique(names, return_inverse=True)
    without = len({name for name in known.tolist() if name.startswith("in ")})
    if len(known) >= LEAST_GROUPS:
        told = f"{len(known) - without} values of {batch}"
        told += f" and the other cells of {without} datasets" if without else ""
        return codes_n.astype(np.int64), told
    told = f"cells, because there are only {len(known)} donors or datasets: too narrow for cells of a new one"
    return np.arange(table.num_rows, dtype=np.int64), told


def shown_values(values_n: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(number of the value of each cell, names): the commonest first, then the others together, then cells without."""
    found, counts = np.unique(values_n[values_n != ""], return_counts=True)
    order = np.lexsort((found, -counts))
    names = found[order][:MOST_VALUES].tolist()
    place = {name: number for number, name in enumerate(names)}
    rarer = len(found) - len(names)
    others = [f"{rarer:,} rarer values"] if rarer else []
    empty = ["no value"] if (values_n == "").any() else []
    code_n = np.array(
        [len(names) + len(others) if not value else place.get(value, len(names)) for value in values_n.tolist()]
    )
    return code_n, [*names, *others, *empty]
