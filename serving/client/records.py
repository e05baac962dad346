"""What the client gives back: typed records, and how they are read from the service's JSON. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Model:
    """What answered: an immutable model version, its vocabulary, and the corpus it learnt from."""

    name: str
    version: str
    digest: str
    vocabulary_digest: str
    corpus_version: int | str | None


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Milliseconds the service spent parsing, waiting and computing."""

    parse: float
    queue: float
    forward: float


@dataclass(frozen=True, kw_only=True)
class CellReport:
    """What became of one cell."""

    id: str | None
    n_genes: int
    n_tokens: int
    cropped: bool
    n_ignored: int
    ignored_by_reason: Mapping[str, int]
    ignored: tuple[tuple[str, str], ...]
    """Gene and reason; cut at the service's limit, the counts are complete."""
    merged: Mapping[str, tuple[str, ...]]
    """Gene id -> the names whose counts were summed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingsAnswer:
    """Embeddings in the order of the cells asked for."""

    embeddings: np.ndarray
    """`(n, d)` float32, bit for bit what the model gave."""
    cells: tuple[CellReport, ...]
    model: Model
    timings_ms: Timings


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddedCells:
    """Embeddings of many cells, asked for in many requests."""

    embeddings: np.ndarray
    """`(n, d)` float32; NaN for a cell that could not be used."""
    n_genes: np.ndarray
    """`(n,)` genes that were ranked, before cropping."""
    n_tokens: np.ndarray
    """`(n,)` tokens that the model saw."""
    n_ignored: np.ndarray
    """`(n,)` genes that were not used."""
    cropped: np.ndarray
    """`(n,)` whether genes fell out of the model's window."""
    unusable: Mapping[int, str]
    """Position of each cell that could not be used, and why."""
    model: Model
    requests: int
    timings_ms: Timings
    """Sums over the requests, which overlap."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CellGenes:
    """The genes that the model sees of one cell, and their embeddings."""

    report: CellReport
    genes: tuple[str, ...]
    """Gene ids in rank order."""
    embeddings: np.ndarray
    """`(g, d)` float32, one row for each gene."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneEmbeddingsAnswer:
    """Embeddings of genes, cell by cell, in the order of the cells asked for."""

    cells: tuple[CellGenes, ...]
    model: Model
    timings_ms: Timings


@dataclass(frozen=True, kw_only=True, eq=False)
class CellTokens:
    """One cell as the model takes it; its genes stand in rank order."""

    report: CellReport
    tokens: np.ndarray
    """`(t,)` int64, with <cls> and <eos> where the model has them; `{"tokens": …}` asks for the same cell."""
    genes: tuple[str, ...]
    """Gene ids, without <cls> and <eos>."""
    symbols: tuple[str, ...]
    """Of each of `genes`; the gene id where no symbol is known."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokensAnswer:
    """Tokens, in the order of the cells asked for."""

    cells: tuple[CellTokens, ...]
    window: int
    """Tokens that the model takes of one cell."""
    model: Model
    timings_ms: Timings


@dataclass(frozen=True, kw_only=True)
class GeneShift:
    """How far one gene's own embedding moved; None where the gene does not stand in both cells."""

    gene: str
    cosine: float | None
    shift: float | None


@dataclass(frozen=True, kw_only=True)
class TopGeneShift:
    """One of the genes whose own embeddings moved furthest."""

    gene: str
    symbol: str
    cosine: float
    shift: float


@dataclass(frozen=True, kw_only=True)
class EditResult:
    """What one edit did to one cell."""

    kind: str
    genes: tuple[str, ...]
    found: Mapping[str, int]
    """Gene -> its rank in the cell (0 = the first gene)."""
    absent: tuple[str, ...]
    cosine: float | None
    shift: float | None
    goal_shift: float | None
    reason: str
    n_compared: int
    n_cut: int
    n_refilled: int
    gene_shifts: tuple[GeneShift, ...]
    state_shifts: Mapping[str, float | None]
    """State -> movement toward it; None where `reason` says why."""
    class_changes: Mapping[str, float] | None
    """Class -> change of its probability; None when no head was asked for, or where `reason` says why."""
    top_gene_shifts: tuple[TopGeneShift, ...]
    """The furthest first."""


@dataclass(frozen=True, kw_only=True)
class PerturbedCell:
    """One cell and what each edit did to it, in the order of the edits."""

    report: CellReport
    edits: tuple[EditResult, ...]


@dataclass(frozen=True, kw_only=True)
class PerturbationsAnswer:
    """Cells in the order asked for, each with all edits."""

    cells: tuple[PerturbedCell, ...]
    model: Model
    timings_ms: Timings


@dataclass(frozen=True, kw_only=True)
class HeadAnswer:
    """What one head says of one cell."""

    label: str
    predicted: str | None
    """The most probable class; None for a number."""
    probabilities: Mapping[str, float]
    number: float | None


