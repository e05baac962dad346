"""A client that is generated from docs/openapi.json alone can ask every question, as an application's own would."""

from __future__ import annotations

import json
import keyword
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.serving.client_wire import Wire

DOCUMENT: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[2] / "docs" / "openapi.json").read_text(encoding="utf-8")
)
HEAD = """
MISSING = object()

class Api:
    def __init__(self, send, check):
        self.send, self.check = send, check
"""
METHOD = """
    def {name}(self{parameters}):
        body = {{{fields}}}
        body = {{key: value for key, value in body.items() if value is not MISSING}}
        if {schema!r}:
            self.check(body, {schema!r})
        status, answer = self.send({method!r}, {path!r}, body if {schema!r} else None)
        self.check(answer, {answers!r}[str(status)])
        return status, answer
"""


def generated() -> str:
    """Source of a client with one method for each operation, whose arguments are the fields of its body."""
    source = HEAD
    for path, operations in DOCUMENT["paths"].items():
        for method, operation in operations.items():
            source += METHOD.format(method=method.upper(), path=path, **parts_of(operation))
    return source


def parts_of(operation: dict[str, Any]) -> dict[str, Any]:
    content = operation.get("requestBody", {}).get("content", {})
    schema = content["application/json"]["schema"]["$ref"] if content else ""
    # A question of several kinds is a choice of schemas: it is sent whole, so its method takes no fields.
    model = {"properties": {}, **(resolved(schema) if schema else {})}
    required = model.get("required", [])
    names = sorted(model["properties"], key=lambda name: name not in required)
    assert all(name.isidentifier() and not keyword.iskeyword(name) for name in [operation["operationId"], *names])
    parameters = [name if name in required else f"{name}=MISSING" for name in names]
    return {
        "name": operation["operationId"],
        "parameters": "".join(f", {one}" for one in parameters),
        "fields": ", ".join(f"{name!r}: {name}" for name in names),
        "schema": schema,
        "answers": {
            status: answer["content"]["application/json"]["schema"]["$ref"]
            for status, answer in operation["responses"].items()
            # Of an answer that is no JSON (a file, numbers for a scraper) the document says no more than its type.
            if "$ref" in answer.get("content", {}).get("application/json", {}).get("schema", {})
        },
    }


def resolved(reference: str) -> dict[str, Any]:
    found: Any = DOCUMENT
    for name in reference.removeprefix("#/").split("/"):
        found = found[name]
    return dict(found)


def check(value: Any, reference: str) -> None:
    jsonschema.Draft202012Validator({**DOCUMENT, "$ref": reference}).validate(value)


@pytest.fixture
def api(wire: Callable[..., Wire]) -> Any:
    module: dict[str, Any] = {}
    exec(compile(generated(), "generated", "exec"), module)
    line = wire(max_cells=2)

    def send(method: str, path: str, body: Any) -> tuple[int, Any]:
        with httpx.Client(transport=line, base_url="http://service") as client:
            response = client.request(method, path, json=body)
        return response.status_code, response.json()

    return module["Api"](send, check)


CELL = {"id": "a", "counts": {"GENE1": 3, "GENE2": 5, "GENE4": 1}}


def test_every_question_is_answered_as_the_document_says(api: Any) -> None:
    status, embedded = api.embeddings(cells=[CELL, {"genes": ["GENE7"], "values": [2]}], layer="last")
    assert status == 200
    assert [len(cell["embedding"]) for cell in embedded["cells"]] == [16, 16]
    status, perturbed = api.perturbations(
        cells=[CELL],
        edits=[{"kind": "delete", "genes": ["GENE1"]}, {"kind": "inhibit", "genes": ["GENE2"], "quartiles": 2}],
        states=[{"name": "well", "vector": embedded["cells"][0]["embedding"]}],
        top_gene_shifts=2,
    )
    assert status == 200
    assert [edit["kind"] for edit in perturbed["cells"][0]["edits"]] == ["delete", "inhibit"]
    status, info = api.info()
    assert (status, info["limits"]["max_cells"]) == (200, 2)
    assert api.alive() == (200, {"status": "alive"})
    assert api.ready() == (200, {"status": "ready"})


def test_refusals_have_the_documented_shape_for_every_question(api: Any) -> None:
    assert api.embeddings(cells=[CELL] * 3)[0] == 413
    assert api.perturbations(cells=[CELL], edits=[{"kind": "delete", "genes": ["NOGENE"]}])[0] == 422
    assert api.classify(cells=[CELL])[0] == 422
    status, answer = api.neighbors(cells=[CELL])
    assert (status, answer["error"]["code"]) == (422, "invalid_input")


def test_the_document_refuses_what_the_service_refuses(api: Any) -> None:
    for wrong in ({"counts": {"GENE1": -1}}, {"counts": {"GENE1": "3"}}, {"tokens": [-4]}, {"counts": {}, "more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            api.embeddings(cells=[wrong])
    with pytest.raises(jsonschema.ValidationError):
        api.perturbations(cells=[CELL], edits=[])


def test_the_generator_knows_every_operation(api: Any) -> None:
    operations = [one["operationId"] for path in DOCUMENT["paths"].values() for one in path.values()]
    assert len(operations) == len(set(operations)) >= 7
    assert all(callable(getattr(api, name)) for name in operations)
