"""Open HDF5 files from strangers: nothing outside the file is read, and nothing larger than it claims to deserve.

An HDF5 file can name other files of the reader's machine (external storage, external links, virtual datasets) and can
declare terabytes in a few bytes. Both show in the header, so the whole file is walked before a value is read.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt

from genescale.ingestion.formats import hdf5_heap, signatures
from genescale.platform.errors import AtlasError, GenescaleError
from genescale.platform.storage import Store

MAX_OBJECTS = 100_000
MAX_DEPTH = 32
MAX_CHUNK_BYTES = 256 * 1024 * 1024
# gzip cannot compress better than about 1 : 1,030; files below the floor are not worth a thought.
MAX_EXPANSION = 2_000
EXPANSION_FLOOR_BYTES = 16 * 1024 * 1024
MAX_TEXT_BYTES = 256 * 1024 * 1024
MAX_ITEM_BYTES = 4_096
MAX_RECORD_BYTES = 64 * 1024
TEXTS_AT_ONCE = 4_096
# Filters that the HDF5 library brings, and the names of those that come with the package `hdf5plugin`.
BUILT_IN_FILTERS = frozenset((1, 2, 3, 4, 5, 6, 32000))
PLUGIN_FILTERS = {
    307: "bzip2", 32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32013: "zfp", 32015: "zstd", 32017: "sz",
    32018: "fcidecomp", 32024: "sz3", 32026: "blosc2", 32028: "sperr",
}  # fmt: skip
# Files of which each object was found harmless, by address and tag: a worker opens one file for many units.
WALKED_KEPT = 1_024
_walked: OrderedDict[tuple[str, str], None] = OrderedDict()
_walked_lock = threading.Lock()


@contextlib.contextmanager
def opened(uri: str, store: Store, *, etag: str = "") -> Iterator[h5py.File]:
    """The HDF5 file at `uri`, walked and found harmless; AtlasError says what is wrong with it otherwise.

    etag: the tag of the content, when it is known; a file that this process has walked is then not walked again.
    Errors of the HDF5 library inside the `with` block become AtlasError; others pass.
    """
    with store.open(uri) as raw, opened_file(raw, uri, etag=etag) as file:
        yield file


@contextlib.contextmanager
def opened_file(raw: BinaryIO, uri: str, *, etag: str = "", largest_text_bytes: int = 0) -> Iterator[h5py.File]:
    """As `opened`, of an open file that errors call `uri`.

    largest_text_bytes: a heap with a longer text is not read (0: any is). The library makes a copy of a text wherever
    it is pointed to, so a short file of pointers to one long text would fill the memory.
    """
    size_bytes = raw.seek(0, 2)
    raw.seek(0)
    head = raw.read(signatures.HEAD_BYTES)
    if not head.startswith(signatures.HDF5):
        raise signatures.refusal(head, size_bytes, uri)
    raw.seek(0)
    source = _Source(raw, uri, largest_text_bytes)
    try:
        with h5py.File(source, "r") as file:
            _walk_once(file, uri, etag)
            yield file
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        if not _of_hdf5(error):
            raise
        # A read that storage refused reaches us as a general failure of the library: the cause says more.
        raise source.failure or explained(error, size_bytes, uri) from error


class _Source(io.RawIOBase):
    """Passes reads through and keeps the error of the last one that failed, which the HDF5 library would swallow.

    What the library asks for is looked at where it is known to trust it too far.
    """

    def __init__(self, raw: BinaryIO, uri: str, largest_text_bytes: int) -> None:
        super().__init__()
        self._raw, self._uri, self._largest_text_bytes = raw, uri, largest_text_bytes
        self.failure: GenescaleError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._raw.seek(offset, whence)
        except (ValueError, OverflowError) as error:
            # A damaged address may be larger than any file: 64 bits without a sign.
            self.failure = AtlasError("an address leads out of the file.", where=self._uri, fix="Download it again.")
            raise self.failure from error

    def tell(self) -> int:
        return self._raw.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            length: int = self._raw.readinto(buffer)  # type: ignore[attr-defined]
            read = memoryview(buffer).cast("B")[:length]
            if read[:4] == hdf5_heap.SIGNATURE:
                self._check_heap(read)
            return length
        except GenescaleError as error:
            self.failure = error
            raise

    def _check_heap(self, read: memoryview) -> None:
        if hdf5_heap.never_ends(read):
            raise AtlasError("a heap of texts is damaged.", where=self._uri, fix="Download the file again.")
        if self._largest_text_bytes and hdf5_heap.largest_object(read) > self._largest_text_bytes:
            raise AtlasError(
                f"a text is longer than {self._largest_text_bytes:,} bytes.",
                where=self._uri,
                fix="Shorten or remove it.",
            )


def _of_hdf5(error: BaseException) -> bool:
    """True when the error came out of h5py, which calls back only into the file it reads: not of the caller's code."""
    files = (frame.f_code.co_filename.replace("\\", "/") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any("h5py" in file.split("/") for file in files)


def explained(error: Exception, size_bytes: int, uri: str) -> AtlasError:
    """The error of the HDF5 library in terms of the file: cut off, compressed in an unknown way, or damaged."""
    text = str(error).strip("'\"")
    if match := re.search(r"truncated file: eof = (\d+),.*stored_eof = (\d+)", text):
        return AtlasError(
            f"the file is cut off: {int(match[1]):,} of {int(match[2]):,} bytes are there.",
            where=uri,
            fix="Download it again.",
        )
    if "filter" in text and "not available" in text:
        return AtlasError(
            f"its data use a compression that this installation cannot read ({text}).",
            where=uri,
            fix="Install hdf5plugin, or write the file again with gzip or without compression.",
        )
    return AtlasError(
        f"the HDF5 content is damaged ({text}); the file has {size_bytes:,} bytes.", where=uri, fix="Download it again."
    )


def _walk_once(file: h5py.File, uri: str, etag: str) -> None:
    key = (uri, etag)
    with _walked_lock:
        if etag and key in _walked:
            _walked.move_to_end(key)
            return
    _check_links(file, uri)
    with _walked_lock:
        if etag:
            _walked[key] = None
            if len(_walked) > WALKED_KEPT:
                _walked.popitem(last=False)


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
                raise AtlasError(
                    f"it holds more objects than {MAX_OBJECTS:,}, or deeper ones than {MAX_DEPTH} levels: no atlas "
                    "does.",
                    where=uri,
                    fix="Write the file again with anndata.",
                )
            item = followed(group, name, uri)
            if isinstance(item, h5py.Group) and (address := _address(item)) not in seen:
                seen.add(address)
                waiting.append((item, depth + 1))


def followed(group: h5py.Group, name: str, uri: str) -> Any:
    """The member of a group, None if it is absent; AtlasError when it lies in another file or place."""
    link = group.get(name, getlink=True)
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink):
        raise AtlasError(
            f"{group.name.rstrip('/')}/{name} is a link that may lead out of the file; such files are refused.",
            where=uri,
            fix="Write the data into the file itself.",
        )
    item = group[name]
    if isinstance(item, h5py.Dataset):
        _check_storage(item, uri)
    return item


