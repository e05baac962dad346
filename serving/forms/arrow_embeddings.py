"""Embeddings as an Arrow IPC stream: one row for each cell, beside what `arrow_answers` says of it

embedding                  fixed_size_list<float>[d], or for the output `genes`
genes, gene_embeddings     list<utf8>, list<fixed_size_list<float>[d]>
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from genescale.serving.answering.embedding_plan import EmbeddingPlan, gene_ids
from genescale.serving.answering.intake import Intake
from genescale.serving.forms.arrow_answers import cell_columns, stream_of
from genescale.serving.schemas import EmbeddingsFacts, Timings


def render_arrow(intake: Intake, plan: EmbeddingPlan, rows_rd: np.ndarray, timings: Timings) -> bytes:
    """The answer as one record batch; `rows_rd` are the rows that the model gave."""
    facts = EmbeddingsFacts(
        provenance=intake.info.provenance,
        layer=plan.layer,
        output=plan.output,
        pooling=plan.pooling,
        file=plan.file,
        timings_ms=timings,
    )
    return stream_of({**cell_columns(plan.cells), **_vectors(intake, plan, rows_rd)}, facts)


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
