"""Atlas files in h5ad form: find the raw counts, prove them, and read them by row range.

Read today: counts in a CSR matrix (anndata 0.7 and later) in `X`, `raw.X` or a named layer. Everything else is refused
with what was seen and what to do. Every value that is read is checked, never a sample.

Axis suffixes: `n` cells, `g` genes of the file, `z` stored values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from genescale.ingestion.dataframes import Column, Frame, first_present, scalar_text
from genescale.ingestion.hdf5_safety import check_written, opened, read_numbers
from genescale.ingestion.schema import OBS_NAMES
from genescale.platform.errors import AtlasError, InputError, NotCountsError
from genescale.platform.storage import Entry, Store

AUTO = "auto"
PROBED_VALUES = 200_000
MAX_GENES = 10_000_000
MAX_CELLS = 2_000_000_000
GENE_ID_COLUMNS = ("ensembl_id", "gene_ids", "feature_id")
SYMBOL_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "symbol")
INDEX = "index"
ENSEMBL_ID = re.compile(r"ENS[A-Z]*[0-9]{6,}(\.[0-9]+)?(_PAR_Y)?")
_CSR_FIX = "Convert with anndata (`adata.X = scipy.sparse.csr_matrix(adata.X)`) and write it again."


@dataclasses.dataclass(frozen=True, eq=False)
class CountBlock:
    """Counts of consecutive cells as they are stored: indptr of n+1, gene indices and counts of z.

    Explicit zeros are taken out and counted. Indices of a row may be unsorted or repeated.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    counts: npt.NDArray[np.float64]
    explicit_zeros: int


class Atlas:
    """An open, checked h5ad file. n_cells, n_genes, nnz; `slot` says where the counts are; `entry` pins the content."""

    def __init__(self, file: h5py.File, entry: Entry, slot: str) -> None:
        self.uri, self.entry, self._file = entry.uri, entry, file
        _check_kind(file, entry.uri)
        self.slot = _chosen_slot(file, self.uri) if slot == AUTO else slot
        matrix = _csr(file, self.slot, self.uri)
        self._data, self._indices = matrix["data"], matrix["indices"]
        self.n_cells, self.n_genes = _shape(matrix, self.uri)
        self.nnz = len(self._data)
        self.indptr: npt.NDArray[np.int64] = _indptr(matrix, self.n_cells, self.nnz, self.uri)
        check_written(self._data, self.uri)
        check_written(self._indices, self.uri)
        self._obs = Frame(file, "obs", self.n_cells, self.uri)
        self._var = Frame(file, "raw/var" if self.slot == "raw.X" else "var", self.n_genes, self.uri)

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Counts of cells start … stop-1; NotCountsError or AtlasError for the first value that cannot be a count."""
        first, last = int(self.indptr[start]), int(self.indptr[stop])
        indices = read_numbers(self._indices, self.uri, first, last)
        values = read_numbers(self._data, self.uri, first, last)
        indptr = self.indptr[start : stop + 1] - first
        self._check_values(indices, values, indptr, start)
        counts, wide = values.astype(np.float64), indices.astype(np.int64)
        stored = counts > 0
        if stored.all():
            return CountBlock(indptr, wide, counts, 0)
        kept_before = np.concatenate(([0], np.cumsum(stored)))
        return CountBlock(kept_before[indptr], wide[stored], counts[stored], int((~stored).sum()))

    def _check_values(
        self, indices: npt.NDArray[Any], values: npt.NDArray[Any], indptr: npt.NDArray[np.int64], start: int
    ) -> None:
        outside = (indices < 0) | (indices >= self.n_genes)
        if outside.any():
            row = start + _row_of(indptr, outside)
            raise AtlasError(
                f"{int(outside.sum()):,} gene indices lie outside 0 … {self.n_genes - 1}, the first in cell {row:,}.",
                where=f"{self.uri}: {self.slot}",
                fix="Matrix and gene table do not belong together: write the file again.",
            )
        for bad, what, fix in _faults(values):
            if bad.any():
                row, place = start + _row_of(indptr, bad), int(np.argmax(bad))
                gene = self._var.index(int(indices[place]), int(indices[place]) + 1)[0]
                raise NotCountsError(
                    f"{int(bad.sum()):,} of {values.size:,} values {what}, the first is {values[place]} "
                    f"(cell {row:,}, gene {gene}).",
                    where=f"{self.uri}: {self.slot}",
                    fix=fix,
                )

    def gene_columns(self) -> dict[str, list[str]]:
        """Candidates for gene ids: the table's index and the columns that usually hold Ensembl ids."""
        found = {INDEX: self._var.index()}
        for name in GENE_ID_COLUMNS:
            if name in self._var.columns:
                found[name] = [value or "" for value in self._var.column(name)[0]]
        return found

    def symbols(self) -> list[str]:
        """Gene symbols beside the ids; empty texts where the file has none."""
        if name := first_present(SYMBOL_COLUMNS, self._var.columns):
            return [value or "" for value in self._var.column(name)[0]]
        index = self._var.index()
        return ["" if ENSEMBL_ID.fullmatch(name.upper()) else name for name in index]

    def cell_ids(self, start: int, stop: int) -> list[str]:
        """Barcodes or names of the cells, as the file has them (they may repeat)."""
        return self._obs.index(start, stop)

    def metadata(self, start: int, stop: int) -> tuple[dict[str, Column], list[str]]:
        """The harmonised columns (see `schema.OBS_NAMES`) as texts, and notes on values that could not be read."""
        columns: dict[str, Column] = {}
        notes: list[str] = []
        for name, spellings in OBS_NAMES.items():
            if found := first_present(spellings, self._obs.columns):
                columns[name], note = self._obs.column(found, start, stop)
                notes += [note] if note else []
            else:
                # The CELLxGENE schema moved the organism from obs to uns in its version 6.
                value = next((v for s in spellings if (v := scalar_text(self._file, f"uns/{s}"))), None)
                columns[name] = [value] * (stop - start)
        return columns, notes


