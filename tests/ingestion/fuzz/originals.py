"""Small valid atlases of every format, the same counts in each, and the vocabulary they are read with."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from scipy import sparse

from genescale.platform.vocabulary import Vocabulary

N_CELLS, N_GENES = 120, 60
GENE_IDS = tuple(f"ENSG{i:011d}" for i in range(1, N_GENES + 1))
CELLS = tuple(f"CELL{i:04d}-1" for i in range(N_CELLS))
KINDS = ("h5ad-csr", "h5ad-csc", "h5ad-dense", "h5ad-plain", "zarr2-zip", "zarr3-zip", "loom", "tenx", "mtx")


def vocabulary() -> Vocabulary:
    """Every gene, with different medians, and a window that crops no cell."""
    return Vocabulary.build(GENE_IDS, 1 + np.arange(N_GENES) / 7, window=64, name="fuzz")


def counts() -> sparse.csr_matrix:
    """Counts of 120 cells, at least eight genes in each, sixteen-bit values among them."""
    rng = np.random.default_rng(7)
    dense = rng.poisson(0.7, (N_CELLS, N_GENES)).astype(np.float32)
    dense[:, :8] += 1
    dense[::10, 3] = 700
    return sparse.csr_matrix(dense)


def write_original(kind: str, folder: Path) -> Path:
    """Write the valid file of a kind into the folder; returns its path (of a folder for `mtx`)."""
    writers: dict[str, Any] = {"loom": _loom, "tenx": _tenx, "mtx": _mtx}
    endings = {"loom": ".loom", "tenx": ".h5", "mtx": ""}
    if kind.startswith("h5ad"):
        path = folder / f"{kind}.h5ad"
        _h5ad(path, kind.removeprefix("h5ad-"))
    elif kind.startswith("zarr"):
        path = folder / f"{kind}.zarr.zip"
        _zarr(path, int(kind[4]))
    else:
        path = folder / f"{kind}{endings[kind]}"
        writers[kind](path)
    return path


def _atlas() -> Any:
    import anndata
    import pandas

    obs = pandas.DataFrame({"donor_id": pandas.Categorical(["d1", "d2"] * (N_CELLS // 2))}, index=list(CELLS))
    return anndata.AnnData(X=counts(), obs=obs, var=pandas.DataFrame(index=list(GENE_IDS)))


def _h5ad(path: Path, layout: str) -> None:
    import anndata

    atlas = _atlas()
    atlas.write_h5ad(path)
    matrix: Any = {"csc": counts().tocsc(), "dense": counts().toarray()}.get(layout, counts())
    # Several chunks, so that damage to one leaves the others whole.
    chunks = (16, 60) if layout == "dense" else (50,)
    how = {} if layout == "plain" else {"compression": "gzip", "chunks": chunks}
    with h5py.File(path, "r+") as file:
        del file["X"]
        anndata.io.write_elem(file, "X", matrix, dataset_kwargs=how)


def _zarr(path: Path, version: int) -> None:
    import anndata
    import zarr

    anndata.settings.zarr_write_format = version
    folder = path.with_suffix("")
    with zarr.config.set({"default_zarr_format": version}):
        _atlas().write_zarr(folder)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(folder).as_posix())


def _loom(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "matrix", data=counts().toarray().T.astype(np.int32), chunks=(20, 40), compression="gzip", shuffle=False
        )
        for name in ("layers", "row_graphs", "col_graphs"):
            file.create_group(name)
        file.create_group("attrs")["LOOM_SPEC_VERSION"] = "3.0.0"
        file.create_group("row_attrs").create_dataset("Accession", data=list(GENE_IDS), dtype=h5py.string_dtype())
        file.create_group("col_attrs").create_dataset("CellID", data=list(CELLS), dtype=h5py.string_dtype())


def _tenx(path: Path) -> None:
    matrix = sparse.csc_matrix(counts().T.astype(np.int32))  # genes × barcodes by barcode, as 10x stores it
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group.create_dataset(name, data=getattr(matrix, name), chunks=(80,), compression="gzip")
        group.create_dataset("shape", data=np.array(matrix.shape, dtype=np.int32))
        group.create_dataset("barcodes", data=np.array(CELLS, dtype="S18"))
        features = group.create_group("features")
        features.create_dataset("id", data=np.array(GENE_IDS, dtype="S15"))
        features.create_dataset("name", data=np.array([f"GENE{i}" for i in range(N_GENES)], dtype="S8"))
        features.create_dataset("feature_type", data=np.array(["Gene Expression"] * N_GENES, dtype="S15"))
        features.create_dataset("genome", data=np.array(["GRCh38"] * N_GENES, dtype="S6"))


def _mtx(folder: Path) -> None:
    folder.mkdir()
    matrix = counts().T.tocoo()
    lines = [f"{g + 1} {c + 1} {int(v)}" for g, c, v in zip(matrix.row, matrix.col, matrix.data, strict=True)]
    head = f"%%MatrixMarket matrix coordinate integer general\n%\n{N_GENES} {N_CELLS} {matrix.nnz}\n"
    # mtime fixed: the same bytes every time, so that a seed means the same mutation.
    (folder / "matrix.mtx.gz").write_bytes(gzip.compress((head + "\n".join(lines) + "\n").encode(), mtime=0))
    features = "".join(f"{gene}\tGENE{i}\tGene Expression\n" for i, gene in enumerate(GENE_IDS))
    (folder / "features.tsv.gz").write_bytes(gzip.compress(features.encode(), mtime=0))
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress("".join(f"{cell}\n" for cell in CELLS).encode(), mtime=0))
