"""Reading h5ad: every layout and compression, bounded reads from object storage, real files, files of every era."""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy import sparse

from genescale.ingestion.counts import checked
from genescale.ingestion.formats.direct_chunks import dataset_ranges
from genescale.ingestion.formats.obsm import write_obsm
from genescale.ingestion.opening import open_atlas
from genescale.platform.errors import AtlasError, InputError
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


LAYOUTS: dict[str, Callable[[sparse.csr_matrix], Any]] = {
    "csr": lambda m: m,
    "csc": sparse.csc_matrix,
    "dense": lambda m: m.toarray(),
    "dense by columns": lambda m: np.asfortranarray(m.toarray()),
    "dense integers": lambda m: m.toarray().astype("i8"),
    "dense float16": lambda m: m.toarray().astype("f2"),
    "dense big-endian": lambda m: m.toarray().astype(">f4"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_gives_the_matrix_that_was_written(
    layout: Callable[[sparse.csr_matrix], Any], write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    counts = counts_of(120)
    path = write_atlas("a.h5ad", layout(counts))
    with open_atlas(str(path), local_store) as atlas:
        assert atlas.matrix.sequential == (atlas.matrix.layout == "csc")
        for start, stop in ((0, 120), (0, 1), (33, 90), (119, 120), (5, 5)):
            block = checked(atlas, start, stop)
            rows = sparse.csr_matrix((block.counts, block.indices, block.indptr), shape=(stop - start, 60))
            assert np.array_equal(rows.toarray(), counts[start:stop].toarray())
        assert len(atlas.matrix.stored_before) == 121
        assert any("needs" in note and "scratch" in note for note in atlas.notes) == atlas.matrix.sequential


FILTERS: dict[str, dict[str, Any]] = {
    "none": {"chunks": (100,)},
    "gzip": {"chunks": (100,), "compression": "gzip"},
    "gzip and shuffle": {"chunks": (100,), "compression": "gzip", "shuffle": True},
    "shuffle": {"chunks": (100,), "shuffle": True},
    "one chunk": {"chunks": (100_000,), "maxshape": (None,), "compression": "gzip"},
    "contiguous": {},
    "lzf": {"chunks": (100,), "compression": "lzf"},
    "checksum": {"chunks": (100,), "compression": "gzip", "fletcher32": True},
    "zstd": {"chunks": (100,), "compression": 32015},
}


def recompressed(path: Path, options: dict[str, Any]) -> None:
    import hdf5plugin  # noqa: F401

    with h5py.File(path, "r+") as file:
        for part in ("data", "indices"):
            values = file[f"X/{part}"][...]
            del file[f"X/{part}"]
            file.create_dataset(f"X/{part}", data=values, **options)


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS.keys())
@pytest.mark.parametrize("dtype", ["float32", "uint16", "int64"])
def test_every_compression_gives_the_same_numbers(
    options: dict[str, Any], dtype: str, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    counts = counts_of(70).astype(dtype)
    path = write_atlas("a.h5ad", counts)
    recompressed(path, options)
    with open_atlas(str(path), local_store) as atlas:
        pieces = [atlas.read(start, min(start + 9, 70)) for start in range(0, 70, 9)]
        assert np.array_equal(np.concatenate([rows.values_z for rows in pieces]), counts.data)
        assert np.array_equal(np.concatenate([rows.indices_z for rows in pieces]), counts.indices)
        again = atlas.read(20, 50)
        assert np.array_equal(again.values_z, counts[20:50].data)
        assert sum(atlas.matrix.seconds.values()) > 0


def test_threads_give_the_same_numbers(write_atlas: Any, counts_of: Any) -> None:
    counts = counts_of(2_000)
    path = write_atlas("a.h5ad", counts)
    recompressed(path, {"chunks": (64,), "compression": "gzip"})
    with h5py.File(path) as file:
        for threads in (1, 2, 3):
            ranges = dataset_ranges(file["X/data"], "here", remote=False, threads=threads)
            assert np.array_equal(ranges.read(7, counts.nnz - 5), counts.data[7:-5])


def test_a_filter_that_is_not_installed_is_named(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    path = write_atlas("a.h5ad", counts_of(30))
    with h5py.File(path, "r+") as file:
        size = len(file["X/data"])
        del file["X/data"]
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((size,))
        plan.set_filter(33_000, h5py.h5z.FLAG_OPTIONAL, ())
        h5py.h5d.create(file["X"].id, b"data", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((size,)), dcpl=plan)
        file["X/data"][:] = 1
    error = refusal(path, local_store)
    assert "HDF5 filter 33000" in str(error)
    assert "hdf5plugin" in error.fix


def flipped(path: Path, name: str, chunk: int) -> None:
    """Turn one bit inside a stored chunk."""
    with h5py.File(path) as file:
        info = file[name].id.get_chunk_info(chunk)
    content = bytearray(path.read_bytes())
    content[info.byte_offset + info.size // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["data", "indices"])
@pytest.mark.parametrize("options", ["gzip", "gzip and shuffle"])
def test_a_flipped_bit_names_dataset_and_chunk(
    part: str, options: str, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    path = write_atlas("a.h5ad", counts_of(200))
    recompressed(path, FILTERS[options])
    flipped(path, f"X/{part}", 3)
    error = refusal(path, local_store, counts_slot="X")
    assert f"X/{part}" in str(error)
    assert "chunk 3 is damaged" in str(error)


def test_reading_a_range_holds_that_range_only(tmp_path: Path, local_store: Store) -> None:
    import anndata

    counts = sparse.random(40_000, 1_000, density=0.1, format="csr", dtype=np.float32, random_state=0)
    counts.data[:] = np.random.default_rng(0).integers(1, 60_000, counts.nnz)
    path = tmp_path / "a.h5ad"
    anndata.AnnData(counts).write_h5ad(path, compression="gzip")
    with open_atlas(str(path), local_store, counts_slot="X") as atlas:
        atlas.read(0, 100)
        tracemalloc.start()
        try:
            for start in range(0, 40_000, 1_000):
                rows = atlas.read(start, start + 1_000)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    range_bytes = rows.values_z.nbytes + rows.indices_z.nbytes
    assert peak_bytes < 4 * range_bytes < counts.data.nbytes / 4


class CountedStore(Store):
    """A Store that counts what it asks of object storage."""

    def count(self) -> list[str]:
        asked: list[str] = []
        client = self._connection.client
        fetch = client.get_object

        def counted(**request: Any) -> Any:
            asked.append(str(request.get("Range")))
            return fetch(**request)

        client.get_object = counted
        return asked


def test_a_unit_is_read_from_object_storage_in_few_requests(tmp_path: Path, s3_store: tuple[Store, str]) -> None:
    import anndata

    plain, bucket = s3_store
    counts = sparse.random(20_000, 2_000, density=0.1, format="csr", dtype=np.float32, random_state=0)
    counts.data[:] = np.random.default_rng(0).integers(1, 60_000, counts.nnz)
    path = tmp_path / "a.h5ad"
    anndata.AnnData(counts).write_h5ad(path, compression="gzip")
    store = CountedStore(plain.settings)
    uri = store.upload(path, f"{bucket}/a.h5ad").uri
    asked = store.count()
    with open_atlas(uri, store, counts_slot="X") as atlas:
        pieces = [atlas.read(start, start + 1_000) for start in range(5_000, 15_000, 1_000)]
    assert np.array_equal(np.concatenate([rows.values_z for rows in pieces]), counts[5_000:15_000].data)
    with h5py.File(path) as file:
        chunks = file["X/data"].id.get_num_chunks()
    blocks = -(-path.stat().st_size // (8 * 1024 * 1024))
    assert chunks > 100
    assert len(asked) <= 2 * blocks + 4, asked


def test_a_chunk_that_was_never_written_is_found_in_object_storage(
    write_atlas: Any, counts_of: Any, s3_store: tuple[Store, str]
) -> None:
    store, bucket = s3_store
    path = write_atlas("a.h5ad", counts_of(100))
    with h5py.File(path, "r+") as file:
        values = file["X/data"][...]
        del file["X/data"]
        part = file.create_dataset("X/data", values.shape, dtype="f4", chunks=(100,), compression="gzip")
        part[:2_000] = values[:2_000]
    uri = store.upload(path, f"{bucket}/a.h5ad").uri
    with open_atlas(uri, store, counts_slot="X") as atlas:
        checked(atlas, 0, 50)
        with pytest.raises(AtlasError, match=r"X/data: chunk 20 was never written.*interrupted"):
            checked(atlas, 0, 100)


READABLE = {
    "atlases/kang_harmony_ctrl_stim_counts_symbols.h5ad": "X",
    "atlases/pbmc3k_lognorm_X_counts_in_raw.h5ad": "raw.X",
    "atlases/pbmc_facs_test_counts_ensembl.h5ad": "X",
    "odd/broken/counts_in_layer.h5ad": "layers/counts",
    "odd/broken/csc_X.h5ad": "X",
    "odd/broken/dense_float64_X.h5ad": "X",
    "odd/broken/zero_count_cells.h5ad": "X",
    "odd/cellxgene_schema/example_valid_HEAD.h5ad": "raw.X",
    "odd/cellxgene_schema/example_with_labels_1.1MB.h5ad": "X",
    "odd/anndata_archives/v0.7.0/adata.h5ad": "raw.X",
    "odd/anndata_archives/v0.7.8/adata.h5ad": "layers/sparse",
}


@pytest.mark.shared
@pytest.mark.parametrize("name", READABLE)
def test_real_files_equal_what_anndata_reads(name: str, shared_data: Path, local_store: Store) -> None:
    import anndata

    path, slot = shared_data / name, READABLE[name]
    # Two places of the archive files hold different whole numbers, so that one must be named.
    named = {"counts_slot": slot} if "archives" in name else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = anndata.read_h5ad(path)
    expected = {
        "X": data.X,
        "raw.X": data.raw.X if data.raw else None,
        **{f"layers/{k}": v for k, v in data.layers.items()},
    }
    with open_atlas(str(path), local_store, **named) as atlas:
        rows = atlas.read(0, atlas.n_cells)
        assert atlas.slot == slot
        assert atlas.cell_ids(0, atlas.n_cells) == data.obs_names.tolist()
        assert atlas.var.index() == (data.raw if slot == "raw.X" else data).var_names.tolist()
        for column in atlas.obs.columns:
            values, note = atlas.obs.column(column)
            assert not note
            assert values == [shown(value) for value in data.obs[column]]
    found = sparse.csr_matrix((rows.values_z, rows.indices_z, rows.indptr_n), shape=(atlas.n_cells, atlas.n_genes))
    assert np.array_equal(found.toarray(), sparse.csr_matrix(expected[slot]).toarray())


def shown(value: Any) -> str | None:
    """A value of a pandas column as our tables give it."""
    if value is None or value != value or value in ("nan", "NaN"):
        return None
    return str(int(value)) if isinstance(value, float | np.floating) and float(value).is_integer() else str(value)


def test_files_of_anndata_0_5_are_read(write_atlas: Any, counts_of: Any, local_store: Store, tmp_path: Path) -> None:
    """Tables as records, categories in `uns`, `raw.X` beside X, and sparse matrices marked by `h5sparse_format`."""
    counts = counts_of(5)
    path = tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        for name in ("X", "raw.X"):
            group = file.create_group(name)
            group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", counts.shape
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(counts, part)
        file["X/data"][...] = np.log1p(counts.data) + 0.1
        obs = np.array(
            [(f"cell{i}".encode(), i % 2, i / 2) for i in range(5)], dtype=[("index", "S8"), ("ct", "i1"), ("q", "f4")]
        )
        file["obs"] = obs
        file["uns/ct_categories"] = np.array([b"B cell", b"T cell"])
        file["var"] = file["raw.var"] = np.array(
            [(f"ENSG{i:011d}".encode(),) for i in range(1, 61)], dtype=[("index", "S15")]
        )
    with open_atlas(str(path), local_store) as atlas:
        assert atlas.slot == "raw.X"
        assert np.array_equal(checked(atlas, 0, 5).counts, counts.data)
        assert atlas.obs.columns == ["ct", "q"]
        assert atlas.obs.column("ct", 1, 4) == (["T cell", "B cell", "T cell"], "")
        assert atlas.obs.typed("q")[0].to_pylist() == [0.0, 0.5, 1.0, 1.5, 2.0]
        assert atlas.var.index(0, 2) == ["ENSG00000000001", "ENSG00000000002"]
        assert atlas.cell_ids(3, 5) == ["cell3", "cell4"]


def test_counts_are_read_from_object_storage(write_atlas: Any, counts_of: Any, s3_store: tuple[Store, str]) -> None:
    store, bucket = s3_store
    counts = counts_of(30)
    uri = store.upload(write_atlas("a.h5ad", counts), f"{bucket}/a.h5ad").uri
    with open_atlas(uri, store) as atlas:
        block = checked(atlas, 10, 30)
    assert block.counts.sum() == counts[10:].sum()


def test_embeddings_are_written_beside_the_cells(
    tmp_path: Path, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    import anndata

    path = write_atlas("a.h5ad", counts_of(10), obs={"cell_type": ["T"] * 10})
    before = path.read_bytes()
    matrix = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    out = write_obsm(str(path), tmp_path / "out" / "b.h5ad", "X_genescale", matrix, local_store)
    again = write_obsm(str(out), tmp_path / "out" / "c.h5ad", "X_genescale", matrix * 2, local_store)
    for file, expected in ((out, matrix), (again, matrix * 2)):
        data = anndata.read_h5ad(file)
        assert np.array_equal(data.obsm["X_genescale"], expected)
        assert abs(data.X - counts_of(10)).nnz == 0
        assert data.obs["cell_type"].tolist() == ["T"] * 10
    assert path.read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["b.h5ad", "c.h5ad"]
    with pytest.raises(InputError, match="9 rows for 10 cells"):
        write_obsm(str(path), tmp_path / "d.h5ad", "X_genescale", matrix[:9], local_store)
    with pytest.raises(InputError, match="cannot name"):
        write_obsm(str(path), tmp_path / "d.h5ad", "../X", matrix, local_store)
    assert not (tmp_path / "d.h5ad").exists()
