"""Cells of a request that came as Arrow: columns become tokens without a Python object for every gene.

One row is one cell:

    id        utf8, may be left out or null
    tokens    list of integers                 or else
    genes     list of utf8, or of a dictionary of utf8, and
    counts    list of numbers, as many as genes

The options of the request, as in a JSON body without `cells`, are JSON under the key `genescale` of the schema's
metadata.

Axis suffixes: `n` cells, `r` genes of all cells, `g` genes of one cell, `v` names of a dictionary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from genescale.platform.errors import InputError
from genescale.serving.answering.cells import CellReader, PreparedCell, check_names_differ
from genescale.serving.answering.intake import Intake
from genescale.serving.forms.arrow_stream import open_stream
from genescale.serving.schemas import LARGEST_COUNT, LONGEST_ID, LONGEST_NAME

METADATA_KEY = b"genescale"
# A schema, dictionaries that are sent apart or replaced, and batches of at least one cell.
MESSAGES_BESIDE_CELLS = 16
FORMS = (("tokens",), ("genes", "counts"))


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrowRequest:
    """A request as it came: its options, still as JSON, and its columns."""

    options: bytes
    batches: list[pa.RecordBatch]
    n_cells: int


def open_request(body: bytes, intake: Intake) -> ArrowRequest:
    """The request in an Arrow stream; raises RefusedError, InputError and LimitError for what cannot be one."""
    schema, batches = open_stream(body, max_messages=intake.limits.max_cells + MESSAGES_BESIDE_CELLS)
    _check_columns(schema)
    n_cells = sum(len(batch) for batch in batches)
    if not n_cells:
        raise InputError("the stream has no cell.", where="cells", fix="Send one row for each cell.")
    intake.check_number(n_cells, intake.limits.max_cells, "cells")
    return ArrowRequest(options=(schema.metadata or {}).get(METADATA_KEY, b"{}"), batches=batches, n_cells=n_cells)


def read_cells(request: ArrowRequest, intake: Intake) -> list[PreparedCell]:
    """Tokens of the cells, in order; InputError and LimitError name the cell."""
    reader = intake.cell_reader()
    cells: list[PreparedCell] = []
    for batch in request.batches:
        columns = _Columns(batch, intake, first=len(cells))
        cells += columns.tokens(reader) if "tokens" in batch.schema.names else columns.counts(reader)
    return cells


class _Columns:
    """One record batch, whose first row is cell `first` of the request."""

    def __init__(self, batch: pa.RecordBatch, intake: Intake, *, first: int) -> None:
        self.batch, self.intake, self.first = batch, intake, first
        self.ids_n = batch.column("id").to_pylist() if "id" in batch.schema.names else [None] * len(batch)
        for at, cell_id in enumerate(self.ids_n):
            if cell_id is not None and len(cell_id) > LONGEST_ID:
                raise InputError(f"the id is longer than {LONGEST_ID} characters.", where=self._where(at, "id"))

    def tokens(self, reader: CellReader) -> Iterator[PreparedCell]:
        values, offsets_n = self._lists("tokens")
        try:
            tokens_r = values.cast(pa.int64()).to_numpy()
        except pa.ArrowInvalid:
            raise InputError(
                "a token does not exist.", where="tokens", fix="Token ids are small whole numbers."
            ) from None
        for at, start, end in _spans(offsets_n):
            yield reader.from_tokens(self.ids_n[at], tokens_r[start:end], self._where(at, "tokens"))

    def counts(self, reader: CellReader) -> Iterator[PreparedCell]:
        values, offsets_n = self._lists("genes")
        counts_r, counts_offsets_n = self._counts()
        lengths_n, counts_lengths_n = np.diff(offsets_n), np.diff(counts_offsets_n)
        if len(unequal := np.flatnonzero(lengths_n != counts_lengths_n)):
            at = int(unequal[0])
            raise InputError(
                f"{lengths_n[at]} genes have {counts_lengths_n[at]} counts.",
                where=self._where(at),
                fix="Give one each.",
            )
        names_v, codes_r = _names(values)
        tokens_v = reader.lookup(names_v)
        named_v = np.array(names_v, dtype=object)
        for at, start, end in _spans(offsets_n):
            codes_g, where = codes_r[start:end], self._where(at, "genes")
            if len(np.unique(codes_g)) < len(codes_g):
                check_names_differ(named_v[codes_g].tolist(), where)
            counts_g = counts_r[counts_offsets_n[at] : counts_offsets_n[at + 1]]
            names_g: Sequence[str] = named_v[codes_g]
            yield reader.from_counts(self.ids_n[at], names_g, tokens_v[codes_g], counts_g, where)

    def _counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(r) float64, and where each cell begins."""
        values, offsets_n = self._lists("counts")
        counts_r = values.cast(pa.float64(), safe=False).to_numpy()
        wrong_r = ~((counts_r >= 0) & (counts_r <= LARGEST_COUNT))
        for at, start, end in _spans(offsets_n) if wrong_r.any() else ():
            if wrong_r[start:end].any():
                place = int(np.flatnonzero(wrong_r[start:end])[0])
                raise InputError(
                    f"{counts_r[start + place]} is no count.",
                    where=f"{self._where(at, 'counts')}[{place}]",
                    fix=f"Counts are numbers from 0 to {LARGEST_COUNT:g}.",
                )
        return counts_r, offsets_n

    def _lists(self, name: str) -> tuple[pa.Array, np.ndarray]:
        """The flat values of a list column, and where each cell begins and ends in them."""
        column = self.batch.column(name)
        if column.null_count or column.values.null_count:
            raise InputError("a value is null.", where=name, fix="Leave out what was not measured.")
        offsets_n = column.offsets.to_numpy().astype(np.int64)
        for at, length in enumerate(np.diff(offsets_n).tolist()):
            self.intake.check_number(length, self.intake.limits.max_genes_per_cell, self._where(at))
        return column.values, offsets_n

    def _where(self, at: int, field: str = "") -> str:
        return f"cells[{self.first + at}]" + (f".{field}" if field else "")


