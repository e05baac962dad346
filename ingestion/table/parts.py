"""Part files of a corpus: how a block of token rows is written, and how cells are read back by their global index.

Axis suffixes: `n` cells, `t` tokens of all cells of a block, one after the other.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genescale.ingestion.schema import PARTITION_COLUMN, TOKEN_COLUMN
from genescale.platform.errors import CorpusError, IntegrityError
from genescale.platform.storage import Store

ROW_GROUP_CELLS = 4_096
READERS_AT_ONCE = 4
LABEL_COLUMN = "labels"
LABEL_PREFIX = f"{LABEL_COLUMN}."
"""`labels.NAME` reads one of the further obs columns as a column of its own."""
_TOKEN_LEAF = f"{TOKEN_COLUMN}.list.element"
_LABEL_LEAVES = [f"{LABEL_COLUMN}.key_value.key", f"{LABEL_COLUMN}.key_value.value"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One committed part file: full address, rows, and the dataset it belongs to (empty when it holds cells of all)."""

    uri: str
    rows: int
    dataset_id: str


class PartWriter:
    """Writes the rows of a part a row group at a time: the same rows give the same bytes, however they are handed over.

    Token ids are close to random, so a dictionary does not pay; splitting their bytes before zstd saves a fifth of the
    plain form. Page checksums are written because Parquet readers otherwise return a flipped bit as data. Statistics
    are kept of columns with one value per row only: they prune reads, those of tokens would not.
    """

    def __init__(self, schema: pa.Schema, *, row_group_cells: int = ROW_GROUP_CELLS) -> None:
        self.schema, self.row_group_cells = schema, row_group_cells
        # Arrow's own memory: a Python file object would be called back, and grow by copies.
        self._sink = pa.BufferOutputStream()
        scalars = [field.name for field in schema if not pa.types.is_nested(field.type)]
        self._writer = pq.ParquetWriter(
            self._sink,
            schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=[field.name for field in schema if pa.types.is_string(field.type)] + _LABEL_LEAVES,
            column_encoding={_TOKEN_LEAF: "BYTE_STREAM_SPLIT"},
            write_statistics=scalars,
            write_page_checksum=True,
        )
        self._waiting: list[pa.Table] = []
        self._rows_waiting = 0

    def add(self, table: pa.Table) -> None:
        """Take in further rows of the schema."""
        self._waiting.append(table)
        self._rows_waiting += table.num_rows
        if self._rows_waiting >= self.row_group_cells:
            rows = pa.concat_tables(self._waiting)
            whole = rows.num_rows // self.row_group_cells * self.row_group_cells
            self._write(rows.slice(0, whole))
            self._waiting, self._rows_waiting = [rows.slice(whole)], rows.num_rows - whole

    def finish(self) -> bytes:
        """The file."""
        if self._rows_waiting:
            self._write(pa.concat_tables(self._waiting))
            self._waiting, self._rows_waiting = [], 0
        self._writer.close()
        data: bytes = self._sink.getvalue().to_pybytes()
        return data

    def _write(self, rows: pa.Table) -> None:
        for start in range(0, rows.num_rows, self.row_group_cells):
            # Pages end where pieces of a table do: in one piece, the bytes do not depend on how rows were handed over.
            group = rows.slice(start, self.row_group_cells).combine_chunks()
            self._writer.write_table(group, row_group_size=self.row_group_cells)


def part_bytes(table: pa.Table, *, row_group_cells: int = ROW_GROUP_CELLS) -> bytes:
    """A part file of these rows; the same rows give the same bytes."""
    writer = PartWriter(table.schema, row_group_cells=row_group_cells)
    writer.add(table)
    return writer.finish()


@dataclasses.dataclass(frozen=True, eq=False)
class TokenBlock:
    """Decoded tokens of one row group: tokens_t one cell after the other, offsets of n+1 cells."""

    tokens_t: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]

    def cell(self, row: int) -> npt.NDArray[Any]:
        """Tokens of one cell (a read-only view)."""
        return self.tokens_t[self.offsets[row] : self.offsets[row + 1]]

    @property
    def size_bytes(self) -> int:
        """Memory it takes."""
        return self.tokens_t.nbytes + self.offsets.nbytes


