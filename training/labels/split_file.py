"""The split as a file: which cell or gene stood in which part of which fold, and how the split was made.

`read_id_lists` (in `listed_parts`) reads it again as lists, so that another model can be measured on the same split.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genescale.platform.errors import InputError
from genescale.platform.storage import Store
from genescale.training.labels.splits import PARTS, Split
from genescale.training.labels.splitting import Folds

SPLIT_FILE = "split.parquet"
METADATA_KEY = b"genescale.split"


def split_table(folds: Folds, ids: Sequence[str], *, facts: Mapping[str, Any] | None = None) -> pa.Table:
    """One row for each unit and fold: `unit_id`, `fold`, `part`; method, tests and `facts` as its metadata."""
    names = np.asarray(ids).astype(str)
    columns: dict[str, list[Any]] = {"unit_id": [], "fold": [], "part": []}
    for fold, split in enumerate(folds.splits):
        for part, positions in split.parts().items():
            columns["unit_id"] += names[positions].tolist()
            columns["fold"] += [fold] * len(positions)
            columns["part"] += [part] * len(positions)
    schema = pa.schema([("unit_id", pa.string()), ("fold", pa.int32()), ("part", pa.string())])
    text = json.dumps({**folds.to_dict(), **dict(facts or {})}, sort_keys=True)
    return pa.table(columns, schema=schema.with_metadata({METADATA_KEY: text.encode()}))


def write_split(
    folds: Folds, ids: Sequence[str], uri: str, store: Store, *, facts: Mapping[str, Any] | None = None
) -> None:
    """Write `split_table` as Parquet."""
    sink = pa.BufferOutputStream()
    pq.write_table(split_table(folds, ids, facts=facts), sink)
    store.write(uri, sink.getvalue().to_pybytes())


def read_split(uri: str, ids: Sequence[str], store: Store) -> Folds:
    """The folds of a split file for these units; InputError when it is none, or names other units."""
    table = pq.read_table(pa.BufferReader(store.read(uri)))
    metadata = (table.schema.metadata or {}).get(METADATA_KEY)
    if metadata is None:
        raise InputError("this file holds no split.", where=uri, fix=f"Give the {SPLIT_FILE} of a run.")
    made = json.loads(metadata)
    position = {name: number for number, name in enumerate(np.asarray(ids).astype(str).tolist())}
    units = table.column("unit_id").to_pylist()
    if unknown := [unit for unit in units if unit not in position]:
        raise InputError(f"{len(unknown)} units are not here, for example {unknown[0]}.", where=uri, fix=_OTHER)
    where_r = np.array([position[unit] for unit in units], dtype=np.int64)
    fold_r, part_r = table.column("fold").to_numpy(), np.array(table.column("part").to_pylist())
    splits = tuple(
        Split(**{part: np.sort(where_r[(fold_r == fold) & (part_r == part)]) for part in PARTS})
        for fold in range(len(made["folds"]))
    )
    return Folds(splits=splits, method=made["method"], seed=made["seed"], notes=tuple(made["notes"]))


_OTHER = "It was made for other cells or genes."