def _spans(offsets_n: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Position, begin and end of each cell."""
    ends = offsets_n.tolist()
    return ((at, ends[at], ends[at + 1]) for at in range(len(ends) - 1))


def _names(values: pa.Array) -> tuple[list[str], np.ndarray]:
    """(v) the names that occur, and (r) which of them each value is."""
    encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    codes_r = encoded.indices.cast(pa.int64()).to_numpy()
    used_v = np.zeros(len(encoded.dictionary), dtype=bool)
    used_v[codes_r] = True
    names_v = encoded.dictionary.filter(pa.array(used_v)).to_pylist()
    for name in names_v:
        if name is None or not 1 <= len(name) <= LONGEST_NAME:
            raise InputError(f"a gene's name has 1 to {LONGEST_NAME} characters.", where="genes")
    check_names_differ(names_v, "genes")
    return names_v, (np.cumsum(used_v) - 1)[codes_r]


def _check_columns(schema: pa.Schema) -> None:
    """InputError unless the columns are those of cells, each of a type that can be read."""
    beside_id = sorted(name for name in schema.names if name != "id")
    if beside_id not in [sorted(form) for form in FORMS] or schema.names.count("id") > 1:
        raise InputError(
            f"the columns are {', '.join(repr(name[:LONGEST_NAME]) for name in schema.names[:8]) or 'none'}.",
            where="schema",
            fix="Send 'tokens', or 'genes' and 'counts', and 'id' if you want it back.",
        )
    for field in schema:
        if not _readable(field):
            raise InputError(
                f"the column '{field.name}' has the type {str(field.type)[:LONGEST_NAME]}.",
                where="schema",
                fix="tokens: list of integers; genes: list of texts (plain or dictionary); counts: list of numbers.",
            )


def _readable(field: pa.Field) -> bool:
    if field.name == "id":
        return _is_text(field.type)
    if not (pa.types.is_list(field.type) or pa.types.is_large_list(field.type)):
        return False
    of = field.type.value_type
    if field.name == "genes":
        return _is_text(of.value_type) if pa.types.is_dictionary(of) else _is_text(of)
    numbers = (pa.types.is_float32, pa.types.is_float64) if field.name == "counts" else ()
    return any(fits(of) for fits in (pa.types.is_integer, *numbers))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
