"""Many cells, as a run takes them: how large each is, and those of some positions as the service wants them.

An AnnData object is taken as it is, in memory or backed: only `X` or a layer, `var_names` and `obs_names` are looked
at, so the client needs neither anndata nor SciPy.

Axis suffixes: `n` cells, `g` genes (columns), `z` stored counts, `b` cells of one block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from genescale.client.cells import Cell, cell_json
from genescale.client.flat import Flat, flat_cells
from genescale.platform.errors import InputError, NotCountsError

# Cells looked at together: 2,048 of 2,000 genes each are some 50 MB.
BLOCK_CELLS = 2_048
# What JSON adds to a gene's name: quotes, commas and a count.
BYTES_PER_GENE, BYTES_PER_TOKEN, BYTES_PER_CELL = 30, 8, 400
Whole = npt.NDArray[np.int64]


class Source(Protocol):
    """Cells that are sent in batches."""

    genes_n: Whole
    """Genes with a count, or tokens, of each cell."""
    bytes_n: Whole
    """Bytes that each cell takes in a request, at most."""

    def cells(self, positions: Whole) -> list[Cell]:
        """The cells at these positions."""

    def flat(self, positions: Whole) -> Flat | None:
        """The same cells as arrays; None where they are of several forms, or of none that is known."""

    def name(self, position: int) -> str:
        """How an error calls the cell."""


class ListedCells:
    """Cells that a caller has as a list."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells = [cell_json(cell) for cell in cells]
        sizes = [_size(cell) for cell in self._cells]
        self.genes_n = np.array([n for n, _ in sizes], dtype=np.int64)
        self.bytes_n = np.array([size for _, size in sizes], dtype=np.int64)

    def cells(self, positions: Whole) -> list[Cell]:
        """The cells at these positions."""
        return [self._cells[at] for at in positions.tolist()]

    def flat(self, positions: Whole) -> Flat | None:
        """The same cells as arrays; None where they are of several forms, or of none that is known."""
        return flat_cells([self._cells[at] for at in positions.tolist()])

    def name(self, position: int) -> str:
        """Its place, and its id where it has one."""
        given = self._cells[position].get("id")
        return f"cells[{position}]" + (f" ({given!r})" if given else "")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """Counts of some cells: `indptr` of b + 1, columns and counts of z, no zero among them."""

    indptr: Whole
    columns_z: Whole
    counts_z: npt.NDArray[np.float64]


class ObjectCells:
    """The cells of an AnnData object; every stored value is looked at once before anything is sent.

    `counts_layer` names the layer of raw counts (`X` when None), `gene_column` the column of `var` with Ensembl ids or
    symbols (`var_names` when None). Raises InputError, and NotCountsError for values that are no raw counts.
    """

    def __init__(self, adata: Any, *, counts_layer: str | None = None, gene_column: str | None = None) -> None:
        self.slot = "X" if counts_layer is None else f"layers[{counts_layer!r}]"
        self._matrix = _by_rows(_matrix(adata, counts_layer))
        self._ids = [str(name) for name in adata.obs_names]
        self._has_layers = sorted(map(str, adata.layers.keys())) if hasattr(adata, "layers") else []
        names = _gene_names(adata, gene_column)
        # Columns of one name are one gene, and their counts are summed.
        self._names, column_of_g = np.unique(names, return_inverse=True)
        self._name_of_column_g = column_of_g.astype(np.int64)
        bytes_g = np.array([len(name.encode()) for name in self._names.tolist()], dtype=np.int64) + BYTES_PER_GENE
        sizes = [self._sizes(start, bytes_g) for start in range(0, len(self._ids), BLOCK_CELLS)]
        self.genes_n = np.concatenate([genes for genes, _ in sizes]) if sizes else np.zeros(0, dtype=np.int64)
        self.bytes_n = np.concatenate([size for _, size in sizes]) if sizes else np.zeros(0, dtype=np.int64)

    def cells(self, positions: Whole) -> list[Cell]:
        """The cells at these positions, as parallel arrays."""
        rows = self._summed(_rows(self._matrix[positions]))
        made: list[Cell] = []
        for at, start, stop in zip(positions.tolist(), rows.indptr[:-1], rows.indptr[1:], strict=True):
            names, counts_z = self._names[rows.columns_z[start:stop]], rows.counts_z[start:stop]
            made.append({"id": self._ids[at], "genes": names.tolist(), "values": counts_z.astype(np.int64).tolist()})
        return made

    def flat(self, positions: Whole) -> Flat:
        """The same cells as arrays."""
        rows = self._summed(_rows(self._matrix[positions]))
        used_v, codes_z = np.unique(rows.columns_z, return_inverse=True)
        return Flat(
            ids=[self._ids[at] for at in positions.tolist()],
            indptr=rows.indptr,
            values_z=rows.counts_z,
            names=self._names[used_v].tolist(),
            codes_z=codes_z.astype(np.int64),
        )

    def name(self, position: int) -> str:
        """Its name in the object."""
        return f"cell {self._ids[position]!r} (row {position})"

    def _sizes(self, start: int, bytes_g: Whole) -> tuple[Whole, Whole]:
        rows = _rows(self._matrix[start : start + BLOCK_CELLS])
        self._check(rows, start)
        rows = self._summed(rows)
        genes_b = np.diff(rows.indptr)
        before = np.concatenate([[0], np.cumsum(bytes_g[rows.columns_z])])
        return genes_b, BYTES_PER_CELL + before[rows.indptr[1:]] - before[rows.indptr[:-1]]

    def _summed(self, rows: _Rows) -> _Rows:
        """Counts by name instead of by column."""
        n_rows, n_names = len(rows.indptr) - 1, len(self._names)
        key_z = np.repeat(np.arange(n_rows), np.diff(rows.indptr)) * n_names + self._name_of_column_g[rows.columns_z]
        keys, which_z = np.unique(key_z, return_inverse=True)
        indptr = np.searchsorted(keys, np.arange(n_rows + 1) * n_names)
        counts_z = np.bincount(which_z, weights=rows.counts_z, minlength=len(keys)).astype(np.float64)
        return _Rows(indptr=indptr, columns_z=keys % max(1, n_names), counts_z=counts_z)

    def _check(self, rows: _Rows, start: int) -> None:
        counts_z = rows.counts_z
        wrong_z = ~np.isfinite(counts_z) | (counts_z < 0) | (counts_z != np.floor(counts_z))
        if not wrong_z.any():
            return
        first = int(np.argmax(wrong_z))
        row = int(np.searchsorted(rows.indptr, first, side="right")) - 1
        gene = self._names[self._name_of_column_g[rows.columns_z[first]]]
        others = ", ".join(self._has_layers) or "none"
        raise NotCountsError(
            f"{counts_z[first]:g} of the gene {gene!r} in {self.name(start + row)} is no raw count.",
            where=self.slot,
            fix=f"Name the layer that holds raw counts with counts_layer (layers: {others}).",
        )


