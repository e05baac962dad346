"""Dense matrices: bands of cells are read whole and turned into the values that are not zero.

Axis suffixes: `n` cells, `z` values that are not zero.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.ingestion.atlas import Layout, Rows
from genescale.ingestion.formats.sparse_matrix import check_shape
from genescale.ingestion.formats.tree import Array
from genescale.platform.errors import AtlasError

# Cells are planned as if one gene in so many were detected: the truth is only known when everything has been read, and
# a full row is never more than this many times what was planned.
PLANNED_SHARE = 8
# Cells are read in bands of whole chunks: at least so many bytes where that is cheap, never more than the limit.
BAND_BYTES = 4 * 1024 * 1024
MAX_BAND_BYTES = 64 * 1024 * 1024


class DenseMatrix:
    """Cells × genes with every zero written out. `stored_before` is an estimate: an eighth of the genes a cell."""

    layout: Layout = "dense"
    sequential = False

    def __init__(self, array: Array, *, where: str) -> None:
        if len(array.shape) != 2:
            raise AtlasError(f"an array of shape {array.shape} is no matrix.", where=where, fix="Write it again.")
        if not array.is_number:
            raise AtlasError(f"it holds values of type {array.dtype}.", where=where, fix="Write the file again.")
        self.n_cells, self.n_genes = array.shape
        check_shape(self.n_cells, self.n_genes, where=where)
        array.check_written()
        self.where, self.dtype, self._array = where, array.dtype, array
        self.stored_before = np.arange(self.n_cells + 1, dtype=np.int64) * -(-self.n_genes // PLANNED_SHARE)
        self.seconds = {"read": 0.0, "inflate": 0.0}
        row_bytes = max(1, self.n_genes * array.dtype.itemsize)
        wished = max(1, BAND_BYTES // (row_bytes * array.band)) * array.band
        # Where not even one band of chunks fits, chunks are inflated several times.
        self._step = max(1, min(wished, MAX_BAND_BYTES // row_bytes))
        self._kept: tuple[int, Rows] | None = None

    def read(self, start: int, stop: int) -> Rows:
        """Values that are not zero of cells start … stop-1, genes in rising order."""
        pieces = []
        for first in range(start // self._step * self._step, stop, self._step):
            low, high = max(start, first), min(stop, first + self._step)
            pieces.append(_cut(self._band(first), low - first, high - first))
        return _joined(pieces, self._array.dtype.newbyteorder("="))

    def _band(self, first: int) -> Rows:
        """A whole band; the last one is kept, because the next range often begins in it."""
        if self._kept is None or self._kept[0] != first:
            self._kept = None
            self._kept = (first, _sparse(self._rows(first, min(first + self._step, self.n_cells))))
        return self._kept[1]

    def _rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        began = time.thread_time()
        values = self._array.rows(start, stop)
        self.seconds["inflate"] += time.thread_time() - began
        return values


def _sparse(block: npt.NDArray[Any]) -> Rows:
    rows, genes_z = np.nonzero(block)
    indptr_n = np.searchsorted(rows, np.arange(len(block) + 1)).astype(np.int64)
    return Rows(indptr_n, genes_z.astype(np.int32), block[rows, genes_z])


def _cut(rows: Rows, start: int, stop: int) -> Rows:
    if (start, stop) == (0, len(rows.indptr_n) - 1):
        return rows
    pointers_n = rows.indptr_n[start : stop + 1]
    first, last = int(pointers_n[0]), int(pointers_n[-1])
    return Rows(pointers_n - first, rows.indices_z[first:last], rows.values_z[first:last])


def _joined(pieces: list[Rows], dtype: np.dtype[Any]) -> Rows:
    if len(pieces) == 1:
        return pieces[0]
    if not pieces:
        return Rows(np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.int32), np.empty(0, dtype=dtype))
    sizes = np.concatenate([[0], *(np.diff(piece.indptr_n) for piece in pieces)])
    return Rows(
        np.cumsum(sizes, dtype=np.int64),
        np.concatenate([piece.indices_z for piece in pieces]),
        np.concatenate([piece.values_z for piece in pieces]),
    )
