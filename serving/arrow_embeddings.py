"""Embeddings as an Arrow IPC stream: one row for each cell, numbers as they are instead of as text.

    id, n_genes, n_tokens, cropped, ignored, merged    as in the JSON answer
    embedding                                          fixed_size_list<float>[d], or for the output `genes`
    genes, gene_embeddings                             list<utf8>, list<fixed_size_list<float>[d]>

The rest of the answer (provenance, layer, output, pooling, timings) is JSON under the key `genescale` of the schema's
metadata.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from genescale.serving.arrow_cells import METADATA_KEY
from genescale.serving.embedding_plan import EmbeddingPlan, gene_ids
from genescale.serving.intake import Intake
from genescale.serving.schemas import EmbeddingsFacts, Timings

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


def render_arrow(intake: Intake, plan: EmbeddingPlan, rows_rd: np.ndarray, timings: Timings) -> bytes:
    """The answer as one record batch; `rows_rd` are the rows that the model gave."""
    facts = EmbeddingsFacts(
        provenance=intake.info.provenance,
        layer=plan.layer,
        output=plan.output,
        pooling=plan.pooling,
        timings_ms=timings,
    )
    dumped = [cell.facts.model_dump() for cell in plan.cells]
    columns = {name: pa.array([one[name] for one in dumped], kind) for name, kind in _FACTS.items()}
    batch = pa.record_batch({**columns, **_vectors(intake, plan, rows_rd)})
    schema = batch.schema.with_metadata({METADATA_KEY: facts.model_dump_json().encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema.metadata))
    body: bytes = sink.getvalue().to_pybytes()
    return body


def _vectors(intake: Intake, plan: EmbeddingPlan, rows_rd: np.ndarray) -> dict[str, pa.Array]:
    flat = pa.array(np.ascontiguousarray(rows_rd, dtype=np.float32).reshape(-1))
    rows = pa.FixedSizeListArray.from_arrays(flat, rows_rd.shape[1])
    if plan.output != "genes":
        return {"embedding": rows}
    ends_n = pa.array(np.cumsum([0, *(cell.n_shown for cell in plan.cells)]), pa.int32())
    names = pa.array([name for cell in plan.cells for name in gene_ids(cell, intake.vocabulary)], pa.utf8())
    return {
        "genes": pa.ListArray.from_arrays(ends_n, names),
        "gene_embeddings": pa.ListArray.from_arrays(ends_n, rows),
    }
