"""The row of a corpus: one cell as tokens, its origin and harmonised metadata. Raising the version is a migration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

CORPUS_SCHEMA_VERSION = 2
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
# Ontology terms, as the CELLxGENE schema has them beside the labels.
ONTOLOGY_COLUMNS = tuple(f"{name}_ontology_term_id" for name in METADATA_COLUMNS if name != "donor_id")
# Columns that a row may lack: rows of earlier releases and of poorer files have null there.
OPTIONAL_FIELDS = (
    *(pa.field(name, pa.string()) for name in (*METADATA_COLUMNS, *ONTOLOGY_COLUMNS, "suspension_type")),
    pa.field("is_primary_data", pa.bool_()),
    pa.field("content_hash", pa.int64()),
    pa.field("labels", pa.map_(pa.string(), pa.string())),
)

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
            *OPTIONAL_FIELDS,
        ]
    )


def corpus_schema(token_dtype: npt.DTypeLike) -> pa.Schema:
    """A corpus row as readers see it: `input_ids` is a list of `token_dtype` (uint16 or uint32).

    total_counts: sum over all genes of the file; n_genes: vocabulary genes detected, before cropping; length: tokens,
    special tokens included; source_row: row of the cell in its atlas file; content_hash: equal for cells with the same
    counts of the same vocabulary genes; labels: further obs columns that were asked for, by name.
    """
    return _schema(pa.from_numpy_dtype(np.dtype(token_dtype)), partition=True)


def part_schema(token_dtype: npt.DTypeLike) -> pa.Schema:
    """A row as a part file holds it: without `dataset_id`, which is the name of the part's folder."""
    return _schema(pa.from_numpy_dtype(np.dtype(token_dtype)), partition=False)


def rows_table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """A table of this schema from arrays or lists by column name; optional columns that are not given are null."""
    n = len(columns["cell_id"])
    optional = {field.name for field in OPTIONAL_FIELDS}
    arrays = [
        pa.nulls(n, field.type)
        if field.name not in columns and field.name in optional
        else _array(columns[field.name], field)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)


def _array(values: Any, field: pa.Field) -> Any:
    return values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, field.type)


def table_schema(token_dtype: npt.DTypeLike) -> pa.Schema:
    """A row as the Delta log declares it.

    Delta Lake has no unsigned types, and declares uint16 as a 16-bit signed number, which breaks at token 32,768. The
    next larger signed type holds every token, and readers widen the stored numbers to it.
    """
    return _schema(pa.int32() if np.dtype(token_dtype) == np.uint16 else pa.int64(), partition=True)
