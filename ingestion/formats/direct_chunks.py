"""Ranges of long HDF5 datasets, faster than the library reads them: raw chunks, inflated by ISA-L outside its lock.

HDF5 holds one lock while it inflates, with a slow zlib. Here only the raw bytes of chunks come from the library; they
are inflated in one or two threads while the next ones are fetched. Filters and layouts that are not known here are
read by the library itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from genescale.ingestion.formats.hdf5_safety import filters
from genescale.ingestion.formats.tree import Ranges
from genescale.platform.errors import AtlasError

DEFLATE, SHUFFLE = 1, 2
KNOWN_PIPELINES: tuple[list[int], ...] = ([], [DEFLATE], [SHUFFLE, DEFLATE], [SHUFFLE])
# Workers of a cluster have one processor each; a second thread helps only where one process has several.
INFLATE_THREADS = 1
# Chunks that one thread inflates in one go: handing over costs more than inflating a few kilobytes.
BATCH_BYTES = 512 * 1024
NEVER_WRITTEN = "The program that wrote the file was interrupted: write it again."


def dataset_ranges(dataset: h5py.Dataset, where: str, *, remote: bool, threads: int = INFLATE_THREADS) -> Ranges:
    """The fastest reader that fits the layout of a one-dimensional dataset of numbers."""
    if is_direct(dataset, remote=remote):
        return DirectChunks(dataset, where, threads=threads)
    return Slices(dataset, where)


def is_direct(dataset: h5py.Dataset, *, remote: bool) -> bool:
    """True when raw chunks are read and decoded here; a chunk that was never written is then met on the way.

    Chunks without filters are read faster by the library, unless they come from object storage.
    """
    pipeline = filters(dataset)
    return (
        dataset.ndim == 1 and dataset.chunks is not None and pipeline in KNOWN_PIPELINES and (remote or pipeline != [])
    )


class Slices:
    """Ranges read by the HDF5 library itself."""

    def __init__(self, dataset: h5py.Dataset, where: str) -> None:
        self._dataset, self._where = dataset, where
        self.seconds = {"read": 0.0, "inflate": 0.0}

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Values start … stop-1 in the machine's byte order."""
        began = time.thread_time()
        values = self._dataset[start:stop]
        # The library reads and inflates in one call.
        self.seconds["inflate" if filters(self._dataset) else "read"] += time.thread_time() - began
        return values.astype(values.dtype.newbyteorder("="), copy=False)


class _Raw(NamedTuple):
    """A chunk as it is stored: its number, the mask of the filters that were left out, its bytes."""

    number: int
    mask: int
    stored: bytes


