"""zarr groups and arrays, of formats 2 and 3, sharded or not, as trees of `tree.py`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.metadata import ArrayV2Metadata

from genescale.ingestion.formats.hdf5_safety import (
    MAX_CHUNK_BYTES,
    MAX_ITEM_BYTES,
    MAX_RECORD_BYTES,
    MAX_TEXT_BYTES,
)
from genescale.ingestion.formats.tree import Array, Group, Node, Ranges
from genescale.ingestion.formats.zarr_store import ReadOnlyStore, opened_members
from genescale.ingestion.formats.zarr_texts import use_checked_codecs
from genescale.platform.errors import AtlasError, GenescaleError
from genescale.platform.storage import Store

# Everything else is refused: a codec decides what runs on the bytes of a stranger, and one of them is `pickle`.
CODECS = frozenset(
    (
        "bytes", "endian", "transpose", "sharding_indexed", "vlen-utf8", "vlen-bytes", "crc32c",
        "gzip", "zlib", "zstd", "blosc", "lz4", "bz2", "lzma",
        "shuffle", "bitround", "delta", "fixedscaleoffset", "packbits", "crc32", "adler32", "fletcher32", "astype",
    )
)  # fmt: skip
MAX_DEPTH = 32
use_checked_codecs()
NEVER_WRITTEN = "The program that wrote the file was interrupted: write it again."


@contextlib.contextmanager
def opened_zarr(uri: str, store: Store) -> Iterator[ZarrGroup]:
    """The root group of a zarr folder or zip; AtlasError when there is none or its metadata is damaged."""
    with opened_members(uri, store) as members:
        chunks = ReadOnlyStore(members)
        with _decoding(uri, "its metadata cannot be read"):
            try:
                root = _root_group(chunks)
            except FileNotFoundError as error:
                raise AtlasError(
                    "no zarr group is here.", where=uri, fix="Give the folder or zip that holds zarr.json or .zgroup."
                ) from error
        yield ZarrGroup(root, chunks, uri)


def _root_group(chunks: ReadOnlyStore) -> zarr.Group:
    try:
        return zarr.open_group(chunks, mode="r")
    except (ValueError, TypeError, KeyError):
        # One array of a type that zarr does not know, perhaps deep in `uns`, spoils the metadata of all in one file.
        return zarr.open_group(chunks, mode="r", use_consolidated=False)


class ZarrGroup(Group):
    """A group of a zarr hierarchy."""

    def __init__(self, group: zarr.Group, chunks: ReadOnlyStore, uri: str) -> None:
        self._group, self._chunks, self._uri = group, chunks, uri
        self.where = f"{uri}: {group.path}" if group.path else uri

    @property
    def attrs(self) -> Mapping[str, Any]:
        """Attributes of the group."""
        return dict(self._group.attrs)

    def names(self) -> list[str]:
        """Names of the members: from consolidated metadata, or by listing the store once."""
        if (known := self._group.metadata.consolidated_metadata) is not None:
            return [name for name in known.metadata if "/" not in name]
        return [name for name in self._chunks.children(self._group.path) if not name.startswith((".z", "zarr.json"))]

    def get(self, path: str) -> Node | None:
        """The member at a relative path, or None."""
        if path.count("/") > MAX_DEPTH or any(part in ("", ".", "..") for part in path.split("/")):
            return None
        with _decoding(f"{self.where}/{path}", "its metadata cannot be read"):
            try:
                item = self._group[path]
            except (KeyError, FileNotFoundError):
                return None
        if isinstance(item, zarr.Group):
            return ZarrGroup(item, self._chunks, self._uri)
        return ZarrArray(item, self._chunks, self._uri)


class ZarrArray(Array):
    """An array of a zarr hierarchy, or one field of an array of records."""

    def __init__(self, array: zarr.Array[Any], chunks: ReadOnlyStore, uri: str, field: str = "") -> None:
        self._array, self._chunks, self._uri, self._field = array, chunks, uri, field
        self.where = f"{uri}: {array.path}" + (f"['{field}']" if field else "")
        self.shape = tuple(array.shape)
        self.dtype = np.dtype(array.dtype)[field] if field else np.dtype(array.dtype)
        self.band = int(array.chunks[0]) if array.chunks else 1
        self._check()

    @property
    def attrs(self) -> Mapping[str, Any]:
        """Attributes of the array."""
        return dict(self._array.attrs)

    def numbers(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows start … stop-1 in the machine's byte order."""
        if not self.shape or not self.is_number:
            raise AtlasError(f"it holds no plain numbers ({self.dtype}).", where=self.where, fix="Write it again.")
        values = self._slice(start, stop)
        return values.astype(values.dtype.newbyteorder("="), copy=False)

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows of a matrix; AtlasError when no chunk of some rows was written.

        Chunks that hold only zeros may be left out by a writer, but hardly all chunks of a row.
        """
        self._chunks.missing.clear()
        values = self.numbers(start, stop)
        if self._chunks.missing:
            for first in range(start, stop, self.band):
                if not values[first - start : first - start + self.band].any():
                    raise AtlasError(
                        f"no chunk of cells {first:,} … {min(first + self.band, stop) - 1:,} was ever written.",
                        where=self.where,
                        fix=NEVER_WRITTEN,
                    )
        return values

    def texts(self, start: int = 0, stop: int | None = None) -> list[str]:
        """A range of texts."""
        if len(self.shape) != 1 or not self.is_text:
            raise AtlasError(f"it holds no texts ({self.dtype}).", where=self.where, fix="Write it again.")
        if self.dtype.kind in "SU" and self.dtype.itemsize > 4 * MAX_ITEM_BYTES:
            raise AtlasError(f"it holds texts of {self.dtype.itemsize:,} bytes each.", where=self.where)
        texts = [_as_text(value) for value in self._slice(start, stop)]
        if sum(map(len, texts)) > MAX_TEXT_BYTES:
            raise AtlasError(f"it holds more than {MAX_TEXT_BYTES:,} bytes of text.", where=self.where)
        return texts

    def field(self, name: str) -> Array:
        """One column of an array of records."""
        if self.dtype.itemsize > MAX_RECORD_BYTES:
            raise AtlasError(f"its records have {self.dtype.itemsize:,} bytes each.", where=self.where)
        return ZarrArray(self._array, self._chunks, self._uri, name)

    def scalar(self) -> Any:
        """The value of an array without dimensions."""
        if self.shape:
            raise AtlasError("it is no single value.", where=self.where)
        with _decoding(self.where):
            return np.asarray(self._array[()])[()]

    def check_written(self) -> None:
        """Nothing: which chunks are there is seen when they are read, see `complete`."""

    def ranges(self) -> Ranges:
        """A reader of row ranges of this array, all of whose chunks must be there."""
        if len(self.shape) != 1 or not self.is_number:
            raise AtlasError(f"it holds no plain numbers ({self.dtype}).", where=self.where, fix="Write it again.")
        return ZarrRanges(self)

    def complete(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows start … stop-1; AtlasError when a chunk of them was never written."""
        self._chunks.missing.clear()
        values = self.numbers(start, stop)
        if missing := sorted(self._chunks.missing):
            more = f", nor were {len(missing) - 1:,} others" if len(missing) > 1 else ""
            raise AtlasError(f"chunk {missing[0]} was never written{more}.", where=self.where, fix=NEVER_WRITTEN)
        self._check_shards(values, start)
        return values

    def _check_shards(self, values: npt.NDArray[Any], start: int) -> None:
        # A chunk that is absent from a shard is filled with zeros inside zarr, where it cannot be seen.
        if self._array.shards is None or not self.where.endswith("/data"):
            return
        for first in range(0, len(values), self.band):
            if not values[first : first + self.band].any():
                raise AtlasError(
                    f"chunk {(start + first) // self.band:,} was never written, or holds only zeros.",
                    where=self.where,
                    fix=NEVER_WRITTEN,
                )

    def _slice(self, start: int, stop: int | None) -> Any:
        begin, end, _ = slice(start, stop).indices(self.shape[0])
        declared = max(end - begin, 0) * int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        if declared > MAX_TEXT_BYTES * 4:
            raise AtlasError(f"{declared:,} bytes of it would be read at once.", where=self.where)
        with _decoding(self.where):
            if self._field:
                return self._array.get_basic_selection(slice(begin, end), fields=self._field)
            return np.asarray(self._array[begin:end])

    def _check(self) -> None:
        chunk_bytes = int(np.prod(self._array.chunks, dtype=np.int64)) * self.dtype.itemsize
        if chunk_bytes > MAX_CHUNK_BYTES:
            raise AtlasError(
                f"it is stored in chunks of more than {MAX_CHUNK_BYTES:,} bytes.",
                where=self.where,
                fix="Write it again with smaller chunks.",
            )
        if unknown := sorted(set(codecs(self._array.metadata)) - CODECS):
            raise AtlasError(
                f"it is encoded with {', '.join(unknown)}, which is not read.",
                where=self.where,
                fix="Write it again with zstd, gzip or blosc.",
            )


