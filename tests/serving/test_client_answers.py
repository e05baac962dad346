"""Answers as records: neighbours, what a later service may add, and the same questions of both clients."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from genescale.client import AsyncGenescaleClient, GenescaleClient
from genescale.serving.neighbours.contract import NeighborsAnswered, NeighborsAsked
from tests.serving.client_wire import Wire, call

CELL = {"id": "a", "counts": {"GENE1": 3, "GENE2": 5, "GENE4": 1}}
EDIT = {"kind": "delete", "genes": ["GENE1"]}
PROVENANCE = {
    "model": {"name": "tiny", "version": "3", "digest": "d"},
    "vocabulary": {"name": "v", "digest": "w"},
    "corpus": {"version": 7},
}
IGNORED = {"n": 0, "unknown": 0, "no_median": 0, "zero": 0, "genes": []}
FACTS = {"id": "a", "n_genes": 3, "n_tokens": 5, "cropped": False, "ignored": IGNORED, "merged": []}


# Objects whose keys are data: labels, states, classes.
BY_NAME = ("labels", "votes", "state_shifts", "class_changes", "probabilities")


def more_of(value: Any) -> Any:
    """An answer as a later service might give it: every object with fields says something more."""
    if isinstance(value, dict):
        return {**{key: item if key in BY_NAME else more_of(item) for key, item in value.items()}, "later": 1}
    return [more_of(item) for item in value] if isinstance(value, list) else value


def neighbors_answer() -> dict[str, Any]:
    """An answer that the contract allows."""
    labels = {"cell_type": "T cell", "tissue": None}
    cell = {
        **FACTS,
        "neighbors": [{"id": "r1", "dataset": "d1", "distance": 0.25, "labels": labels, "place": None}],
        "votes": {"cell_type": [{"label": "T cell", "n": 1, "share": 1.0}]},
        "out_of_distribution": 0.5,
        "place": [0.5, 1.5],
    }
    reference = example(NeighborsAnswered)["reference"]
    timings = {"parse": 1.0, "queue": 2.0, "forward": 3.0, "search": 4.0}
    answer = {
        "provenance": PROVENANCE,
        "reference": reference,
        "k": 1,
        "cells": [cell],
        "file": None,
        "timings_ms": timings,
    }
    NeighborsAnswered.model_validate(answer)
    return answer


def example(kind: Any) -> dict[str, Any]:
    """Some value for each field of the reference, whatever its fields are."""
    schema = kind.model_json_schema()

    def value(of: dict[str, Any]) -> Any:
        if "$ref" in of:
            of = schema["$defs"][of["$ref"].rsplit("/", 1)[1]]
        if "enum" in of or "const" in of:
            return of.get("const", of.get("enum", [None])[0])
        if "anyOf" in of:
            return value(of["anyOf"][0])
        if of.get("type") == "object":
            return {name: value(one) for name, one in of.get("properties", {}).items()}
        return {"string": "x", "integer": 1, "number": 1.0, "boolean": True, "array": [], "null": None}[of["type"]]

    return {"reference": value(schema["properties"]["reference"])}


@pytest.mark.parametrize("later", [False, True], ids=["now", "later"])
def test_neighbors_are_asked_and_read_as_the_contract_says(later: bool) -> None:
    asked: list[dict[str, Any]] = []

    def line(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/neighbors"
        asked.append(json.loads(request.content))
        answer = neighbors_answer()
        return httpx.Response(200, json={**more_of(answer), "reference": answer["reference"]} if later else answer)

    with GenescaleClient("http://service", transport=httpx.MockTransport(line)) as client:
        answer = client.neighbors([CELL], k=1, columns=["cell_type"])
        client.neighbors([CELL])
    assert NeighborsAsked.model_validate(asked[0]).columns == ["cell_type"]
    assert NeighborsAsked.model_validate(asked[1]).columns is None
    (found,) = answer.cells
    assert (found.report.id, found.out_of_distribution, found.place) == ("a", 0.5, (0.5, 1.5))
    assert (found.neighbors[0].id, found.neighbors[0].distance) == ("r1", 0.25)
    assert (found.neighbors[0].labels["tissue"], found.neighbors[0].place) == (None, None)
    assert found.votes["cell_type"][0].share == 1.0
    assert (answer.k, answer.timings_ms.search, answer.model.corpus_version) == (1, 4.0, 7)
    assert answer.reference.digest == neighbors_answer()["reference"]["digest"]


@pytest.mark.parametrize("method", ["tokens", "embeddings", "gene_embeddings", "perturbations"])
def test_a_later_service_may_say_more(method: str, wire: Callable[..., Wire]) -> None:
    given = ([CELL], [EDIT]) if method == "perturbations" else ([CELL],)
    real = wire()
    now = call("sync", real, method, *given)
    answer = asyncio.run_coroutine_threadsafe(real.answer(real.posted[-1]), real.loop).result(timeout=30).json()
    later = wire()
    later.mend = lambda request: httpx.Response(200, json=more_of(answer))
    then = call("sync", later, method, *given)
    assert now.model == then.model
    if method == "perturbations":
        assert now.cells == then.cells
    assert [getattr(cell, "report", cell) for cell in then.cells] == [
        getattr(cell, "report", cell) for cell in now.cells
    ]


def test_both_clients_ask_the_same_questions_with_the_same_arguments() -> None:
    def methods(kind: type) -> dict[str, list[tuple[str, Any]]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: [(one.name, one.default) for one in inspect.signature(method).parameters.values()]
            for name, method in found
            if not name.startswith("_")
        }

    assert methods(GenescaleClient) == methods(AsyncGenescaleClient)
    assert {"tokens", "embeddings", "perturbations", "classify", "neighbors", "embed", "embed_anndata"} <= set(
        methods(GenescaleClient)
    )


@pytest.mark.parametrize("method", ["tokens", "embeddings", "gene_embeddings", "perturbations", "info", "ready"])
def test_both_clients_give_the_same_answers(method: str, wire: Callable[..., Wire]) -> None:
    given: tuple[Any, ...] = {"perturbations": ([CELL], [EDIT]), "info": (), "ready": ()}.get(method, ([CELL],))
    one, other = (call(kind, wire(), method, *given) for kind in ("sync", "async"))
    assert without_times(one) == without_times(other)


def test_tokens_ask_for_the_same_cell(wire: Callable[..., Wire]) -> None:
    real = wire()
    (cell,) = call("sync", real, "tokens", [CELL]).cells
    assert cell.report.n_tokens == len(cell.tokens)
    assert len(cell.genes) == len(cell.symbols) == cell.report.n_genes
    (counts, again) = (
        call("sync", real, "embeddings", [asked]) for asked in (CELL, {"id": "a", "tokens": cell.tokens})
    )
    np.testing.assert_array_equal(again.embeddings, counts.embeddings)


def without_times(answer: Any) -> Any:
    if not hasattr(answer, "timings_ms"):
        return answer
    facts = {name: value for name, value in vars(answer).items() if name != "timings_ms"}
    return repr(facts)
