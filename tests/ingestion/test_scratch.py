"""Rows out of values in any order: the same rows as SciPy makes, in bounded memory, and nothing left behind."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from genescale.ingestion.formats import scratch
from genescale.ingestion.formats.scratch import Triplets, scratch_matrix
from genescale.platform.errors import AtlasError, StorageError


@pytest.fixture(autouse=True)
def scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scratch folder of its own, so that what is left behind shows."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def in_blocks(matrix: sparse.coo_matrix, size: int = 97) -> Callable[[], Iterator[Triplets]]:
    """The values of a matrix in their order, so many at a time."""

    def triplets() -> Iterator[Triplets]:
        for first in range(0, matrix.nnz, size):
            part = slice(first, first + size)
            yield matrix.row[part], matrix.col[part], matrix.data[part]

    return triplets


def orders(matrix: sparse.csr_matrix) -> dict[str, sparse.coo_matrix]:
    """The same values by cell, by gene, and in no order."""
    by_cell, by_gene = matrix.tocoo(), matrix.tocsc().tocoo()
    mixed = np.random.default_rng(3).permutation(by_cell.nnz)
    shuffled = sparse.coo_matrix((by_cell.data[mixed], (by_cell.row[mixed], by_cell.col[mixed])), by_cell.shape)
    return {"by cell": by_cell, "by gene": by_gene, "shuffled": shuffled}


@pytest.mark.parametrize("range_values", [1, 50, 4_000_000])
@pytest.mark.parametrize("order", ["by cell", "by gene", "shuffled"])
def test_rows_are_those_of_the_matrix(order: str, range_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "RANGE_VALUES", range_values)
    matrix = sparse.random(60, 40, 0.3, format="csr", random_state=1)
    matrix.data = np.arange(1, matrix.nnz + 1, dtype=np.int32)
    matrix = sparse.vstack([matrix, sparse.csr_matrix((3, 40), dtype=np.int32)]).tocsr()
    given = orders(matrix)[order]
    with scratch_matrix(
        in_blocks(given), n_cells=63, n_genes=40, dtype=np.int32, where="x", layout="csc", nnz=matrix.nnz
    ) as made:
        assert made.sequential
        assert np.array_equal(made.stored_before, matrix.indptr)
        for start, stop in ((0, 63), (7, 8), (10, 31), (60, 63), (5, 5)):
            rows, wanted = made.read(start, stop), matrix[start:stop]
            got = sparse.csr_matrix((rows.values_z, rows.indices_z, rows.indptr_n), (stop - start, 40))
            assert rows.values_z.dtype == np.int32
            assert (got != wanted).nnz == 0
        whole = made.read(0, 63)
    for cell in range(63):
        came = given.col[given.row == cell]
        row = whole.indices_z[whole.indptr_n[cell] : whole.indptr_n[cell + 1]]
        assert np.array_equal(row, came), "genes of a cell keep the order in which they came"


@pytest.mark.parametrize(("order", "passes"), [("by cell", 1), ("by gene", 2), ("shuffled", 2)])
def test_values_by_cell_are_read_once_and_others_twice(order: str, passes: int) -> None:
    matrix = sparse.random(30, 20, 0.5, format="csr", random_state=2)
    blocks, calls = in_blocks(orders(matrix)[order]), 0

    def triplets() -> Iterator[Triplets]:
        nonlocal calls
        calls += 1
        return blocks()

    with scratch_matrix(
        triplets, n_cells=30, n_genes=20, dtype=np.float64, where="x", layout="csc", nnz=matrix.nnz
    ) as made:
        assert calls == 0, "nothing is read before rows are asked for"
        made.read(0, 30)
        made.read(0, 30)
    assert calls == passes


def test_repeated_entries_stay_and_an_unknown_number_is_counted() -> None:
    given = sparse.coo_matrix(([1, 2, 3, 4], ([1, 0, 1, 1], [2, 0, 2, 1])), (2, 3))
    with scratch_matrix(
        in_blocks(given, 2), n_cells=2, n_genes=3, dtype=np.int64, where="x", layout="dense", nnz=None
    ) as made:
        rows = made.read(0, 2)
    assert rows.indptr_n.tolist() == [0, 1, 4]
    assert rows.indices_z.tolist() == [0, 2, 2, 1]
    assert rows.values_z.tolist() == [2, 1, 3, 4]


@pytest.mark.parametrize(
    ("cell", "gene", "nnz", "message"),
    [
        (5, 0, 1, r"1 cell indices lie outside 0 … 4, the first is 5 at value 0"),
        (-1, 0, 1, r"1 cell indices lie outside"),
        (0, 2**40, 1, r"1 gene indices lie outside 0 … 2, the first is 1099511627776"),
        (0, 0, 2, r"2 values are declared but 1 are there\. The matrix is cut off"),
        (0, 0, 0, r"0 values are declared but more are there"),
    ],
)
def test_wrong_indices_and_sizes_are_refused(cell: int, gene: int, nnz: int, message: str) -> None:
    def triplets() -> Iterator[Triplets]:
        yield np.array([cell]), np.array([gene]), np.array([1.0])

    with (
        scratch_matrix(triplets, n_cells=5, n_genes=3, dtype=np.float64, where="a.mtx", layout="csc", nnz=nnz) as made,
        pytest.raises(AtlasError, match=f"^a.mtx: {message}"),
    ):
        made.read(0, 1)


def test_a_check_may_refuse_before_rows_are_made() -> None:
    given = sparse.coo_matrix(([1, 2], ([1, 0], [0, 0])), (2, 1))

    def check(stored_before: np.ndarray) -> None:
        raise AtlasError(f"seen {stored_before.tolist()}")

    with (
        scratch_matrix(
            in_blocks(given), n_cells=2, n_genes=1, dtype=np.int32, where="x", layout="csc", nnz=2, check=check
        ) as made,
        pytest.raises(AtlasError, match=r"seen \[0, 1, 2\]"),
    ):
        _ = made.stored_before


def test_nothing_is_left_and_little_is_held(scratch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "RANGE_VALUES", 100_000)
    n_cells, n_genes, n_values = 20_000, 500, 3_000_000

    def triplets() -> Iterator[Triplets]:
        for gene_block in range(0, n_values, 50_000):
            places = np.arange(gene_block, gene_block + 50_000, dtype=np.int64)
            yield places % n_cells, places // n_cells, places + 1

    with scratch_matrix(
        triplets, n_cells=n_cells, n_genes=n_genes, dtype=np.int64, where="x", layout="csc", nnz=n_values
    ) as made:
        tracemalloc.start()
        rows = made.read(19_990, 20_000)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert os.listdir(scratch_folder) == [], "scratch files have no name, so a killed worker leaves nothing"
    assert rows.values_z[-1] == n_values
    assert rows.indptr_n[-1] == 10 * 150
    assert scratch.scratch_bytes(n_values, np.dtype(np.int64)) == 48_000_000
    assert peak_bytes < 12_000_000


def test_a_scratch_folder_without_room_is_named_with_what_is_needed(
    scratch_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = sparse.coo_matrix(([1], ([0], [0])), (1, 1))
    huge = 10**18
    with (
        scratch_matrix(
            in_blocks(given), n_cells=1, n_genes=1, dtype=np.int32, where="a.h5ad: X", layout="csc", nnz=huge
        ) as made,
        pytest.raises(StorageError) as caught,
    ):
        made.read(0, 1)
    assert f"needs {12 * huge:,} bytes of scratch in {scratch_folder}, where" in caught.value.what
    assert caught.value.where == "a.h5ad: X"
    assert "TMPDIR" in caught.value.fix
    monkeypatch.setenv("TMPDIR", str(scratch_folder / "missing"))
    with (
        scratch_matrix(in_blocks(given), n_cells=1, n_genes=1, dtype=int, where="x", layout="csc", nnz=1) as made,
        pytest.raises(StorageError, match=r"scratch folder .*missing cannot be used: No such file"),
    ):
        made.read(0, 1)
