"""Reads a mutated atlas a second way (h5py, zarr, scipy; nothing of Genescale but the ranking rule) for comparison."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from originals import vocabulary
from scipy import io as scipy_io
from scipy import sparse

from genescale.platform.rank_value import rank_value_tokens

MIN_GENES = 7


def read(kind: str, path: Path) -> tuple[Any, list[str]]:
    """Counts, cells × genes, and names of the genes."""
    if kind == "mtx":
        return _mtx(path)
    if kind.startswith("zarr"):
        import zarr

        return _anndata(zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r"))
    with h5py.File(path, "r") as file:
        if kind.startswith("h5ad"):
            return _anndata(file)
        if kind == "loom":
            return sparse.csr_matrix(file["matrix"][()].T.astype(np.float64)), _texts(file["row_attrs/Accession"][()])
        group = file["matrix"]
        genes, cells = (int(n) for n in group["shape"][()])
        return _sparse(group, (cells, genes), "csr"), _texts(group["features/id"][()])


def _anndata(file: Any) -> tuple[Any, list[str]]:
    var = file["var"]
    index = var[str(var.attrs.get("_index", "_index"))][...]
    matrix = file["X"]
    if not hasattr(matrix, "keys"):
        return sparse.csr_matrix(matrix[...].astype(np.float64)), _texts(index)
    shape = tuple(int(n) for n in np.asarray(matrix.attrs["shape"]))
    layout = "csc" if str(matrix.attrs.get("encoding-type", "")).startswith("csc") else "csr"
    return _sparse(matrix, shape, layout), _texts(index)


def _sparse(group: Any, shape: tuple[int, ...], layout: str) -> Any:
    kind = sparse.csc_matrix if layout == "csc" else sparse.csr_matrix
    parts = [np.asarray(group[name][...]) for name in ("data", "indices", "indptr")]
    matrix = kind((parts[0].astype(np.float64), parts[1].astype(np.int64), parts[2].astype(np.int64)), shape=shape)
    matrix.check_format(full_check=True)
    found = matrix.tocsr()
    found.sum_duplicates()
    return found


def _mtx(folder: Path) -> tuple[Any, list[str]]:
    matrix = scipy_io.mmread(io.BytesIO(gzip.decompress((folder / "matrix.mtx.gz").read_bytes())))
    lines = gzip.decompress((folder / "features.tsv.gz").read_bytes()).decode(errors="replace").splitlines()
    genes = [row[0] if row else "" for row in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]
    return sparse.csr_matrix(matrix.T.astype(np.float64)), genes


def _texts(values: Any) -> list[str]:
    return [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in values]


def rows_of(kind: str, path: Path) -> dict[str, str]:
    known = vocabulary()
    counts, names = read(kind, path)
    tokens_of = {gene: int(token) for gene, token in zip(known.gene_ids, known.token_ids, strict=True)}
    if counts.shape[1] != len(names):
        raise ValueError(f"{counts.shape[1]} columns, {len(names)} genes")
    targets = [tokens_of.get(name.strip().upper().partition(".")[0], -1) for name in names]
    found = {}
    for n in range(counts.shape[0]):
        row = counts[n]
        summed: dict[int, float] = {}
        for gene, value in zip(row.indices, row.data, strict=True):
            if value and targets[gene] >= 0:
                summed[targets[gene]] = summed.get(targets[gene], 0.0) + value
        if len(summed) >= MIN_GENES:
            ranked = rank_value_tokens(np.array(sorted(summed)), np.array([summed[t] for t in sorted(summed)]), known)
            found[str(n)] = hashlib.sha256(ranked.input_ids.astype("<u4").tobytes()).hexdigest()[:16]
    return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            result: dict[str, Any] = {"rows": rows_of(job["kind"], Path(job["path"]))}
        except Exception as error:  # noqa: BLE001 (another reader may fail in any way)
            result = {"failed": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
