"""Texts of variable length stand in heaps; a damaged one makes the HDF5 library turn in a circle and never return.

Source: HDF5 File Format Specification, section III.E (global heap). The library walks from object to object by the
sizes it finds and does not see when one of them leads nowhere.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

SIGNATURE = b"GCOL"
HEADER_BYTES = 16
_SIZE = struct.Struct("<Q")
_OBJECT = struct.Struct("<HH4xQ")


def never_ends(block: bytes | memoryview) -> bool:
    """True when the library would not find the end of the heap collection that begins with these bytes."""
    return any(step == 0 for _, step in _objects(block))


def largest_object(block: bytes | memoryview) -> int:
    """Bytes of the largest object in the heap collection that begins with these bytes, by its own word."""
    return max((size for size, _ in _objects(block)), default=0)


def _objects(block: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """Size of each object (0 for the space that is left), and the step to the next; ends after a step of 0."""
    if len(block) < HEADER_BYTES:
        return
    end = min(len(block), _SIZE.unpack_from(block, 8)[0])
    place = HEADER_BYTES
    while place + _OBJECT.size <= end:
        number, _, size = _OBJECT.unpack_from(block, place)
        # Object 0 is the space that is left, with its header; others have a header and are rounded up to 8 bytes. The
        # library adds in 64 bits, so a size near the largest number comes round to nothing.
        step = (_OBJECT.size + (size + 7 & ~7) if number else size) & (2**64 - 1)
        yield size if number else 0, step
        if step == 0:
            return
        place += step
