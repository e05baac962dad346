"""What `/v1/perturbations` accepts and answers, as strict models.

An edit has the options of its kind and no others; which belong to which, `perturbation.editing.requests` says.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from genescale.serving.schemas import (
    Answered,
    Asked,
    CellFacts,
    Cells,
    GeneName,
    Kind,
    Layer,
    Measure,
    Provenance,
    Timings,
)

# A rank beyond the end of a cell is its last; beyond this a rank is a mistake.
LARGEST_RANK = 1_000_000
Rank = Annotated[int, Field(ge=0, le=LARGEST_RANK)]


class EditAsked(Asked):
    """One edit, tried on each cell by itself: its genes are edited together."""

    kind: Kind = Field(
        description="`delete` takes the genes out, `overexpress` puts them first, `inhibit` and `activate` move them "
        "down or up in rank, `replace` gives them the ranks of `ranks`."
    )
    genes: Annotated[list[GeneName], Field(min_length=1)]
    refill: bool = Field(
        False, description="Deletion only: let the next genes of a cropped cell move up into the window."
    )
    quartiles: Annotated[int, Field(ge=1, le=3)] | None = Field(
        None, description="`inhibit` and `activate`: rank quartiles to move by. 1 without this and `rank`."
    )
    rank: Rank | None = Field(
        None,
        description="`inhibit` and `activate`: the rank (0 = the first gene) to move to instead. A gene that already "
        "stands behind it (`inhibit`) or before it (`activate`) stays.",
    )
    ranks: Annotated[list[Rank], Field(fail_fast=True)] = Field(
        [], description="`replace` only: the rank of each of `genes`, in their order."
    )


class StateAsked(Asked):
    """A state, such as healthy, as the mean embedding of its cells: one that is given, or a published one."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    vector: Annotated[list[float], Field(fail_fast=True)] | None = Field(
        None,
        description="Of the same model and layer; a mean over genes, or of <cls> for the measure `cls`. Without it the "
        "published state of this name is taken (`/v1/info` lists them).",
    )


class PerturbationsOptions(Asked):
    """What to try on the cells of a request: all of it that is no cell."""

    edits: Annotated[list[EditAsked], Field(min_length=1)]
    layer: Layer = "second_to_last"
    measure: Measure = Field(
        "remaining_genes",
        description="What is compared: each gene that was not edited (mean of cosines), <cls>, or the mean over genes.",
    )
    states: list[StateAsked] = Field([], description="States: adds the movement of each cell toward each of them.")
    goal: list[float] | None = Field(
        None, description="Shorthand for a single state without a name: adds the movement toward it as `goal_shift`."
    )
    head: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None,
        description="Label of a head of cell classes (`/v1/info` lists the heads): adds the change of the probability "
        "of each of its classes.",
    )
    gene_shifts: list[GeneName] = Field([], description="Genes whose own shift is wanted for each edit.")
    top_gene_shifts: Annotated[int, Field(ge=0)] = Field(
        0, description="How many of the genes that moved furthest are wanted for each edit."
    )


class PerturbationsAsked(PerturbationsOptions):
    """Cells, and edits to try on each of them."""

    cells: Cells


class FoundGene(Answered):
    """An edited gene that the cell has, and its rank in it (0 = the first gene)."""

    gene: str
    rank: int


class GeneShift(Answered):
    """How far one gene's own embedding moved; null where the gene does not stand in both cells."""

    gene: str
    cosine: float | None
    shift: float | None


class TopGeneShift(Answered):
    """One of the genes whose own embeddings moved furthest."""

    gene: str
    symbol: str = Field(description="The gene id where no symbol is known.")
    cosine: float
    shift: float


class EditAnswered(Answered):
    """What one edit did to one cell. A gene that the cell lacks is an answer, not an error."""

    kind: Kind
    genes: list[str]
    found: list[FoundGene]
    absent: list[str]
    cosine: float | None = Field(description="Cosine before and after; null where `reason` says why.")
    shift: float | None = Field(description="1 - cosine.")
    goal_shift: float | None = Field(description="Movement toward the goal; null when no goal was given.")
    state_shifts: dict[str, float | None] = Field(
        description="Movement toward each of the states, by name: positive toward it; null where `reason` says why."
    )
    class_changes: dict[str, float] | None = Field(
        description="Change of the probability of each class of the head; null when no head was asked for, or where "
        "`reason` says why."
    )
    reason: str = Field(description="Why there is no cosine; empty otherwise.")
    n_compared: int = Field(description="Genes that stand in both cells and were not edited.")
    n_cut: int = Field(description="Lowest genes that had to leave a full window.")
    n_refilled: int = Field(description="Genes that moved up into the window.")
    gene_shifts: list[GeneShift] = Field(description="Of the genes asked for, in that order.")
    top_gene_shifts: list[TopGeneShift] = Field(description="The furthest first.")


class PerturbedCell(CellFacts):
    """One cell and its edits, in the order of the request."""

    edits: list[EditAnswered]


class PerturbationsFacts(Answered):
    """What an answer says of all its cells."""

    provenance: Provenance
    layer: Layer
    measure: Measure
    timings_ms: Timings


class PerturbationsAnswered(PerturbationsFacts):
    """Edits of each cell, in the order of the request."""

    cells: list[PerturbedCell]
