"""What the service accepts and answers, as strict models: the HTTP contract, and the source of the OpenAPI document.

Requests are strict: an unknown field, a text where a number belongs, a boolean as a count, NaN or infinity are errors.
Numbers of an answer keep every bit: an embedding is float32, written with as many digits as it needs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The same names as in training.embedder and perturbation.readouts.shift; a test compares them. Written out here,
# because the HTTP side must not import torch.
Layer = Literal["last", "second_to_last"]
Pooling = Literal["mean_genes", "cls"]
Output = Literal["cell", "cls", "genes"]
Measure = Literal["remaining_genes", "cls", "mean_pooled"]
Kind = Literal["delete", "overexpress", "inhibit", "activate", "replace"]
HeadKind = Literal["cell_classes", "gene_classes", "number"]
Reason = Literal["unknown", "no_median", "zero"]

# Beyond this a count is a mistake, and its quotient by a small median could leave the range of a double.
LARGEST_COUNT = 1e12
LONGEST_NAME, LONGEST_ID = 64, 256
GeneName = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME, description="Ensembl gene id, symbol or alias.")]
Count = Annotated[float, Field(ge=0, le=LARGEST_COUNT)]
Token = Annotated[int, Field(ge=0, le=2**32 - 1)]


class Asked(BaseModel):
    """A part of a request: nothing beside the known fields, nothing converted."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Answered(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CellAsked(Asked):
    """One cell: raw counts by gene, the same as two arrays, or the tokens of a cell that is tokenised already."""

    id: Annotated[str, Field(max_length=LONGEST_ID)] | None = Field(None, description="Comes back in the answer.")
    counts: dict[GeneName, Count] | None = Field(
        None,
        description="Raw count of each gene. Names that lead to one gene are summed; zeros and unknown genes are "
        "ignored and reported.",
        examples=[{"ENSG00000107485": 3, "GATA4": 1}],
    )
    genes: Annotated[list[GeneName], Field(fail_fast=True)] | None = Field(
        None, description="Instead of `counts`: the genes, each name once, with their counts in `values`."
    )
    values: Annotated[list[Count], Field(fail_fast=True)] | None = Field(
        None, description="Raw count of each of `genes`, in their order."
    )
    tokens: Annotated[list[Token], Field(fail_fast=True)] | None = Field(
        None,
        description="Gene tokens in rank order, with or without <cls> and <eos>. What exceeds the window is cropped.",
    )

    @property
    def n_given(self) -> int:
        """Names or tokens that are given."""
        return len(next(form for form in (self.counts, self.genes, self.tokens) if form is not None))

    @model_validator(mode="after")
    def _one_form(self) -> CellAsked:
        if sum(form is not None for form in (self.counts, self.genes, self.tokens)) != 1:
            raise ValueError("give either counts, or genes and values, or tokens")
        if (self.genes is None) != (self.values is None) or len(self.genes or ()) != len(self.values or ()):
            raise ValueError("genes and values must be arrays of one length")
        return self


# The first wrong cell ends the reading: listing all mistakes of a large request would cost more than answering it.
Cells = Annotated[list[CellAsked], Field(min_length=1, fail_fast=True)]


class EmbeddingOptions(Asked):
    """What to read from the cells of a request: all of it that is no cell."""

    layer: Layer = Field("second_to_last", description="Encoder layer whose output is taken.")
    output: Output = Field(
        "cell",
        description="One vector per cell, made as `pooling` says; the vector of <cls>; or one vector per gene of the "
        "window, in rank order.",
    )
    pooling: Pooling = Field(
        "mean_genes", description="Of the output `cell`: mean over the genes, or the vector of <cls>."
    )


class EmbeddingsAsked(EmbeddingOptions):
    """Cells to embed."""

    cells: Cells


class ClassifyOptions(Asked):
    """What to ask the heads of: all of it that is no cell."""

    genes: list[GeneName] = Field(
        [],
        description="Gene heads only: the genes that are wanted. Empty means every gene of the cells, up to a limit.",
    )


class ClassifyAsked(ClassifyOptions):
    """Cells, or genes in the context of cells, to answer with the heads of a fine-tuned model."""

    cells: Cells


class ModelFacts(Answered):
    """Which model answered: an immutable version."""

    name: str
    version: str
    digest: str


class VocabularyFacts(Answered):
    """Which vocabulary ranked the genes."""

    name: str
    digest: str


class CorpusFacts(Answered):
    """Which corpus the model learnt from; null where its bundle does not say."""

    version: int | str | None


class Provenance(Answered):
    """Where an answer comes from."""

    model: ModelFacts
    vocabulary: VocabularyFacts
    corpus: CorpusFacts


class Timings(Answered):
    """Where the time went, in milliseconds. Passes shared with other requests count in full."""

    parse: float
    queue: float
    forward: float


class IgnoredGene(Answered):
    """A name in `counts` that gave no token."""

    gene: str
    reason: Reason


class Ignored(Answered):
    """Everything of a cell that was not used. The counts are complete; the list is cut at a limit."""

    n: int
    unknown: int
    no_median: int
    zero: int
    genes: list[IgnoredGene]


class Merged(Answered):
    """Several names of one gene, whose counts were summed."""

    gene: str
    names: list[str]


