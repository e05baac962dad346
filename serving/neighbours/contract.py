"""What `/v1/neighbors` accepts and answers: part of the HTTP contract in `schemas.py`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from genescale.serving.schemas import Answered, Asked, CellFacts, Cells, Provenance, ReferenceFacts, Timings

ColumnName = Annotated[str, Field(min_length=1, max_length=256)]


class NeighborsAsked(Asked):
    """Cells whose nearest cells in the published reference are wanted."""

    cells: Cells
    k: int = Field(10, ge=1, description="Reference cells per cell; `/v1/info` says how many are allowed.")
    columns: list[ColumnName] | None = Field(
        None,
        description="Labels that are wanted; all that the reference has when left out.",
        examples=[["cell_type"]],
    )


class Neighbor(Answered):
    """One reference cell."""

    id: str
    dataset: str
    distance: float = Field(description="Cosine distance: 0 for the same direction, 2 for the opposite one.")
    labels: dict[str, str | None] = Field(description="By column; null where the cell has none.")


class LabelVote(Answered):
    """How many of a cell's neighbours have one label."""

    label: str | None
    n: int
    share: float


class NeighborsCell(CellFacts):
    """One cell, its neighbours (nearest first) and what their labels say together."""

    neighbors: list[Neighbor]
    votes: dict[str, list[LabelVote]] = Field(
        description="By column, most votes first; of equal ones, the label whose nearest cell is nearer."
    )
    out_of_distribution: float = Field(
        description="Share of reference cells that are nearer to their own k-th neighbour than this cell is to its: "
        "0.99 and more says that the reference holds little that is like it."
    )


class NeighborsTimings(Timings):
    """Also the time that looking for the neighbours took, in milliseconds."""

    search: float


class NeighborsAnswered(Answered):
    """Nearest reference cells, in the order of the request."""

    provenance: Provenance
    reference: ReferenceFacts
    k: int
    cells: list[NeighborsCell]
    timings_ms: NeighborsTimings
