"""From the service's JSON to the client's records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from genescale.client.records import (
    ClassifiedCell,
    ClassifiedGene,
    ClassifyAnswer,
    EmbeddingsAnswer,
    GeneEmbeddingsAnswer,
    HeadAnswer,
    LabelVote,
    Neighbor,
    NeighborsAnswer,
    NeighborsCell,
    NeighborsReference,
    NeighborsTimings,
    PerturbationsAnswer,
    PerturbedCell,
    Timings,
    TokensAnswer,
    edit_of,
    genes_of,
    made,
    model_of,
    report_of,
    tokens_of,
)

Json = Mapping[str, Any]


def embeddings_answer(answer: Json) -> EmbeddingsAnswer:
    """What `/v1/embeddings` answered."""
    vectors = [cell["embedding"] for cell in answer["cells"]]
    return EmbeddingsAnswer(
        # Through float64: the digits of a float32 lead back to its very bits only that way.
        embeddings=np.asarray(vectors, dtype=np.float64).astype(np.float32),
        cells=tuple(report_of(cell) for cell in answer["cells"]),
        model=model_of(answer["provenance"]),
        timings_ms=made(Timings, answer["timings_ms"]),
    )


def tokens_answer(answer: Json) -> TokensAnswer:
    """What `/v1/tokens` answered."""
    return TokensAnswer(
        cells=tuple(tokens_of(cell) for cell in answer["cells"]),
        window=answer["window"],
        model=model_of(answer["provenance"]),
        timings_ms=made(Timings, answer["timings_ms"]),
    )


def gene_embeddings_answer(answer: Json) -> GeneEmbeddingsAnswer:
    """What `/v1/embeddings` answered for the output `genes`."""
    return GeneEmbeddingsAnswer(
        cells=tuple(genes_of(cell) for cell in answer["cells"]),
        model=model_of(answer["provenance"]),
        timings_ms=made(Timings, answer["timings_ms"]),
    )


def perturbations_answer(answer: Json) -> PerturbationsAnswer:
    """What `/v1/perturbations` answered."""
    return PerturbationsAnswer(
        cells=tuple(
            PerturbedCell(report=report_of(cell), edits=tuple(edit_of(edit) for edit in cell["edits"]))
            for cell in answer["cells"]
        ),
        model=model_of(answer["provenance"]),
        timings_ms=made(Timings, answer["timings_ms"]),
    )


def classify_answer(answer: Json) -> ClassifyAnswer:
    """What `/v1/classify` answered."""
    return ClassifyAnswer(
        cells=tuple(
            ClassifiedCell(report=report_of(cell), heads=tuple(made(HeadAnswer, head) for head in cell["heads"]))
            for cell in answer["cells"]
        ),
        genes=tuple(made(ClassifiedGene, gene) for gene in answer["genes"]),
        model=model_of(answer["provenance"]),
        timings_ms=made(Timings, answer["timings_ms"]),
    )


def neighbors_answer(answer: Json) -> NeighborsAnswer:
    """What `/v1/neighbors` answered."""
    reference = answer["reference"]
    return NeighborsAnswer(
        cells=tuple(_cell_with_neighbors(cell) for cell in answer["cells"]),
        k=answer["k"],
        reference=NeighborsReference(
            digest=reference["digest"],
            corpus_version=reference["corpus"]["version"],
            facts={key: value for key, value in reference.items() if key not in ("digest", "corpus")},
        ),
        model=model_of(answer["provenance"]),
        timings_ms=made(NeighborsTimings, answer["timings_ms"]),
    )


def _cell_with_neighbors(cell: Json) -> NeighborsCell:
    return NeighborsCell(
        report=report_of(cell),
        neighbors=tuple(made(Neighbor, {**one, "place": _place(one)}) for one in cell["neighbors"]),
        votes={column: tuple(made(LabelVote, one) for one in votes) for column, votes in cell["votes"].items()},
        out_of_distribution=cell["out_of_distribution"],
        place=_place(cell),
    )


def _place(one: Json) -> tuple[float, float] | None:
    if one["place"] is None:
        return None
    x, y = one["place"]
    return x, y
