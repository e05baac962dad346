"""Where a Parquet file is damaged: every page is checked against its own checksum, without decoding it.

A Parquet library says that a checksum does not fit, but not where. Here the page headers (Thrift's compact protocol,
https://github.com/apache/parquet-format) are read one after the other, so that a fault has a row group, a column and a
page. Page headers and the footer have no checksum in the format: only a digest of the whole file speaks for them.
"""

from __future__ import annotations

import dataclasses
import io
import zlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

MAGIC = b"PAR1"
TAIL_BYTES = 8
# Types of Thrift's compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_PAGE_TYPE, _COMPRESSED_SIZE, _CRC = 1, 3, 4
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_DEEPEST = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageFault:
    """A damaged place: in a page of a column (numbers from 0), or in what holds the pages together."""

    what: str
    offset: int
    """First byte of the damaged page or region within the file."""
    row_group: int | None = None
    column: str = ""
    page: int | None = None

    @property
    def place(self) -> str:
        """The place in words."""
        byte = f"byte {self.offset:,}"
        if self.row_group is None:
            return byte
        page = "" if self.page is None else f", page {self.page}"
        return f"row group {self.row_group}, column {self.column}{page} ({byte})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chunk:
    row_group: int
    column: str
    start: int
    stop: int


def page_faults(data: bytes) -> tuple[int, list[PageFault]]:
    """(number of pages, damaged places) of a Parquet file.

    A page without a checksum counts as damaged, because Genescale writes none. Page headers and the footer have no
    checksum of their own: damage there is found only where it makes them impossible.
    """
    try:
        chunks = list(_footer(data))
    except _DamagedError as error:
        return 0, [error.fault]
    pages, faults = 0, []
    for chunk in chunks:
        n, found = _walk(data, chunk)
        pages += n
        faults += found
    return pages, faults


def place_of(data: bytes, offset: int) -> PageFault:
    """What stands at byte `offset` of a sound file."""
    for chunk in _footer(data):
        if chunk.start <= offset < chunk.stop:
            pages = list(_pages(data, chunk))
            number = max(i for i, (start, _, _, _) in enumerate(pages) if start <= offset)
            what = "a page header is damaged" if offset < pages[number][1] else "a page is damaged"
            return _fault(what, pages[number][0], chunk, number)
    return PageFault(what="the header is damaged" if offset < len(MAGIC) else "the footer is damaged", offset=offset)


def undecodable(data: bytes) -> PageFault | None:
    """The first column chunk that cannot be decoded though its pages fit their checksums, None when all can."""
    parquet = pq.ParquetFile(io.BytesIO(data))
    for chunk in _footer(data):
        try:
            found = parquet.read_row_group(chunk.row_group, columns=[chunk.column]).num_rows
        except (pa.ArrowException, OSError, ValueError):
            found = -1
        if found != parquet.metadata.row_group(chunk.row_group).num_rows:
            return _somewhere("a page header, or what the footer says of this column, is damaged", data, chunk)
    return None


def differing_chunk(data: bytes, sound: bytes) -> PageFault | None:
    """The one column chunk that differs from a file with the same rows, None when none or several do."""
    try:
        pairs = list(zip(_footer(data), _footer(sound), strict=True))
    except (_DamagedError, ValueError):
        return None
    differing = [chunk for chunk, other in pairs if data[chunk.start : chunk.stop] != sound[other.start : other.stop]]
    if len(differing) != 1:
        return None
    return _somewhere("a page header is damaged", data, differing[0])


def _somewhere(what: str, data: bytes, chunk: _Chunk) -> PageFault:
    page = 0 if len(list(_pages(data, chunk))) == 1 else None
    return PageFault(what=what, offset=chunk.start, row_group=chunk.row_group, column=chunk.column, page=page)


class _DamagedError(Exception):
    def __init__(self, fault: PageFault) -> None:
        super().__init__(fault.what)
        self.fault = fault


def _footer(data: bytes) -> list[_Chunk]:
    if data[:4] != MAGIC:
        raise _DamagedError(PageFault(what="the header (first four bytes) is damaged", offset=0))
    start = len(data) - TAIL_BYTES - int.from_bytes(data[-TAIL_BYTES:-4], "little")
    damaged = PageFault(what="the footer is damaged", offset=max(0, min(start, len(data) - TAIL_BYTES)))
    if data[-4:] != MAGIC or start < len(MAGIC):
        raise _DamagedError(damaged)
    try:
        return _chunks(pq.read_metadata(io.BytesIO(data)), start)
    except (pa.ArrowException, OSError, ValueError):
        raise _DamagedError(damaged) from None


