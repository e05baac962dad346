"""Open HDF5 files from strangers: nothing outside the file is read, and nothing larger than it claims to deserve.

An HDF5 file can name other files of the reader's machine (external storage, external links, virtual datasets) and can
declare terabytes in a few bytes. Both show in the header, so the whole file is walked before a value is read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from genescale.platform.errors import AtlasError
from genescale.platform.storage import Store

SIGNATURE = b"\x89HDF\r\n\x1a\n"
MAX_OBJECTS = 100_000
MAX_DEPTH = 32
MAX_CHUNK_BYTES = 256 * 1024 * 1024
# gzip cannot compress better than about 1 : 1,030; files below the floor are not worth a thought.
MAX_EXPANSION = 2_000
EXPANSION_FLOOR_BYTES = 16 * 1024 * 1024
MAX_TEXT_BYTES = 256 * 1024 * 1024
MAX_FIXED_TEXT_BYTES = 4_096
TEXTS_AT_ONCE = 4_096
# What is often found under the name of an atlas that failed to download, by its first bytes.
IMPOSTORS = {
    b"PK": "a zip archive",
    b"<": "an HTML or XML page, which is how a failed download often ends",
    b"version https://git-lfs": "a Git LFS pointer, not the file it points to",
    b"\x1f\x8b": "compressed with gzip as a whole",
}


@contextlib.contextmanager
def opened(uri: str, store: Store) -> Iterator[h5py.File]:
    """The HDF5 file at `uri`, walked and found harmless; AtlasError says what is wrong with it otherwise."""
    with store.open(uri) as raw:
        size_bytes = raw.seek(0, 2)
        raw.seek(0)
        _check_signature(raw.read(64), size_bytes, uri)
        raw.seek(0)
        try:
            with h5py.File(raw, "r") as file:
                _check_links(file, uri)
                yield file
        except (OSError, RuntimeError) as error:
            raise _explained(error, size_bytes, uri) from error
        except KeyError as error:
            # The HDF5 library's way to say that an object's header cannot be read; other KeyErrors are faults of ours.
            if "Unable to" not in str(error):
                raise
            raise _explained(error, size_bytes, uri) from error


def _check_signature(head: bytes, size_bytes: int, uri: str) -> None:
    if size_bytes == 0:
        raise AtlasError("the file is empty (0 bytes).", where=uri, fix="Download it again.")
    if head.startswith(SIGNATURE):
        return
    found = next((what for start, what in IMPOSTORS.items() if head.lstrip().startswith(start)), "not an HDF5 file")
    raise AtlasError(f"not an h5ad file: it is {found}.", where=uri, fix="Give the .h5ad file itself.")


def _explained(error: Exception, size_bytes: int, uri: str) -> AtlasError:
    text = str(error)
    if match := re.search(r"truncated file: eof = (\d+),.*stored_eof = (\d+)", text):
        return AtlasError(
            f"the file is cut off: {int(match[1]):,} of {int(match[2]):,} bytes are there.",
            where=uri,
            fix="Download it again.",
        )
    if "filter" in text:
        return AtlasError(
            f"its data use a compression that this installation cannot read ({text}).",
            where=uri,
            fix="Write the file again with gzip or without compression.",
        )
    return AtlasError(
        f"the HDF5 content is damaged ({text}); the file has {size_bytes:,} bytes.", where=uri, fix="Download it again."
    )


def _check_links(file: h5py.File, uri: str) -> None:
    """Walk every object once, following nothing that leads elsewhere."""
    waiting: list[tuple[h5py.Group, int]] = [(file, 0)]
    seen = {_address(file)}
    count = 0
    while waiting:
        group, depth = waiting.pop()
        for name in group:
            count += 1
            if count > MAX_OBJECTS or depth > MAX_DEPTH:
                raise AtlasError("it holds more objects, or deeper ones, than an atlas has.", where=uri)
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise AtlasError(
                    f"{group.name.rstrip('/')}/{name} is a link that may lead out of the file; such files are refused.",
                    where=uri,
                    fix="Write the data into the file itself.",
                )
            item = group[name]
            if isinstance(item, h5py.Dataset):
                _check_storage(item, uri)
            elif isinstance(item, h5py.Group) and (address := _address(item)) not in seen:
                seen.add(address)
                waiting.append((item, depth + 1))


def _address(item: Any) -> int:
    return int(h5py.h5o.get_info(item.id).addr)


def _check_storage(dataset: h5py.Dataset, uri: str) -> None:
    if dataset.external or dataset.is_virtual:
        raise AtlasError(
            f"{dataset.name} takes its data from another file; such files are refused.",
            where=uri,
            fix="Write the data into the file itself.",
        )


def check_size(dataset: h5py.Dataset, uri: str) -> None:
    """AtlasError when a dataset that is about to be read declares far more than is stored, or was never written."""
    declared, stored = int(dataset.size or 0) * dataset.dtype.itemsize, int(dataset.id.get_storage_size())
    if dataset.chunks and int(np.prod(dataset.chunks, dtype=np.int64)) * dataset.dtype.itemsize > MAX_CHUNK_BYTES:
        raise AtlasError(f"{dataset.name} is stored in chunks of more than {MAX_CHUNK_BYTES:,} bytes.", where=uri)
    if declared > EXPANSION_FLOOR_BYTES and declared > stored * MAX_EXPANSION:
        raise AtlasError(f"{dataset.name} declares {declared:,} bytes but stores only {stored:,}.", where=uri)


def check_written(dataset: h5py.Dataset, uri: str) -> None:
    """AtlasError when parts of a dataset have no storage: an interrupted writer leaves zeros that look like data."""
    check_size(dataset, uri)
    if not dataset.size:
        return
    if dataset.chunks is None:
        if dataset.id.get_storage_size() == 0:
            raise AtlasError(f"{dataset.name} was never written.", where=uri, fix="Write the file again.")
        return
    expected = int(np.prod([-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)]))
    if (written := dataset.id.get_num_chunks()) < expected:
        raise AtlasError(
            f"{expected - written:,} of {expected:,} chunks of {dataset.name} were never written.",
            where=uri,
            fix="The program that wrote the file was interrupted: write it again.",
        )


def read_texts(dataset: h5py.Dataset, uri: str, start: int = 0, stop: int | None = None) -> list[str]:
    """A range of a text dataset; AtlasError when it is not one, or holds more text than any atlas does."""
    if dataset.ndim != 1 or not (h5py.check_string_dtype(dataset.dtype) or dataset.dtype.kind in "SO"):
        raise AtlasError(f"{dataset.name} holds no texts ({dataset.dtype}).", where=uri)
    if dataset.dtype.kind == "S" and dataset.dtype.itemsize > MAX_FIXED_TEXT_BYTES:
        raise AtlasError(f"{dataset.name} holds texts of {dataset.dtype.itemsize:,} bytes each.", where=uri)
    check_size(dataset, uri)
    stop = len(dataset) if stop is None else min(stop, len(dataset))
    texts: list[str] = []
    total_bytes = 0
    for first in range(start, stop, TEXTS_AT_ONCE):
        for value in dataset[first : min(first + TEXTS_AT_ONCE, stop)]:
            text = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
            total_bytes += len(text)
            texts.append(text)
        if total_bytes > MAX_TEXT_BYTES:
            raise AtlasError(f"{dataset.name} holds more than {MAX_TEXT_BYTES:,} bytes of text.", where=uri)
    return texts


def read_numbers(dataset: h5py.Dataset, uri: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
    """A range of a one-dimensional dataset of plain numbers, in the machine's byte order."""
    if dataset.ndim != 1 or dataset.dtype.kind not in "iufb":
        raise AtlasError(f"{dataset.name} holds no plain numbers ({dataset.dtype}).", where=uri)
    check_size(dataset, uri)
    values = dataset[start:stop]
    return values.astype(values.dtype.newbyteorder("="), copy=False)
