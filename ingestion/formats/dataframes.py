"""The tables of an anndata file (`obs`, `var`): one column, one range of rows at a time, whatever its encoding.

Metadata never stops a cell from being read: a column that cannot be understood becomes empty, and a note says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from genescale.ingestion.formats.tree import Array, Group, Node, as_text, check_encoding, encoding
from genescale.platform.errors import AtlasError

LONGEST_VALUE = 500
MISSING_TEXTS = frozenset(("nan", "NaN"))
FRAMES = {"dataframe": ("0.1.0", "0.2.0")}
COLUMNS = {
    "array": ("0.2.0",),
    "string-array": ("0.2.0",),
    "categorical": ("0.2.0",),
    "nullable-integer": ("0.1.0",),
    "nullable-boolean": ("0.1.0",),
    "nullable-string-array": ("0.1.0",),
}
# Decoded categories up to this many are kept from one range of rows to the next.
CATEGORIES_KEPT = 1_000_000
Column = list[str | None]


def frame_length(root: Group, path: str) -> int:
    """Rows of a table, -1 when there is none."""
    table = root.get(path)
    if isinstance(table, Array):
        return len(table)
    index = table.get(as_text(table.attrs.get("_index", "_index"))) if table is not None else None
    return -1 if index is None else _length(index)


class Frame:
    """One table, `obs`, `var` or `raw/var`, with `rows` rows; raises AtlasError when it is none, or has others.

    Tables of anndata 0.5 and 0.6 are one array of records, whose categories stand in `uns` as `NAME_categories`.
    """

    def __init__(self, root: Group, path: str, rows: int) -> None:
        self.path, self.rows, self.where = path, rows, root.where
        table = root.get(path)
        if table is None or (isinstance(table, Array) and not table.dtype.names):
            seen = "there is none" if table is None else f"it is an array ({table.dtype})"
            raise AtlasError(
                f"{path} is not a table of columns: {seen}.",
                where=root.where,
                fix="Open the file with a current anndata and write it again.",
            )
        if isinstance(table, Group):
            check_encoding(table, FRAMES)
        self._root, self._table = root, table
        self._index = self._index_name()
        self._decoded: dict[str, pa.Array] = {}
        self._columns: list[str] | None = None
        self._check_index()

    @property
    def columns(self) -> list[str]:
        """Names of the columns, without the index."""
        # Asked for many times per block of cells, and a walk over the group for HDF5.
        if self._columns is None:
            table = self._table
            names = table.dtype.names or () if isinstance(table, Array) else table.names()
            self._columns = [name for name in names if name not in (self._index, "__categories")]
        return list(self._columns)

    def index(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Row names: ids of cells or genes."""
        values = self._read(self._index, start, stop)
        return [value or "" for value in _texts(values)]

    def column(self, name: str, start: int = 0, stop: int | None = None) -> tuple[Column, str]:
        """Values of a column as texts (None where missing), and a note that is empty when all is well."""
        values, note = self.typed(name, start, stop)
        return _texts(values), note

    def typed(self, name: str, start: int = 0, stop: int | None = None) -> tuple[pa.Array, str]:
        """Values in their own type (string, int64, float64 or bool; null where missing), and a note."""
        try:
            values = self._read(name, start, stop)
        except (AtlasError, KeyError, IndexError, TypeError, ValueError, pa.ArrowException) as error:
            reason = error.what if isinstance(error, AtlasError) else f"{type(error).__name__}: {error}"
            count = len(range(*slice(start, stop).indices(self.rows)))
            return pa.nulls(count, pa.string()), f"{self.path}['{name}'] left empty: {reason}"
        return _shortened(values, f"{self.path}['{name}']")

    def _index_name(self) -> str:
        if isinstance(self._table, Array):
            return (self._table.dtype.names or ("",))[0]
        if "_index" in self._table.attrs:
            return as_text(self._table.attrs["_index"])
        return next((name for name in ("_index", "index") if self._table.get(name)), "_index")

    def _check_index(self) -> None:
        item = self._item(self._index)
        if item is None:
            raise AtlasError(f"{self.path} has no index '{self._index}'.", where=self.where, fix="Write it again.")
        if (length := _length(item)) != self.rows:
            raise AtlasError(
                f"{self.path} has {length:,} rows but the matrix has {self.rows:,}.",
                where=self.where,
                fix="The tables and the matrix do not belong together: write the file again.",
            )

    def _item(self, name: str) -> Node | None:
        if isinstance(self._table, Array):
            return self._table.field(name) if name in (self._table.dtype.names or ()) else None
        return self._table.get(name)

    def _read(self, name: str, start: int, stop: int | None) -> pa.Array:
        item = self._item(name)
        if item is None:
            raise AtlasError(f"there is no column '{name}'.", where=self.where)
        if (length := _length(item)) != self.rows:
            raise AtlasError(f"{length:,} rows, not {self.rows:,}", where=self.where)
        check_encoding(item, COLUMNS)
        if isinstance(item, Group):
            return self._read_group(name, item, start, stop)
        if (categories := self._categories_elsewhere(name, item)) is not None:
            return self._chosen(name, item.numbers(start, stop), categories)
        return _plain(item, start, stop)

    def _read_group(self, name: str, item: Group, start: int, stop: int | None) -> pa.Array:
        if item.get("categories") is not None:
            return self._chosen(name, item.array("codes").numbers(start, stop), item.array("categories"))
        values = _plain(item.array("values"), start, stop, missing_texts=frozenset())
        if item.get("mask") is None:
            return values
        missing = item.array("mask").numbers(start, stop).astype(bool)
        return _masked(values, missing)

    def _categories_elsewhere(self, name: str, item: Array) -> Array | None:
        """Categories that stand beside the table (anndata 0.7) or in `uns` (before)."""
        if not item.is_number:
            return None
        if "categories" in item.attrs and isinstance(self._table, Group):
            return self._table.array(f"__categories/{name}")
        if isinstance(self._table, Array) and item.dtype.kind in "iu":
            found = self._root.get(f"uns/{name}_categories")
            return found if isinstance(found, Array) else None
        return None

    def _chosen(self, name: str, codes: npt.NDArray[Any], categories: Array) -> pa.Array:
        texts = self._decoded.get(name)
        if texts is None:
            texts = _plain(categories, 0, None)
            if len(texts) <= CATEGORIES_KEPT:
                self._decoded[name] = texts
        if codes.dtype.kind not in "iu":
            raise AtlasError(f"category codes of type {codes.dtype}", where=self.where)
        if codes.size and (codes.max() >= len(texts) or codes.min() < -1):
            raise AtlasError(f"category codes outside -1 … {len(texts) - 1}", where=self.where)
        return texts.take(pa.array(codes.astype(np.int64), mask=codes == -1))


