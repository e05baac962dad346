"""Answers as Arrow IPC streams: one row for each cell, numbers as they are instead of as text.

    id, n_genes, n_tokens, cropped, ignored, merged    of every cell, as in the JSON answer

What an answer says of all cells (provenance, options, timings) is JSON under the key `genescale` of the schema's
metadata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
from pydantic import BaseModel

from genescale.serving.answering.cells import PreparedCell
from genescale.serving.forms.arrow_cells import METADATA_KEY

_IGNORED = pa.struct(
    [
        *((name, pa.int32()) for name in ("n", "unknown", "no_median", "zero")),
        ("genes", pa.list_(pa.struct([("gene", pa.utf8()), ("reason", pa.utf8())]))),
    ]
)
_FACTS: dict[str, pa.DataType] = {
    "id": pa.utf8(),
    "n_genes": pa.int32(),
    "n_tokens": pa.int32(),
    "cropped": pa.bool_(),
    "ignored": _IGNORED,
    "merged": pa.list_(pa.struct([("gene", pa.utf8()), ("names", pa.list_(pa.utf8()))])),
}


def cell_columns(cells: Sequence[PreparedCell]) -> dict[str, pa.Array]:
    """What became of each cell, as columns."""
    dumped = [cell.facts.model_dump() for cell in cells]
    return {name: pa.array([one[name] for one in dumped], kind) for name, kind in _FACTS.items()}


def stream_of(columns: Mapping[str, pa.Array], facts: BaseModel) -> bytes:
    """One record batch of these columns, with `facts` in its metadata."""
    batch = pa.record_batch(dict(columns))
    schema = batch.schema.with_metadata({METADATA_KEY: facts.model_dump_json().encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema.metadata))
    body: bytes = sink.getvalue().to_pybytes()
    return body