@contextlib.contextmanager
def open_atlas(uri: str, store: Store, *, counts_slot: str = AUTO, etag: str = "") -> Iterator[Atlas]:
    """Open an h5ad file, check its header and structure, and find its counts.

    counts_slot: `auto` (raw.X if it is there and holds counts, else X), `X`, `raw.X` or `layers/NAME`; etag: refuse
    content that differs from the one planned. Raises AtlasError or NotCountsError with what was seen.
    """
    entry = store.stat(uri)
    if etag and entry.etag != etag:
        raise AtlasError("the file changed since it was planned.", where=uri, fix="Run the command again.")
    with opened(uri, store) as file:
        yield Atlas(file, entry, counts_slot)


def _faults(values: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[np.bool_], str, str]]:
    """Marks of the values that cannot be counts, with what they are and what to do, in the order of telling."""
    if values.dtype.kind == "b":
        yield np.ones(values.shape, dtype=bool), "are true/false", "Detection calls are not counts: give raw counts."
    if values.dtype.kind == "f":
        yield ~np.isfinite(values), "are not finite numbers", "Repair the file, or write it again from the raw counts."
    if values.dtype.kind in "if":
        yield values < 0, "are negative: this is scaled data", "Give the raw counts."
    if values.dtype.kind == "f":
        fix = "This looks normalised or ambient-corrected: give raw counts, or name another slot with --counts-slot."
        yield values != np.floor(values), "are not whole numbers", fix
    exact = 2**24 if values.dtype == np.float32 else 2**53
    yield values > exact, f"exceed {exact:,} and have lost digits in this number format", "Store counts as integers."


def _row_of(indptr: npt.NDArray[np.int64], marked: npt.NDArray[np.bool_]) -> int:
    """Row, within the block, of the first marked value."""
    return int(np.searchsorted(indptr, int(np.argmax(marked)), side="right")) - 1


def _check_kind(file: h5py.File, uri: str) -> None:
    """AtlasError that names the kind of file when the tables of an h5ad file are not there."""
    if "obs" in file and "var" in file:
        return
    kind = "no obs and var tables"
    if "matrix" in file and "row_attrs" in file:
        kind = "a loom file"
    elif any(isinstance(item, h5py.Group) and "barcodes" in item for item in file.values()):
        kind = "a 10x Genomics matrix"
    raise AtlasError(
        f"HDF5, but not h5ad: it holds {kind}.", where=uri, fix="Convert it to h5ad with anndata or scanpy."
    )


def _slot_path(slot: str, uri: str) -> str:
    if slot in ("X", "raw.X"):
        return slot.replace(".", "/")
    if re.fullmatch(r"layers/[^/]+", slot) and slot not in ("layers/.", "layers/.."):
        return slot
    raise AtlasError(f"'{slot}' is no place for counts.", where=uri, fix="Use auto, X, raw.X or layers/NAME.")


def _chosen_slot(file: h5py.File, uri: str) -> str:
    """`raw.X` if it is there and looks like counts, else `X`; NotCountsError says what each slot looked like."""
    seen: list[str] = []
    unread: AtlasError | None = None
    for slot in ("raw.X", "X"):
        if _slot_path(slot, uri) not in file:
            seen.append(f"{slot}: absent")
            continue
        try:
            looks = _looks(_csr(file, slot, uri))
        except AtlasError as error:
            unread = unread or error
            continue
        if not looks:
            return slot
        seen.append(f"{slot}: {looks}")
    if unread:
        raise unread
    layers = ", ".join(file["layers"]) if isinstance(file.get("layers"), h5py.Group) else ""
    raise NotCountsError(
        f"no raw counts found ({'; '.join(seen)}; layers: {layers or 'none'}).",
        where=uri,
        fix="Give raw counts, or name the slot that holds them, for example --counts-slot layers/counts.",
    )


def _looks(matrix: h5py.Group) -> str:
    """Why the first values are no counts, or an empty text; all values are checked when they are read."""
    data = matrix["data"]
    if data.dtype.kind not in "iufb":
        return f"values of type {data.dtype}"
    values = data[: min(PROBED_VALUES, len(data))]
    for bad, what, _ in _faults(values):
        if bad.any():
            count = f"{int(bad.sum()):,} of the first {values.size:,} values"
            return f"{count} {what}, for example {values[np.argmax(bad)]}"
    return ""


