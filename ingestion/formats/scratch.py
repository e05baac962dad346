"""Rows out of values that come in any order: through unnamed scratch files, in bounded memory.

Values are counted by cell and written where their row belongs. Values that come cell by cell already, as in every 10x
matrix, need one pass; others are read a second time, dealt to ranges of cells, and sorted range by range, always by
counting. The scratch files have no name, so that nothing is left behind, however the program ends.

Axis suffixes: `n` cells, `z` values.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from genescale.ingestion.atlas import Layout, Matrix, Rows
from genescale.platform.errors import AtlasError, StorageError
from genescale.platform.log import get_logger

Triplets = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]
# Values that are sorted at once: about 100 MB with their keys.
RANGE_VALUES = 4_000_000
LARGEST_INDEX = 2**31 - 1
INDEX = np.dtype(np.int32)
log = get_logger(__name__)


def scratch_folder() -> str:
    """The folder for scratch files: `$TMPDIR`, or the system's own."""
    return os.environ.get("TMPDIR") or tempfile.gettempdir()


def scratch_bytes(nnz: int, dtype: np.dtype[Any]) -> int:
    """Bytes of scratch that so many values need."""
    return nnz * (2 * INDEX.itemsize + dtype.itemsize)


def scratch_note(nnz: int, dtype: np.dtype[Any], layout: Layout) -> str:
    """What reading through scratch costs, for the notes of an atlas."""
    order = {"csc": "CSC (gene by gene)", "dense": "stored gene by gene"}.get(layout, "a list of single values")
    megabytes = -(-scratch_bytes(nnz, dtype) // 1_000_000)
    return f"the matrix is {order}: all of it is read once and needs {megabytes:,} MB of scratch in {scratch_folder()}"


@contextlib.contextmanager
def scratch_matrix(
    triplets: Callable[[], Iterator[Triplets]],
    *,
    n_cells: int,
    n_genes: int,
    dtype: npt.DTypeLike,
    where: str,
    layout: Layout,
    nnz: int | None,
    check: Callable[[npt.NDArray[np.int64]], None] | None = None,
) -> Iterator[ScratchMatrix]:
    """A matrix read by rows out of blocks of (cells_z, genes_z, values_z) in any order.

    triplets: gives the blocks from the start whenever it is called; nnz: values they hold together, None when that is
    not known; check: looks at `stored_before` as soon as it is known, and may refuse the matrix. The work is done when
    rows are first asked for; the genes of a row keep the order in which they came. Raises AtlasError for an index out
    of range or another number of values, and StorageError when the scratch does not fit.
    """
    if max(n_cells, n_genes) > LARGEST_INDEX:
        raise AtlasError(f"{n_cells:,} cells × {n_genes:,} genes are more than an atlas has.", where=where)
    with contextlib.ExitStack() as stack:
        yield ScratchMatrix(
            triplets, (n_cells, n_genes), np.dtype(dtype), where=where, layout=layout, nnz=nnz, check=check, stack=stack
        )


class ScratchMatrix:
    """The matrix that `scratch_matrix` makes; see `atlas.Matrix`."""

    sequential = True

    def __init__(
        self,
        triplets: Callable[[], Iterator[Triplets]],
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        *,
        where: str,
        layout: Layout,
        nnz: int | None,
        check: Callable[[npt.NDArray[np.int64]], None] | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self.where, self.layout, self.dtype = where, layout, dtype.newbyteorder("=")
        self.n_cells, self.n_genes = shape
        self._triplets, self._nnz, self._check, self._stack = triplets, nnz, check, stack
        self._before: npt.NDArray[np.int64] | None = None

    @property
    def stored_before(self) -> npt.NDArray[np.int64]:
        """Values stored before each cell (n+1), from 0."""
        return self._built()

    def read(self, start: int, stop: int) -> Rows:
        """Stored values of cells start … stop-1, in the order in which they came."""
        before = self._built()
        first, last = int(before[start]), int(before[stop])
        genes, values = (file.read(first, last - first) for file in (self._genes, self._values))
        return Rows(before[start : stop + 1] - first, genes, values)

    def _built(self) -> npt.NDArray[np.int64]:
        if self._before is None:
            check_room(scratch_bytes(self._nnz or 0, self.dtype), self.where)
            self._cells, self._genes, self._values = (self._file(kind) for kind in (INDEX, INDEX, self.dtype))
            before, in_order = self._first_pass()
            if self._check:
                self._check(before)
            if not in_order:
                check_room(scratch_bytes(int(before[-1]), self.dtype), self.where)
                self._second_pass(before)
                self._sort_ranges(before)
            self._cells.clear()
            self._before = before
        return self._before

    def _file(self, dtype: np.dtype[Any]) -> ScratchFile:
        with scratch_errors(self.where):
            return ScratchFile(
                self._stack.enter_context(tempfile.TemporaryFile(dir=scratch_folder())), dtype, self.where
            )

    def _first_pass(self) -> tuple[npt.NDArray[np.int64], bool]:
        """Count the values of each cell; as long as cells come in order, keep what was read."""
        from genescale.ingestion.formats.scratch_loops import count_groups

        counts_n = np.zeros(self.n_cells, dtype=np.int64)
        done, last, in_order = 0, -1, True
        for cells, genes, values in self._checked():
            if in_order and cells.size:
                in_order = bool(cells[0] >= last and (np.diff(cells) >= 0).all())
                last = int(cells[-1])
                if in_order:
                    self._genes.write(done, genes)
                    self._values.write(done, values)
            done += cells.size
            count_groups(cells, counts_n)
        if self._nnz is not None and done != self._nnz:
            raise AtlasError(
                f"{self._nnz:,} values are declared but {done:,} are there.",
                where=self.where,
                fix="The matrix is cut off or damaged: download or write it again.",
            )
        return np.concatenate(([0], np.cumsum(counts_n))), in_order

    def _second_pass(self, before: npt.NDArray[np.int64]) -> None:
        """Deal all values to the ranges of cells that they belong to; a range stands where its rows will."""
        from genescale.ingestion.formats.scratch_loops import grouped

        firsts = range_starts(before, RANGE_VALUES)
        places = before[firsts].copy()
        range_n = np.repeat(np.arange(firsts.size, dtype=INDEX), np.diff(np.append(firsts, self.n_cells)))
        for cells, genes, values in self._checked():
            order, starts = grouped(range_n[cells], firsts.size)
            for file, block in ((self._cells, cells), (self._genes, genes), (self._values, values)):
                dealt = block[order]
                for k in np.flatnonzero(np.diff(starts)):
                    file.write(int(places[k]), dealt[starts[k] : starts[k + 1]])
            places += np.diff(starts)
        if not np.array_equal(places, np.append(before[firsts[1:]], before[-1])):
            raise AtlasError("the file changed while it was read.", where=self.where, fix="Run the command again.")

    def _sort_ranges(self, before: npt.NDArray[np.int64]) -> None:
        from genescale.ingestion.formats.scratch_loops import grouped

        firsts = range_starts(before, RANGE_VALUES)
        for cell, end in zip(firsts.tolist(), [*firsts[1:].tolist(), self.n_cells], strict=True):
            start, size = int(before[cell]), int(before[end] - before[cell])
            order, _ = grouped(self._cells.read(start, size) - INDEX.type(cell), end - cell)
            for file in (self._genes, self._values):
                file.write(start, file.read(start, size)[order])

    def _checked(self) -> Iterator[Triplets]:
        """Blocks whose indices lie within the matrix: an index is stored in 32 bits and must not wrap."""
        done = 0
        for cells, genes, values in self._triplets():
            for indices, size, what in ((cells, self.n_cells, "cell"), (genes, self.n_genes, "gene")):
                outside = (indices < 0) | (indices >= size)
                if outside.any():
                    raise AtlasError(
                        f"{int(outside.sum()):,} {what} indices lie outside 0 … {size - 1:,}, "
                        f"the first is {indices[int(np.argmax(outside))]} at value {done + int(np.argmax(outside)):,}.",
                        where=self.where,
                        fix="Matrix and tables do not belong together: write the file again.",
                    )
            done += cells.size
            if self._nnz is not None and done > self._nnz:
                raise AtlasError(
                    f"{self._nnz:,} values are declared but more are there.", where=self.where, fix="Write it again."
                )
            yield cells, genes, values


class TurnedMatrix:
    """A matrix that can only be read from beginning to end: its rows come from scratch, made when they are asked for.

    sample: values of the file itself, to look at before anything is turned.
    """

    sequential = True

    def __init__(self, by_rows: Matrix, layout: Layout, sample: Callable[[], npt.NDArray[Any]]) -> None:
        self.where, self.dtype, self.layout = by_rows.where, by_rows.dtype, layout
        self.n_cells, self.n_genes = by_rows.n_cells, by_rows.n_genes
        self._by_rows, self.sample_values = by_rows, sample

    @property
    def stored_before(self) -> npt.NDArray[np.int64]:
        """Values stored before each cell (n+1)."""
        return self._by_rows.stored_before

    def read(self, start: int, stop: int) -> Rows:
        """Stored values of cells start … stop-1."""
        return self._by_rows.read(start, stop)


def range_starts(before: npt.NDArray[np.int64], values: int) -> npt.NDArray[np.int64]:
    """First cells of consecutive ranges of about `values` values each, at least one cell in each."""
    cuts = np.searchsorted(before, np.arange(0, max(int(before[-1]), 1), values), side="right") - 1
    return np.unique(np.append(0, np.minimum(cuts, before.size - 2)))


class ScratchFile:
    """An open file of numbers of one kind, read and written by position."""

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any], where: str) -> None:
        self._file, self._dtype, self._where = file, dtype, where

    def write(self, place: int, values: npt.NDArray[Any]) -> None:
        """Store `values` from position `place`."""
        data = np.ascontiguousarray(values, dtype=self._dtype).data.cast("B")
        offset = place * self._dtype.itemsize
        with scratch_errors(self._where):
            while data:
                written = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[written:], offset + written

    def read(self, place: int, size: int) -> npt.NDArray[Any]:
        """`size` numbers from position `place`."""
        values = np.empty(size, dtype=self._dtype)
        data, offset = values.data.cast("B"), place * self._dtype.itemsize
        with scratch_errors(self._where):
            while data:
                count = os.preadv(self._file.fileno(), [data], offset)
                if not count:
                    raise OSError(errno.EIO, "the scratch file is shorter than what was written to it")
                data, offset = data[count:], offset + count
        return values

    def clear(self) -> None:
        """Give the space back."""
        os.ftruncate(self._file.fileno(), 0)


def check_room(need_bytes: int, where: str) -> None:
    """StorageError when the scratch folder has less room than needed."""
    with scratch_errors(where):
        free_bytes = shutil.disk_usage(scratch_folder()).free
    if need_bytes > free_bytes:
        raise StorageError(
            f"reading it by rows needs {need_bytes:,} bytes of scratch in {scratch_folder()}, "
            f"where {free_bytes:,} are free.",
            where=where,
            fix="Set TMPDIR to a folder on a larger disk.",
        )


@contextlib.contextmanager
def scratch_errors(where: str) -> Iterator[None]:
    """Turn the OSErrors of the block into a StorageError that names the scratch folder."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the scratch folder {scratch_folder()} cannot be used: {error.strerror or error}.",
            where=where,
            fix="Free some space there, or set TMPDIR to a folder on a larger disk.",
        ) from error
