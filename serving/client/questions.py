"""What each question sends and how its answer is read: pure functions that both clients share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from genescale.client.answers import (
    classify_answer,
    embeddings_answer,
    gene_embeddings_answer,
    neighbors_answer,
    perturbations_answer,
    tokens_answer,
)
from genescale.client.cells import Cell, Vector, cell_json, doubles, json_bytes, plain
from genescale.client.records import (
    ClassifyAnswer,
    EmbeddingsAnswer,
    GeneEmbeddingsAnswer,
    NeighborsAnswer,
    PerturbationsAnswer,
    TokensAnswer,
)
from genescale.platform.errors import ServiceError

Answer = TypeVar("Answer")
Edit = Mapping[str, Any]
"""`{"kind": "delete", "genes": [...]}`, or another kind, and what belongs to it: `refill` (delete), `quartiles` or
`rank` (inhibit, activate), `ranks` (replace)."""
JSON_TYPE = "application/json"
LAYER, POOLING = "second_to_last", "mean_genes"


@dataclass(frozen=True, kw_only=True, eq=False)
class Question(Generic[Answer]):
    """One request, encoded once however often it is sent, and the way from its response to the answer."""

    method: str
    path: str
    read: Callable[[httpx.Response], Answer]
    content: bytes | None = None
    headers: Mapping[str, str]


def embeddings(cells: Sequence[Cell], *, layer: str, pooling: str) -> Question[EmbeddingsAnswer]:
    """Which embedding each cell has."""
    body = {"cells": [cell_json(cell) for cell in cells], "layer": layer, "pooling": pooling}
    return posted("/v1/embeddings", body, embeddings_answer)


def tokens(cells: Sequence[Cell], *, beyond_window: bool) -> Question[TokensAnswer]:
    """How each cell is ranked and tokenised."""
    body = {"cells": [cell_json(cell) for cell in cells], "beyond_window": beyond_window}
    return posted("/v1/tokens", body, tokens_answer)


def gene_embeddings(cells: Sequence[Cell], *, layer: str) -> Question[GeneEmbeddingsAnswer]:
    """Which embedding each gene has in each cell."""
    body = {"cells": [cell_json(cell) for cell in cells], "layer": layer, "output": "genes"}
    return posted("/v1/embeddings", body, gene_embeddings_answer)


def perturbations(
    cells: Sequence[Cell],
    edits: Sequence[Edit],
    *,
    layer: str,
    measure: str,
    states: Mapping[str, Vector] | None,
    goal: Vector | None,
    head: str | None,
    gene_shifts: Sequence[str],
    top_gene_shifts: int,
) -> Question[PerturbationsAnswer]:
    """How far each edit moves each cell."""
    body: dict[str, Any] = {
        "cells": [cell_json(cell) for cell in cells],
        "edits": [plain(edit) for edit in edits],
        "layer": layer,
        "measure": measure,
        "states": [{"name": name, "vector": doubles(vector)} for name, vector in (states or {}).items()],
        "gene_shifts": list(gene_shifts),
        "top_gene_shifts": top_gene_shifts,
    }
    if goal is not None:
        body["goal"] = doubles(goal)
    if head is not None:
        body["head"] = head
    return posted("/v1/perturbations", body, perturbations_answer)


def perturbations_of(content: bytes) -> PerturbationsAnswer:
    """The answer to a question for perturbations as a job wrote it down; ServiceError for anything else."""
    return understood(lambda: perturbations_answer(json.loads(content)), "/v1/perturbations")


def classify(cells: Sequence[Cell], *, genes: Sequence[str]) -> Question[ClassifyAnswer]:
    """What the heads say of cells, or of genes."""
    body = {"cells": [cell_json(cell) for cell in cells], "genes": list(genes)}
    return posted("/v1/classify", body, classify_answer)


def neighbors(cells: Sequence[Cell], *, k: int, columns: Sequence[str] | None) -> Question[NeighborsAnswer]:
    """Which cells of the published reference are nearest."""
    body: dict[str, Any] = {"cells": [cell_json(cell) for cell in cells], "k": k}
    if columns is not None:
        body["columns"] = list(columns)
    return posted("/v1/neighbors", body, neighbors_answer)


def info() -> Question[dict[str, Any]]:
    """What runs there, and what it allows."""
    return Question(method="GET", path="/v1/info", headers={"Accept": JSON_TYPE}, read=json_object)


def posted(path: str, body: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Answer]) -> Question[Answer]:
    """A question in JSON that is answered in JSON; raises InputError for what JSON cannot carry."""
    return Question(
        method="POST",
        path=path,
        content=json_bytes(body),
        headers={"Content-Type": JSON_TYPE, "Accept": JSON_TYPE},
        read=lambda response: understood(lambda: read(json_object(response)), path),
    )


def understood(read: Callable[[], Answer], path: str) -> Answer:
    """What `read` makes of a response; ServiceError for an answer of another shape than the contract's."""
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise ServiceError(
            "the service's answer is not what this client knows.",
            where=path,
            fix="Compare the versions of the client and of the service (`build` in /v1/info).",
        ) from error


def json_object(response: httpx.Response) -> dict[str, Any]:
    """The object in a response; ServiceError when it holds none."""
    try:
        answer = response.json()
    except ValueError as error:
        raise ServiceError("the service answered something that is not JSON.", where=response.url.path) from error
    if not isinstance(answer, dict):
        raise ServiceError("the service answered something unexpected.", where=response.url.path)
    return answer