def _chunks(metadata: pq.FileMetaData, footer_start: int) -> list[_Chunk]:
    """Column chunks in file order; ValueError when they do not lie one after the other, as a writer puts them."""
    chunks, at = [], len(MAGIC)
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            first = column.dictionary_page_offset if column.has_dictionary_page else None
            start = min(column.data_page_offset, first) if first else column.data_page_offset
            stop = start + column.total_compressed_size
            if start != at or stop > footer_start:
                raise ValueError("column chunks overlap or leave a gap")
            chunks.append(_Chunk(row_group=group, column=column.path_in_schema, start=start, stop=stop))
            at = stop
    return chunks


def _walk(data: bytes, chunk: _Chunk) -> tuple[int, list[PageFault]]:
    faults, n_pages = [], 0
    try:
        for number, (start, body, stop, crc) in enumerate(_pages(data, chunk)):
            n_pages += 1
            if crc is None:
                faults.append(_fault("a page has no checksum", start, chunk, number))
            elif zlib.crc32(memoryview(data)[body:stop]) != crc & 0xFFFFFFFF:
                faults.append(_fault("a page does not fit its checksum", start, chunk, number))
    except _DamagedError as error:
        # A wrong size in a header shows first as a page that does not fit, then as a header that is none.
        if not faults or faults[-1].page != n_pages - 1:
            faults.append(error.fault)
    return n_pages, faults


def _pages(data: bytes, chunk: _Chunk) -> Iterator[tuple[int, int, int, int | None]]:
    """Start, start of the body, stop and checksum of every page of a column chunk."""
    at, number = chunk.start, 0
    while at < chunk.stop:
        damaged = _fault("a page header is damaged", at, chunk, number)
        try:
            fields, body = read_struct(data, at, chunk.stop)
        except ValueError:
            raise _DamagedError(damaged) from None
        size = fields.get(_COMPRESSED_SIZE, -1)
        known = fields.get(_PAGE_TYPE) in (_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2)
        if not known or size < 0 or body + size > chunk.stop:
            raise _DamagedError(damaged)
        yield at, body, body + size, fields.get(_CRC)
        at, number = body + size, number + 1


def _fault(what: str, offset: int, chunk: _Chunk, page: int) -> PageFault:
    return PageFault(what=what, offset=offset, row_group=chunk.row_group, column=chunk.column, page=page)


def read_struct(data: bytes, start: int, stop: int) -> tuple[dict[int, int], int]:
    """(32-bit fields of a Thrift struct by id, position behind it); ValueError when it is malformed."""
    reader = _Thrift(data, start, stop)
    fields = dict(reader.struct(0))
    return fields, reader.at


class _Thrift:
    """Reads what a page header is made of, within bounds."""

    def __init__(self, data: bytes, at: int, stop: int) -> None:
        self.data, self.at, self.stop = data, at, stop

    def struct(self, depth: int) -> Iterator[tuple[int, int]]:
        if depth > _DEEPEST:
            raise ValueError("structs are nested too deeply")
        number = 0
        while (head := self.byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self.zigzag()
            value = self.value(head & 0x0F, depth)
            if value is not None:
                yield number, value

    def value(self, kind: int, depth: int) -> int | None:
        if kind == _I32:
            return self.zigzag()
        if kind in (_I16, _I64):
            self.zigzag()
        elif kind == _BYTE:
            self.skip(1)
        elif kind == _DOUBLE:
            self.skip(8)
        elif kind == _BINARY:
            self.skip(self.varint())
        elif kind == _STRUCT:
            for _ in self.struct(depth + 1):
                pass
        elif kind in (_LIST, _SET):
            self.items(depth)
        elif kind not in (_TRUE, _FALSE):
            raise ValueError(f"a field of the unknown type {kind}")
        return None

    def items(self, depth: int) -> None:
        head = self.byte()
        count = head >> 4 if head >> 4 < 15 else self.varint()
        for _ in range(count):
            # In a list a truth value takes a byte of its own.
            self.skip(1) if head & 0x0F in (_TRUE, _FALSE) else self.value(head & 0x0F, depth + 1)

    def byte(self) -> int:
        self.skip(1)
        return self.data[self.at - 1]

    def skip(self, count: int) -> None:
        if count > self.stop - self.at:
            raise ValueError("the header runs past its column")
        self.at += count

    def varint(self) -> int:
        result = shift = 0
        while True:
            byte = self.byte()
            result |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return result
            shift += 7
            if shift > 63:
                raise ValueError("a number is too long")

    def zigzag(self) -> int:
        number = self.varint()
        return (number >> 1) ^ -(number & 1)
