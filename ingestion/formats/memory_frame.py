"""A table of cells or genes whose columns are held in memory or read range by range (loom, 10x, Matrix Market)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from genescale.ingestion.atlas import Column
from genescale.ingestion.formats.dataframes import LONGEST_VALUE, MISSING_TEXTS
from genescale.platform.errors import AtlasError

RangeReader = Callable[[int, int], pa.Array]


class MemoryFrame:
    """A table of `rows` rows; a column is an array, or a function that reads rows start … stop-1 of it.

    Arrays are string, int64, float64 or bool. Raises AtlasError when the index has another length.
    """

    def __init__(
        self,
        path: str,
        index: pa.Array,
        columns: Mapping[str, pa.Array | RangeReader] | None = None,
        *,
        rows: int,
        uri: str,
    ) -> None:
        self.path, self.rows = path, rows
        self._index, self._columns = index, dict(columns or {})
        if len(index) != rows:
            raise AtlasError(
                f"{path} has {len(index):,} rows but the matrix has {rows:,}.",
                where=uri,
                fix="The tables and the matrix do not belong together: write the file again.",
            )

    @property
    def columns(self) -> list[str]:
        """Names of the columns, without the index."""
        return list(self._columns)

    def index(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Row names: ids of cells or genes; empty where missing."""
        return [value or "" for value in self._slice(self._index, start, stop).to_pylist()]

    def column(self, name: str, start: int = 0, stop: int | None = None) -> tuple[Column, str]:
        """Values as texts (None where missing), and a note that is empty when all is well."""
        values, note = self.typed(name, start, stop)
        return [None if value is None else _shown(value) for value in values.to_pylist()], note

    def typed(self, name: str, start: int = 0, stop: int | None = None) -> tuple[pa.Array, str]:
        """Values in their own type (null where missing), and a note."""
        count = len(range(*slice(start, stop).indices(self.rows)))
        try:
            values = self._slice(self._columns[name], start, stop)
            if len(values) != count:
                raise AtlasError(f"{len(values):,} rows, not {count:,}")
        except AtlasError as error:
            return pa.nulls(count, pa.string()), f"{self.path}['{name}'] left empty: {error.what}"
        return _without_missing(values, f"{self.path}['{name}']")

    def _slice(self, column: pa.Array | RangeReader, start: int, stop: int | None) -> pa.Array:
        first, last, _ = slice(start, stop).indices(self.rows)
        return column[first:last] if isinstance(column, pa.Array) else column(first, last)


def _without_missing(values: pa.Array, shown: str) -> tuple[pa.Array, str]:
    """Texts and numbers that stand for a missing value, and texts of absurd length, become null."""
    if pa.types.is_floating(values.type):
        return pc.if_else(pc.is_nan(values), None, values), ""
    if not pa.types.is_string(values.type):
        return values, ""
    long = pc.greater(pc.utf8_length(values), LONGEST_VALUE)
    missing = pc.is_in(values, pa.array(sorted(MISSING_TEXTS)))
    count = pc.sum(long).as_py() or 0
    note = f"{shown}: {count:,} values longer than {LONGEST_VALUE} left empty" if count else ""
    return pc.if_else(pc.fill_null(pc.or_(long, missing), False), None, values), note


def _shown(value: str | float | bool) -> str:
    """Numbers as people write them: whole ones without a decimal point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
