"""10x HDF5 of Cell Ranger 2 and 3: cells as the file has them, the human genome of several, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
from scipy import sparse

from genescale.ingestion.atlas import Atlas
from genescale.ingestion.opening import open_atlas
from genescale.platform.errors import AtlasError, NotCountsError
from genescale.platform.storage import Store, join

TENX = Path("atlases") / "tenx"


def write_matrix(group: h5py.Group, counts: sparse.csr_matrix) -> None:
    """The arrays that both versions share: features × barcodes, barcode by barcode."""
    n_cells, n_genes = counts.shape
    for name, values in (("data", counts.data), ("indices", counts.indices), ("indptr", counts.indptr)):
        group.create_dataset(name, data=values.astype(np.int64), compression="gzip", chunks=True)
    group["shape"] = np.array([n_genes, n_cells], dtype=np.int32)
    group["barcodes"] = np.array([f"AAAC{i}-1".encode() for i in range(n_cells)])


def write_v3(path: Path, counts: sparse.csr_matrix, **features: Sequence[str]) -> Path:
    """Write as Cell Ranger 3 and later; features: columns beside id and name."""
    with h5py.File(path, "w") as file:
        write_matrix(group := file.create_group("matrix"), counts)
        ids = [f"ENSG{i:011d}" for i in range(counts.shape[1])]
        columns = {"id": ids, "name": [f"G{i}" for i in range(len(ids))], "_all_tag_keys": ["genome"], **features}
        for name, values in columns.items():
            group[f"features/{name}"] = np.array([value.encode() for value in values])
    return path


def write_v2(path: Path, counts: sparse.csr_matrix, *genomes: str) -> Path:
    """Write as Cell Ranger 2, with the same counts for each genome."""
    with h5py.File(path, "w") as file:
        for genome in genomes:
            write_matrix(group := file.create_group(genome), counts)
            group["genes"] = np.array([f"ENSG{i:011d}".encode() for i in range(counts.shape[1])])
            group["gene_names"] = np.array([f"{genome}-G{i}".encode() for i in range(counts.shape[1])])
    return path


def read_all(atlas: Atlas) -> sparse.csr_matrix:
    """All rows of an atlas."""
    rows = atlas.read(0, atlas.n_cells)
    return sparse.csr_matrix((rows.values_z, rows.indices_z, rows.indptr_n), (atlas.n_cells, atlas.n_genes))


def test_version_3_keeps_other_features_and_tells_them_apart(
    tmp_path: Path, local_store: Store, counts_of: Callable[..., sparse.csr_matrix]
) -> None:
    counts = counts_of(9, n_genes=12)
    types = ["Gene Expression"] * 10 + ["Antibody Capture"] * 2
    path = write_v3(tmp_path / "a.h5", counts, feature_type=types, genome=["GRCh38"] * 10 + [""] * 2)
    with open_atlas(str(path), local_store) as atlas:
        assert (atlas.kind, atlas.slot, atlas.matrix.sequential) == ("10x-h5", "X", False)
        assert (read_all(atlas) != counts).nnz == 0
        assert np.array_equal(atlas.read(3, 5).values_z, counts[3:5].data)
        assert atlas.cell_ids(0, 1) == ["AAAC0-1"]
        assert atlas.var.index(11) == ["ENSG00000000011"]
        assert sorted(atlas.var.columns) == ["feature_name", "feature_type", "genome"]
        assert atlas.var.column("feature_type", 9, 11)[0] == ["Gene Expression", "Antibody Capture"]


def test_version_2_takes_the_human_genome_of_several(
    tmp_path: Path, local_store: Store, counts_of: Callable[..., sparse.csr_matrix]
) -> None:
    counts = counts_of(9, n_genes=12)
    path = write_v2(tmp_path / "a.h5", counts, "mm10", "GRCh38")
    with open_atlas(str(path), local_store) as atlas:
        assert (read_all(atlas) != counts).nnz == 0
        assert atlas.var.column("feature_name", 0, 1)[0] == ["GRCh38-G0"]
        assert atlas.var.column("genome", 0, 1)[0] == ["GRCh38"]
        assert atlas.notes == ("of the genomes in this file, GRCh38 is taken and mm10 left out",)
    only = write_v2(tmp_path / "b.h5", counts, "mm10")
    with open_atlas(str(only), local_store) as atlas:
        assert atlas.var.column("genome", 0, 1)[0] == ["mm10"], "a single genome is judged by its genes"


@pytest.mark.parametrize(
    ("genomes", "message"),
    [
        (("mm10", "rn6"), r"it holds 2 genomes \(mm10, rn6\), and none of them named as human"),
        (("hg19", "GRCh38", "mm10"), r"it holds 3 genomes \(GRCh38, hg19, mm10\), and 2 of them named as human"),
    ],
)
def test_several_genomes_without_one_human_are_refused(
    genomes: tuple[str, ...], message: str, tmp_path: Path, local_store: Store, counts_of: Callable[..., Any]
) -> None:
    path = write_v2(tmp_path / "a.h5", counts_of(9, n_genes=12), *genomes)
    with pytest.raises(AtlasError, match=message), open_atlas(str(path), local_store):
        pass


@pytest.mark.shared
def test_shared_files_hold_what_h5py_reads(shared_data: Path, local_store: Store) -> None:
    for name, group in (
        ("cellranger3/filtered_feature_bc_matrix.h5", "matrix"),
        ("cellranger1/filtered_gene_bc_matrices_h5.h5", "hg19_chr21"),
        ("cellranger1/multiple_genomes.h5", "hg19_chr21"),
    ):
        path = shared_data / TENX / name
        with h5py.File(path) as file, open_atlas(str(path), local_store) as atlas:
            arrays = [file[group][part][:] for part in ("data", "indices", "indptr")]
            wanted = sparse.csc_matrix(tuple(arrays), file[group]["shape"][:]).T.tocsr()
            assert (read_all(atlas) != wanted).nnz == 0
            assert atlas.cell_ids(0, atlas.n_cells) == [name.decode() for name in file[group]["barcodes"][:]]


@pytest.mark.shared
def test_the_hdf5_file_and_the_triple_of_one_run_are_equal(shared_data: Path, local_store: Store) -> None:
    run = shared_data / TENX / "cellranger3"
    with (
        open_atlas(str(run / "filtered_feature_bc_matrix.h5"), local_store) as one,
        open_atlas(str(run / "filtered_feature_bc_matrix"), local_store) as other,
    ):
        assert (read_all(one) != read_all(other)).nnz == 0
        assert one.var.index() == other.var.index()
        assert one.cell_ids(0, one.n_cells) == other.cell_ids(0, other.n_cells)


def test_from_object_storage(s3_store: tuple[Store, str], tmp_path: Path, counts_of: Callable[..., Any]) -> None:
    store, bucket = s3_store
    counts = counts_of(9, n_genes=12)
    store.upload(write_v3(tmp_path / "a.h5", counts), join(bucket, "a.h5"))
    with open_atlas(join(bucket, "a.h5"), store) as atlas:
        assert (read_all(atlas) != counts).nnz == 0


def test_the_matrix_of_every_barcode_is_refused_unless_it_is_wanted(tmp_path: Path, local_store: Store) -> None:
    rng = np.random.default_rng(1)
    full = rng.random((11_000, 20)) < np.where(np.arange(11_000) % 5 == 0, 0.9, 0.1)[:, None]
    counts = sparse.csr_matrix(full.astype(np.int64) * 3)
    path = write_v3(tmp_path / "raw_feature_bc_matrix.h5", counts)
    with (
        pytest.raises(AtlasError, match=r"11,000 barcodes, and 80% of them .* unfiltered matrix.*--allow-unfiltered"),
        open_atlas(str(path), local_store),
    ):
        pass
    with open_atlas(str(path), local_store, allow_unfiltered=True) as atlas:
        assert (read_all(atlas) != counts).nnz == 0


def _put(name: str, **arguments: Any) -> Callable[[h5py.Group], None]:
    def change(group: h5py.Group) -> None:
        del group[name]
        if arguments:
            group.create_dataset(name, **arguments)

    return change


def _first_index(value: int) -> Callable[[h5py.Group], None]:
    def change(group: h5py.Group) -> None:
        group["indices"][0] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_put("barcodes", data=np.array([b"a"])), "obs has 1 rows but the matrix has 9"),
        (_put("features/id", data=np.array([b"a"])), "var has 1 rows but the matrix has 12"),
        (_put("features/id"), "it has no 'id'"),
        (_put("data"), "no array 'data'"),
        (_put("shape", data=[12, 9, 1]), "does not say its shape"),
        (_put("shape", data=[12, 0]), "the matrix is empty"),
        (_put("shape", data=[12, 5]), "indptr has 10 entries, 6 belong"),
        (_put("indptr", data=np.arange(9, -1, -1)), "indptr does not rise"),
        (_put("data", data=np.ones(3)), "3 values but"),
        (_put("data", shape=(10**13,), chunks=(4096,), dtype="i8"), "10,000,000,000,000"),
        (_put("indices", data=np.ones(3)), "holds values of type float64|3 indices"),
    ],
)
def test_damaged_files_are_refused(
    change: Callable[[h5py.Group], None],
    message: str,
    tmp_path: Path,
    local_store: Store,
    counts_of: Callable[..., Any],
) -> None:
    path = write_v3(tmp_path / "a.h5", counts_of(9, n_genes=12))
    with h5py.File(path, "r+") as file:
        change(file["matrix"])
    with pytest.raises(AtlasError, match=message) as caught, open_atlas(str(path), local_store) as atlas:
        read_all(atlas)
    assert caught.value.where.startswith(str(path))
    assert caught.value.fix


@pytest.mark.parametrize("index", [-1, 12])
def test_indices_out_of_range_are_found_when_rows_are_proved(
    index: int, tmp_path: Path, local_store: Store, counts_of: Callable[..., Any]
) -> None:
    from genescale.ingestion.counts import checked

    path = write_v3(tmp_path / "a.h5", counts_of(9, n_genes=12))
    with h5py.File(path, "r+") as file:
        _first_index(index)(file["matrix"])
    with (
        open_atlas(str(path), local_store) as atlas,
        pytest.raises(AtlasError, match=r"1 gene indices lie outside 0 … 11, the first in cell 0"),
    ):
        checked(atlas, 0, 9)


def test_fractional_values_are_no_counts_but_may_be_allowed(
    tmp_path: Path, local_store: Store, counts_of: Callable[..., Any]
) -> None:
    counts = counts_of(40, n_genes=12)
    path = write_v3(tmp_path / "a.h5", counts)
    corrected = counts.data - np.where(np.arange(counts.nnz) % 5 == 0, 0.125, 0)
    with h5py.File(path, "r+") as file:
        _put("data", data=corrected)(file["matrix"])
    with pytest.raises(NotCountsError), open_atlas(str(path), local_store):
        pass
    with open_atlas(str(path), local_store, allow_fractional=True) as atlas:
        assert np.array_equal(atlas.read(0, 40).values_z, corrected)


def test_an_h5ad_file_under_another_name_is_still_one(
    tmp_path: Path, local_store: Store, write_atlas: Callable[..., Path], counts_of: Callable[..., Any]
) -> None:
    path = write_atlas("a.h5", counts_of(9))
    with open_atlas(str(path), local_store) as atlas:
        assert atlas.kind == "h5ad"
        assert (read_all(atlas) != anndata.read_h5ad(path).X).nnz == 0
