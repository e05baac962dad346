"""Put results beside the cells of an h5ad file: a copy of the file with one more entry in `uns`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl

from genescale.ingestion.formats.obsm import changed_copy
from genescale.platform.errors import InputError
from genescale.platform.storage import Store


def write_uns(source_uri: str, out: Path, key: str, content: Mapping[str, Any], store: Store) -> Path:
    """Copy an h5ad file to `out` with `uns[key]` added (or replaced).

    content: texts, numbers, Polars tables and mappings of them; tables become dataframes of anndata. Raises InputError
    for a name or a value that cannot stand in `uns`; nothing stands at `out` unless it is whole.
    """
    from anndata.io import write_elem

    if not re.fullmatch(r"[A-Za-z0-9_.-]+", key):
        raise InputError(f"'{key}' cannot name an entry of uns.", fix="Use letters, digits and underscores.")
    entry = as_uns(content)
    with changed_copy(source_uri, out, store) as file:
        if "uns" in file and not isinstance(file["uns"], h5py.Group):
            raise InputError("its uns is no group.", where=source_uri, fix="Write the file again with anndata.")
        if "uns" not in file:
            file.create_group("uns").attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        if key in file["uns"]:
            del file["uns"][key]
        write_elem(file["uns"], key, entry)
    return out


def as_uns(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` as anndata can write it: Polars tables as pandas dataframes, None left out, tuples as arrays.

    Raises InputError for names with a slash and for values that have no place in a file.
    """
    made: dict[str, Any] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise InputError(f"'{name}' cannot name an entry of uns.", fix="Use a name without slashes.")
        if value is not None:
            made[name] = _as_element(name, value)
    return made


def _as_element(name: str, value: Any) -> Any:
    if isinstance(value, pl.DataFrame):
        return _frame(value)
    if isinstance(value, Mapping):
        return as_uns(value)
    if isinstance(value, list | tuple):
        return np.array(list(value)) if value else np.zeros(0)
    if isinstance(value, str | bool | int | float | np.ndarray | np.generic):
        return value
    raise InputError(f"'{name}' is of type {type(value).__name__}.", fix="Use texts, numbers, tables or mappings.")


def _frame(table: pl.DataFrame) -> Any:
    """A pandas dataframe of a table: its index are the numbers of its rows."""
    import pandas

    # A slash in a column's name would make a group in the file.
    frame = pandas.DataFrame({series.name.replace("/", "_"): _column(series) for series in table.iter_columns()})
    frame.index = frame.index.astype(str)
    return frame


def _column(series: pl.Series) -> Any:
    """Numbers as they are, missing ones as NaN; all else as categories, where missing values stay missing."""
    import pandas

    if series.dtype == pl.Boolean and not series.null_count():
        return series.to_numpy()
    if series.dtype.is_numeric() or series.dtype == pl.Boolean:
        numbers = series.cast(pl.Float64) if series.null_count() or series.dtype == pl.Boolean else series
        return (numbers.fill_null(float("nan")) if numbers.dtype.is_float() else numbers).to_numpy()
    return pandas.Categorical([None if value is None else str(value) for value in series.to_list()])
