"""Matrix Market triples: every spelling of the three files, both orientations, and what must be refused."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from scipy import sparse

from genescale.ingestion.atlas import Atlas
from genescale.ingestion.formats import market_text
from genescale.ingestion.opening import open_atlas, stat_source
from genescale.platform.errors import AtlasError, NotCountsError
from genescale.platform.storage import Store, join

HEAD = "%%MatrixMarket matrix coordinate integer general\n"


def text_of(matrix: Any, *, field: str | None = None, comment: str = "") -> bytes:
    """The matrix as Matrix Market text."""
    out = io.BytesIO()
    scipy.io.mmwrite(out, matrix, field=field, comment=comment)
    return out.getvalue()


def write_triple(
    folder: Path,
    matrix: bytes,
    cells: Sequence[str],
    genes: Sequence[str],
    *,
    names: tuple[str, str, str] = ("matrix.mtx.gz", "barcodes.tsv.gz", "features.tsv.gz"),
) -> Path:
    """Write three files under these names, compressed where the name says so; returns the matrix file."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = ("".join(f"{line}\n" for line in lines).encode() for lines in (cells, genes))
    for name, data in zip(names, (matrix, *tables), strict=True):
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder / names[0]


def genes_of(n: int) -> list[str]:
    """Lines of a features table."""
    return [f"ENSG{i:011d}\tGENE{i}\tGene Expression" for i in range(1, n + 1)]


def cells_of(n: int) -> list[str]:
    """Lines of a barcodes table."""
    return [f"AAAC{i}-1" for i in range(n)]


def read_all(atlas: Atlas) -> sparse.csr_matrix:
    """All rows of an atlas."""
    rows = atlas.read(0, atlas.n_cells)
    return sparse.csr_matrix((rows.values_z, rows.indices_z, rows.indptr_n), (atlas.n_cells, atlas.n_genes))


@pytest.mark.parametrize(
    "names",
    [
        ("matrix.mtx.gz", "barcodes.tsv.gz", "features.tsv.gz"),
        ("matrix.mtx", "barcodes.tsv", "genes.tsv"),
        ("GSM123_lung_matrix.mtx.gz", "GSM123_lung_barcodes.tsv.gz", "GSM123_lung_genes.tsv.gz"),
        ("cells_x_genes.mtx", "cells_x_genes.barcodes.txt", "cells_x_genes.genes.txt"),
        ("matrix.mtx", "barcodes.tsv.gz", "GSM1_features.tsv"),
    ],
)
def test_every_spelling_of_a_triple(
    names: tuple[str, str, str], tmp_path: Path, local_store: Store, counts_of: Callable[..., sparse.csr_matrix]
) -> None:
    counts = counts_of(9, n_genes=12)
    file = write_triple(tmp_path / "run", text_of(counts.T), cells_of(9), genes_of(12), names=names)
    for uri in (tmp_path / "run", file):
        with open_atlas(str(uri), local_store) as atlas:
            assert (atlas.kind, atlas.slot, atlas.matrix.layout) == ("mtx", "X", "triplets")
            assert (read_all(atlas) != counts).nnz == 0
            assert atlas.cell_ids(0, 2) == ["AAAC0-1", "AAAC1-1"]
            assert atlas.var.index(0, 1) == ["ENSG00000000001"]
            assert atlas.var.column("feature_name", 11)[0] == ["GENE12"]
            assert atlas.var.column("feature_type", 0, 1)[0] == ["Gene Expression"]


@pytest.mark.parametrize("field", ["integer", "real"])
@pytest.mark.parametrize("cells_first", [False, True])
def test_either_orientation_and_number_format(
    field: str, cells_first: bool, tmp_path: Path, local_store: Store, counts_of: Callable[..., sparse.csr_matrix]
) -> None:
    counts = counts_of(9, n_genes=12)
    matrix = counts if cells_first else counts.T
    write_triple(tmp_path / "run", text_of(matrix, field=field, comment="a\nb"), cells_of(9), genes_of(12))
    with open_atlas(str(tmp_path / "run"), local_store) as atlas:
        assert atlas.matrix.dtype == (np.int64 if field == "integer" else np.float64)
        assert (read_all(atlas) != counts).nnz == 0
        assert ("the matrix is stored cells × genes" in atlas.notes) == cells_first


def test_a_square_matrix_is_taken_as_genes_by_cells_and_says_so(tmp_path: Path, local_store: Store) -> None:
    matrix = HEAD + "2 2 2\n1 2 5\n2 2 7\n"
    write_triple(tmp_path / "run", matrix.encode(), cells_of(2), genes_of(2))
    with open_atlas(str(tmp_path / "run"), local_store) as atlas:
        assert read_all(atlas).toarray().tolist() == [[0, 0], [5, 7]]
        assert any("as many cells as genes" in note for note in atlas.notes)


