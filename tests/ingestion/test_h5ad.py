"""Reading h5ad files: counts are found and proved; every other file is refused with what was seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy import sparse

from genescale.ingestion.counts import checked
from genescale.ingestion.opening import open_atlas
from genescale.ingestion.slots import sampled_rows
from genescale.platform.errors import AtlasError, NotCountsError
from genescale.platform.storage import Store


def dense_of(path: Path, store: Store, **options: Any) -> tuple[np.ndarray, str]:
    """All counts of a file as it is read (repeated entries summed), and the slot they came from."""
    with open_atlas(str(path), store, **options) as atlas:
        block = checked(atlas, 0, atlas.n_cells)
        shape = (atlas.n_cells, atlas.n_genes)
        return sparse.csr_matrix((block.counts, block.indices, block.indptr), shape=shape).toarray(), atlas.slot


def refusal(path: Path, store: Store, **options: Any) -> AtlasError:
    """The error with which a file is refused when it is opened and read to its end."""
    with pytest.raises(AtlasError) as caught:
        dense_of(path, store, **options)
    assert str(path) in str(caught.value), "the message names the file"
    assert caught.value.fix or caught.value.code == "atlas"
    return caught.value


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint16", "int64"])
def test_counts_of_any_number_type_are_read_by_row_range(
    dtype: str, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    counts = counts_of(20).astype(dtype)
    path = write_atlas("a.h5ad", counts)
    with open_atlas(str(path), local_store) as atlas:
        assert (atlas.n_cells, atlas.n_genes, atlas.stored, atlas.slot) == (20, counts.shape[1], counts.nnz, "X")
        block = checked(atlas, 5, 12)
        assert atlas.cell_ids(5, 7) == ["cell5", "cell6"]
    rows = sparse.csr_matrix((block.counts, block.indices, block.indptr), shape=(7, counts.shape[1]))
    assert (rows != counts[5:12].astype(float)).nnz == 0
    assert block.counts.dtype == np.float64


def test_explicit_zeros_are_taken_out_and_counted(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    counts = counts_of(10)
    counts.data[::3] = 0
    path = write_atlas("a.h5ad", counts)
    with open_atlas(str(path), local_store) as atlas:
        block = checked(atlas, 0, 10)
    assert block.explicit_zeros == int((counts.data == 0).sum()) > 0
    assert (block.counts > 0).all()
    assert np.diff(block.indptr).tolist() == [int((row.data > 0).sum()) for row in counts]


def test_one_bad_value_far_beyond_the_first_look_is_found(write_atlas: Any, local_store: Store) -> None:
    values = np.ones(600_000, dtype=np.float32)
    values[450_000] = 2.5
    counts = sparse.csr_matrix((values, np.tile(np.arange(60), 10_000), np.arange(0, 600_001, 60)), shape=(10_000, 60))
    path = write_atlas("a.h5ad", counts)
    with open_atlas(str(path), local_store) as atlas:
        looked_at = [range(a, b) for a, b in sampled_rows(atlas.matrix.stored_before)]
        assert not any(7_500 in rows for rows in looked_at), "this test is about a value that no sample shows"
    error = refusal(path, local_store)
    assert isinstance(error, NotCountsError)
    assert "2.5 (cell 7,500, gene ENSG00000000001)" in str(error)


def test_detection_calls_are_no_counts(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    error = refusal(write_atlas("a.h5ad", counts_of(10).astype(bool)), local_store)
    assert "true/false: these are detection calls" in str(error)


Damage = Callable[[h5py.File], None]


def put(path: str, change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    """Replace a dataset by a changed copy."""

    def damage(file: h5py.File) -> None:
        values = change(file[path][...])
        del file[path]
        file[path] = values

    return damage


def at(index: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[index] = value
        return values

    return change


def never_written(file: h5py.File) -> None:
    size = len(file["X/data"])
    del file["X/data"]
    part = file.create_dataset("X/data", (size,), dtype="f4", chunks=(16,))
    part[:16] = 1


DAMAGES: dict[str, tuple[Damage, str]] = {
    "index too large": (put("X/indices", at(3, 60)), "gene indices lie outside 0 … 59, the first in cell 0"),
    "index negative": (put("X/indices", at(3, -1)), "gene indices lie outside 0 … 59"),
    "indptr falls": (put("X/indptr", at(3, 0)), "does not rise"),
    "indptr ends past the data": (put("X/indptr", at(-1, 10_000)), "does not rise"),
    "indptr too short": (put("X/indptr", lambda v: v[:-1]), "indptr has 10 entries, 11 belong to 10 cells or genes"),
    "fewer indices than values": (put("X/indices", lambda v: v[:-1]), "values but"),
    "more cells than names": (put("obs/_index", lambda v: v[:-1]), "obs has 9 rows but the matrix has 10"),
    "more genes than names": (put("var/_index", lambda v: v[:-1]), "var has 59 rows but the matrix has 60"),
    "chunks never written": (never_written, "were never written"),
    "no shape": (lambda f: f["X"].attrs.__delitem__("shape"), "does not say its shape"),
    "shape of millions": (lambda f: f["X"].attrs.__setitem__("shape", [2**40, 60]), "more than an atlas has"),
    "no cells": (lambda f: f["X"].attrs.__setitem__("shape", [0, 60]), "the matrix is empty"),
    "no values": (lambda f: f["X"].__delitem__("data"), "has no 'data'"),
    "texts as values": (put("X/data", lambda v: v.astype("S4")), "data holds values of type |S4"),
    "unknown encoding": (
        lambda f: f["X"].attrs.__setitem__("encoding-type", "csr_matrix_v9"),
        "it uses encoding csr_matrix_v9 0.1.0; this release reads csr_matrix 0.1.0, csc_matrix 0.1.0, array 0.2.0",
    ),
    "newer encoding": (
        lambda f: f["X"].attrs.__setitem__("encoding-version", "9.9.9"),
        "it uses encoding csr_matrix 9.9.9; this release reads csr_matrix up to 0.1.0",
    ),
    "newer table": (
        lambda f: f["obs"].attrs.__setitem__("encoding-version", "0.3.0"),
        "it uses encoding dataframe 0.3.0; this release reads dataframe up to 0.2.0",
    ),
    "no encoding": (lambda f: f["X"].attrs.__delitem__("encoding-type"), "does not say how it is encoded"),
    "indptr too long": (put("X/indptr", lambda v: np.append(v, v[-1])), "indptr has 12 entries, 11 belong"),
    "indptr begins late": (put("X/indptr", at(0, 5)), "does not rise from 0"),
    "indptr of fractions": (put("X/indptr", lambda v: v.astype("f8")), "indptr holds values of type float64"),
    "no obs": (lambda f: f.__delitem__("obs"), "no obs and var tables"),
    "no index": (lambda f: f["obs"].__delitem__("_index"), "obs has no index"),
}


@pytest.mark.parametrize(("damage", "text"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_structure_is_refused(
    damage: Damage, text: str, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    path = write_atlas("a.h5ad", counts_of(10))
    with h5py.File(path, "r+") as file:
        damage(file)
    assert text in str(refusal(path, local_store))


def test_a_giant_attribute_is_not_read(tmp_path: Path, local_store: Store) -> None:
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w", libver="latest") as file:
        file.create_group("obs")
        file.create_group("var").attrs["_index"] = "_index"
        file.attrs["encoding-type"] = np.zeros(20 * 2**20, dtype="u1")
    assert "its attribute 'encoding-type' has 20,971,520 bytes" in str(refusal(path, local_store))


def external_link(file: h5py.File, secret: Path) -> None:
    del file["X/data"]
    file["X/data"] = h5py.ExternalLink(str(secret), "data")


def external_storage(file: h5py.File, secret: Path) -> None:
    size = len(file["X/data"])
    del file["X/data"]
    file.create_dataset("X/data", (size,), dtype="u1", external=[(str(secret), 0, size)])


def virtual_dataset(file: h5py.File, secret: Path) -> None:
    size = len(file["X/data"])
    del file["X/data"]
    layout = h5py.VirtualLayout(shape=(size,), dtype="u1")
    layout[:] = h5py.VirtualSource(str(secret), "data", shape=(size,))
    file.create_virtual_dataset("X/data", layout)


def soft_link(file: h5py.File, secret: Path) -> None:
    file["uns/elsewhere"] = h5py.SoftLink("/obs")


@pytest.mark.parametrize("trick", [external_link, external_storage, virtual_dataset, soft_link])
def test_a_file_that_points_elsewhere_is_refused_before_a_value_is_read(
    trick: Callable[[h5py.File, Path], None], tmp_path: Path, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    counts, secret = counts_of(10), tmp_path / "secret.bin"
    with h5py.File(secret, "w") as file:
        file["data"] = np.full(counts.nnz, 77, dtype="u1")
    path = write_atlas("a.h5ad", counts)
    with h5py.File(path, "r+") as file:
        trick(file, secret)
    assert "such files are refused" in str(refusal(path, local_store))


def test_a_header_that_declares_gigabytes_is_refused(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    path = write_atlas("a.h5ad", counts_of(10))
    with h5py.File(path, "r+") as file:
        del file["X/data"], file["X/indices"]
        for name, dtype in (("data", "f4"), ("indices", "i4")):
            file["X"].create_dataset(name, (2**32,), dtype=dtype, chunks=(2**20,), compression="gzip")
        file["X/indptr"][-1] = 2**31 - 1
    assert path.stat().st_size < 1_000_000
    refusal(path, local_store)


def test_endless_nesting_is_refused(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    path = write_atlas("a.h5ad", counts_of(10))
    with h5py.File(path, "r+") as file:
        file["uns/loop"] = file["uns"]
        dense_of(path, local_store)  # a cycle alone is harmless, and must not hang the reader
        file.create_group("uns/" + "/".join("d" * 60))
    assert "deeper" in str(refusal(path, local_store))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"PK\x03\x04zarr", "the zip archive is damaged"),
        (b"gene,cell\n", "it is plain text"),
    ],
)
def test_files_that_are_no_hdf5(content: bytes, text: str, tmp_path: Path, local_store: Store) -> None:
    path = tmp_path / "a.h5ad"
    path.write_bytes(content)
    assert text in str(refusal(path, local_store))


def test_a_cut_file_says_how_much_is_missing(
    tmp_path: Path, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    whole = write_atlas("a.h5ad", counts_of(500)).read_bytes()
    path = tmp_path / "half.h5ad"
    path.write_bytes(whole[: len(whole) // 2])
    error = refusal(path, local_store)
    assert f"{len(whole) // 2:,} of {len(whole):,} bytes" in str(error)


def test_sparse_numbers_of_other_machines(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    counts = counts_of(50)
    for name, data, pointers in (("half", "f2", "i4"), ("big", ">i4", ">i8"), ("unsigned", "u8", "u8")):
        path = write_atlas(f"{name}.h5ad", counts)
        with h5py.File(path, "r+") as file:
            for part, dtype in (("data", data), ("indices", pointers), ("indptr", pointers)):
                put(f"X/{part}", lambda values, dtype=dtype: values.astype(dtype))(file)
        found, _ = dense_of(path, local_store)
        assert np.array_equal(found, counts.toarray()), name


def test_content_that_changed_since_planning_is_refused(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    path = write_atlas("a.h5ad", counts_of(10))
    etag = local_store.stat(str(path)).etag
    dense_of(path, local_store, etag=etag)
    write_atlas("a.h5ad", counts_of(11))
    assert "changed since it was planned" in str(refusal(path, local_store, etag=etag))


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("odd/broken/empty.h5ad", "atlas", "the file is empty (0 bytes). Download it again."),
        ("odd/broken/lognormalised_only_X.h5ad", "not_counts", "the largest value is 4.84: this looks log-transformed"),
        ("odd/broken/nan_in_X.h5ad", "not_counts", "X: 1.03 % of 31,912 sampled values are not finite numbers"),
        ("odd/broken/truncated_half.h5ad", "atlas", "the file is cut off: 624,785 of 1,249,570 bytes are there."),
        (
            "odd/cellxgene_schema/example_invalid_raw.h5ad",
            "not_counts",
            "this looks ambient-corrected, for example 1.5",
        ),
        ("odd/anndata_archives/v0.5.0/adata.h5ad", "not_counts", "X: 74 % of 535,433 sampled values are negative"),
        ("odd/anndata_archives/v0.7.0/adata.h5ad", "not_counts", "raw.X and X both look like counts but differ in"),
        ("odd/anndata_archives/v0.7.8/adata.h5ad", "not_counts", "--counts-slot raw.X or --counts-slot X"),
        ("odd/anndata_archives/v0.11.4/adata.h5ad", "not_counts", "there is no X, raw.X or layer"),
    ],
)
def test_real_odd_files_are_refused_with_what_was_seen(
    name: str, code: str, text: str, shared_data: Path, local_store: Store
) -> None:
    error = refusal(shared_data / name, local_store)
    assert error.code == code
    assert text in str(error)
    assert error.fix


def test_records_of_absurd_size_are_refused(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    path = write_atlas("a.h5ad", counts_of(10))
    with h5py.File(path, "r+") as file:
        del file["obs"]
        file.create_dataset("obs", (10,), dtype=[("index", "S8"), ("big", "S100000")], chunks=(1,), compression="gzip")
    assert "its records have 100,008 bytes each" in str(refusal(path, local_store))
