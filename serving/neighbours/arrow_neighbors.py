"""Neighbours as an Arrow IPC stream: one row for each cell, beside what `arrow_answers` says of it

    neighbors              list<struct<id, dataset, distance, labels: struct<COLUMN: utf8>, place>>, nearest first
    votes                  struct<COLUMN: list<struct<label, n, share>>>
    out_of_distribution    double
    place                  fixed_size_list<double>[2], null without a map

A question for no columns has neither `labels` nor `votes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from genescale.serving.answering.cells import PreparedCell
from genescale.serving.forms.arrow_answers import cell_columns, stream_of
from genescale.serving.neighbours.contract import NeighborsCell, NeighborsFacts

_PLACE = pa.list_(pa.float64(), 2)
_VOTES = pa.list_(pa.struct([("label", pa.utf8()), ("n", pa.int32()), ("share", pa.float64())]))


def render_arrow(
    facts: NeighborsFacts, prepared: Sequence[PreparedCell], cells: Sequence[NeighborsCell], columns: Sequence[str]
) -> bytes:
    """The answer as one record batch; `columns` are the labels in it."""
    labels = [("labels", pa.struct([(name, pa.utf8()) for name in columns]))] if columns else []
    neighbor = pa.struct(
        [("id", pa.utf8()), ("dataset", pa.utf8()), ("distance", pa.float64()), *labels, ("place", _PLACE)]
    )
    made = {
        **cell_columns(prepared),
        "neighbors": pa.array([[one.model_dump() for one in cell.neighbors] for cell in cells], pa.list_(neighbor)),
        "out_of_distribution": pa.array([cell.out_of_distribution for cell in cells], pa.float64()),
        "place": pa.array([cell.place for cell in cells], _PLACE),
    }
    if columns:
        votes = pa.struct([(name, _VOTES) for name in columns])
        made["votes"] = pa.array(
            [{name: [vote.model_dump() for vote in cell.votes[name]] for name in columns} for cell in cells], votes
        )
    return stream_of(made, facts)