def test_white_space_blocks_and_line_ends_do_not_matter(
    tmp_path: Path, local_store: Store, monkeypatch: pytest.MonkeyPatch, counts_of: Callable[..., sparse.csr_matrix]
) -> None:
    counts = counts_of(30, n_genes=20)
    plain = text_of(counts.T)
    head, _, body = plain.partition(b"general\n")
    body = body.replace(b"\n", b" \r\n  ").replace(b" ", b"\t  ").rstrip()
    monkeypatch.setattr(market_text, "BLOCK_BYTES", 64)
    for number, text in enumerate((plain, head + b"general\n" + body, plain.rstrip(b"\n"))):
        write_triple(tmp_path / str(number), text, cells_of(30), genes_of(20))
        with open_atlas(str(tmp_path / str(number)), local_store) as atlas:
            assert (read_all(atlas) != counts).nnz == 0


@pytest.mark.shared
def test_shared_runs_equal_what_scipy_reads(shared_data: Path, local_store: Store) -> None:
    tenx = shared_data / "atlases" / "tenx"
    for folder, name in (
        (tenx / "cellranger3" / "filtered_feature_bc_matrix", "matrix.mtx.gz"),
        (tenx / "cellranger1" / "filtered_gene_bc_matrices" / "hg19_chr21", "matrix.mtx"),
    ):
        wanted = scipy.io.mmread(folder / name).tocsr().T.tocsr()
        with open_atlas(str(folder), local_store) as atlas:
            assert (read_all(atlas) != wanted).nnz == 0
            assert atlas.obs.rows == wanted.shape[0]


def test_from_object_storage(s3_store: tuple[Store, str], tmp_path: Path, counts_of: Callable[..., Any]) -> None:
    store, bucket = s3_store
    counts = counts_of(9, n_genes=12)
    write_triple(tmp_path / "run", text_of(counts.T), cells_of(9), genes_of(12))
    store.upload_folder(tmp_path / "run", join(bucket, "lab/run"))
    for uri in (f"{bucket}/lab/run", f"{bucket}/lab/run/matrix.mtx.gz"):
        entry = stat_source(uri, store)
        assert entry.uri == f"{bucket}/lab/run", "one source has one address, however it is named"
        with open_atlas(uri, store, etag=entry.etag) as atlas:
            assert (read_all(atlas) != counts).nnz == 0


def test_the_tag_covers_all_three_files(tmp_path: Path, local_store: Store) -> None:
    matrix = HEAD + "2 3 1\n1 2 5\n"
    write_triple(tmp_path / "run", matrix.encode(), cells_of(3), genes_of(2))
    planned = stat_source(str(tmp_path / "run"), local_store)
    assert planned.size_bytes == sum(path.stat().st_size for path in (tmp_path / "run").iterdir())
    (tmp_path / "run" / "notes.txt").write_text("not a member")
    assert stat_source(str(tmp_path / "run"), local_store) == planned
    (tmp_path / "run" / "barcodes.tsv.gz").write_bytes(gzip.compress(b"x\ny\nz2\n"))
    with (
        pytest.raises(AtlasError, match=r"changed since it was planned\. Run the command again"),
        open_atlas(str(tmp_path / "run"), local_store, etag=planned.etag),
    ):
        pass


def opened_text(text: str | bytes, tmp_path: Path, store: Store, *, n_genes: int = 2, n_cells: int = 3) -> None:
    """Read all rows of a triple with this matrix text."""
    data = text if isinstance(text, bytes) else text.encode()
    write_triple(tmp_path / "run", data, cells_of(n_cells), genes_of(n_genes))
    with open_atlas(str(tmp_path / "run"), store) as atlas:
        read_all(atlas)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "2 3 1\n0 1 5\n", "1 row numbers lie outside 1 … 2, the first is 0 in entry 1. Numbers count from 1"),
        (HEAD + "2 3 1\n-1 1 5\n", "the first is -1"),
        (HEAD + "2 3 2\n1 1 5\n3 1 5\n", "1 row numbers lie outside 1 … 2, the first is 3 in entry 2"),
        (HEAD + "2 3 1\n1 4 5\n", "1 column numbers lie outside 1 … 3"),
        (HEAD + "2 3 2\n1 1 5\n", "2 values are declared but 1 are there. The matrix is cut off"),
        (HEAD + "2 3 1\n1 1 5\n1 2 6\n", "1 values are declared but more are there"),
        (HEAD + "2 3 1\n1 1 five\n", "after entry 0 comes text that is no entry"),
        (HEAD + "2 3 1\n1 1\n", "after entry 0 comes text that is no entry"),
        (HEAD + "2 3 1\n1 1 99999999999999999999\n", "no entry"),
        (HEAD + "2 3 1\n" + "1" * 9000 + "\n", "no entry"),
        (HEAD + "2 3 90000\n1 1 5\n", "90,000 entries are declared, which"),
        (HEAD + "2 3\n", "the line of sizes reads '2 3'; three whole numbers belong there"),
        (HEAD + "2 3 -1\n", "the line of sizes reads"),
        (HEAD + "0 3 0\n", "the matrix is empty (0 × 3)"),
        (HEAD + "5 3 0\n", "the matrix is 5 × 3, but the tables beside it have 2 genes and 3 cells"),
        (HEAD.replace("general", "symmetric") + "3 3 0\n", "a symmetric matrix: that is a graph"),
        (HEAD.replace("integer", "complex") + "2 3 0\n", "a Matrix Market file of complex values"),
        (HEAD.replace("coordinate", "array") + "2 3\n", "only sparse matrices are read"),
        ("%%MatrixMarket nonsense\n", "no Matrix Market file: it begins with"),
    ],
)
def test_damaged_and_foreign_text_is_refused(text: str, message: str, tmp_path: Path, local_store: Store) -> None:
    with pytest.raises(AtlasError) as caught:
        opened_text(text, tmp_path, local_store)
    assert message in str(caught.value)
    assert caught.value.where.startswith(str(tmp_path / "run" / "matrix.mtx.gz"))


