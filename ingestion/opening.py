"""Open an atlas of any format: what a file is, is told by its content; its name only serves messages.

Read are h5ad and zarr (folders and zip files) of every era of anndata, loom, 10x HDF5 and Matrix Market triples.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import h5py

from genescale.ingestion.atlas import Atlas
from genescale.ingestion.formats.hdf5_safety import opened
from genescale.ingestion.formats.layouts import (
    MATRIX_NAME,
    ZARR_MARKERS,
    combined,
    files_in,
    split_uri,
    triple_entry,
    triple_of,
    triples,
)
from genescale.ingestion.formats.signatures import GZIP, HDF5, HEAD_BYTES, MATRIX_MARKET, ZIP, inflated_head, refusal
from genescale.platform.address import parse
from genescale.platform.errors import AtlasError, NotFoundError
from genescale.platform.storage import Entry, Store

AUTO = "auto"
KINDS = ("h5ad", "zarr", "loom", "10x-h5", "mtx")
# A worker opens one file for many units; its kind is found once.
KINDS_KEPT = 1_024
_kinds: dict[tuple[str, str], str] = {}
_NOT_ATLASES = {
    "mod": ("a MuData file of several modalities", "Write its RNA modality as h5ad: mdata['rna'].write('rna.h5ad')."),
    "assays": ("an h5Seurat file", "Convert it to h5ad with SeuratDisk::Convert."),
    "barcode_idx": ("10x molecule info, not a matrix", "Give filtered_feature_bc_matrix.h5 of the same run."),
}


@contextlib.contextmanager
def open_atlas(
    uri: str,
    store: Store,
    *,
    counts_slot: str = AUTO,
    etag: str = "",
    allow_fractional: bool = False,
    allow_unfiltered: bool = False,
) -> Iterator[Atlas]:
    """Open an atlas, check its structure and find its counts; etag: refuse content that differs from the one planned.

    counts_slot: `auto`, `X` (in loom and 10x files the main matrix), `raw.X` or `layers/NAME`; allow_fractional: take
    values that are no whole numbers; allow_unfiltered: take 10x matrices of every barcode. Raises AtlasError or
    NotCountsError.
    """
    entry = stat_source(uri, store)
    if etag and entry.etag != etag:
        raise AtlasError("the file changed since it was planned.", where=entry.uri, fix="Run the command again.")
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"counts_slot": counts_slot, "allow_fractional": allow_fractional}
        kind = kind_of(entry, store)
        if kind in ("10x-h5", "mtx"):
            options["allow_unfiltered"] = allow_unfiltered
        yield stack.enter_context(_opener(kind)(entry.uri, store, entry, **options))


def stat_source(uri: str, store: Store) -> Entry:
    """Address, size and tag of a source; of a zarr folder or a triple, over all its files.

    The address is the one by which the source goes, however it was named: see `layouts.triple_entry`.
    Raises NotFoundError when nothing is there, AtlasError for a folder that is no atlas.
    """
    place = parse(uri).uri
    if MATRIX_NAME.fullmatch(split_uri(place)[1]) and store.exists(place):
        return triple_entry(triple_of(place, store), triples(files_in(split_uri(place)[0], store)))
    if parse(place).key and store.exists(place):
        return store.stat(place)
    beside = files_in(place, store)
    if _is_zarr(beside):
        return combined(place, store.list(place))
    if found := triples(beside):
        return triple_entry(triple_of(place, store), found)
    if not beside and not store.list(place):
        raise NotFoundError("nothing is stored there.", where=place, fix="Check the address.")
    raise AtlasError(
        "this folder is no atlas: it holds neither a zarr group nor a matrix.mtx.",
        where=place,
        fix="Give the atlas file, a zarr folder, or the folder of a 10x matrix.",
    )


def kind_of(entry: Entry, store: Store) -> str:
    """One of KINDS, by content; AtlasError says what other content is and what to do."""
    uri = entry.uri
    if not parse(uri).key or not store.exists(uri):
        return "zarr" if _is_zarr(files_in(uri, store)) else "mtx"
    head = store.read_range(uri, 0, HEAD_BYTES)
    if head.startswith(HDF5):
        return hdf5_kind(entry, store)
    if head.startswith(ZIP) and _is_zarr_zip(uri, store):
        return "zarr"
    if (inflated_head(head) if head.startswith(GZIP) else head).startswith(MATRIX_MARKET):
        return "mtx"
    raise refusal(head, entry.size_bytes, uri)


def _is_zarr(files: Iterable[Entry]) -> bool:
    return any(split_uri(entry.uri)[1] in ZARR_MARKERS for entry in files)


def _is_zarr_zip(uri: str, store: Store) -> bool:
    """True for an archive with a zarr group at its root or in its one folder."""
    try:
        with store.open(uri) as raw, zipfile.ZipFile(raw) as archive:
            return any(name.rpartition("/")[2] in ZARR_MARKERS and name.count("/") <= 1 for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise AtlasError(
            f"the zip archive is damaged or cut off ({error}).", where=uri, fix="Download it again."
        ) from error


def hdf5_kind(entry: Entry, store: Store) -> str:
    """`h5ad`, `loom` or `10x-h5` by the names of its groups; AtlasError for other HDF5 files and damaged ones."""
    key = (entry.uri, entry.etag)
    if key not in _kinds:
        with opened(entry.uri, store, etag=entry.etag) as file:
            kind = _kind_by_names(file)
            if not kind:
                raise _no_atlas(set(file), entry.uri)
        if len(_kinds) >= KINDS_KEPT:
            _kinds.clear()
        _kinds[key] = kind
    return _kinds[key]


def _kind_by_names(file: h5py.File) -> str:
    """The kind of a walked HDF5 file; empty when it is no atlas."""
    names = set(file)
    if names & {"obs", "var", "X"} and "matrix" not in names:
        return "h5ad"
    if "matrix" in names and names & {"row_attrs", "col_attrs"}:
        return "loom"
    groups = [item for item in file.values() if isinstance(item, h5py.Group)]
    return "10x-h5" if any("barcodes" in group and "indptr" in group for group in groups) else ""


def _no_atlas(names: set[str], uri: str) -> AtlasError:
    what, fix = next((known for name, known in _NOT_ATLASES.items() if name in names), ("", ""))
    shown = ", ".join(sorted(names)[:8]) or "nothing"
    return AtlasError(
        f"HDF5, but not an atlas: {what or 'it holds ' + shown}.",
        where=uri,
        fix=fix or "Give an h5ad, loom or 10x file, or convert it to h5ad with anndata.",
    )


def is_atlas(entry: Entry, store: Store) -> bool:
    """Whether a file of a folder is worth trying: false for HDF5 and zip files of other programs.

    A damaged file, or one that went meanwhile, is tried, so that it is reported.
    """
    try:
        head = store.read_range(entry.uri, 0, HEAD_BYTES)
        if head.startswith(HDF5):
            with opened(entry.uri, store, etag=entry.etag) as file:
                return bool(_kind_by_names(file))
        return _is_zarr_zip(entry.uri, store) if head.startswith(ZIP) else True
    except (AtlasError, NotFoundError):
        return True


def _opener(kind: str) -> Callable[..., contextlib.AbstractContextManager[Atlas]]:
    """The reader of a kind, imported when it is needed."""
    if kind == "loom":
        from genescale.ingestion.formats.loom import open_loom

        return open_loom
    if kind == "10x-h5":
        from genescale.ingestion.formats.tenx_hdf5 import open_tenx

        return open_tenx
    if kind == "mtx":
        from genescale.ingestion.formats.market_matrix import open_mtx

        return open_mtx
    from genescale.ingestion.formats.anndata_file import open_anndata

    return open_anndata