class ZarrRanges:
    """Ranges of a one-dimensional array; the last chunk is kept, because the next range begins in it."""

    def __init__(self, array: ZarrArray) -> None:
        self._array, self._chunk, self._size = array, array.band, len(array)
        self._kept: tuple[int, npt.NDArray[Any]] | None = None
        self.seconds = {"read": 0.0, "inflate": 0.0}

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Values start … stop-1; AtlasError when a chunk of them was never written."""
        if stop <= start:
            return np.empty(0, dtype=self._array.dtype.newbyteorder("="))
        first = start // self._chunk * self._chunk
        last = min(-(-stop // self._chunk) * self._chunk, self._size)
        # zarr fetches and decodes in threads of its own, so only the time of the whole process tells.
        began = time.process_time()
        values = self._whole_chunks(first, last)
        self.seconds["inflate"] += time.process_time() - began
        tail = (last - 1) // self._chunk * self._chunk
        self._kept = (tail, values[tail - first :].copy())
        return values[start - first : stop - first]

    def _whole_chunks(self, first: int, last: int) -> npt.NDArray[Any]:
        if self._kept is None or self._kept[0] != first:
            return self._array.complete(first, last)
        kept = self._kept[1]
        if first + len(kept) >= last:
            return kept
        return np.concatenate([kept, self._array.complete(first + len(kept), last)])


def codecs(metadata: Any) -> Iterator[str]:
    """Names of all codecs of an array, those inside shards included."""
    if isinstance(metadata, ArrayV2Metadata):
        for codec in (metadata.compressor, *(metadata.filters or ())):
            if codec is not None:
                yield str(codec.get_config()["id"])
        return
    yield from _named(json.loads(json.dumps([codec.to_dict() for codec in metadata.codecs], default=str)))


def _named(described: Any) -> Iterator[str]:
    for codec in described if isinstance(described, list) else ():
        yield str(codec.get("name", "")).removeprefix("numcodecs.")
        inside = codec.get("configuration") or {}
        for part in ("codecs", "index_codecs"):
            yield from _named(list(inside.get(part) or ()))


def _as_text(value: Any) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


@contextlib.contextmanager
def _decoding(where: str, what: str = "it cannot be decoded") -> Iterator[None]:
    try:
        yield
    except (GenescaleError, KeyboardInterrupt):
        raise
    except Exception as error:
        # A damaged chunk may ask for any memory; codecs and zarr itself raise whatever they like.
        raise AtlasError(
            f"{what} ({type(error).__name__}: {str(error)[:200]}).", where=where, fix="Download or write it again."
        ) from error
