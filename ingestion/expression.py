"""Log-normalised expression of cells of a corpus, read back from the atlas files that the corpus was made of.

Axis suffixes: `n` cells that are asked for, `g` gene columns of a file, `t` tokens of the vocabulary.

A corpus keeps ranks, not counts; baselines that see expression need the counts. The corpus knows each cell's source,
its row in it and what every gene column was mapped to, so the same counts are found again as long as the file is what
it was when it was ingested.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from genescale.ingestion.annotation.genes import map_genes
from genescale.ingestion.atlas import Atlas
from genescale.ingestion.config import IngestConfig
from genescale.ingestion.corpus import Corpus
from genescale.ingestion.plan import opened
from genescale.ingestion.table.records import DatasetRecord
from genescale.ingestion.table.verify_source import unchanged_source
from genescale.platform.errors import CorpusError, InputError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store

if TYPE_CHECKING:
    from scipy import sparse

COUNTS_PER_CELL = 10_000
GENES_FILE = "genes.parquet"
_VALUES_AT_ONCE = 4_000_000
# Rows between two chosen ones that are read along rather than jumped over.
_ROWS_READ_ALONG = 32
_FIX = "Put the source back where it was, or leave out what needs expression."


def log_normalised(
    corpus: Corpus,
    index_n: npt.NDArray[np.int64],
    store: Store | None = None,
    *,
    counts_per_cell: float = COUNTS_PER_CELL,
    progress: Progress = SILENT,
) -> sparse.csr_array:
    """log1p of counts per 10,000 of the cells with these global indices: (n, vocabulary size) float32, by token.

    A cell's library is all counted genes of its species, in the vocabulary or not; columns of one gene are summed.
    Raises CorpusError when the source of any of the cells is gone, has changed, or holds other cells.
    """
    from scipy import sparse

    index_n = np.asarray(index_n, dtype=np.int64)
    if len(index_n) and not 0 <= index_n.min() <= index_n.max() < corpus.n_cells:
        raise InputError(f"a cell index lies outside 0 … {corpus.n_cells - 1:,}.", where=corpus.uri)
    store = corpus.store if store is None else store
    cells = corpus.cells(["cell_id", "dataset_id", "source_row"]).take(index_n)
    datasets_n = np.array(cells.column("dataset_id").to_pylist(), dtype=str)
    names, rows_n = cells.column("cell_id").to_pylist(), cells.column("source_row").to_numpy()
    records = {record.dataset_id: record for record in corpus.datasets()}
    progress.start(len(index_n), "cells read from their sources")
    blocks, places = [sparse.csr_array((0, corpus.vocabulary.size), dtype=np.float32)], []
    for dataset in np.unique(datasets_n).tolist():
        mine = np.flatnonzero(datasets_n == dataset)
        mine = mine[np.argsort(rows_n[mine], kind="stable")]
        counts = _counts(corpus, records[dataset], rows_n[mine], [names[i] for i in mine], store, progress)
        blocks += [_normalised(counts_ng, totals_n, counts_per_cell) for counts_ng, totals_n in counts]
        places.append(mine)
    order = np.argsort(np.concatenate(places)) if places else np.empty(0, dtype=np.int64)
    return sparse.csr_array(sparse.vstack(blocks, format="csr")[order])


def _counts(
    corpus: Corpus,
    record: DatasetRecord,
    rows_n: npt.NDArray[np.int64],
    names: list[str],
    store: Store,
    progress: Progress,
) -> Iterator[tuple[sparse.csr_array, npt.NDArray[np.float64]]]:
    """Counts by token, and library sizes, of rising rows of one source, block by block."""
    from scipy import sparse

    try:
        source = unchanged_source(record, store)
    except CorpusError as error:
        what = f"{len(rows_n):,} cells of dataset '{record.dataset_id}' have no expression: {error.what}"
        raise CorpusError(what, where=error.where, fix=_FIX) from error
    recipe = {name: value for name, value in source.get("recipe", {}).items() if name != "gene_table_digest"}
    config = IngestConfig().changed(recipe, where=f"recipe of {record.dataset_id}")
    slot = str(record.details.get("counts_slot") or config.counts_slot)
    with opened(str(source["uri"]), str(source["etag"]), slot, config, store) as atlas:
        targets_g, counted_g = _genes(corpus, record, atlas, config)
        _check_names(atlas, rows_n, names, record.dataset_id)
        known_g = np.flatnonzero(targets_g >= 0)
        shape = (atlas.n_genes, corpus.vocabulary.size)
        to_tokens = sparse.csr_array((np.ones(len(known_g)), (known_g, targets_g[known_g])), shape=shape)
        for chosen in _blocks(atlas, rows_n):
            start, stop = int(rows_n[chosen[0]]), int(rows_n[chosen[-1]]) + 1
            rows = atlas.read(start, stop)
            stored = (rows.values_z.astype(np.float64), rows.indices_z.astype(np.int64), rows.indptr_n)
            counts_ng = sparse.csr_array(stored, shape=(stop - start, atlas.n_genes))[rows_n[chosen] - start]
            yield counts_ng @ to_tokens, counts_ng @ counted_g.astype(np.float64)
            progress.advance(len(chosen))


def _genes(
    corpus: Corpus, record: DatasetRecord, atlas: Atlas, config: IngestConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Token of each gene column (-1 for none) and whether it counts to the library, as they were at ingestion."""
    if GENES_FILE not in corpus.source_files(record.dataset_id):
        # Sources of the first release have no such file; their genes were mapped without a table.
        mapped = map_genes(atlas, corpus.vocabulary, rules=config)
        return mapped.targets_g.astype(np.int64), mapped.counted_g
    data = corpus.read_source_file(record.dataset_id, GENES_FILE)
    table = pq.read_table(io.BytesIO(data), columns=["token", "counted"])
    if table.num_rows != atlas.n_genes:
        raise CorpusError(
            f"the corpus recorded {table.num_rows:,} gene columns, the file has {atlas.n_genes:,}.", where=atlas.uri
        )
    targets_g = table.column("token").fill_null(-1).to_numpy().astype(np.int64)
    return targets_g, table.column("counted").to_numpy()


