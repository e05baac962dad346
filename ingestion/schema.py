"""The row of a corpus: one cell as tokens, its origin and harmonised metadata. Raising the version is a migration."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

CORPUS_SCHEMA_VERSION = 1
PARTITION_COLUMN = "dataset_id"
TOKEN_COLUMN = "input_ids"

# Harmonised column -> names it has in atlas files, best first: the CELLxGENE label, common spellings, and last the
# ontology term, which is better than nothing.
OBS_NAMES: dict[str, tuple[str, ...]] = {
    "cell_type": ("cell_type", "celltype", "cell_type_ontology_term_id"),
    "tissue": ("tissue", "tissue_ontology_term_id"),
    "disease": ("disease", "disease_ontology_term_id"),
    "assay": ("assay", "assay_ontology_term_id"),
    "donor_id": ("donor_id", "donor"),
    "sex": ("sex", "sex_ontology_term_id"),
    "development_stage": ("development_stage", "development_stage_ontology_term_id"),
    "organism": ("organism", "organism_ontology_term_id"),
}
METADATA_COLUMNS = tuple(OBS_NAMES)

TokenType = type[np.uint16] | type[np.uint32]


def _schema(token_type: Any, *, partition: bool) -> pa.Schema:
    origin = [pa.field(PARTITION_COLUMN, pa.string(), nullable=False)] if partition else []
    return pa.schema(
        [
            pa.field("cell_id", pa.string(), nullable=False),
            *origin,
            pa.field("source_row", pa.int64(), nullable=False),
            pa.field(TOKEN_COLUMN, pa.list_(pa.field("element", token_type, nullable=False)), nullable=False),
            pa.field("length", pa.int32(), nullable=False),
            pa.field("total_counts", pa.float64(), nullable=False),
            pa.field("n_genes", pa.int32(), nullable=False),
            *(pa.field(name, pa.string()) for name in METADATA_COLUMNS),
        ]
    )


def corpus_schema(token_dtype: npt.DTypeLike) -> pa.Schema:
    """A corpus row as readers see it: `input_ids` is a list of `token_dtype` (uint16 or uint32).

    total_counts: sum over all genes of the file; n_genes: vocabulary genes detected, before cropping; length: tokens,
    special tokens included; source_row: row of the cell in its atlas file.
    """
    return _schema(pa.from_numpy_dtype(np.dtype(token_dtype)), partition=True)


def part_schema(token_dtype: npt.DTypeLike) -> pa.Schema:
    """A row as a part file holds it: without `dataset_id`, which is the name of the part's folder."""
    return _schema(pa.from_numpy_dtype(np.dtype(token_dtype)), partition=False)


def table_schema(token_dtype: npt.DTypeLike) -> pa.Schema:
    """A row as the Delta log declares it.

    Delta Lake has no unsigned types, and declares uint16 as a 16-bit signed number, which breaks at token 32,768. The
    next larger signed type holds every token, and readers widen the stored numbers to it.
    """
    return _schema(pa.int32() if np.dtype(token_dtype) == np.uint16 else pa.int64(), partition=True)