def _length(item: Node) -> int:
    found: Node | None = item
    if isinstance(item, Group):
        found = next((part for name in ("codes", "values") if (part := item.get(name)) is not None), None)
    if not isinstance(found, Array) or len(found.shape) != 1:
        named = encoding(item)
        raise AtlasError(f"not a column this release reads (encoding {named})", where=item.where)
    return len(found)


def _plain(array: Array, start: int, stop: int | None, *, missing_texts: frozenset[str] = MISSING_TEXTS) -> pa.Array:
    if array.is_text:
        texts = array.texts(start, stop)
        return pa.array([None if text in missing_texts else text for text in texts], pa.string())
    values = array.numbers(start, stop)
    if values.dtype.kind == "f":
        values = values.astype(np.float64)
        return pa.array(values, mask=np.isnan(values))
    if values.dtype.kind == "b":
        return pa.array(values)
    if values.dtype == np.uint64 and values.size and values.max() > np.iinfo(np.int64).max:
        return pa.array(values.astype(np.float64))
    return pa.array(values.astype(np.int64))


def _masked(values: pa.Array, missing: npt.NDArray[np.bool_]) -> pa.Array:
    if len(missing) != len(values):
        raise AtlasError(f"a mask of {len(missing):,} for {len(values):,} values")
    return values.take(pa.array(np.arange(len(values)), mask=missing))


def _shortened(values: pa.Array, shown: str) -> tuple[pa.Array, str]:
    """The values with texts of absurd length left empty, and a note on how many there were."""
    if not pa.types.is_string(values.type):
        return values, ""
    long = pc.fill_null(pc.greater(pc.utf8_length(values), LONGEST_VALUE), False)
    count = int(pc.sum(long).as_py() or 0)
    if not count:
        return values, ""
    emptied = pc.if_else(long, pa.scalar(None, pa.string()), values)
    return emptied, f"{shown}: {count:,} values longer than {LONGEST_VALUE} left empty"


def _texts(values: pa.Array) -> Column:
    """Values as people write them: whole numbers without a decimal point."""
    if pa.types.is_floating(values.type):
        return [None if v is None else str(int(v)) if v.is_integer() else str(v) for v in values.to_pylist()]
    return [None if v is None else str(v) for v in values.to_pylist()]


def scalar_text(root: Group, path: str) -> str | None:
    """A single text such as `uns/title`, or None."""
    item = root.get(path)
    if not isinstance(item, Array) or not item.is_text:
        return None
    if item.shape == ():
        return as_text(item.scalar())[:LONGEST_VALUE]
    # R packages write single texts as arrays of one.
    return item.texts()[0][:LONGEST_VALUE] if item.shape == (1,) else None


def first_present(names: Sequence[str], available: Sequence[str]) -> str | None:
    """The first of `names` that is available."""
    return next((name for name in names if name in available), None)
