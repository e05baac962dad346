"""The tables of an h5ad file (`obs`, `var`): one column, one range of rows at a time, whatever its encoding.

Metadata never stops a cell from being read: a column that cannot be understood becomes empty, and a note says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from genescale.ingestion.hdf5_safety import read_numbers, read_texts
from genescale.platform.errors import AtlasError

LONGEST_VALUE = 500
Column = list[str | None]


class Frame:
    """One table of an h5ad file, `obs`, `var` or `raw/var`, with `rows` rows; raises AtlasError for other layouts."""

    def __init__(self, file: h5py.File, path: str, rows: int, uri: str) -> None:
        self.path, self.rows, self.uri = path, rows, uri
        group = file.get(path)
        if not isinstance(group, h5py.Group):
            seen = "there is none" if group is None else "it is one compound array, as anndata wrote before 0.7"
            raise AtlasError(
                f"{path} is not a table of columns: {seen}.",
                where=uri,
                fix="Open the file with a current anndata and write it again.",
            )
        self._group = group
        self._index = str(_text(group.attrs.get("_index", "_index")))
        self._check_index()

    @property
    def columns(self) -> list[str]:
        """Names of the columns, without the index."""
        return [name for name in self._group if name not in (self._index, "__categories")]

    def index(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Row names: ids of cells or genes."""
        return [value or "" for value in self._values(self._group[self._index], start, stop)]

    def column(self, name: str, start: int = 0, stop: int | None = None) -> tuple[Column, str]:
        """Values of a column as texts (None where missing), and a note that is empty when all is well."""
        item = self._group[name]
        try:
            if self._length(item) != self.rows:
                raise AtlasError(f"{self._length(item):,} rows, not {self.rows:,}")
            values = self._values(item, start, stop)
        except (AtlasError, KeyError, IndexError, TypeError) as error:
            reason = error.what if isinstance(error, AtlasError) else f"{type(error).__name__}: {error}"
            count = len(range(*slice(start, stop).indices(self.rows)))
            return [None] * count, f"{self.path}['{name}'] left empty: {reason}"
        long = sum(value is not None and len(value) > LONGEST_VALUE for value in values)
        note = f"{self.path}['{name}']: {long:,} values longer than {LONGEST_VALUE} left empty" if long else ""
        return [None if value is None or len(value) > LONGEST_VALUE else value for value in values], note

    def _check_index(self) -> None:
        if self._index not in self._group:
            raise AtlasError(f"{self.path} has no index '{self._index}'.", where=self.uri, fix="Write the file again.")
        if (length := self._length(self._group[self._index])) != self.rows:
            raise AtlasError(
                f"{self.path} has {length:,} rows but the matrix has {self.rows:,}.",
                where=self.uri,
                fix="The tables and the matrix do not belong together: write the file again.",
            )

    def _length(self, item: Any) -> int:
        if isinstance(item, h5py.Group):
            item = item.get("codes") if "codes" in item else item.get("values")
        if not isinstance(item, h5py.Dataset) or item.ndim != 1:
            raise AtlasError("not a column this release reads")
        return len(item)

    def _values(self, item: Any, start: int, stop: int | None) -> Column:
        if isinstance(item, h5py.Group) and "codes" in item and "categories" in item:
            codes = read_numbers(item["codes"], self.uri, start, stop)
            return _decoded(codes, self._all_texts(item["categories"]))
        if isinstance(item, h5py.Group) and "values" in item:
            values = self._plain(item["values"], start, stop)
            missing: Any = read_numbers(item["mask"], self.uri, start, stop).astype(bool) if "mask" in item else []
            return (
                [None if gone else value for value, gone in zip(values, missing, strict=True)]
                if len(missing)
                else values
            )
        if isinstance(item, h5py.Dataset) and "categories" in item.attrs:
            # anndata 0.7 kept categories beside the column, in `__categories`.
            name = item.name.rpartition("/")[2]
            return _decoded(
                read_numbers(item, self.uri, start, stop), self._all_texts(self._group["__categories"][name])
            )
        return self._plain(item, start, stop)

    def _all_texts(self, dataset: h5py.Dataset) -> Column:
        return self._plain(dataset, 0, None)

    def _plain(self, dataset: h5py.Dataset, start: int, stop: int | None) -> Column:
        if dataset.dtype.kind in "SO":
            return [None if text in ("nan", "NaN") else text for text in read_texts(dataset, self.uri, start, stop)]
        return _shown(read_numbers(dataset, self.uri, start, stop))


def _decoded(codes: npt.NDArray[Any], categories: Column) -> Column:
    if codes.size and (codes.max() >= len(categories) or codes.min() < -1):
        raise AtlasError(f"category codes outside -1 … {len(categories) - 1}")
    return [None if code < 0 else categories[code] for code in codes.tolist()]


def _shown(values: npt.NDArray[Any]) -> Column:
    """Numbers as people write them: whole ones without a decimal point, missing ones as None."""
    if values.dtype.kind != "f":
        return [str(value) for value in values.tolist()]
    return [None if np.isnan(v) else str(int(v)) if float(v).is_integer() else str(v) for v in values.tolist()]


def _text(value: Any) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def scalar_text(file: h5py.File, path: str) -> str | None:
    """A single text such as `uns/title`, or None."""
    item = file.get(path)
    if isinstance(item, h5py.Dataset) and item.shape == () and item.dtype.kind in "SO":
        return _text(item[()])[:LONGEST_VALUE]
    return None


def first_present(names: Sequence[str], available: Sequence[str]) -> str | None:
    """The first of `names` that is available."""
    return next((name for name in names if name in available), None)