def _check_names(atlas: Atlas, rows_n: npt.NDArray[np.int64], names: list[str], dataset_id: str) -> None:
    if len(rows_n) and rows_n[-1] >= atlas.n_cells:
        raise CorpusError(
            f"row {rows_n[-1]:,} of dataset '{dataset_id}' is not in its source of {atlas.n_cells:,} cells.",
            where=atlas.uri,
            fix=_FIX,
        )
    first = int(rows_n[0]) if len(rows_n) else 0
    found = atlas.cell_ids(first, int(rows_n[-1]) + 1) if len(rows_n) else []
    for row, name in zip(rows_n.tolist(), names, strict=True):
        if found[row - first] != name:
            what = f"row {row:,} of dataset '{dataset_id}' should be '{name}', but is '{found[row - first]}'."
            raise CorpusError(what, where=atlas.uri, fix=_FIX)


def _blocks(atlas: Atlas, rows_n: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """Positions of rising rows, in runs that are read at once: neither far apart nor more values than memory likes."""
    if not len(rows_n):
        return
    before_n = atlas.matrix.stored_before
    start = 0
    for place in range(1, len(rows_n) + 1):
        done = place == len(rows_n)
        if (
            done
            or rows_n[place] - rows_n[place - 1] > _ROWS_READ_ALONG
            or before_n[rows_n[place] + 1] - before_n[rows_n[start]] > _VALUES_AT_ONCE
        ):
            yield np.arange(start, place)
            start = place


def _normalised(counts: Any, totals_n: npt.NDArray[np.float64], counts_per_cell: float) -> sparse.csr_array:
    from scipy import sparse

    scale_n = np.divide(counts_per_cell, totals_n, out=np.zeros_like(totals_n), where=totals_n > 0)
    scaled = sparse.csr_array(sparse.diags_array(scale_n) @ counts)
    scaled.data = np.log1p(scaled.data)
    scaled.eliminate_zeros()
    return sparse.csr_array(scaled, dtype=np.float32)