def cells_of(adata: Any, *, counts_layer: str | None = None, gene_column: str | None = None) -> list[Cell]:
    """The cells of an AnnData object as each question takes them; arguments and errors as ObjectCells."""
    source = ObjectCells(adata, counts_layer=counts_layer, gene_column=gene_column)
    return source.cells(np.arange(len(source.genes_n)))


def _matrix(adata: Any, counts_layer: str | None) -> Any:
    try:
        matrix = adata.X if counts_layer is None else adata.layers[counts_layer]
    except AttributeError:
        raise InputError(
            f"{type(adata).__name__} is no AnnData object.", fix="Give one with X and var_names."
        ) from None
    except KeyError:
        known = ", ".join(sorted(map(str, adata.layers.keys()))) or "none"
        raise InputError(f"there is no layer '{counts_layer}'.", where="layers", fix=f"Layers: {known}.") from None
    if matrix is None:
        raise InputError("the object has no X.", where="X", fix="Name the layer of raw counts with counts_layer.")
    return matrix


def _by_rows(matrix: Any) -> Any:
    # Rows of a matrix stored by columns would be looked for in all of it, block after block.
    in_memory = isinstance(getattr(matrix, "data", None), np.ndarray)
    return matrix.tocsr() if in_memory and getattr(matrix, "format", "csr") != "csr" else matrix


def _gene_names(adata: Any, gene_column: str | None) -> npt.NDArray[np.str_]:
    if gene_column is None:
        return np.array([str(name) for name in adata.var_names], dtype=np.str_)
    if gene_column not in adata.var.columns:
        known = ", ".join(map(str, adata.var.columns)) or "none"
        raise InputError(f"there is no column '{gene_column}'.", where="var", fix=f"Columns: {known}.")
    column = adata.var[gene_column]
    if n_missing := int(column.isna().sum()):
        raise InputError(
            f"{n_missing:,} genes have no name in this column.",
            where=f"var[{gene_column!r}]",
            fix="Name them, or take the other genes only.",
        )
    return np.array([str(name) for name in column], dtype=np.str_)


def _rows(block: Any) -> _Rows:
    """What is stored in a block of a sparse or dense matrix."""
    if hasattr(block, "tocsr"):
        sparse = block.tocsr()
        indptr, columns_z, counts_z = sparse.indptr, sparse.indices, np.asarray(sparse.data, dtype=np.float64)
    else:
        dense_bg = np.asarray(block)
        row_z, columns_z = np.nonzero(dense_bg)
        indptr = np.searchsorted(row_z, np.arange(len(dense_bg) + 1))
        counts_z = dense_bg[row_z, columns_z].astype(np.float64)
    kept_z = counts_z != 0
    before = np.concatenate([[0], np.cumsum(kept_z)])
    return _Rows(
        indptr=before[np.asarray(indptr)].astype(np.int64),
        columns_z=np.asarray(columns_z)[kept_z].astype(np.int64),
        counts_z=counts_z[kept_z],
    )


def _size(cell: Mapping[str, Any]) -> tuple[int, int]:
    """Genes or tokens of a cell, and bytes of its JSON at most."""
    if "tokens" in cell:
        n = len(cell["tokens"])
        return n, BYTES_PER_CELL + BYTES_PER_TOKEN * n
    genes = list(cell.get("counts", cell.get("genes", ())))
    return len(genes), BYTES_PER_CELL + sum(len(str(gene).encode()) + BYTES_PER_GENE for gene in genes)
