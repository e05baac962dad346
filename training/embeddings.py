"""A folder of embeddings: its manifest, reading it back, and putting it into the h5ad file the cells came from.

Axis suffixes: `n` cells, `d` width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genescale.ingestion.formats.obsm import cell_names, write_obsm
from genescale.ingestion.pipeline import dataset_name
from genescale.platform.errors import InputError, IntegrityError, NotFoundError, did_you_mean
from genescale.platform.settings import build
from genescale.platform.storage import Store, join
from genescale.training.embedder import Layer, Pooling, Precision

MANIFEST = "manifest.json"
EMBEDDING_COLUMN = "embedding"
OBSM_KEY = "X_genescale"
IDENTITY_COLUMNS = ("cell_id", "dataset_id", "source_row")
REPAIR = "Delete the damaged file and run the same `genescale embed` again: it makes what is missing."


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished folder of embeddings holds; written last."""

    key: str
    """Digest of everything that decides the numbers; part of every file's name."""
    bundle_digest: str
    vocabulary_digest: str
    corpus_uri: str
    corpus_version: int
    layer: Layer
    pooling: Pooling
    precision: Precision
    width: int
    cells: int
    tokens: int
    files: tuple[str, ...]
    """File names, in the corpus's order of cells."""
    schema_version: int = 1


def read_manifest(uri: str, store: Store) -> Manifest:
    """The manifest of a folder of embeddings; NotFoundError when there is none (never embedded, or cut off)."""
    address = join(uri, MANIFEST)
    try:
        content = json.loads(store.read(address))
    except NotFoundError:
        raise NotFoundError(
            "there are no finished embeddings here.",
            where=uri,
            fix="Run `genescale embed` into this folder; if it was cut off, the same command goes on.",
        ) from None
    except ValueError as error:
        raise IntegrityError("the manifest is not JSON.", where=address) from error
    return build(Manifest, content, where=address)


def read_embeddings(uri: str, store: Store) -> tuple[pa.Table, np.ndarray]:
    """All embeddings of a finished folder: scalar columns and vectors (n, d) float32, in the corpus's order of cells.

    Raises NotFoundError without a manifest, IntegrityError when a file is gone or damaged or cells are missing.
    """
    manifest = read_manifest(uri, store)
    tables = []
    for name in manifest.files:
        try:
            with store.open(join(uri, name)) as file:
                tables.append(pq.ParquetFile(file, page_checksum_verification=True).read())
        except (NotFoundError, pa.ArrowException, OSError) as error:
            raise IntegrityError(f"a file cannot be read: {error}.", where=join(uri, name), fix=REPAIR) from error
    table = pa.concat_tables(tables) if tables else pa.table({EMBEDDING_COLUMN: pa.array([], pa.list_(pa.float32()))})
    if table.num_rows != manifest.cells:
        raise IntegrityError(
            f"the files hold {table.num_rows:,} cells, the manifest says {manifest.cells:,}.", where=uri, fix=REPAIR
        )
    vectors = pc.list_flatten(table.column(EMBEDDING_COLUMN)).to_numpy()
    return table.drop_columns([EMBEDDING_COLUMN]), vectors.reshape(-1, manifest.width).astype(np.float32, copy=False)


@dataclass(frozen=True, kw_only=True)
class AnnotateReport:
    """What `annotate_h5ad` wrote: cells of the file, those with an embedding, and those without (rows of NaN)."""

    out: Path
    dataset_id: str
    cells: int
    embedded: int
    missing: int


def annotate_h5ad(
    source_uri: str, embeddings_uri: str, out: Path | str, *, store: Store, dataset_id: str = ""
) -> AnnotateReport:
    """Copy an atlas file to the local path `out` with `obsm["X_genescale"]`: one row a cell, in the file's order.

    Cells that ingestion dropped get NaN, and are counted. `dataset_id` says which dataset of the corpus the file is;
    without it, the one with the file's name, or the only one. Raises InputError when the file and the embeddings do
    not belong together (their cell ids differ).
    """
    table, vectors_nd = read_embeddings(embeddings_uri, store)
    place = place_in_file(source_uri, table, store, dataset_id=dataset_id, what="embeddings")
    matrix_nd = np.full((place.n_cells, vectors_nd.shape[1]), np.nan, dtype=np.float32)
    matrix_nd[place.rows_n] = vectors_nd[place.chosen_n]
    write_obsm(source_uri, Path(out), OBSM_KEY, matrix_nd, store)
    return place.report(Path(out))


@dataclass(frozen=True, kw_only=True, eq=False)
class PlaceInFile:
    """Which rows of a table are cells of an atlas file, and which rows of the file they are."""

    dataset_id: str
    n_cells: int
    """Cells of the file."""
    chosen_n: np.ndarray
    """int64 rows of the table."""
    rows_n: np.ndarray
    """int64 rows of the file."""

    def report(self, out: Path) -> AnnotateReport:
        """What was written to `out`."""
        held = len(self.rows_n)
        return AnnotateReport(
            out=out, dataset_id=self.dataset_id, cells=self.n_cells, embedded=held, missing=self.n_cells - held
        )


def place_in_file(
    source_uri: str, table: pa.Table, store: Store, *, dataset_id: str = "", what: str = "table"
) -> PlaceInFile:
    """Find the cells of an atlas file in a table with the columns of IDENTITY_COLUMNS, as `annotate_h5ad` says.

    what: what the table holds, for messages. Raises InputError when file and table do not belong together.
    """
    dataset_id = _dataset_of(source_uri, table, dataset_id, what)
    chosen_n = np.flatnonzero(pc.equal(table.column("dataset_id"), dataset_id).to_numpy())
    rows_n = table.column("source_row").to_numpy()[chosen_n]
    cell_ids = table.column("cell_id").take(pa.array(chosen_n)).to_pylist()
    names = cell_names(source_uri, store)
    for row, cell_id in zip(rows_n.tolist(), cell_ids, strict=True):
        if row >= len(names) or names[row] != cell_id:
            found = f"is '{names[row]}'" if row < len(names) else "does not exist"
            raise InputError(
                f"row {row:,} should be the cell '{cell_id}' of dataset '{dataset_id}', but {found}.",
                where=source_uri,
                fix="Give the file this dataset was ingested from, or name another with --dataset-id.",
            )
    return PlaceInFile(dataset_id=dataset_id, n_cells=len(names), chosen_n=chosen_n, rows_n=rows_n)


def _dataset_of(source_uri: str, table: pa.Table, dataset_id: str, what: str) -> str:
    known = sorted(pc.unique(table.column("dataset_id")).to_pylist()) if table.num_rows else []
    named = dataset_id or dataset_name(source_uri)
    if named in known:
        return named
    if not dataset_id and len(known) == 1:
        return str(known[0])
    hint = did_you_mean(named, known) or f"They are of: {', '.join(known[:10]) or 'no dataset'}."
    raise InputError(f"the {what} hold no dataset '{named}'.", where=source_uri, fix=f"{hint} Name it: --dataset-id.")
