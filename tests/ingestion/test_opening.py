"""What a file is, is told by its content: every kind opens under any name, everything else is refused by name."""

from __future__ import annotations

import gzip
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from genescale.ingestion.opening import open_atlas, stat_source
from genescale.platform.errors import AtlasError, NotFoundError
from genescale.platform.storage import Store, join

SIGNATURE = b"\x89HDF\r\n\x1a\n"


def opened(uri: Any, store: Store, **options: Any) -> tuple[str, str, int]:
    """Kind, slot and number of cells of an atlas."""
    with open_atlas(str(uri), store, **options) as atlas:
        assert atlas.read(0, atlas.n_cells).values_z.size > 0
        return atlas.kind, atlas.slot, atlas.n_cells


def write_zarr(h5ad: Path, to: Path) -> None:
    """The same atlas as a zarr folder."""
    with anndata.settings.override(zarr_write_format=2), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        anndata.read_h5ad(h5ad).write_zarr(to)


def test_anndata_in_each_of_its_stores(
    tmp_path: Path, local_store: Store, write_atlas: Callable[..., Path], counts_of: Callable[..., Any]
) -> None:
    path = write_atlas("a.h5ad", counts_of(9))
    write_zarr(path, tmp_path / "a.zarr")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted((tmp_path / "a.zarr").rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(tmp_path / "a.zarr"))
    path.rename(tmp_path / "no_ending")
    assert opened(tmp_path / "no_ending", local_store) == ("h5ad", "X", 9)
    assert opened(tmp_path / "a.zarr", local_store) == ("zarr", "X", 9)
    assert opened(tmp_path / "a.zip", local_store) == ("zarr", "X", 9)


def test_a_zarr_folder_in_object_storage(
    s3_store: tuple[Store, str], tmp_path: Path, write_atlas: Callable[..., Path], counts_of: Callable[..., Any]
) -> None:
    store, bucket = s3_store
    write_zarr(write_atlas("a.h5ad", counts_of(9)), tmp_path / "a.zarr")
    uri = join(bucket, "lab/a.zarr")
    uploaded = store.upload_folder(tmp_path / "a.zarr", uri)
    entry = stat_source(f"{uri}/", store)
    assert entry.uri == uri
    assert entry.size_bytes == sum(file.size_bytes for file in uploaded)
    assert opened(uri, store, etag=entry.etag) == ("zarr", "X", 9)
    store.write(join(uri, "obs/more"), b"x")
    with pytest.raises(AtlasError, match=r"the file changed since it was planned\. Run the command again"):
        opened(uri, store, etag=entry.etag)


def test_a_file_that_changed_since_it_was_planned_is_refused(
    local_store: Store, write_atlas: Callable[..., Path], counts_of: Callable[..., Any]
) -> None:
    path = write_atlas("a.h5ad", counts_of(9))
    entry = stat_source(str(path), local_store)
    assert opened(path, local_store, etag=entry.etag) == ("h5ad", "X", 9)
    write_atlas("a.h5ad", counts_of(10))
    with pytest.raises(AtlasError, match="changed since it was planned") as caught:
        opened(path, local_store, etag=entry.etag)
    assert caught.value.where == str(path)


def _parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"a": [1]}), path)


def _feather(path: Path) -> None:
    pyarrow.feather.write_feather(pa.table({"a": [1]}), path)


def _tar(path: Path) -> None:
    member = path.with_suffix(".txt")
    member.write_text("text")
    with tarfile.open(path, "w") as archive:
        archive.add(member, "inside.h5ad")


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("atlas.h5ad", SIGNATURE)


def _half_zip(path: Path) -> None:
    _zip(path)
    path.write_bytes(path.read_bytes()[:30])