class FileFacts(Answered):
    """The file that the cells of a request came in, and how it was read."""

    cells: int = Field(description="Of the whole file.")
    offset: int = Field(description="Number of the first cell that was read; 0 is the first of the file.")
    counts_slot: str = Field(description="Where the raw counts stand: X, raw.X or layers/NAME.")
    counts_reason: str = Field(description="Why they are taken for raw counts.")
    gene_column: str = Field(description="Column of the gene table that names the genes.")
    genes: int = Field(description="Gene columns of the file.")
    genes_known: int = Field(description="Of these, columns of genes that the model knows.")
    notes: list[str] = Field(description="What was decided or mended while reading.")


class CellFacts(Answered):
    """What became of one cell."""

    id: str | None
    n_genes: int = Field(description="Genes that were ranked, before cropping.")
    n_tokens: int = Field(description="Tokens the model saw, <cls> and <eos> included.")
    cropped: bool = Field(description="Whether genes fell out of the model's window.")
    ignored: Ignored
    merged: list[Merged]

    @property
    def fields(self) -> dict[str, Any]:
        """These facts, for an answer that says more of the cell."""
        return {name: getattr(self, name) for name in CellFacts.model_fields}


class EmbeddedCell(CellFacts):
    """One cell and its embedding, or the embeddings of its genes."""

    embedding: list[float] | None = Field(description="Null for the output `genes`.")
    genes: list[str] | None = Field(
        description="Of the output `genes`: the gene ids of the window in rank order; null otherwise."
    )
    gene_embeddings: list[list[float]] | None = Field(description="One for each of `genes`.")


class EmbeddingsFacts(Answered):
    """What an answer says of all its embeddings."""

    provenance: Provenance
    layer: Layer
    output: Output
    pooling: Pooling | None = Field(description="Null for the output `genes`.")
    file: FileFacts | None = Field(description="Of cells that came in a file; null otherwise.")
    timings_ms: Timings


class EmbeddingsAnswered(EmbeddingsFacts):
    """Embeddings, in the order of the request."""

    cells: list[EmbeddedCell]


class HeadFacts(Answered):
    """One head of a fine-tuned model: what it reads, and what it can answer."""

    label: str
    kind: HeadKind
    classes: list[str] = Field(description="Empty for a number.")


class HeadAnswered(Answered):
    """What one head says."""

    label: str
    predicted: str | None = Field(description="The most probable class; null for a number.")
    probabilities: dict[str, float] = Field(description="Of each class; empty for a number.")
    number: float | None = Field(description="In the unit of the labels; null for classes.")


class ClassifiedCell(CellFacts):
    """One cell and what each cell head says of it; none for a model whose head reads genes."""

    heads: list[HeadAnswered]


class ClassifiedGene(Answered):
    """One gene and what the gene head says of it: the mean over the request's cells that have the gene."""

    gene: str
    n_cells: int
    predicted: str | None = Field(description="The most probable class; null where no cell has the gene.")
    probabilities: dict[str, float]
    spread: dict[str, float] = Field(description="Standard deviation of each probability over those cells.")


class ClassifyFacts(Answered):
    """What an answer says of all its cells."""

    provenance: Provenance
    heads: list[HeadFacts]
    file: FileFacts | None = Field(description="Of cells that came in a file; null otherwise.")
    timings_ms: Timings


class ClassifyAnswered(ClassifyFacts):
    """Answers of the heads, in the order of the request."""

    cells: list[ClassifiedCell]
    genes: list[ClassifiedGene]


class EncoderFacts(Answered):
    """Shape of the model."""

    width: int
    layers: int
    window: int
    n_genes: int
    has_cls: bool


class ReferenceFacts(Answered):
    """The published reference cells of /v1/neighbors, and how they are compared."""

    digest: str
    corpus: CorpusFacts
    cells: int
    columns: list[str] = Field(description="Labels that can be asked for.")
    layer: Layer
    pooling: Pooling
    search: Literal["exact", "graph"]
    max_neighbors: int = Field(description="Largest `k`.")
    apart: str | None = Field(
        description="Out-of-distribution scores compare with reference cells that differ in this column; null where "
        "every other cell counts."
    )


class StateFacts(Answered):
    """A published state: the mean embedding of cells, which a request names instead of sending it."""

    name: str
    layer: Layer
    pooling: Pooling
    cells: int | None = Field(description="Cells that it is the mean of; null when unknown.")


class InfoAnswered(Answered):
    """What runs here, and what it allows."""

    service: str
    build: str
    models: dict[str, ModelFacts] = Field(
        {}, description="What answers under each name (`?model=NAME`), the default first; `/v1/models` says more."
    )
    provenance: Provenance
    encoder: EncoderFacts
    heads: list[HeadFacts] = Field(description="What /v1/classify answers; empty for a model without a head.")
    reference: ReferenceFacts | None = Field(
        None, description="Where /v1/neighbors looks; null for a service without a reference."
    )
    states: list[StateFacts] = Field([], description="States that /v1/perturbations knows by name.")
    lineage: dict[str, str | int | float | None]
    choices: dict[str, list[str]]
    limits: dict[str, float]


class StatusAnswered(Answered):
    """`alive` or `ready`."""

    status: Literal["alive", "ready"]


class ErrorFacts(Answered):
    """One error: a stable code, a sentence, the id to quote, and where in the request."""

    code: str
    message: str
    request_id: str
    details: dict[str, Any] | None = None


class ErrorAnswered(Answered):
    """The body of every answer that is not 200."""

    error: ErrorFacts
