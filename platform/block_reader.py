"""A seekable file over ranged reads, with the last few blocks kept.

Readers of HDF5 and Parquet seek back and forth over small pieces; one request for each would take longer than the data.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES = 8 * 1024 * 1024
KEPT_BLOCKS = 8


class BlockReader(io.RawIOBase):
    """Reads `size_bytes` bytes through `fetch(start, length)`, one block at a time.

    `fetch` must return exactly `length` bytes. A read of more than `kept_blocks` blocks passes by the cache.
    """

    def __init__(
        self,
        size_bytes: int,
        fetch: Callable[[int, int], bytes],
        *,
        block_bytes: int = BLOCK_BYTES,
        kept_blocks: int = KEPT_BLOCKS,
    ) -> None:
        super().__init__()
        self._size_bytes, self._fetch = size_bytes, fetch
        self._block_bytes, self._kept_blocks = block_bytes, kept_blocks
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._position = 0

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """The position of the next read, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position; past the end is allowed and reads nothing there."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to {start + offset}, before the start of the file")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Fill `buffer` as far as the file goes; returns the number of bytes."""
        target = memoryview(buffer).cast("B")
        length = max(0, min(len(target), self._size_bytes - self._position))
        if length > self._kept_blocks * self._block_bytes:
            target[:length] = self._fetch(self._position, length)
        else:
            self._copy(target[:length])
        self._position += length
        return length

    def _copy(self, target: memoryview) -> None:
        done = 0
        while done < len(target):
            index, offset = divmod(self._position + done, self._block_bytes)
            piece = memoryview(self._block(index))[offset : offset + len(target) - done]
            target[done : done + len(piece)] = piece
            done += len(piece)

    def _block(self, index: int) -> bytes:
        if index in self._blocks:
            self._blocks.move_to_end(index)
        else:
            start = index * self._block_bytes
            self._blocks[index] = self._fetch(start, min(self._block_bytes, self._size_bytes - start))
            if len(self._blocks) > self._kept_blocks:
                self._blocks.popitem(last=False)
        return self._blocks[index]
