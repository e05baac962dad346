"""What `/v1/neighbors` accepts and answers: part of the HTTP contract in `schemas.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from genescale.serving.schemas import Answered, Asked, CellFacts, Cells, FileFacts, Provenance, ReferenceFacts, Timings

ColumnName = Annotated[str, Field(min_length=1, max_length=256)]
Place = Annotated[list[float], Field(min_length=2, max_length=2, description="x and y, without a unit.")]


class NeighborsOptions(Asked):
    """What is wanted of the nearest cells: all of a request that is no cell."""

    k: int = Field(10, ge=1, description="Reference cells per cell; `/v1/info` says how many are allowed.")
    columns: list[ColumnName] | None = Field(
        None,
        description="Labels that are wanted; all that the reference has when left out.",
        examples=[["cell_type"]],
    )


class NeighborsAsked(NeighborsOptions):
    """Cells whose nearest cells in the published reference are wanted."""

    cells: Cells


class Neighbor(Answered):
    """One reference cell."""

    id: str
    dataset: str
    distance: float = Field(description="Cosine distance: 0 for the same direction, 2 for the opposite one.")
    labels: dict[str, str | None] = Field(description="By column; null where the cell has none.")
    place: Place | None = Field(description="On the map of the reference; null where it has none.")


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
    place: Place | None = Field(
        description="On the map of the reference: the mean place of the 10 nearest reference cells, the nearer the "
        "heavier; null where it has no map."
    )


class NeighborsTimings(Timings):
    """Also the time that looking for the neighbours took, in milliseconds."""

    search: float


class NeighborsFacts(Answered):
    """What an answer says of all its cells."""

    provenance: Provenance
    reference: ReferenceFacts
    k: int
    file: FileFacts | None = Field(description="Of cells that came in a file; null otherwise.")
    timings_ms: NeighborsTimings


class NeighborsAnswered(NeighborsFacts):
    """Nearest reference cells, in the order of the request."""

    cells: list[NeighborsCell]


class MapLabels(Answered):
    """The labels of one column, for the cells of the map."""

    values: list[str] = Field(description="Labels that occur, the commonest first.")
    codes: list[int] = Field(description="Of each cell: a place in `values`, or -1 for a cell without a label.")


class MapAnswered(Answered):
    """Reference cells in two dimensions, as columns: the n-th entry of each speaks of the n-th cell."""

    reference: ReferenceFacts
    method: Literal["umap"] | None = Field(
        description="How the cells were laid out. Neighbourhoods mean something, distances of far groups do not. Null "
        "for a reference without a map."
    )
    cells: int = Field(description="How many follow: all of the reference, or as many at random as were asked for.")
    x: list[float]
    y: list[float]
    ids: list[str]
    labels: dict[str, MapLabels] = Field(description="By column.")


class Example(Answered):
    """A reference cell that can be asked about."""

    id: str
    dataset: str
    labels: dict[str, str | None]
    place: Place | None = Field(description="On the map of the reference; null where it has none.")
    tokens: list[int] = Field(description="Of the whole cell, as `tokens` of a cell in any question.")


class ExamplesAnswered(Answered):
    """A few cells of the reference, drawn at random for each label of its first column."""

    reference: ReferenceFacts
    examples: list[Example] = Field(description="Empty for a reference that publishes none.")
