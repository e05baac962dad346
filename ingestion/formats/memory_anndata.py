"""An AnnData that is in memory already, as an Atlas: nothing is written, and the same rules find and prove its counts.

Axis suffixes: `n` cells, `z` stored values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from genescale.ingestion.atlas import Atlas, Layout, Matrix, Rows
from genescale.ingestion.formats.anndata_file import TEXTS
from genescale.ingestion.formats.memory_frame import MemoryFrame
from genescale.ingestion.formats.sparse_matrix import check_shape
from genescale.ingestion.slots import choose_slot, ordered_layers
from genescale.platform.address import Entry
from genescale.platform.errors import AtlasError, InputError

if TYPE_CHECKING:
    import pandas
    from anndata import AnnData as AnnData

URI = "memory:AnnData"
Give = Callable[[], Any]


class MemoryMatrix:
    """Cells × genes held as CSR arrays; dense and CSC matrices are turned once, when they are looked at."""

    layout: Layout = "csr"
    sequential = False

    def __init__(self, values: Any, *, where: str) -> None:
        from scipy import sparse

        if getattr(values, "ndim", 0) != 2 or np.dtype(values.dtype).kind not in "iufb":
            raise AtlasError(
                f"it is no matrix of numbers ({type(values).__name__}, {getattr(values, 'dtype', 'no type')}).",
                where=where,
                fix="Give raw counts as a NumPy array or a SciPy sparse matrix.",
            )
        rows = sparse.csr_array(values)
        self.where, (self.n_cells, self.n_genes) = where, rows.shape
        check_shape(self.n_cells, self.n_genes, where=where)
        self.dtype = rows.dtype
        self.stored_before = rows.indptr.astype(np.int64)
        self._indices_z, self._values_z = rows.indices, rows.data

    def read(self, start: int, stop: int) -> Rows:
        """Stored values of cells start … stop-1."""
        pointers_n = self.stored_before[start : stop + 1]
        first, last = int(pointers_n[0]), int(pointers_n[-1])
        return Rows(pointers_n - first, self._indices_z[first:last], self._values_z[first:last])


def memory_atlas(adata: AnnData, *, counts_slot: str = "auto", allow_fractional: bool = False) -> Atlas:
    """The atlas in an AnnData, whose raw counts are looked for in `raw.X`, the layers and `X`, as in a file.

    Raises InputError for what is no AnnData or is backed by a file, AtlasError or NotCountsError as `open_atlas` does.
    """
    _check(adata)
    matrices = _matrices(adata)
    genes = {name: partial(_gene_names, adata, name) for name in matrices}
    slot = choose_slot(matrices, counts_slot, where=URI, allow_fractional=allow_fractional, genes=genes)
    of_raw = slot.name == "raw.X"
    return Atlas(
        entry=Entry(URI, int(slot.matrix.stored_before[-1]) * 8, _tag(adata, slot.matrix)),
        kind="h5ad",
        slot=slot,
        obs=_frame("obs", adata.obs, slot.matrix.n_cells),
        var=_frame("raw/var" if of_raw else "var", adata.raw.var if of_raw else adata.var, slot.matrix.n_genes),
        texts={name: adata.uns[name] for name in TEXTS if isinstance(adata.uns.get(name), str)},
    )


def _check(adata: Any) -> None:
    if not all(hasattr(adata, name) for name in ("X", "obs", "var", "layers", "raw", "uns")):
        raise InputError(f"{type(adata).__name__} is no AnnData.", fix="Give an AnnData or the address of an atlas.")
    if adata.isbacked:
        raise InputError(
            "this AnnData is backed by a file.",
            where=str(adata.filename),
            fix="Give the file's path instead, or adata.to_memory().",
        )


def _matrices(adata: AnnData) -> dict[str, Callable[[], Matrix]]:
    given: dict[str, Give] = {}
    if adata.raw is not None:
        given["raw.X"] = lambda: adata.raw.X
    for name in ordered_layers(list(adata.layers)):
        given[f"layers/{name}"] = partial(adata.layers.__getitem__, name)
    if adata.X is not None:
        given["X"] = lambda: adata.X
    return {name: cache(partial(_matrix, give, f"{URI}: {name}")) for name, give in given.items()}


def _matrix(give: Give, where: str) -> Matrix:
    return MemoryMatrix(give(), where=where)


def _gene_names(adata: AnnData, slot: str) -> list[str]:
    return [str(name) for name in (adata.raw if slot == "raw.X" else adata).var_names]


def _tag(adata: AnnData, matrix: Matrix) -> str:
    """Tells two AnnData apart by their cells, genes and the first and last counts: for messages, not for trust."""
    text = "\n".join((*map(str, adata.obs_names), "", *map(str, adata.var_names), str(matrix.stored_before[-1])))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _frame(path: str, table: pandas.DataFrame, rows: int) -> MemoryFrame:
    index = pa.array([str(name) for name in table.index], pa.string())
    columns: Mapping[str, pa.Array] = {str(name): _arrow(table[name]) for name in table.columns}
    return MemoryFrame(path, index, columns, rows=rows, uri=URI)


def _arrow(column: pandas.Series) -> pa.Array:
    """A column as texts, int64, float64 or bool; missing values are null."""
    kind = getattr(column.dtype, "kind", "O")
    if kind == "b":
        return pa.array(column, pa.bool_(), from_pandas=True)
    if kind in "iu":
        return pa.array(column, pa.int64(), from_pandas=True)
    if kind == "f":
        return pa.array(column, pa.float64(), from_pandas=True)
    missing = column.isna().to_numpy(dtype=bool)
    texts = [None if gone else str(value) for value, gone in zip(column.tolist(), missing, strict=True)]
    return pa.array(texts, pa.string())
