"""Embeddings go back to where the cells came from: `obsm["X_genescale"]` of a copy of an atlas file.

Axes: n cells of the file, d width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genescale.ingestion.h5ad import open_atlas, write_obsm
from genescale.platform.errors import InputError
from genescale.platform.storage import Store
from genescale.training.embeddings import read_embeddings

OBSM_KEY = "X_genescale"


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """What was written; `cells` = embedded + missing."""

    path: Path
    cells: int
    embedded: int
    missing: int
    """Cells of the file that are not in the corpus; their rows are NaN."""


def annotate_h5ad(
    source: str, embeddings_uri: str, out: str | Path, *, store: Store, dataset_id: str = ""
) -> Annotated:
    """Copy the h5ad file `source` to `out` with the embeddings of its cells, `(n, d)` float32, matched by row.

    `dataset_id` names the file's dataset; it may be left out when the embeddings have one only. Raises InputError when
    it is not among them, or when its rows do not fit the file.
    """
    table, embeddings_nd = read_embeddings(embeddings_uri, store)
    datasets = sorted(set(table["dataset_id"].to_pylist()))
    if not dataset_id and len(datasets) == 1:
        dataset_id = datasets[0]
    if dataset_id not in datasets:
        what = f"no dataset '{dataset_id}' in these embeddings." if dataset_id else "which dataset is this file?"
        raise InputError(what, where=source, fix=f"Name one of {', '.join(datasets)} with --dataset-id.")
    mine = np.asarray(table["dataset_id"].to_pylist()) == dataset_id
    rows_n = table["source_row"].to_numpy()[mine]
    with open_atlas(source, store) as atlas:
        cells = atlas.n_cells
    if len(rows_n) and rows_n.max() >= cells:
        raise InputError(
            f"dataset '{dataset_id}' has a cell from row {int(rows_n.max())}, the file has {cells:,} rows.",
            where=source,
            fix="Give the file that was ingested.",
        )
    matrix_nd = np.full((cells, embeddings_nd.shape[1]), np.nan, dtype=np.float32)
    matrix_nd[rows_n] = embeddings_nd[mine]
    path = write_obsm(source, Path(out), OBSM_KEY, matrix_nd, store)
    return Annotated(path=path, cells=cells, embedded=len(rows_n), missing=cells - len(rows_n))
