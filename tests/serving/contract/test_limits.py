"""Every limit at its edge: what is allowed is answered, one more is refused, with the code and place that say why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genescale.serving.config import Limits, ServingConfig
from genescale.serving.gate import Gate
from genescale.serving.schemas import LONGEST_ID, LONGEST_NAME
from genescale.serving.schemas_perturb import LARGEST_RANK
from tests.serving.conftest import WIDTH

Ask = Callable[..., httpx.Response]
Body = dict[str, Any]
few = settings(
    max_examples=2,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def counts(n: int, first: int = 0) -> Body:
    """A cell of `n` genes that can be ranked."""
    return {"counts": {f"GENE{first + at}": at + 1 for at in range(n)}}


def delete(*genes: str) -> Body:
    return {"kind": "delete", "genes": list(genes)}


def perturb(**more: Any) -> Body:
    return {"cells": [counts(5)], "edits": [delete("GENE1")], **more}


def names(n: int) -> list[str]:
    return [f"GENE{at}" for at in range(n)]


@dataclass(frozen=True)
class Edge:
    """One limit: the question that asks for `n` of what it bounds, and the place that a refusal names."""

    limit: str
    path: str
    body: Callable[[int], Body]
    where: str
    unit: int = 1
    """How much one more of it counts."""


EDGES = (
    Edge("max_cells", "/v1/embeddings", lambda n: {"cells": [counts(2)] * n}, "cells"),
    Edge("max_cells", "/v1/perturbations", lambda n: perturb(cells=[counts(2)] * n), "cells"),
    Edge("max_cells", "/v1/classify", lambda n: {"cells": [counts(2)] * n}, "cells"),
    Edge("max_cells", "/v1/neighbors", lambda n: {"cells": [counts(2)] * n, "k": 1}, "cells"),
    Edge("max_cells", "/v1/tokens", lambda n: {"cells": [counts(2)] * n}, "cells"),
    Edge("max_genes_per_cell", "/v1/tokens", lambda n: {"cells": [counts(2), counts(n)]}, ""),
    Edge(
        "max_genes_per_cell",
        "/v1/embeddings",
        lambda n: {"cells": [counts(1), {"genes": names(n), "values": [1] * n}]},
        "cells[1]",
    ),
    Edge(
        "max_genes_per_cell",
        "/v1/embeddings",
        lambda n: {"cells": [counts(1), {"tokens": list(range(4, 4 + n))}]},
        "cells[1]",
    ),
    Edge("max_edits", "/v1/perturbations", lambda n: perturb(edits=[delete("GENE1")] * n), "edits"),
    Edge(
        "max_genes_per_edit",
        "/v1/perturbations",
        lambda n: perturb(edits=[delete("GENE0"), delete(*names(n))]),
        "edits[1].genes",
    ),
    Edge("max_gene_shifts", "/v1/perturbations", lambda n: perturb(gene_shifts=names(n)), "gene_shifts"),
    Edge("max_gene_shifts", "/v1/perturbations", lambda n: perturb(top_gene_shifts=n), "top_gene_shifts"),
    Edge(
        "max_states",
        "/v1/perturbations",
        lambda n: perturb(states=[{"name": f"s{at}", "vector": [1.0] * WIDTH} for at in range(n)]),
        "states",
    ),
    Edge(
        "max_gene_values",
        "/v1/embeddings",
        lambda n: {"cells": [counts(n // WIDTH)], "output": "genes"},
        "output",
        unit=WIDTH,
    ),
    Edge("max_tokens", "/v1/embeddings", lambda n: {"cells": [counts(n - 2)]}, ""),
    # The cell, and the cell again for its edit.
    Edge("max_tokens", "/v1/perturbations", lambda n: perturb(cells=[counts(n // 2 - 2)]), "", unit=2),
    Edge("max_tokens", "/v1/classify", lambda n: {"cells": [counts(n - 2)]}, ""),
    Edge("max_tokens", "/v1/neighbors", lambda n: {"cells": [counts(n - 2)], "k": 1}, ""),
)
# Tokens of a small cell and its edit; as many keys as any object of a question has beside the counts.
LEAST = {"max_tokens": 14, "max_genes_per_cell": 8}
# Limits with a test of their own below or beside their code.
ELSEWHERE = {
    "max_body_bytes": "test_limits.py",
    "max_listed_genes": "test_limits.py",
    "max_held_bytes": "../test_gate_work.py",
    "max_classified_genes": "../test_classify.py",
    "max_file_bytes": "../test_h5ad_attacks.py",
    "max_unpacked_bytes": "../test_h5ad_attacks.py",
    "body_timeout_s": "../test_gate.py",
    "deadline_s": "../test_gate.py",
}


def test_every_limit_is_asked_at_its_edge() -> None:
    assert {edge.limit for edge in EDGES} | set(ELSEWHERE) == {field.name for field in fields(Limits)}
    for limit, file in ELSEWHERE.items():
        assert limit in (Path(__file__).parent / file).read_text(encoding="utf-8"), f"{file} does not test {limit}"


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: f"{edge.limit}-{edge.path.rpartition('/')[2]}-{edge.where}")
def test_the_limit_is_allowed_and_one_more_is_not(complete: Callable[..., Gate], ask: Ask, edge: Edge) -> None:
    @few
    @given(st.integers(1, 6))
    def at(steps: int) -> None:
        limit = steps * edge.unit + LEAST.get(edge.limit, 0)
        app = complete(**{edge.limit: limit})
        allowed = ask(app, "POST", edge.path, json=edge.body(limit))
        assert allowed.status_code == 200, allowed.text
        refused = ask(app, "POST", edge.path, json=edge.body(limit + edge.unit))
        problem = refused.json()["error"]
        assert (refused.status_code, problem["code"]) == (413, "limit"), refused.text
        assert problem.get("details", {}).get("where", "") == edge.where
        assert f"{limit + edge.unit:,}" in problem["message"]
        assert f"{limit:,}" in problem["message"]

    at()


@few
@given(st.integers(0, 40), st.booleans())
def test_a_body_is_counted_to_the_byte(complete: Callable[..., Gate], ask: Ask, blanks: int, declared: bool) -> None:
    body = json.dumps({"cells": [counts(2)]}).encode() + b" " * blanks
    headers = {"Content-Type": "application/json"}

    async def pieces() -> Any:
        for at in range(0, len(body), 7):
            yield body[at : at + 7]

    def status(limit: int) -> httpx.Response:
        app = complete(max_body_bytes=limit)
        return ask(app, "POST", "/v1/embeddings", content=body if declared else pieces(), headers=headers)

    assert status(len(body)).status_code == 200
    refused = status(len(body) - 1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "limit")


@few
@given(st.integers(1, 5), st.integers(0, 9))
def test_ignored_genes_are_all_counted_and_listed_up_to_the_limit(
    complete: Callable[..., Gate], ask: Ask, limit: int, unknown: int
) -> None:
    cell = {"counts": {**counts(2)["counts"], **{f"NOGENE{at}": 1 for at in range(unknown)}}}
    answer = ask(complete(max_listed_genes=limit), "POST", "/v1/tokens", json={"cells": [cell]}).json()
    ignored = answer["cells"][0]["ignored"]
    assert (ignored["n"], ignored["unknown"]) == (unknown, unknown)
    assert [one["gene"] for one in ignored["genes"]] == [f"NOGENE{at}" for at in range(min(limit, unknown))]


@dataclass(frozen=True)
class Value:
    """A bound of the schema: the greatest value that fits, one that does not, and the place of the refusal."""

    path: str
    body: Callable[[Any], Body]
    fits: Any
    beyond: Any
    where: str


VALUES = (
    Value("/v1/embeddings", lambda v: {"cells": [counts(1), {"counts": {"GENE1": v}}]}, 1e12, 2e12, "cells[1]"),
    Value("/v1/embeddings", lambda v: {"cells": [{"counts": {"GENE1": v, "GENE2": 1}}]}, 0, -1e-9, "cells[0]"),
    Value("/v1/embeddings", lambda v: {"cells": [{"genes": ["GENE1"], "values": [v]}]}, 1e12, 2e12, "cells[0].values"),
    Value(
        "/v1/embeddings",
        lambda v: {"cells": [{"counts": {"GENE1": 1, "G" * v: 1}}]},
        LONGEST_NAME,
        LONGEST_NAME + 1,
        "cells[0]",
    ),
    Value(
        "/v1/embeddings", lambda v: {"cells": [{"id": "i" * v, **counts(1)}]}, LONGEST_ID, LONGEST_ID + 1, "cells[0].id"
    ),
    Value(
        "/v1/perturbations",
        lambda v: perturb(edits=[{"kind": "inhibit", "genes": ["GENE1"], "rank": v}]),
        LARGEST_RANK,
        LARGEST_RANK + 1,
        "edits[0].rank",
    ),
    Value(
        "/v1/perturbations",
        lambda v: perturb(edits=[{"kind": "inhibit", "genes": ["GENE1"], "quartiles": v}]),
        3,
        4,
        "edits[0].quartiles",
    ),
    Value("/v1/neighbors", lambda v: {"cells": [counts(2)], "k": v}, 1, 0, "k"),
)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{value.path.rpartition('/')[2]}-{value.where}")
def test_values_are_bounded_as_the_schema_says(complete: Callable[..., Gate], ask: Ask, value: Value) -> None:
    app = complete()
    allowed = ask(app, "POST", value.path, json=value.body(value.fits))
    assert allowed.status_code == 200, allowed.text
    refused = ask(app, "POST", value.path, json=value.body(value.beyond))
    problem = refused.json()["error"]
    assert (refused.status_code, problem["code"]) == (422, "invalid_input"), refused.text
    assert problem["details"]["where"].startswith(value.where)


def test_as_many_neighbours_as_the_reference_says(complete: Callable[..., Gate], ask: Ask) -> None:
    app = complete()
    most = ask(app, "GET", "/v1/info").json()["reference"]["max_neighbors"]
    assert ask(app, "POST", "/v1/neighbors", json={"cells": [counts(2)], "k": most}).status_code == 200
    refused = ask(app, "POST", "/v1/neighbors", json={"cells": [counts(2)], "k": most + 1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "limit")
    assert refused.json()["error"]["details"]["where"] == "k"


@few
@given(st.integers(1, 3), st.integers(0, 3))
def test_places_are_as_many_as_the_config_says(
    ask_together: Callable[..., list[httpx.Response]], ongoing: int, queued: int
) -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.05)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    gate = Gate(slow, ServingConfig(max_ongoing=ongoing, max_queued=queued))
    places = ongoing + queued
    answers = ask_together(gate, [("POST", "/v1/embeddings", {})] * (places + 2))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200] * places + [429] * 2
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "overloaded"
            assert 0 < int(answer.headers["retry-after-ms"]) <= 1_000
            assert int(answer.headers["retry-after"]) >= 1
    assert gate.room.admitted == gate.room.held_bytes == 0