def _address(item: Any) -> int:
    return int(h5py.h5o.get_info(item.id).addr)


def _check_storage(dataset: h5py.Dataset, uri: str) -> None:
    if dataset.external or dataset.is_virtual:
        raise AtlasError(
            f"{dataset.name} takes its data from another file; such files are refused.",
            where=uri,
            fix="Write the data into the file itself.",
        )


def check_chunks(dataset: h5py.Dataset, uri: str) -> None:
    """AtlasError when a dataset is stored in chunks too large to hold, or compressed in a way nobody here reads."""
    if dataset.chunks and int(np.prod(dataset.chunks, dtype=np.int64)) * dataset.dtype.itemsize > MAX_CHUNK_BYTES:
        raise AtlasError(
            f"{dataset.name} is stored in chunks of more than {MAX_CHUNK_BYTES:,} bytes.",
            where=uri,
            fix="Write it again with smaller chunks.",
        )
    check_filters(dataset, uri)


def filters(dataset: h5py.Dataset) -> list[int]:
    """Numbers of the filters that a dataset's chunks went through, in the order of writing."""
    plan = dataset.id.get_create_plist()
    return [int(plan.get_filter(i)[0]) for i in range(plan.get_nfilters())]


def check_filters(dataset: h5py.Dataset, uri: str) -> None:
    """AtlasError that names a filter which is not installed; `hdf5plugin` is loaded when a dataset needs it."""
    needed = [number for number in filters(dataset) if number not in BUILT_IN_FILTERS]
    if not needed:
        return
    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401
    for number in needed:
        if not h5py.h5z.filter_avail(number):
            name = f" ({PLUGIN_FILTERS[number]})" if number in PLUGIN_FILTERS else ""
            raise AtlasError(
                f"{dataset.name} uses HDF5 filter {number}{name}, which is not installed.",
                where=uri,
                fix="Install hdf5plugin, or write the file again with gzip.",
            )


