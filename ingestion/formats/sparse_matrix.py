"""Sparse matrices stored as data, indices and pointers: by cells (CSR), or by genes (CSC), which is turned first.

Axis suffixes: `n` cells, `z` stored values; `major` is the axis that the pointers belong to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.ingestion.atlas import Layout, Matrix, Rows
from genescale.ingestion.formats.tree import PIECE_BYTES, Array
from genescale.platform.errors import AtlasError

MAX_GENES = 10_000_000
MAX_CELLS = 300_000_000
# Values of one cell that are held at once; a cell has one for each gene, or a few when entries are repeated.
MAX_ROW_VALUES = 64_000_000
TURNED_AT_ONCE = 1_000_000
SAMPLED_VALUES = 200_000
SAMPLED_PLACES = 8
AGAIN = "The matrix is damaged: write the file again."


@dataclasses.dataclass(frozen=True, eq=False)
class Compressed:
    """The three arrays of a sparse matrix and what they say: checked structure, unchecked values."""

    data: Array
    indices: Array
    starts: npt.NDArray[np.int64]
    """Where each cell (CSR) or gene (CSC) begins: one more than there are, from 0 to the number of values."""
    where: str


def compressed(data: Array, indices: Array, indptr: Array, n_major: int, *, where: str) -> Compressed:
    """Check that the three arrays belong together; AtlasError says what does not fit.

    n_major: cells of a CSR matrix, genes of a CSC matrix.
    """
    for name, array, kinds in (("data", data, "iufb"), ("indices", indices, "iu"), ("indptr", indptr, "iu")):
        if len(array.shape) != 1:
            raise AtlasError(f"the matrix has no '{name}'.", where=where, fix="Write the file again.")
        if array.dtype.kind not in kinds:
            raise AtlasError(f"{name} holds values of type {array.dtype}.", where=where, fix="Write the file again.")
    if len(indptr) != n_major + 1:
        raise AtlasError(
            f"indptr has {len(indptr):,} entries, {n_major + 1:,} belong to {n_major:,} cells or genes.",
            where=where,
            fix=AGAIN,
        )
    if len(indices) != len(data):
        raise AtlasError(f"it has {len(data):,} values but {len(indices):,} indices.", where=where, fix=AGAIN)
    for array in (data, indices, indptr):
        array.check_written()
    return Compressed(data, indices, _starts(indptr, len(data), where), where)


def _starts(indptr: Array, n_values: int, where: str) -> npt.NDArray[np.int64]:
    ranges, step = indptr.ranges(), PIECE_BYTES // indptr.dtype.itemsize
    # In pieces, so that damage is met before memory is. Numbers beyond int64 turn negative and are found below.
    pieces = [ranges.read(a, min(a + step, len(indptr))).astype(np.int64) for a in range(0, len(indptr), step)]
    starts = np.concatenate(pieces)
    steps = np.diff(starts)
    if starts[0] != 0 or starts[-1] != n_values or (steps < 0).any():
        wrapped = " (32-bit pointers that overflowed?)" if indptr.dtype == np.int32 and n_values >= 2**31 else ""
        raise AtlasError(
            f"indptr does not rise from 0 to {n_values:,}, the number of values{wrapped}.", where=where, fix=AGAIN
        )
    return starts


def check_shape(n_cells: int, n_genes: int, *, where: str) -> None:
    """AtlasError for an empty matrix, or one larger than any atlas."""
    if n_cells <= 0 or n_genes <= 0:
        raise AtlasError(
            f"the matrix is empty ({n_cells:,} cells, {n_genes:,} genes).", where=where, fix="Give a file with cells."
        )
    if n_cells > MAX_CELLS or n_genes > MAX_GENES:
        raise AtlasError(
            f"{n_cells:,} cells × {n_genes:,} genes are more than an atlas has.",
            where=where,
            fix="The file is damaged, or made to be: write it again.",
        )


class CsrMatrix:
    """Cells × genes with the values of each cell side by side: any range of rows is one range of values."""

    layout: Layout = "csr"
    sequential = False

    def __init__(self, parts: Compressed, *, n_cells: int, n_genes: int) -> None:
        check_shape(n_cells, n_genes, where=parts.where)
        self.where, self.n_cells, self.n_genes = parts.where, n_cells, n_genes
        self.dtype, self.stored_before = parts.data.dtype, parts.starts
        if (longest := int(np.diff(parts.starts).max())) > MAX_ROW_VALUES:
            raise AtlasError(f"one cell stores {longest:,} values for {n_genes:,} genes.", where=self.where, fix=AGAIN)
        self._data, self._indices = parts.data.ranges(), parts.indices.ranges()

    @property
    def seconds(self) -> dict[str, float]:
        """Processor seconds spent so far, under `read` and `inflate`."""
        return {name: self._data.seconds[name] + self._indices.seconds[name] for name in self._data.seconds}

    def read(self, start: int, stop: int) -> Rows:
        """Stored values of cells start … stop-1."""
        pointers_n = self.stored_before[start : stop + 1]
        first, last = int(pointers_n[0]), int(pointers_n[-1])
        return Rows(pointers_n - first, self._indices.read(first, last), self._data.read(first, last))


class CscMatrix:
    """Cells × genes with the values of each gene side by side: its rows come from a turned copy in scratch space.

    turned: that copy, made when its first row or pointer is asked for.
    """

    layout: Layout = "csc"
    sequential = True

    def __init__(self, parts: Compressed, turned: Matrix) -> None:
        self.where, self.n_cells, self.n_genes = parts.where, turned.n_cells, turned.n_genes
        self.dtype, self._parts, self._turned = parts.data.dtype, parts, turned
        self.n_values = int(parts.starts[-1])

    @property
    def stored_before(self) -> npt.NDArray[np.int64]:
        """Values stored before each cell (n+1)."""
        return self._turned.stored_before

    def read(self, start: int, stop: int) -> Rows:
        """Stored values of cells start … stop-1."""
        return self._turned.read(start, stop)

    def sample_values(self) -> npt.NDArray[Any]:
        """Values from places spread over the matrix, without turning it."""
        values, size = self._parts.data.ranges(), self.n_values
        step = SAMPLED_VALUES // SAMPLED_PLACES
        firsts = np.linspace(0, max(size - step, 0), SAMPLED_PLACES).astype(np.int64)
        return np.concatenate([values.read(int(first), min(int(first) + step, size)) for first in np.unique(firsts)])


Triplets = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[Any]]


def by_gene(parts: Compressed, n_cells: int) -> Iterator[Triplets]:
    """Cells, genes and values (each z) of a CSC matrix, a million at a time; AtlasError for a cell it does not have."""
    data, indices = parts.data.ranges(), parts.indices.ranges()
    size = int(parts.starts[-1])
    for first in range(0, size, TURNED_AT_ONCE):
        last = min(first + TURNED_AT_ONCE, size)
        cells_z = indices.read(first, last).astype(np.int64)
        if (marked := (cells_z < 0) | (cells_z >= n_cells)).any():
            raise AtlasError(
                f"cell index {int(cells_z[np.argmax(marked)]):,} lies outside 0 … {n_cells - 1:,}.",
                where=parts.where,
                fix="Matrix and cell table do not belong together: write the file again.",
            )
        yield cells_z, _major_of(parts.starts, first, last), data.read(first, last)


def _major_of(starts: npt.NDArray[np.int64], first: int, last: int) -> npt.NDArray[np.int64]:
    """The gene (CSC) of each of the values first … last-1."""
    low = int(np.searchsorted(starts, first, side="right")) - 1
    high = int(np.searchsorted(starts, last, side="left"))
    counts: npt.NDArray[np.int64] = np.diff(np.clip(starts[low : high + 1], first, last)).astype(np.int64)
    return np.repeat(np.arange(low, high, dtype=np.int64), counts)
