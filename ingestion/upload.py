"""An h5ad file that a stranger sent over the network: read from memory, and never more of it than was agreed.

Beside everything that is checked of any HDF5 file (`formats/hdf5_safety`), what the file declares to hold is added up
before a value is read: the sender decides how much memory and time reading costs, and pays for neither.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator

import h5py

from genescale.ingestion.atlas import Atlas
from genescale.ingestion.formats.anndata_file import atlas_of
from genescale.ingestion.formats.hdf5_safety import BUILT_IN_FILTERS, filters, opened_file
from genescale.ingestion.formats.hdf5_tree import HdfGroup
from genescale.platform.address import Entry
from genescale.platform.errors import AtlasError, LimitError

NAME = "the h5ad file"
# What cells are made of; the rest of a file (embeddings, graphs, images) is never read.
_READ = ("X", "raw", "raw.X", "raw.var", "layers", "obs", "var")
# A pointer to a text; the text itself stands in the file as it is, never compressed.
_POINTER_BYTES = 16
LARGEST_CHUNK_BYTES = 64 * 1024 * 1024
LARGEST_TEXT_BYTES = 16 * 1024
MOST_CELLS = 1_000_000
_AGAIN = "Write it again with anndata."


@contextlib.contextmanager
def opened_upload(
    body: bytes,
    *,
    counts_slot: str = "auto",
    allow_fractional: bool = False,
    max_unpacked_bytes: int,
    max_genes: int,
) -> Iterator[Atlas]:
    """Open an h5ad file that stands in memory, and find its raw counts as ingestion finds them.

    max_unpacked_bytes: what its matrices and tables may declare to hold, unpacked. Raises AtlasError, NotCountsError,
    and LimitError for more cells, genes or bytes than are allowed.
    """
    entry = Entry(uri=NAME, size_bytes=len(body), etag="")
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(io.BytesIO(body))
        file = stack.enter_context(opened_file(raw, NAME, largest_text_bytes=LARGEST_TEXT_BYTES))
        check_declared(file, max_unpacked_bytes=max_unpacked_bytes)
        root = HdfGroup(file, NAME)
        atlas = atlas_of(root, entry, "h5ad", stack, counts_slot=counts_slot, allow_fractional=allow_fractional)
        _check_number(atlas.n_cells, MOST_CELLS, "cells")
        _check_number(atlas.n_genes, max_genes, "gene columns")
        yield atlas


def check_declared(file: h5py.File, *, max_unpacked_bytes: int) -> None:
    """LimitError when what would be read declares more bytes than allowed; AtlasError for what nobody should unpack."""
    declared = 0
    for part in (*_READ, *_categories(file)):
        for dataset in _datasets(file, part):
            _check_layout(dataset)
            declared += _declared_bytes(dataset)
            if declared > max_unpacked_bytes:
                raise LimitError(
                    f"its matrices and tables unpack to more than {max_unpacked_bytes:,} bytes.",
                    where=NAME,
                    fix="Send fewer cells at a time, or only the matrix with raw counts.",
                )


def _categories(file: h5py.File) -> list[str]:
    """Where files of before anndata 0.7 keep the texts of their categorical columns."""
    uns = file.get("uns")
    return [f"uns/{name}" for name in uns if name.endswith("_categories")] if isinstance(uns, h5py.Group) else []


def _datasets(file: h5py.File, part: str) -> Iterator[h5py.Dataset]:
    """Every dataset of a part of the file, each once; the walk before has found that no link leads elsewhere."""
    item = file.get(part)
    if isinstance(item, h5py.Dataset):
        yield item
    elif isinstance(item, h5py.Group):
        names: list[str] = []
        item.visit(names.append)
        yield from (found for name in names if isinstance(found := item[name], h5py.Dataset))


def _declared_bytes(dataset: h5py.Dataset) -> int:
    is_free_text = h5py.check_string_dtype(dataset.dtype) is not None and dataset.dtype.kind == "O"
    return math.prod(dataset.shape or (0,)) * (_POINTER_BYTES if is_free_text else dataset.dtype.itemsize)


def _check_layout(dataset: h5py.Dataset) -> None:
    where = f"{NAME}: {dataset.name.strip('/')}"
    foreign = [number for number in filters(dataset) if number not in BUILT_IN_FILTERS]
    if foreign:
        raise AtlasError(f"it is compressed by HDF5 filter {foreign[0]}.", where=where, fix="Write it again with gzip.")
    if dataset.chunks is not None:
        chunk_bytes = math.prod(dataset.chunks) * dataset.dtype.itemsize
        if chunk_bytes > LARGEST_CHUNK_BYTES:
            raise AtlasError(f"it is stored in chunks of {chunk_bytes:,} bytes.", where=where, fix=_AGAIN)
    # Pointers of a sparse matrix, and rows of a dense one or of a table: they are held as 64-bit numbers or as texts.
    if dataset.name.endswith("/indptr") or dataset.ndim == 2 or "/obs" in dataset.name:
        _check_number(dataset.shape[0] if dataset.shape else 0, MOST_CELLS + 1, f"rows in {dataset.name.strip('/')}")


def _check_number(n: int, limit: int, what: str) -> None:
    if n > limit:
        raise LimitError(f"it has {n:,} {what}; {limit:,} are allowed.", where=NAME, fix="Send a smaller file.")