def check_size(dataset: h5py.Dataset, uri: str) -> None:
    """AtlasError when a dataset that is about to be read whole declares far more than is stored."""
    check_chunks(dataset, uri)
    declared = int(dataset.size or 0) * dataset.dtype.itemsize
    # Asking for the stored size walks the index of all chunks, so small datasets are not asked.
    if declared <= EXPANSION_FLOOR_BYTES:
        return
    stored = int(dataset.id.get_storage_size())
    if declared > stored * MAX_EXPANSION:
        raise AtlasError(
            f"{dataset.name} declares {declared:,} bytes but stores only {stored:,}.",
            where=uri,
            fix="The file is damaged, or made to be: write it again.",
        )


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


def read_texts(dataset: Any, uri: str, start: int = 0, stop: int | None = None) -> list[str]:
    """A range of a text dataset; AtlasError when it is not one, or holds more text than any atlas does.

    dataset: an h5py dataset, or one field of a dataset of records.
    """
    dtype = dataset.dtype
    if len(dataset.shape) != 1 or not (h5py.check_string_dtype(dtype) or dtype.kind in "SO"):
        raise AtlasError(f"{_name(dataset)} holds no texts ({dtype}).", where=uri)
    if dtype.kind == "S" and dtype.itemsize > MAX_ITEM_BYTES:
        raise AtlasError(f"{_name(dataset)} holds texts of {dtype.itemsize:,} bytes each.", where=uri)
    if isinstance(dataset, h5py.Dataset):
        check_size(dataset, uri)
    stop = dataset.shape[0] if stop is None else min(stop, dataset.shape[0])
    texts: list[str] = []
    total_bytes = 0
    for first in range(start, stop, TEXTS_AT_ONCE):
        values = dataset[first : min(first + TEXTS_AT_ONCE, stop)].tolist()
        texts += [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]
        total_bytes += sum(map(len, texts[first - start :]))
        if total_bytes > MAX_TEXT_BYTES:
            raise AtlasError(f"{_name(dataset)} holds more than {MAX_TEXT_BYTES:,} bytes of text.", where=uri)
    return texts


def _name(dataset: Any) -> str:
    return str(getattr(dataset, "name", "a field of records"))


def read_numbers(dataset: h5py.Dataset, uri: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
    """A range of a one-dimensional dataset of plain numbers, in the machine's byte order."""
    if dataset.ndim != 1 or dataset.dtype.kind not in "iufb":
        raise AtlasError(f"{dataset.name} holds no plain numbers ({dataset.dtype}).", where=uri)
    check_size(dataset, uri)
    values = dataset[start:stop]
    return values.astype(values.dtype.newbyteorder("="), copy=False)
