"""Put columns beside the cells of an h5ad file: a copy of the file with more columns in `obs`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from genescale.ingestion.formats.dataframes import frame_length
from genescale.ingestion.formats.hdf5_safety import opened
from genescale.ingestion.formats.hdf5_tree import HdfGroup
from genescale.ingestion.formats.obsm import changed_copy
from genescale.platform.errors import InputError
from genescale.platform.storage import Store

Column = npt.NDArray[Any] | Sequence[str | None]


def write_obs(source_uri: str, out: Path, columns: Mapping[str, Column], store: Store) -> Path:
    """Copy an h5ad file to `out` with columns added to `obs` (or replaced): one value for each cell, in order.

    Texts (None where missing) become a categorical column, arrays of numbers stay as they are. Raises InputError when
    a column is not of the file's cells; nothing stands at `out` unless it is whole.
    """
    with opened(source_uri, store) as file:
        n_cells = frame_length(HdfGroup(file, source_uri), "obs")
    for name, values in columns.items():
        if len(values) != n_cells:
            what = f"column '{name}' has {len(values):,} values for {n_cells:,} cells."
            raise InputError(what, where=source_uri, fix="Give one value a cell.")
        if not re.fullmatch(r"[^/\x00-\x1f]+", name):
            raise InputError(f"'{name}' cannot name a column of obs.", fix="Use a name without slashes.")
    with changed_copy(source_uri, out, store) as file:
        if not isinstance(file.get("obs"), h5py.Group):
            raise InputError(
                "its obs is one array, as anndata wrote before 0.7.",
                where=source_uri,
                fix="Write it again with anndata.",
            )
        for name, values in columns.items():
            _put(file["obs"], name, values)
    return out


def _put(obs: h5py.Group, name: str, values: Column) -> None:
    import pandas
    from anndata.io import write_elem

    numbers = isinstance(values, np.ndarray) and values.dtype.kind in "iufb"
    if name in obs:
        del obs[name]
    write_elem(obs, name, values if numbers else pandas.Categorical(list(values)))
    order = [
        column for column in np.asarray(obs.attrs.get("column-order", []), dtype=object).tolist() if column != name
    ]
    # Fixed-length texts cannot hold every name.
    obs.attrs.create("column-order", [*order, name], dtype=h5py.string_dtype())