def test_presence_only_and_negative_values_are_no_counts(tmp_path: Path, local_store: Store) -> None:
    for text in (HEAD.replace("integer", "pattern") + "2 3 2\n1 1\n2 2\n", HEAD + "2 3 2\n1 1 -5\n2 2 1\n"):
        with pytest.raises(NotCountsError):
            opened_text(text, tmp_path, local_store)


def test_cut_and_damaged_compression_is_told_as_such(tmp_path: Path, local_store: Store) -> None:
    rng = np.random.default_rng(0)
    counts = sparse.random(200, 100, 0.3, random_state=rng, format="csr")
    counts.data = rng.integers(1, 1000, counts.nnz)
    file = write_triple(tmp_path / "run", text_of(counts), cells_of(100), genes_of(200))
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    for data, message in ((whole[: len(whole) // 2], "the gzip file is cut off"), (bytes(flipped), "damaged|no entry")):
        file.write_bytes(data)
        with pytest.raises(AtlasError, match=message), open_atlas(str(file), local_store) as atlas:
            read_all(atlas)


def test_a_missing_table_is_named(tmp_path: Path, local_store: Store) -> None:
    file = write_triple(tmp_path / "run", (HEAD + "2 3 0\n").encode(), cells_of(3), genes_of(2))
    (tmp_path / "run" / "barcodes.tsv.gz").unlink()
    for uri in (file, tmp_path / "run"):
        with (
            pytest.raises(AtlasError, match=r"without its barcodes\.tsv: the names of cells\. Put the table beside"),
            open_atlas(str(uri), local_store),
        ):
            pass


@pytest.mark.parametrize(
    ("table", "message"), [(b"", "this table is empty"), (b"a\tb\nc\n", "not a table of tab-separated texts")]
)
def test_damaged_tables_are_refused(table: bytes, message: str, tmp_path: Path, local_store: Store) -> None:
    write_triple(tmp_path / "run", (HEAD + "2 3 0\n").encode(), cells_of(3), genes_of(2))
    (tmp_path / "run" / "barcodes.tsv.gz").write_bytes(gzip.compress(table))
    with pytest.raises(AtlasError, match=message), open_atlas(str(tmp_path / "run"), local_store):
        pass


def test_the_matrix_of_every_barcode_is_refused_unless_it_is_wanted(tmp_path: Path, local_store: Store) -> None:
    n_barcodes, n_genes = 12_000, 20
    rng = np.random.default_rng(1)
    full = rng.random((n_genes, n_barcodes)) < np.where(np.arange(n_barcodes) % 10 == 0, 0.9, 0.1)
    counts = sparse.csc_matrix(full.astype(np.int64) * 3)
    write_triple(tmp_path / "raw_feature_bc_matrix", text_of(counts), cells_of(n_barcodes), genes_of(n_genes))
    uri = str(tmp_path / "raw_feature_bc_matrix")
    with (
        pytest.raises(AtlasError, match=r"12,000 barcodes, and 90% of them .* this is the unfiltered matrix"),
        open_atlas(uri, local_store) as atlas,
    ):
        read_all(atlas)
    with open_atlas(uri, local_store, allow_unfiltered=True) as atlas:
        assert (read_all(atlas) != counts.T).nnz == 0


def test_ensembl_ids_in_the_second_column_are_offered_as_ids(tmp_path: Path, local_store: Store) -> None:
    genes = ["GENE1\tENSG00000000001", "GENE2\tENSG00000000002"]
    write_triple(tmp_path / "run", (HEAD + "2 3 1\n1 1 1\n").encode(), cells_of(3), genes)
    with open_atlas(str(tmp_path / "run"), local_store) as atlas:
        assert atlas.var.columns == ["gene_ids"]
        assert atlas.var.column("gene_ids")[0] == ["ENSG00000000001", "ENSG00000000002"]
