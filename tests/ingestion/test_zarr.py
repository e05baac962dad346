"""Atlases in zarr: formats 2 and 3, sharded or not, folders and zip archives, local and in object storage."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import zarr
from scipy import sparse

from genescale.ingestion.counts import checked
from genescale.ingestion.opening import open_atlas
from genescale.platform.errors import AtlasError
from genescale.platform.storage import Store

N_CELLS = 80
Writer = Callable[..., Path]
LAYOUTS: dict[str, Callable[[sparse.csr_matrix], Any]] = {
    "csr": lambda m: m,
    "csc": sparse.csc_matrix,
    "dense": lambda m: m.toarray(),
}


@pytest.fixture
def write_zarr(tmp_path: Path, counts_of: Any) -> Writer:
    """Write the counts of 80 cells in a zarr format; returns the folder."""

    def write(name: str = "a.zarr", zarr_format: int = 3, layout: str = "csr") -> Path:
        import anndata

        obs = pandas.DataFrame(
            {"tissue": pandas.Categorical(["lung", "liver"] * (N_CELLS // 2)), "age": np.arange(N_CELLS)},
            index=[f"cell{i}" for i in range(N_CELLS)],
        )
        var = pandas.DataFrame(index=[f"ENSG{i:011d}" for i in range(1, 61)])
        data = anndata.AnnData(LAYOUTS[layout](counts_of(N_CELLS)), obs=obs, var=var, uns={"title": "A title"})
        with anndata.settings.override(zarr_write_format=zarr_format), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data.write_zarr(tmp_path / name, chunks=(16, 20) if layout == "dense" else None)
        return tmp_path / name

    return write


def rewritten(folder: Path, part: str, **options: Any) -> None:
    """Write one array of a format 3 hierarchy again, with other chunks, shards or codecs."""
    group = zarr.open_group(folder, mode="r+", use_consolidated=False)
    old = group[part]
    values, attributes = old[...], dict(old.attrs)
    del group[part]
    new = group.create_array(part, shape=values.shape, dtype=values.dtype, **options)
    new[...] = values
    new.attrs.update(attributes)
    unconsolidated(folder)


def unconsolidated(folder: Path) -> None:
    (folder / ".zmetadata").unlink(missing_ok=True)
    if (root := folder / "zarr.json").exists():
        root.write_text(json.dumps({k: v for k, v in json.loads(root.read_text()).items() if "consol" not in k}))


def zipped(folder: Path, to: Path, *, inside: str = "", compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(to, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, inside + file.relative_to(folder).as_posix())
    return to


def assert_whole(uri: str, store: Store, counts: sparse.csr_matrix, layout: str = "csr") -> None:
    with open_atlas(uri, store) as atlas:
        assert (atlas.kind, atlas.slot, atlas.matrix.layout) == ("zarr", "X", layout)
        for start, stop in ((0, N_CELLS), (3, 4), (10, 57), (57, 80)):
            block = checked(atlas, start, stop)
            found = sparse.csr_matrix((block.counts, block.indices, block.indptr), shape=(stop - start, 60))
            assert np.array_equal(found.toarray(), counts[start:stop].toarray())
        assert atlas.cell_ids(2, 4) == ["cell2", "cell3"]
        assert atlas.var.index(0, 1) == ["ENSG00000000001"]
        assert atlas.obs.columns == ["age", "tissue"] or sorted(atlas.obs.columns) == ["age", "tissue"]
        assert atlas.obs.column("tissue", 1, 4) == (["liver", "lung", "liver"], "")
        assert atlas.obs.typed("age", 1, 3)[0].to_pylist() == [1, 2]
        assert atlas.texts["title"] == "A title"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("consolidated", [True, False])
def test_folders_of_both_formats(
    zarr_format: int, consolidated: bool, layout: str, write_zarr: Writer, counts_of: Any, local_store: Store
) -> None:
    folder = write_zarr(zarr_format=zarr_format, layout=layout)
    if not consolidated:
        unconsolidated(folder)
    assert_whole(str(folder), local_store, counts_of(N_CELLS), layout)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(("inside", "compression"), [("", zipfile.ZIP_STORED), ("a.zarr/", zipfile.ZIP_DEFLATED)])
def test_zip_archives(
    zarr_format: int,
    inside: str,
    compression: int,
    tmp_path: Path,
    write_zarr: Writer,
    counts_of: Any,
    local_store: Store,
) -> None:
    folder = write_zarr(zarr_format=zarr_format)
    archive = zipped(folder, tmp_path / "a.zarr.zip", inside=inside, compression=compression)
    assert_whole(str(archive), local_store, counts_of(N_CELLS))


CODECS: dict[str, dict[str, Any]] = {
    "small chunks": {"chunks": (50,)},
    "sharded": {"chunks": (50,), "shards": (200,)},
    "sharded with gzip": {"chunks": (50,), "shards": (200,), "compressors": zarr.codecs.GzipCodec()},
    "blosc": {"chunks": (70,), "compressors": zarr.codecs.BloscCodec(cname="lz4")},
    "none": {"chunks": (70,), "compressors": None},
}


@pytest.mark.parametrize("options", CODECS.values(), ids=CODECS.keys())
def test_chunks_shards_and_codecs(
    options: dict[str, Any], write_zarr: Writer, counts_of: Any, local_store: Store
) -> None:
    folder = write_zarr()
    rewritten(folder, "X/data", **options)
    rewritten(folder, "X/indices", **options)
    assert_whole(str(folder), local_store, counts_of(N_CELLS))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_object_storage(
    zarr_format: int, tmp_path: Path, write_zarr: Writer, counts_of: Any, s3_store: tuple[Store, str]
) -> None:
    store, bucket = s3_store
    folder = write_zarr(zarr_format=zarr_format)
    store.upload_folder(folder, f"{bucket}/a.zarr")
    assert_whole(f"{bucket}/a.zarr", store, counts_of(N_CELLS))
    unconsolidated(folder)
    store.upload_folder(folder, f"{bucket}/b.zarr")
    assert_whole(f"{bucket}/b.zarr", store, counts_of(N_CELLS))
    archive = zipped(folder, tmp_path / "a.zarr.zip")
    assert_whole(store.upload(archive, f"{bucket}/a.zarr.zip").uri, store, counts_of(N_CELLS))


def test_shards_in_object_storage_are_read_by_range(
    write_zarr: Writer, counts_of: Any, s3_store: tuple[Store, str]
) -> None:
    store, bucket = s3_store
    folder = write_zarr()
    for part in ("X/data", "X/indices"):
        rewritten(folder, part, chunks=(50,), shards=(100_000,))
    store.upload_folder(folder, f"{bucket}/a.zarr")
    assert_whole(f"{bucket}/a.zarr", store, counts_of(N_CELLS))


def refused(source: Path, store: Store, **options: Any) -> str:
    with pytest.raises(AtlasError) as caught, open_atlas(str(source), store, **options) as atlas:
        checked(atlas, 0, atlas.n_cells)
    assert str(source) in str(caught.value)
    assert caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize("part", ["X/data", "X/indices", "X/indptr"])
@pytest.mark.parametrize("shards", [None, (200,)])
def test_a_chunk_that_was_never_written_is_an_error(
    part: str, shards: tuple[int] | None, write_zarr: Writer, local_store: Store
) -> None:
    folder = write_zarr()
    rewritten(folder, part, chunks=(20,), shards=shards)
    (folder / part / "c" / "0").unlink()
    text = refused(folder, local_store, counts_slot="X")
    assert f"{part}: chunk {part}/c/0 was never written." in text
    assert "interrupted" in text


def test_a_hole_inside_a_shard_is_an_error(write_zarr: Writer, local_store: Store) -> None:
    folder = write_zarr()
    group = zarr.open_group(folder, mode="r+", use_consolidated=False)
    values = group["X/data"][...]
    rewritten(folder, "X/data", chunks=(50,), shards=(200,))
    zarr.open_group(folder, mode="r+")["X/data"][50:100] = 0
    assert values[50:100].all()
    assert "X/data: chunk 1 was never written, or holds only zeros" in refused(folder, local_store, counts_slot="X")


def test_cells_of_a_dense_matrix_that_were_never_written(
    write_zarr: Writer, counts_of: Any, local_store: Store
) -> None:
    folder = write_zarr(layout="dense")
    (folder / "X/c/2/1").unlink()
    with open_atlas(str(folder), local_store, counts_slot="X") as atlas:
        counts = counts_of(N_CELLS).toarray()
        counts[32:48, 20:40] = 0
        assert checked(atlas, 0, N_CELLS).counts.sum() == counts.sum(), "writers leave out chunks of zeros"
    for file in (folder / "X/c/2").iterdir():
        file.unlink()
    assert "no chunk of cells 32 … 47 was ever written" in refused(folder, local_store, counts_slot="X")


def test_damaged_chunks_name_the_array(write_zarr: Writer, local_store: Store) -> None:
    folder = write_zarr()
    rewritten(folder, "X/data", chunks=(5_000,), compressors=zarr.codecs.GzipCodec())
    chunk = folder / "X/data/c/0"
    chunk.write_bytes(chunk.read_bytes()[:-20])
    assert "X/data: it cannot be decoded" in refused(folder, local_store, counts_slot="X")


def test_damaged_metadata(write_zarr: Writer, local_store: Store) -> None:
    folder = write_zarr()
    (folder / "zarr.json").write_text("{not json")
    assert "its metadata cannot be read" in refused(folder, local_store)


@pytest.mark.parametrize("part", ["obs/_index", "X/data"])
def test_pickles_are_never_opened(part: str, tmp_path: Path, write_zarr: Writer, local_store: Store) -> None:
    folder, proof = write_zarr(zarr_format=2), tmp_path / "opened"
    unconsolidated(folder)
    described = json.loads((folder / part / ".zarray").read_text())
    described["filters"] = [{"id": "pickle", "protocol": 5}]
    described["compressor"] = None
    (folder / part / ".zarray").write_text(json.dumps(described))
    (folder / part / "0").write_bytes(f"cos\nsystem\n(S'touch {proof}'\ntR.".encode())
    assert "pickle" in refused(folder, local_store, counts_slot="X")
    assert not proof.exists()


def test_hostile_sizes(write_zarr: Writer, local_store: Store) -> None:
    folder = write_zarr()
    unconsolidated(folder)
    described = json.loads((folder / "X/data/zarr.json").read_text())
    described["chunk_grid"]["configuration"]["chunk_shape"] = [2**40]
    (folder / "X/data/zarr.json").write_text(json.dumps(described))
    assert "chunks of more than 268,435,456 bytes" in refused(folder, local_store, counts_slot="X")
    folder = write_zarr("b.zarr")
    unconsolidated(folder)
    described = json.loads((folder / "X/zarr.json").read_text())
    described["attributes"]["shape"] = [2**31, 60]
    (folder / "X/zarr.json").write_text(json.dumps(described))
    assert "more than an atlas has" in refused(folder, local_store, counts_slot="X")


def test_a_bomb_in_a_zip(tmp_path: Path, write_zarr: Writer, local_store: Store) -> None:
    folder = write_zarr()
    (folder / "X/indptr/c/0").write_bytes(bytes(300 * 2**20))
    archive = zipped(folder, tmp_path / "a.zarr.zip", compression=zipfile.ZIP_BZIP2)
    assert "'X/indptr/c/0' declares 314,572,800 bytes" in refused(archive, local_store, counts_slot="X")


def test_a_newer_encoding_is_named(write_zarr: Writer, local_store: Store) -> None:
    folder = write_zarr()
    zarr.open_group(folder, mode="r+", use_consolidated=False)["X"].attrs["encoding-version"] = "9.9.9"
    unconsolidated(folder)
    assert "it uses encoding csr_matrix 9.9.9; this release reads csr_matrix up to 0.1.0" in refused(
        folder, local_store
    )


def test_a_folder_without_tables(write_zarr: Writer, local_store: Store) -> None:
    folder = write_zarr()
    shutil.rmtree(folder / "obs")
    unconsolidated(folder)
    assert "no obs and var tables" in refused(folder, local_store)


@pytest.mark.shared
@pytest.mark.parametrize(("era", "slot"), [("v0.7.0", "raw.X"), ("v0.7.8", "layers/sparse"), ("v0.7.8", "X")])
def test_archives_of_each_era_equal_the_h5ad_beside_them(
    era: str, slot: str, shared_data: Path, local_store: Store
) -> None:
    folder = shared_data / "odd/anndata_archives" / era
    read = {}
    for name in ("adata.zarr.zip", "adata.h5ad"):
        with open_atlas(str(folder / name), local_store, counts_slot=slot) as atlas:
            rows = atlas.read(0, atlas.n_cells)
            obs = {column: atlas.obs.column(column) for column in atlas.obs.columns}
            read[name] = (
                rows.indptr_n.tolist(),
                rows.indices_z.tolist(),
                rows.values_z.tolist(),
                obs,
                atlas.var.index(),
            )
    assert read["adata.zarr.zip"] == read["adata.h5ad"]
    assert read["adata.h5ad"][3]


@pytest.mark.shared
def test_public_zarr_archives(shared_data: Path, local_store: Store) -> None:
    with open_atlas(str(shared_data / "atlases/10x_pbmc68k_reduced.zarr.zip"), local_store) as atlas:
        assert (atlas.slot, atlas.n_cells, atlas.n_genes) == ("layers/counts", 700, 765)
        assert "X: 74 % of" in atlas.slot_reason
        assert checked(atlas, 0, 700).counts.max() == 259
        assert set(atlas.obs.column("bulk_labels", 0, 5)[0]) <= {
            "CD14+ Monocyte",
            "Dendritic",
            "CD56+ NK",
            "CD4+/CD25 T Reg",
        }
    text = refused(shared_data / "odd/anndata_archives/v0.11.4/adata.zarr.zip", local_store)
    assert "there is no X, raw.X or layer" in text
