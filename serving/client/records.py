"""What the client gives back: typed records, and how they are read from the service's JSON. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class GeneShift:
    """How far one gene's own embedding moved; None where the gene does not stand in both cells."""

    gene: str
    cosine: float | None
    shift: float | None


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


def model_of(provenance: Mapping[str, Any]) -> Model:
    """The model of an answer."""
    return Model(
        **provenance["model"],
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


def edit_of(edit: Mapping[str, Any]) -> EditResult:
    """An edit of an answer."""
    same = ("kind", "cosine", "shift", "goal_shift", "reason", "n_compared", "n_cut", "n_refilled")
    return EditResult(
        **{key: edit[key] for key in same},
        genes=tuple(edit["genes"]),
        found={one["gene"]: one["rank"] for one in edit["found"]},
        absent=tuple(edit["absent"]),
        gene_shifts=tuple(GeneShift(**one) for one in edit["gene_shifts"]),
    )
