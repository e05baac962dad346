"""Saved states: one Parquet file with a row for each state.

state, role            its name; `goal`, `start` or empty
layer, pooling         what was embedded, as `genescale embed` calls them
model_digest           of the bundle; states of one model mean nothing to another
cells                  how many cells the vector is the mean of; 0 when unknown
vector                 list of float64
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genescale.perturbation.readouts.states import States
from genescale.platform.errors import InputError
from genescale.platform.storage import Store

SCHEMA = pa.schema(
    [
        ("state", pa.string()),
        ("role", pa.string()),
        ("layer", pa.string()),
        ("pooling", pa.string()),
        ("model_digest", pa.string()),
        ("cells", pa.int64()),
        ("vector", pa.list_(pa.float64())),
    ]
)
LARGEST_FILE_BYTES = 256 * 1024 * 1024
_FIX = "Make the file with `genescale perturb states`."


def states_bytes(states: States) -> bytes:
    """The states as one Parquet file."""
    roles = {states.goal: "goal", states.start: "start"}
    rows = [
        {
            "state": name,
            "role": roles.get(name, ""),
            "layer": states.layer,
            "pooling": states.pooling,
            "model_digest": states.model_digest,
            "cells": cells,
            "vector": vector_d.tolist(),
        }
        for name, cells, vector_d in zip(
            states.names, states.cells or (0,) * len(states.names), states.vectors_sd, strict=True
        )
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def read_states(uri: str, store: Store, *, start: str | None = None, goal: str | None = None) -> States:
    """The states saved at `uri`; `start` and `goal`, when given, take the place of those in the file.

    Raises InputError for a file that holds no states, or rows of several models, layers or poolings.
    """
    rows = read_rows(uri, store)
    role = {row["role"]: row["state"] for row in rows}
    return States(
        names=tuple(row["state"] for row in rows),
        vectors_sd=np.array([row["vector"] for row in rows], dtype=np.float64),
        goal=role.get("goal", "") if goal is None else goal,
        start=role.get("start", "") if start is None else start,
        layer=rows[0]["layer"],
        pooling=rows[0]["pooling"],
        model_digest=rows[0]["model_digest"],
        cells=tuple(row["cells"] for row in rows),
    )


def read_rows(uri: str, store: Store) -> list[dict[str, Any]]:
    """The rows of a file of states, of one model, layer and pooling; raises as `read_states`.

    For whoever compares vectors without a model at hand.
    """
    try:
        table = pq.read_table(io.BytesIO(store.read(uri, max_bytes=LARGEST_FILE_BYTES)))
    except pa.ArrowException as error:
        raise InputError(f"this is no Parquet file: {error}.", where=uri, fix=_FIX) from None
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise InputError(f"the file has no column '{missing[0]}', so it holds no states.", where=uri, fix=_FIX)
    rows: list[dict[str, Any]] = table.to_pylist()
    if len({(row["layer"], row["pooling"], row["model_digest"], len(row["vector"] or ())) for row in rows}) != 1:
        raise InputError("the states are none, or of several models, layers or poolings.", where=uri, fix=_FIX)
    return rows
