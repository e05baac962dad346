"""A read-only zarr store over our own storage: a folder, local or in object storage, or a zip archive of one.

It remembers which chunks were asked for and are not there, because zarr reads those as zeros without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import zipfile
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Protocol

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype

from genescale.platform.errors import AtlasError, NotFoundError
from genescale.platform.storage import Store, join

METADATA = frozenset(("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata"))
ROOT_MARKERS = ("zarr.json", ".zgroup", ".zmetadata")
MAX_METADATA_BYTES = 64 * 1024 * 1024
MAX_OBJECT_BYTES = 1024 * 1024 * 1024
# Members of an archive are stored, or deflated at most about 1 : 1,030.
MAX_EXPANSION = 2_000
DAMAGED = "The archive is damaged: download it again."


class Members(Protocol):
    """The files of a zarr hierarchy by key."""

    def read(self, key: str) -> bytes | None:
        """The whole content, None when it is not there."""

    def read_range(self, key: str, start: int, stop: int | None) -> bytes | None:
        """Bytes start … stop-1, to the end without a stop, the last ones with a negative start."""

    def all_keys(self) -> list[str]:
        """All keys, sorted."""


class FolderMembers:
    """Files below a folder of a Store."""

    def __init__(self, store: Store, uri: str) -> None:
        self._store, self._uri = store, uri
        self._keys: list[str] | None = None
        self._sizes: dict[str, int] = {}

    def read(self, key: str) -> bytes | None:
        """The whole content of a file."""
        limit = MAX_METADATA_BYTES if _is_metadata(key) else MAX_OBJECT_BYTES
        try:
            return self._store.read(join(self._uri, key), max_bytes=limit)
        except NotFoundError:
            return None

    def read_range(self, key: str, start: int, stop: int | None) -> bytes | None:
        """A range of a file."""
        address = join(self._uri, key)
        try:
            if start < 0 or stop is None:
                size_bytes = self._size(address)
                start = max(0, start + size_bytes) if start < 0 else start
                stop = size_bytes
            return self._store.read_range(address, start, max(0, min(stop - start, MAX_OBJECT_BYTES)))
        except NotFoundError:
            return None

    def all_keys(self) -> list[str]:
        """All keys; the folder is listed once."""
        if self._keys is None:
            self._keys = [entry.uri.removeprefix(self._uri).lstrip("/") for entry in self._store.list(self._uri)]
        return self._keys

    def _size(self, address: str) -> int:
        # The index of a shard stands at its end, and is asked for again with every part of it.
        if address not in self._sizes:
            self._sizes[address] = self._store.stat(address).size_bytes
        return self._sizes[address]


class ZipMembers:
    """Members of a zip archive, read through any seekable file: of names that repeat, the last one counts."""

    def __init__(self, archive: zipfile.ZipFile, uri: str) -> None:
        self._archive, self._uri, self._lock = archive, uri, threading.Lock()
        names = [name for name in archive.namelist() if not name.endswith("/")]
        self._top = _top_folder(names)
        self._names = {name.removeprefix(self._top): name for name in names if name.startswith(self._top)}

    def read(self, key: str) -> bytes | None:
        """The whole content of a member."""
        if key not in self._names:
            return None
        limit = MAX_METADATA_BYTES if _is_metadata(key) else MAX_OBJECT_BYTES
        info = self._archive.getinfo(self._names[key])
        if info.file_size > limit or info.file_size > max(info.compress_size, 1) * MAX_EXPANSION:
            raise AtlasError(f"its member '{key}' declares {info.file_size:,} bytes.", where=self._uri, fix=DAMAGED)
        # Archives share one file position, so one member is read at a time.
        with self._lock, _zip_errors(self._uri, key):
            return self._archive.read(info)

    def read_range(self, key: str, start: int, stop: int | None) -> bytes | None:
        """A range of a member."""
        if key not in self._names:
            return None
        info = self._archive.getinfo(self._names[key])
        first = max(0, start + info.file_size) if start < 0 else start
        last = info.file_size if stop is None or start < 0 else min(stop, info.file_size)
        with self._lock, _zip_errors(self._uri, key), self._archive.open(info) as member:
            member.seek(first)
            return member.read(max(0, min(last - first, MAX_OBJECT_BYTES)))

    def all_keys(self) -> list[str]:
        """All keys, sorted."""
        return sorted(self._names)


def _is_metadata(key: str) -> bool:
    return key.rpartition("/")[2] in METADATA


def _top_folder(names: list[str]) -> str:
    """The one folder that everything lies in, with a slash; empty when the hierarchy is at the top."""
    if any(name in ROOT_MARKERS for name in names):
        return ""
    tops = {
        name.rpartition("/")[0] for name in names if name.count("/") == 1 and name.rpartition("/")[2] in ROOT_MARKERS
    }
    return f"{tops.pop()}/" if len(tops) == 1 else ""


@contextlib.contextmanager
def _zip_errors(uri: str, key: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise AtlasError(f"its member '{key}' cannot be read ({error}).", where=uri, fix=DAMAGED) from error
    except Exception as error:
        # zlib.error and its like come from whatever compressed the member.
        if type(error).__name__ not in ("error", "LZMAError"):
            raise
        raise AtlasError(f"its member '{key}' is damaged ({error}).", where=uri, fix=DAMAGED) from error


@contextlib.contextmanager
def opened_members(uri: str, store: Store) -> Iterator[Members]:
    """The files of the zarr folder or zip archive at `uri`."""
    if not store.exists(uri):
        yield FolderMembers(store, uri)
        return
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(store.open(uri))
        try:
            archive = stack.enter_context(zipfile.ZipFile(raw))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
            raise AtlasError(
                f"the zip archive is damaged or cut off ({error}).", where=uri, fix="Download it again."
            ) from error
        yield ZipMembers(archive, uri)


class ReadOnlyStore(ZarrStore):
    """What zarr asks of a store, over Members; `missing` lists chunks that were asked for and are not there."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, members: Members) -> None:
        super().__init__(read_only=True)
        self._members = members
        self.missing: list[str] = []

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The content of a key, or a range of it."""
        data = await asyncio.to_thread(self._get, key, byte_range)
        if data is None:
            if not _is_metadata(key):
                self.missing.append(key)
            return None
        return prototype.buffer.from_bytes(data)

    def _get(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        match byte_range:
            case None:
                return self._members.read(key)
            case RangeByteRequest():
                return self._members.read_range(key, byte_range.start, byte_range.end)
            case OffsetByteRequest():
                return self._members.read_range(key, byte_range.offset, None)
            case SuffixByteRequest():
                return self._members.read_range(key, -byte_range.suffix, None)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several ranges at once."""
        return list(await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges)))

    async def exists(self, key: str) -> bool:
        """True when the key is there."""
        return await asyncio.to_thread(self._members.read_range, key, 0, 1) is not None

    async def set(self, key: str, value: Buffer) -> None:
        """Refused."""
        self._check_writable()

    async def delete(self, key: str) -> None:
        """Refused."""
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        """All keys."""
        for key in await asyncio.to_thread(self._members.all_keys):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Keys that begin with a text."""
        for key in await asyncio.to_thread(self._members.all_keys):
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names right below a folder."""
        for name in await asyncio.to_thread(self.children, prefix):
            yield name

    def children(self, prefix: str) -> Any:
        """Names right below a folder, sorted."""
        start = f"{prefix.rstrip('/')}/" if prefix else ""
        return sorted(
            {key[len(start) :].partition("/")[0] for key in self._members.all_keys() if key.startswith(start)}
        )
