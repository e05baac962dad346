"""Matrix Market triples, as Cell Ranger, STARsolo, kallisto and GEO have them: matrix, barcodes, features.

The text is streamed and its entries are put into rows through scratch, so memory is bounded. Which way the matrix lies
is told by the lengths of the two tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from genescale.ingestion.atlas import Atlas
from genescale.ingestion.formats.layouts import triple_of
from genescale.ingestion.formats.market_text import Header, check_declared, inflated, read_entries, read_header
from genescale.ingestion.formats.memory_frame import MemoryFrame
from genescale.ingestion.formats.scratch import Triplets, TurnedMatrix, scratch_matrix, scratch_note
from genescale.ingestion.formats.signatures import GZIP
from genescale.ingestion.formats.unfiltered import refuse_unfiltered
from genescale.ingestion.slots import choose_slot
from genescale.platform.errors import AtlasError
from genescale.platform.storage import Entry, Store

SLOT = "X"
_FIX = "Give the tables that came with the matrix."
MAX_TABLE_BYTES = 256 * 1024 * 1024
ENSEMBL = "^ENS[A-Z]*[0-9]{6,}"


@contextlib.contextmanager
def open_mtx(
    uri: str,
    store: Store,
    entry: Entry,
    *,
    counts_slot: str = "auto",
    allow_fractional: bool = False,
    allow_unfiltered: bool = False,
) -> Iterator[Atlas]:
    """Open the triple of a folder or of a matrix file; see `opening.open_atlas`. Rows exist after one pass over it."""
    matrix, barcodes, features = triple_of(uri, store).complete()
    header = _header(matrix, store)
    cells = _table(barcodes.uri, store).column(0).combine_chunks()
    genes = _table(features.uri, store)
    genes_by_cells, note = _orientation(header, len(genes), len(cells), matrix.uri)

    text = MarketText(matrix=matrix, header=header, genes_by_cells=genes_by_cells, store=store)
    unfiltered = None if allow_unfiltered else functools.partial(refuse_unfiltered, where=matrix.uri)
    with scratch_matrix(
        text.triplets,
        n_cells=len(cells),
        n_genes=len(genes),
        dtype=header.dtype,
        where=f"{matrix.uri}: {SLOT}",
        layout="triplets",
        nnz=header.n_entries,
        check=unfiltered,
    ) as by_rows:
        made = TurnedMatrix(by_rows, "triplets", text.first_values)
        slot = choose_slot({SLOT: lambda: made}, counts_slot, where=matrix.uri, allow_fractional=allow_fractional)
        yield Atlas(
            entry=entry,
            kind="mtx",
            slot=slot,
            obs=MemoryFrame("obs", cells, rows=len(cells), uri=barcodes.uri),
            var=_gene_table(genes, features.uri),
            notes=(*note, scratch_note(header.n_entries, header.dtype, "triplets")),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarketText:
    """The entries of a Matrix Market file as cells, genes and values."""

    matrix: Entry
    header: Header
    genes_by_cells: bool
    store: Store

    def triplets(self) -> Iterator[Triplets]:
        """Blocks of all entries, from the start of the file."""
        with inflated(self.matrix.uri, self.store) as text:
            read_header(text, self.matrix)
            for rows, columns, values in read_entries(text, self.header, self.matrix.uri):
                yield (columns, rows, values) if self.genes_by_cells else (rows, columns, values)

    def first_values(self) -> npt.NDArray[Any]:
        """Values from the beginning of the file: a stream of text cannot be entered elsewhere."""
        return next((values for _, _, values in self.triplets()), np.empty(0, dtype=self.header.dtype))


def _header(matrix: Entry, store: Store) -> Header:
    with inflated(matrix.uri, store) as text:
        header = read_header(text, matrix)
    check_declared(header, matrix, compressed=store.read_range(matrix.uri, 0, 2) == GZIP)
    return header


def _orientation(header: Header, n_genes: int, n_cells: int, uri: str) -> tuple[bool, tuple[str, ...]]:
    """True when rows of the file are genes, and a note when the tables cannot tell."""
    shape = (header.n_rows, header.n_columns)
    if shape == (n_genes, n_cells):
        square = f"the matrix has as many cells as genes ({n_cells:,}): its rows are taken as genes, as 10x writes them"
        return True, (square,) if n_genes == n_cells else ()
    if shape == (n_cells, n_genes):
        return False, ("the matrix is stored cells × genes",)
    raise AtlasError(
        f"the matrix is {shape[0]:,} × {shape[1]:,}, but the tables beside it have {n_genes:,} genes and "
        f"{n_cells:,} cells.",
        where=uri,
        fix="Matrix and tables must belong together; tables have one line for each row or column and no heading.",
    )


def _table(uri: str, store: Store) -> pa.Table:
    """A table of tab-separated texts without heading; columns f0, f1, …"""
    with inflated(uri, store) as text:
        data = text.read(MAX_TABLE_BYTES + 1)
    if len(data) > MAX_TABLE_BYTES:
        raise AtlasError(f"this table holds more than {MAX_TABLE_BYTES:,} bytes of text.", where=uri, fix=_FIX)
    if not data.strip():
        raise AtlasError("this table is empty.", where=uri, fix="Download it again.")
    if not data.isascii():
        data = data.decode("utf-8", errors="replace").encode()
    width = data.partition(b"\n")[0].count(b"\t") + 1
    names = [f"f{i}" for i in range(width)]
    try:
        return pyarrow.csv.read_csv(
            pa.BufferReader(data),
            read_options=pyarrow.csv.ReadOptions(column_names=names, use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t"),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), null_values=[], strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        raise AtlasError(
            f"not a table of tab-separated texts ({str(error)[:200]}).", where=uri, fix="Write it again."
        ) from error


def _gene_table(table: pa.Table, uri: str) -> MemoryFrame:
    """The features: id, name and type; a second column of Ensembl ids is offered as such."""
    texts = [column.combine_chunks() for column in table.columns]
    columns: dict[str, pa.Array] = {}
    if len(texts) > 1:
        looks_like_ids = pc.mean(pc.match_substring_regex(texts[1], ENSEMBL, ignore_case=True)).as_py() > 0.5
        first_too = pc.mean(pc.match_substring_regex(texts[0], ENSEMBL, ignore_case=True)).as_py() > 0.5
        columns["gene_ids" if looks_like_ids and not first_too else "feature_name"] = texts[1]
    if len(texts) > 2:
        columns["feature_type"] = texts[2]
    return MemoryFrame("var", texts[0], columns, rows=len(table), uri=uri)
