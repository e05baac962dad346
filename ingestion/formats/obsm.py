"""Put a matrix beside the cells of an h5ad file: a copy of the file with one more entry in `obsm`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy.typing as npt

from genescale.ingestion.formats.dataframes import Frame, frame_length
from genescale.ingestion.formats.hdf5_safety import opened
from genescale.ingestion.formats.hdf5_tree import HdfGroup
from genescale.platform.errors import InputError
from genescale.platform.storage import Store


def cell_names(source_uri: str, store: Store) -> list[str]:
    """Names of the cells of an h5ad file, whatever its matrices hold."""
    with opened(source_uri, store) as file:
        root = HdfGroup(file, source_uri)
        return Frame(root, "obs", frame_length(root, "obs")).index()


def write_obsm(source_uri: str, out: Path, key: str, matrix: npt.NDArray[Any], store: Store) -> Path:
    """Copy an h5ad file to `out` with `obsm[key]` added (or replaced): one row of `matrix` for each cell, in order.

    Raises InputError when the rows are not the file's cells; nothing stands at `out` unless it is whole.
    """
    with opened(source_uri, store) as file:
        n_cells = frame_length(HdfGroup(file, source_uri), "obs")
    if matrix.ndim != 2 or len(matrix) != n_cells:
        raise InputError(f"{len(matrix):,} rows for {n_cells:,} cells.", where=source_uri, fix="Give one row a cell.")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", key):
        raise InputError(f"'{key}' cannot name an entry of obsm.", fix="Use letters, digits and underscores.")
    with changed_copy(source_uri, out, store) as file:
        _put(file, key, matrix)
    return out


@contextlib.contextmanager
def changed_copy(source_uri: str, out: Path, store: Store) -> Iterator[h5py.File]:
    """A copy of an h5ad file, open for changes; it stands at `out` once the block has ended well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.{os.getpid()}.unfinished")
    try:
        with store.open(source_uri) as source, unfinished.open("wb") as copy:
            shutil.copyfileobj(source, copy, 8 * 1024 * 1024)
        with h5py.File(unfinished, "r+") as file:
            yield file
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)


def _put(file: h5py.File, key: str, matrix: npt.NDArray[Any]) -> None:
    if isinstance(file.get("obsm"), h5py.Dataset):
        raise InputError("its obsm is one array, as anndata wrote before 0.7.", fix="Write it again with anndata.")
    if "obsm" not in file:
        file.create_group("obsm").attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    if key in file["obsm"]:
        del file["obsm"][key]
    stored: Sequence[Any] = file["obsm"].create_dataset(key, data=matrix, compression="gzip", shuffle=True)
    stored.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})  # type: ignore[attr-defined]