@dataclass(frozen=True, kw_only=True)
class ClassifiedCell:
    """One cell and what each head says of it; no heads where the model's head reads genes."""

    report: CellReport
    heads: tuple[HeadAnswer, ...]


@dataclass(frozen=True, kw_only=True)
class ClassifiedGene:
    """One gene: the mean over the cells that have it, and the standard deviation over them."""

    gene: str
    n_cells: int
    predicted: str | None
    probabilities: Mapping[str, float]
    spread: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ClassifyAnswer:
    """Cells in the order asked for, and genes where the model's head reads genes."""

    cells: tuple[ClassifiedCell, ...]
    genes: tuple[ClassifiedGene, ...]
    model: Model
    timings_ms: Timings


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """One reference cell; `distance` is the cosine distance."""

    id: str
    dataset: str
    distance: float
    labels: Mapping[str, str | None]
    """By column; None where the reference cell has none."""
    place: tuple[float, float] | None
    """x and y on the map of the reference, without a unit; None where it has none."""


@dataclass(frozen=True, kw_only=True)
class LabelVote:
    """How many of a cell's neighbours have one label."""

    label: str | None
    n: int
    share: float


@dataclass(frozen=True, kw_only=True)
class NeighborsCell:
    """One cell and its neighbours, the nearest first."""

    report: CellReport
    neighbors: tuple[Neighbor, ...]
    votes: Mapping[str, tuple[LabelVote, ...]]
    """By column, most votes first."""
    out_of_distribution: float
    """Share of reference cells nearer to their own k-th neighbour than this cell is to its."""
    place: tuple[float, float] | None
    """x and y among the places of the nearest reference cells, without a unit; None where the reference has no map."""


@dataclass(frozen=True, kw_only=True)
class NeighborsReference:
    """Where the neighbours were looked for."""

    digest: str
    corpus_version: int | str | None
    facts: Mapping[str, Any]
    """Everything else that the service says of its reference."""


@dataclass(frozen=True, kw_only=True)
class NeighborsTimings(Timings):
    """Also the milliseconds that looking for the neighbours took."""

    search: float


@dataclass(frozen=True, kw_only=True)
class NeighborsAnswer:
    """Nearest reference cells, in the order of the cells asked for."""

    cells: tuple[NeighborsCell, ...]
    k: int
    reference: NeighborsReference
    model: Model
    timings_ms: NeighborsTimings


Record = TypeVar("Record")


def made(kind: type[Record], facts: Mapping[str, Any]) -> Record:
    """A record of the fields that it knows, of an answer that may say more; KeyError for a field that is not said."""
    return kind(**{field.name: facts[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def model_of(provenance: Mapping[str, Any]) -> Model:
    """The model of an answer."""
    model = provenance["model"]
    return Model(
        **{key: model[key] for key in ("name", "version", "digest")},
        vocabulary_digest=provenance["vocabulary"]["digest"],
        corpus_version=provenance["corpus"]["version"],
    )


def report_of(cell: Mapping[str, Any]) -> CellReport:
    """What became of a cell of an answer."""
    ignored = cell["ignored"]
    return CellReport(
        **{key: cell[key] for key in ("id", "n_genes", "n_tokens", "cropped")},
        n_ignored=ignored["n"],
        ignored_by_reason={reason: ignored[reason] for reason in ("unknown", "no_median", "zero")},
        ignored=tuple((one["gene"], one["reason"]) for one in ignored["genes"]),
        merged={one["gene"]: tuple(one["names"]) for one in cell["merged"]},
    )


def genes_of(cell: Mapping[str, Any]) -> CellGenes:
    """The genes of a cell of an answer."""
    vectors_gd = np.asarray(cell["gene_embeddings"], dtype=np.float64).astype(np.float32)
    return CellGenes(report=report_of(cell), genes=tuple(cell["genes"]), embeddings=vectors_gd)


def tokens_of(cell: Mapping[str, Any]) -> CellTokens:
    """The tokens of a cell of an answer."""
    return CellTokens(
        report=report_of(cell),
        tokens=np.asarray(cell["tokens"], dtype=np.int64),
        genes=tuple(cell["genes"]),
        symbols=tuple(cell["symbols"]),
    )


def edit_of(edit: Mapping[str, Any]) -> EditResult:
    """An edit of an answer."""
    same = ("kind", "cosine", "shift", "goal_shift", "reason", "n_compared", "n_cut", "n_refilled")
    more = ("state_shifts", "class_changes")
    return EditResult(
        **{key: edit[key] for key in same + more},
        genes=tuple(edit["genes"]),
        found={one["gene"]: one["rank"] for one in edit["found"]},
        absent=tuple(edit["absent"]),
        gene_shifts=tuple(made(GeneShift, one) for one in edit["gene_shifts"]),
        top_gene_shifts=tuple(made(TopGeneShift, one) for one in edit["top_gene_shifts"]),
    )