def _csr(file: h5py.File, slot: str, uri: str) -> h5py.Group:
    where = f"{uri}: {slot}"
    matrix = file.get(_slot_path(slot, uri))
    if matrix is None:
        raise AtlasError("this slot is absent.", where=where, fix="Use auto, X, raw.X or layers/NAME.")
    if isinstance(matrix, h5py.Dataset):
        raise AtlasError(
            f"a dense array ({matrix.dtype}); only sparse CSR matrices are read.", where=where, fix=_CSR_FIX
        )
    kind = matrix.attrs.get("encoding-type", "")
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    if kind == "csc_matrix":
        raise AtlasError("a CSC matrix (gene by gene); only CSR matrices are read.", where=where, fix=_CSR_FIX)
    if kind != "csr_matrix":
        raise AtlasError(
            f"encoding '{kind or 'unknown'}' is not read.", where=where, fix="Write it again with anndata as CSR."
        )
    for name in ("data", "indices", "indptr"):
        if not isinstance(matrix.get(name), h5py.Dataset) or matrix[name].ndim != 1:
            raise AtlasError(f"the matrix has no '{name}'.", where=where, fix="Write the file again.")
    return matrix


def _shape(matrix: h5py.Group, uri: str) -> tuple[int, int]:
    shape = np.asarray(matrix.attrs.get("shape", ()))
    if shape.shape != (2,) or shape.dtype.kind not in "iu" or (shape < 0).any():
        raise AtlasError(f"{matrix.name} does not say its shape.", where=uri, fix="Write the file again.")
    n_cells, n_genes = int(shape[0]), int(shape[1])
    if n_cells == 0 or n_genes == 0:
        raise AtlasError(f"the matrix is empty ({n_cells:,} cells, {n_genes:,} genes).", where=uri)
    if n_cells > MAX_CELLS or n_genes > MAX_GENES:
        raise AtlasError(f"{n_cells:,} cells × {n_genes:,} genes are more than an atlas has.", where=uri)
    if len(matrix["indptr"]) != n_cells + 1:
        raise AtlasError(
            f"{matrix.name}/indptr has {len(matrix['indptr']):,} entries, {n_cells + 1:,} belong to {n_cells:,} cells.",
            where=uri,
            fix="Write the file again.",
        )
    return n_cells, n_genes


def _indptr(matrix: h5py.Group, n_cells: int, nnz: int, uri: str) -> npt.NDArray[np.int64]:
    check_written(matrix["indptr"], uri)
    if matrix["indptr"].dtype.kind not in "iu" or matrix["indices"].dtype.kind not in "iu":
        raise AtlasError(f"{matrix.name} has indices that are not whole numbers.", where=uri)
    indptr = read_numbers(matrix["indptr"], uri).astype(np.int64)
    if len(matrix["indices"]) != nnz:
        raise AtlasError(f"{matrix.name} has {nnz:,} values but {len(matrix['indices']):,} indices.", where=uri)
    if indptr[0] != 0 or indptr[-1] != nnz or (np.diff(indptr) < 0).any():
        raise AtlasError(
            f"{matrix.name}/indptr does not rise from 0 to {nnz:,}, the number of values.",
            where=uri,
            fix="The matrix is damaged: write the file again.",
        )
    return indptr


def write_obsm(source_uri: str, out: Path, key: str, matrix: npt.NDArray[Any], store: Store) -> Path:
    """Copy an h5ad file to `out` with `obsm[key]` added (or replaced): one row of `matrix` for each cell, in order.

    Raises InputError when the rows are not the file's cells; nothing stands at `out` unless it is whole.
    """
    with opened(source_uri, store) as file:
        obs = file.get("obs")
        name = obs.attrs.get("_index", "_index") if isinstance(obs, h5py.Group) else ""
        n_cells = len(obs[name]) if isinstance(obs, h5py.Group) and isinstance(obs.get(name), h5py.Dataset) else -1
    if matrix.ndim != 2 or len(matrix) != n_cells:
        raise InputError(f"{len(matrix):,} rows for {n_cells:,} cells.", where=source_uri, fix="Give one row a cell.")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", key):
        raise InputError(f"'{key}' cannot name an entry of obsm.", fix="Use letters, digits and underscores.")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.{os.getpid()}.unfinished")
    try:
        with store.open(source_uri) as source, unfinished.open("wb") as copy:
            shutil.copyfileobj(source, copy, 8 * 1024 * 1024)
        with h5py.File(unfinished, "r+") as file:
            _put_obsm(file, key, matrix)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return out


def _put_obsm(file: h5py.File, key: str, matrix: npt.NDArray[Any]) -> None:
    if "obsm" not in file:
        file.create_group("obsm").attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    if key in file["obsm"]:
        del file["obsm"][key]
    stored: Sequence[Any] = file["obsm"].create_dataset(key, data=matrix, compression="gzip", shuffle=True)
    stored.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})  # type: ignore[attr-defined]