class PartReader:
    """Reads committed parts; keeps decoded row groups within a byte budget, least recently used out first."""

    def __init__(self, parts: Sequence[Part], store: Store, token_dtype: npt.DTypeLike, cache_bytes: int) -> None:
        self.parts, self.store, self.cache_bytes = tuple(parts), store, cache_bytes
        self.token_dtype = np.dtype(token_dtype)
        self._starts = [0, *itertools.accumulate(part.rows for part in self.parts)]
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[int, int], TokenBlock] = OrderedDict()
        self._held_bytes = 0
        self._footers: dict[int, pq.FileMetaData] = {}
        self._group_starts: dict[int, list[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["parts"], state["store"], state["token_dtype"], state["cache_bytes"])  # type: ignore[misc]

    def scalars(self, schema: pa.Schema, numbers: Sequence[int] | None = None) -> pa.Table:
        """Columns of every part (or of those with these numbers), in order; the dataset is the part's own."""
        parts = self.parts if numbers is None else [self.parts[number] for number in numbers]
        if not parts:
            return schema.empty_table()
        with ThreadPoolExecutor(READERS_AT_ONCE) as pool:
            return pa.concat_tables(pool.map(lambda part: self._scalars_of(part, schema), parts))

    def tokens(self, indices: Sequence[int]) -> list[npt.NDArray[Any]]:
        """Tokens of cells by global index, in the order asked for; each row group is decoded at most once."""
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for place, index in enumerate(indices):
            part, row = self._locate(int(index))
            group, row_in_group = self._group(part, row)
            wanted.setdefault((part, group), []).append((place, row_in_group))
        found: list[Any] = [None] * len(indices)
        for key in sorted(wanted):
            block = self._block(key)
            for place, row in wanted[key]:
                found[place] = block.cell(row)
        return found

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self._starts[-1]:
            raise CorpusError(f"there is no cell {index}.", fix=f"Cells are numbered 0 to {self._starts[-1] - 1}.")
        part = bisect.bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]

    def _group(self, part: int, row: int) -> tuple[int, int]:
        if part not in self._group_starts:
            footer = self._footer(part)
            sizes = (footer.row_group(group).num_rows for group in range(footer.num_row_groups))
            self._group_starts[part] = [0, *itertools.accumulate(sizes)]
        starts = self._group_starts[part]
        if row >= starts[-1]:
            raise IntegrityError("the part has fewer rows than its commit says.", where=self.parts[part].uri)
        group = bisect.bisect_right(starts, row) - 1
        return group, row - starts[group]

    def _footer(self, part: int) -> pq.FileMetaData:
        if part not in self._footers:
            with self.store.open(self.parts[part].uri) as file, _checked(self.parts[part]):
                self._footers[part] = pq.read_metadata(file)
        return self._footers[part]

    def _block(self, key: tuple[int, int]) -> TokenBlock:
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
        block = self._decode(*key)
        with self._lock:
            if key not in self._blocks:
                self._blocks[key] = block
                self._held_bytes += block.size_bytes
            while self._held_bytes > self.cache_bytes and len(self._blocks) > 1:
                self._held_bytes -= self._blocks.popitem(last=False)[1].size_bytes
        return block

    def _decode(self, part: int, group: int) -> TokenBlock:
        with self.store.open(self.parts[part].uri) as source, _checked(self.parts[part]):
            file = pq.ParquetFile(source, metadata=self._footer(part), page_checksum_verification=True)
            column = file.read_row_group(group, columns=[TOKEN_COLUMN]).column(0).combine_chunks()
        lists = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        offsets = lists.offsets.to_numpy().astype(np.int64)
        # `values` ignores the offset of a sliced array; one that was just read has none.
        tokens_t = lists.values.to_numpy(zero_copy_only=False).astype(self.token_dtype, copy=False)
        tokens_t.setflags(write=False)
        return TokenBlock(tokens_t, offsets)

    def _scalars_of(self, part: Part, schema: pa.Schema) -> pa.Table:
        with self.store.open(part.uri) as source, _checked(part):
            file = pq.ParquetFile(source, page_checksum_verification=True)
            present = set(file.schema_arrow.names)
            wanted = {LABEL_COLUMN if _label(name) else name for name in schema.names}
            table = file.read(columns=sorted(wanted & present))
        if file.metadata.num_rows != part.rows:
            raise IntegrityError(f"{file.metadata.num_rows} rows, its commit says {part.rows}.", where=part.uri)
        return pa.table([_column(table, field, part) for field in schema], schema=schema)


def _column(table: pa.Table, field: pa.Field, part: Part) -> pa.Array | pa.ChunkedArray:
    """A column of a part; null where the part was written before the column was, or has no such label."""
    if field.name in table.column_names:
        return table.column(field.name).cast(field.type)
    if field.name == PARTITION_COLUMN:
        return pa.repeat(pa.scalar(part.dataset_id, field.type), part.rows)
    label = _label(field.name)
    if label and LABEL_COLUMN in table.column_names:
        return pc.map_lookup(table.column(LABEL_COLUMN), label, "first").cast(field.type)
    if not field.nullable:
        raise IntegrityError(f"the part has no column '{field.name}'.", where=part.uri)
    return pa.nulls(part.rows, field.type)


def _label(name: str) -> str:
    """The obs column that `labels.NAME` asks for; an empty text for other columns."""
    return name[len(LABEL_PREFIX) :] if name.startswith(LABEL_PREFIX) else ""


@contextlib.contextmanager
def _checked(part: Part) -> Iterator[None]:
    """Turn what Parquet says about damaged bytes into an IntegrityError that names the part."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(
            f"the part cannot be read: {error}.",
            where=part.uri,
            fix="Restore the file, or remove its dataset and ingest it again.",
        ) from error