class DirectChunks:
    """Ranges read chunk by chunk; the last chunk of a range is kept, because the next range begins in it.

    threads: how many inflate at a time; 1 inflates in the calling thread.
    """

    def __init__(self, dataset: h5py.Dataset, where: str, *, threads: int = INFLATE_THREADS) -> None:
        self._id, self._where, self._threads = dataset.id, where, threads
        self._dtype, self._size = dataset.dtype, int(dataset.shape[0])
        self._chunk = int(dataset.chunks[0])
        self._bytes = self._chunk * dataset.dtype.itemsize
        self._pipeline = filters(dataset)
        self._pool: ThreadPoolExecutor | None = None
        self._kept: tuple[int, npt.NDArray[Any]] | None = None
        self.seconds = {"read": 0.0, "inflate": 0.0}

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Values start … stop-1 in the machine's byte order; AtlasError names a chunk that is absent or damaged."""
        values = np.empty(max(stop - start, 0), dtype=self._dtype)
        if stop <= start:
            return values.astype(self._dtype.newbyteorder("="), copy=False)
        numbers = range(start // self._chunk, -(-stop // self._chunk))
        for number, decoded in self._decoded(numbers):
            first = number * self._chunk
            low, high = max(start, first), min(stop, first + self._chunk)
            values[low - start : high - start] = decoded[low - first : high - first]
            if number == numbers[-1]:
                self._kept = (number, decoded)
        return values.astype(self._dtype.newbyteorder("="), copy=False)

    def _decoded(self, numbers: range) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Chunks in order; the first may be the one that was kept."""
        if self._kept is not None and self._kept[0] == numbers[0]:
            yield self._kept
            numbers = numbers[1:]
        step = max(1, BATCH_BYTES // self._bytes)
        batches = (self._raw(numbers[first : first + step]) for first in range(0, len(numbers), step))
        if self._threads == 1 or len(numbers) == 1 or DEFLATE not in self._pipeline:
            for batch in batches:
                yield from self._inflated(batch)
            return
        yield from self._in_threads(batches)

    def _in_threads(self, batches: Iterator[list[_Raw]]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        waiting: deque[Future[list[tuple[int, npt.NDArray[Any]]]]] = deque()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="inflate")
        for batch in batches:
            waiting.append(self._pool.submit(self._inflated, batch))
            # One batch more than threads keeps them busy and memory bounded.
            if len(waiting) > self._threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()

    def _raw(self, numbers: range) -> list[_Raw]:
        """Stored bytes of some chunks."""
        began = time.thread_time()
        batch = [_Raw(number, *self._stored(number)) for number in numbers]
        self.seconds["read"] += time.thread_time() - began
        return batch

    def _stored(self, number: int) -> tuple[int, bytes]:
        """Mask of the filters that were left out of a chunk, and its stored bytes."""
        try:
            mask, raw = self._id.read_direct_chunk((number * self._chunk,))
        except MemoryError:
            # The index of a damaged file says how many bytes a chunk has, and the library asks for them all.
            what = f"chunk {number:,} declares more bytes than there is memory."
            raise AtlasError(what, where=self._where, fix="Download the file again.") from None
        except (OSError, RuntimeError, ValueError) as error:
            if "address is undefined" in str(error) or "not allocated" in str(error) or "not found" in str(error):
                raise AtlasError(f"chunk {number:,} was never written.", where=self._where, fix=NEVER_WRITTEN) from None
            raise
        if not raw:
            raise AtlasError(f"chunk {number:,} was never written.", where=self._where, fix=NEVER_WRITTEN)
        return mask, raw

    def _inflated(self, batch: list[_Raw]) -> list[tuple[int, npt.NDArray[Any]]]:
        from isal import isal_zlib

        damaged: tuple[type[Exception], ...] = (isal_zlib.error, ValueError)  # type: ignore[assignment]
        began = time.thread_time()
        chunks = []
        for number, mask, raw in batch:
            try:
                chunks.append((number, self._undone(raw, mask, isal_zlib)))
            except damaged as error:
                raise AtlasError(
                    f"chunk {number:,} is damaged ({error}).", where=self._where, fix="Download the file again."
                ) from None
        # Several threads add to one number; the sum is for a report, and an addition lost now and then does no harm.
        self.seconds["inflate"] += time.thread_time() - began
        return chunks

    def _undone(self, stored: bytes, mask: int, isal_zlib: Any) -> npt.NDArray[Any]:
        """The chunk's values, with its filters undone from the last to the first."""
        raw: bytes | memoryview = stored
        for place in reversed(range(len(self._pipeline))):
            if mask >> place & 1:
                continue
            if self._pipeline[place] == DEFLATE:
                inflater = isal_zlib.decompressobj()
                raw = inflater.decompress(raw, self._bytes + 1)
                if not inflater.eof:
                    raise ValueError("it does not end where it should")
            elif memoryview(raw).nbytes == self._bytes:
                raw = unshuffled(raw, self._dtype.itemsize)
        if (size_bytes := memoryview(raw).nbytes) != self._bytes:
            raise ValueError(f"it holds {size_bytes:,} bytes, {self._bytes:,} belong to it")
        return np.frombuffer(raw, dtype=self._dtype)


def unshuffled(raw: bytes | memoryview, itemsize: int) -> memoryview:
    """Bytes in their order before HDF5's shuffle filter, which stores first all first bytes, then all second ones."""
    planes = np.frombuffer(raw, dtype=np.uint8).reshape(itemsize, -1)
    items = np.empty((planes.shape[1], itemsize), dtype=np.uint8)
    # Plane by plane is more than twice as fast as one transposition.
    for place, plane in enumerate(planes):
        items[:, place] = plane
    return items.data