def _hdf5(*groups: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for group in groups:
                file.create_group(group)

    return write


def _numpy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def _bytes(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


IMPOSTORS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "nothing": (_bytes(b""), "the file is empty (0 bytes)", "Download it again"),
    "lfs": (_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "Git LFS pointer", "git lfs pull"),
    "html": (_bytes(b"\n<!DOCTYPE html><html>404"), "an HTML or XML page", "Download"),
    "xml": (_bytes(b"<?xml version='1.0'?><Error><Code>AccessDenied"), "an HTML or XML page", "Download"),
    "gzip of h5ad": (_bytes(gzip.compress(SIGNATURE + b"0" * 99)), "HDF5 file, compressed with gzip", "gunzip"),
    "gzip of text": (_bytes(gzip.compress(b"gene,a,b\nX,1,2\n")), "plain text, compressed with gzip", "gunzip"),
    "gzip of rds": (_bytes(gzip.compress(b"X\n\x00\x00\x00\x03\x00\x04")), "an R object", "writeH5AD"),
    "cut gzip": (_bytes(b"\x1f\x8b\x08\x00"), "compressed with gzip", "gunzip"),
    "rdata": (_bytes(b"RDX3\nX\n"), "an R object", "writeH5AD"),
    "parquet": (_parquet, "a Parquet file", "count matrix"),
    "feather": (_feather, "an Arrow (Feather) file", "h5ad"),
    "tar": (_tar, "a tar archive", "Unpack"),
    "zip": (_zip, "a zip archive without zarr data", "Unpack"),
    "half a zip": (_half_zip, "the zip archive is damaged or cut off", "Download"),
    "pickle": (_bytes(pickle.dumps({"a": 1})), "a Python pickle, which is never opened", "h5ad"),
    "numpy": (_numpy, "a NumPy array", "h5ad"),
    "bzip2": (_bytes(b"BZh91AY&SY"), "compressed with bzip2", "Decompress"),
    "json": (_bytes(b'{"message": "Not Found"}'), "JSON text", "list of sources ends in .toml"),
    "text": (_bytes(b"gene\tcell1\nENSG1\t5\n"), "plain text", "convert it to h5ad"),
    "noise": (_bytes(bytes(range(7, 200))), "of an unknown kind (it begins with 07 08 09", "h5ad"),
    "mudata": (_hdf5("mod", "obsmap"), "MuData", "rna"),
    "seurat": (_hdf5("assays", "meta.data"), "h5Seurat", "SeuratDisk"),
    "molecule info": (_hdf5("barcode_idx", "barcodes"), "molecule info", "filtered_feature_bc_matrix.h5"),
    "model": (_hdf5("model_weights"), "it holds model_weights", "convert it to h5ad"),
    "empty hdf5": (_hdf5(), "it holds nothing", "convert it to h5ad"),
    "half an hdf5": (_bytes(SIGNATURE + b"\x00" * 600), "damaged|cut off", "Download"),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_other_content_is_refused_by_name(name: str, tmp_path: Path, local_store: Store) -> None:
    write, what, fix = IMPOSTORS[name]
    path = tmp_path / "atlas.h5ad"
    write(path)
    with pytest.raises(AtlasError) as caught:
        opened(path, local_store)
    assert any(part in caught.value.what for part in what.split("|"))
    assert caught.value.where == str(path)
    assert fix in caught.value.fix


def test_a_pickle_is_never_run(tmp_path: Path, local_store: Store) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    (tmp_path / "a.h5ad").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(AtlasError, match="can run code"):
        opened(tmp_path / "a.h5ad", local_store)
    assert not (tmp_path / "sprung").exists()


def test_folders_that_are_no_atlas(tmp_path: Path, local_store: Store) -> None:
    with pytest.raises(NotFoundError):
        stat_source(str(tmp_path / "missing"), local_store)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(AtlasError, match=r"neither a zarr group nor a matrix\.mtx"):
        stat_source(str(tmp_path), local_store)
    for sample in ("a", "b"):
        for name in ("matrix.mtx", "barcodes.tsv", "genes.tsv"):
            (tmp_path / f"{sample}_{name}").write_text("x")
    with pytest.raises(AtlasError, match=r"2 matrices .*a_matrix\.mtx, b_matrix\.mtx.* Name the matrix file"):
        stat_source(str(tmp_path), local_store)
    with pytest.raises(AtlasError, match=r"is no atlas|plain text"):
        opened(tmp_path / "a_matrix.mtx", local_store)
