"""Loom files of both versions and of every layout read the same counts; damaged and hostile ones are refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse

from genescale.ingestion.atlas import Atlas
from genescale.ingestion.formats import loom
from genescale.ingestion.opening import open_atlas
from genescale.platform.errors import AtlasError, NotCountsError
from genescale.platform.storage import Store, join


def write_loom(
    path: Path,
    counts: Any,
    *,
    layers: Mapping[str, Any] | None = None,
    cells: Mapping[str, Any] | None = None,
    genes: Mapping[str, Any] | None = None,
    version: int = 3,
    **storage: Any,
) -> Path:
    """Write counts of cells × genes as loompy does: turned, in chunks of 64 × 64 unless `storage` says otherwise."""
    n_cells, n_genes = counts.shape
    storage = storage or {"chunks": (min(64, n_genes), min(64, n_cells)), "compression": "gzip"}
    cells = {"CellID": [f"cell{i}" for i in range(n_cells)]} if cells is None else cells
    genes = {"Accession": [f"ENSG{i:011d}" for i in range(n_genes)]} if genes is None else genes
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=np.asarray(counts.T), **storage)
        for name, layer in (layers or {}).items():
            file.create_dataset(f"layers/{name}", data=np.asarray(layer.T), **storage)
        for group, columns in (("col_attrs", cells), ("row_attrs", genes)):
            file.create_group(group)
            for name, values in columns.items():
                array = np.asarray(values)
                if array.dtype.kind == "U":
                    array = np.char.encode(array, "ascii") if version == 2 else array.astype(h5py.string_dtype())
                file[group][name] = array
        if version == 3:
            file["attrs/title"] = "a title"
        else:
            file.attrs["title"] = np.bytes_("a title")
    return path


@pytest.fixture
def counts(counts_of: Callable[..., sparse.csr_matrix]) -> np.ndarray:
    """Counts of 150 cells × 100 genes: several chunks both ways, the last ones not full."""
    return counts_of(150, n_genes=100).toarray()


def read_all(atlas: Atlas, step: int = 1_000_000) -> np.ndarray:
    """All rows of an atlas, `step` cells at a time."""
    parts = []
    for start in range(0, atlas.n_cells, step):
        stop = min(start + step, atlas.n_cells)
        rows = atlas.read(start, stop)
        assert (rows.values_z != 0).all()
        shape = (stop - start, atlas.n_genes)
        values = rows.values_z.astype(np.float64)
        parts.append(sparse.csr_matrix((values, rows.indices_z, rows.indptr_n), shape).toarray())
    return np.vstack(parts)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "storage",
    [{}, {"chunks": (7, 13)}, {"chunks": (100, 1)}, {"chunks": (1, 150), "compression": "gzip"}, {"chunks": None}],
    ids=["64x64", "7x13", "by cell", "by gene", "contiguous"],
)
@pytest.mark.parametrize("column_bytes", [loom.COLUMN_BYTES, 6_000])
def test_every_layout_reads_the_same_rows(
    version: int,
    storage: dict[str, Any],
    column_bytes: int,
    tmp_path: Path,
    local_store: Store,
    counts: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loom, "COLUMN_BYTES", column_bytes)
    monkeypatch.setattr(loom, "GENES_BYTES", column_bytes)
    path = write_loom(tmp_path / "a.loom", counts.astype(np.float32), version=version, **storage)
    with open_atlas(str(path), local_store) as atlas:
        assert (atlas.kind, atlas.slot, atlas.n_cells, atlas.n_genes) == ("loom", "X", 150, 100)
        assert np.array_equal(read_all(atlas), counts)
        assert np.array_equal(read_all(atlas, 17), counts)
        assert atlas.cell_ids(148, 150) == ["cell148", "cell149"]
        assert atlas.var.index(0, 1) == ["ENSG00000000000"]
        assert atlas.texts["title"] == "a title"


@pytest.mark.parametrize("dtype", ["u1", ">i4", ">f8", "<f2"])
def test_number_formats(dtype: str, tmp_path: Path, local_store: Store, counts: np.ndarray) -> None:
    path = write_loom(tmp_path / "a.loom", counts.astype(dtype))
    with open_atlas(str(path), local_store) as atlas:
        assert np.array_equal(read_all(atlas), counts)
        assert atlas.read(0, 1).values_z.dtype.isnative


@pytest.mark.shared
def test_the_shared_atlas_equals_what_h5py_reads(shared_data: Path, local_store: Store) -> None:
    path = shared_data / "atlases" / "pbmc_scenic.loom"
    with h5py.File(path) as file, open_atlas(str(path), local_store) as atlas:
        assert np.array_equal(read_all(atlas, 30), file["matrix"][:].T)
        assert atlas.cell_ids(0, 100) == [name.decode() for name in file["col_attrs/CellID"][:]]
        assert atlas.var.index() == [name.decode() for name in file["row_attrs/Gene"][:]]
        assert atlas.obs.typed("nUMI", 0, 3)[0].to_pylist() == file["col_attrs/nUMI"][:3].tolist()


def test_attributes_become_columns(tmp_path: Path, local_store: Store, counts: np.ndarray) -> None:
    ages = np.where(np.arange(150) == 1, np.nan, 30.0)
    kinds = ["nan", "T &#955; cell", "x" * 600] + ["B"] * 147
    cells = {"obs_names": np.arange(150), "age": ages, "kind": kinds, "umap": np.zeros((150, 2)), "short": [1, 2]}
    genes = {"Gene": [f"G{i}" for i in range(100)], "Accession": [f"ENSG{i:011d}" for i in range(100)]}
    path = write_loom(tmp_path / "a.loom", counts, cells=cells, genes=genes)
    with open_atlas(str(path), local_store) as atlas:
        assert atlas.cell_ids(0, 2) == ["0", "1"]
        assert atlas.obs.columns == ["age", "kind", "obs_names", "short"], "tables of several dimensions are left out"
        assert atlas.obs.column("age", 0, 3) == (["30", None, "30"], "")
        assert atlas.obs.typed("age", 0, 3)[0].type == pa.float64()
        values, note = atlas.obs.column("kind", 0, 4)
        assert values == [None, "T λ cell", None, "B"]
        assert note == "obs['kind']: 1 values longer than 500 left empty"
        values, note = atlas.obs.column("short")
        assert values == [None] * 150
        assert note.startswith("obs['short'] left empty:")
        assert atlas.var.index(0, 1) == ["ENSG00000000000"], "ids are better than symbols"
        assert atlas.var.column("Gene", 1, 2)[0] == ["G1"]


def test_cells_without_names_are_numbered_but_genes_need_names(
    tmp_path: Path, local_store: Store, counts: np.ndarray
) -> None:
    path = write_loom(tmp_path / "a.loom", counts, cells={"age": np.zeros(150)})
    with open_atlas(str(path), local_store) as atlas:
        assert atlas.cell_ids(149, 150) == ["149"]
    path = write_loom(tmp_path / "b.loom", counts, genes={"length": np.zeros(100)})
    with (
        pytest.raises(AtlasError, match=r"row_attrs names no genes: it has length\. Add one of Accession"),
        open_atlas(str(path), local_store),
    ):
        pass


def test_counts_are_found_in_a_layer(tmp_path: Path, local_store: Store, counts: np.ndarray) -> None:
    layers = {"counts": counts, "spliced": counts // 2}
    path = write_loom(tmp_path / "a.loom", np.log1p(counts), layers=layers)
    with open_atlas(str(path), local_store) as atlas:
        assert atlas.slot == "layers/counts"
        assert np.array_equal(read_all(atlas), counts)
        assert "not whole" in atlas.slots_seen["X"] or "fractional" in atlas.slots_seen["X"]
    with open_atlas(str(path), local_store, counts_slot="layers/spliced") as atlas:
        assert np.array_equal(read_all(atlas), counts // 2)
    path = write_loom(tmp_path / "b.loom", np.log1p(counts))
    with pytest.raises(NotCountsError, match="no raw counts found"), open_atlas(str(path), local_store):
        pass


def test_from_object_storage_through_a_copy_that_is_removed(
    s3_store: tuple[Store, str], tmp_path: Path, counts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bucket = s3_store
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    uri = join(bucket, "a.loom")
    store.upload(write_loom(tmp_path / "a.loom", counts), uri)
    with open_atlas(uri, store) as atlas:
        assert atlas.matrix.sequential, "one task must read it all, for each would download it"
        assert np.array_equal(read_all(atlas), counts)
        assert len(os.listdir(tmp_path / "scratch")) == 1
    assert os.listdir(tmp_path / "scratch") == []
    with pytest.raises(ZeroDivisionError), open_atlas(uri, store):
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "scratch") == []


def damaged(path: Path, change: Callable[[h5py.File], None]) -> str:
    """Change a loom file in place."""
    with h5py.File(path, "r+") as file:
        change(file)
    return str(path)


def _put(name: str, **arguments: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **arguments)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_put("matrix", data=np.ones(5)), "a loom file without a matrix of genes × cells"),
        (_put("matrix", shape=(100, 150), chunks=(64, 64), dtype="i4"), "were never written"),
        (_put("matrix", shape=(100, 10**12), chunks=(64, 64), dtype="i4"), "more than an atlas has|never written|decl"),
        (_put("matrix", data=np.zeros((0, 0))), "empty|no atlas"),
        (_put("matrix", data=np.full((100, 150), b"x")), "holds values of type"),
        (_put("col_attrs", data=np.ones(3)), "a loom file without col_attrs"),
        (_put("row_attrs/Accession", data=np.array([b"a", b"b"])), "var has 2 rows but the matrix has 100"),
        (_put("col_attrs/CellID", data=np.array([b"a"])), "obs has 1 rows but the matrix has 150"),
    ],
)
def test_damaged_files_are_refused(
    change: Callable[[h5py.File], None], message: str, tmp_path: Path, local_store: Store, counts: np.ndarray
) -> None:
    uri = damaged(write_loom(tmp_path / "a.loom", counts), change)
    with pytest.raises(AtlasError, match=message) as caught, open_atlas(uri, local_store) as atlas:
        read_all(atlas)
    assert caught.value.where.startswith(uri)
    assert caught.value.fix


def test_links_out_of_the_file_are_refused(tmp_path: Path, local_store: Store, counts: np.ndarray) -> None:
    other = write_loom(tmp_path / "other.loom", counts)

    def change(file: h5py.File) -> None:
        del file["matrix"]
        file["matrix"] = h5py.ExternalLink(str(other), "/matrix")

    uri = damaged(write_loom(tmp_path / "a.loom", counts), change)
    with pytest.raises(AtlasError, match="link that may lead out of the file"), open_atlas(uri, local_store):
        pass
