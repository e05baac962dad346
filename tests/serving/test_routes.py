"""Routes: facts, probes, error shapes, keys and the OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import httpx
import numpy as np
import pytest

from genescale.perturbation.editing import requests as requests_module
from genescale.perturbation.readouts import shift
from genescale.platform.errors import ServiceError
from genescale.serving import schemas
from genescale.serving.access.scopes import is_open
from genescale.serving.answering import passes
from genescale.serving.config import Limits
from genescale.serving.gate import Gate
from genescale.serving.in_process import InProcessModel
from genescale.serving.routes import openapi_document, routes

if TYPE_CHECKING:
    from genescale.training.embedder import Embedder

KEY = "the-only-key-0123456789abcdef"
Ask = Callable[..., httpx.Response]
DrawCell = Callable[[int, int], dict[str, float]]
Tokens = Callable[[Mapping[str, float]], np.ndarray]
Build = Callable[..., Gate]


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) <= {"code", "message", "request_id", "details"}
    assert error["request_id"] == response.headers["x-request-id"]
    return error


def test_info_tells_every_limit_and_choice_and_nothing_private(ask: Ask, build: Build) -> None:
    response = ask(build(max_cells=17, keys=[KEY]), "GET", "/v1/info", headers={"Authorization": f"Bearer {KEY}"})
    info = response.json()
    assert set(Limits.__dataclass_fields__) <= set(info["limits"])
    assert info["limits"]["max_cells"] == 17
    assert info["choices"]["layer"] == ["last", "second_to_last"]
    assert info["encoder"] == {"width": 16, "layers": 2, "window": 48, "n_genes": 120, "has_cls": True}
    assert info["lineage"] == {"corpus_version": 7, "git_commit": "abc123"}
    assert "private-bucket" not in response.text
    assert KEY not in response.text


class Gone:
    """A model that does not answer."""

    async def ping(self) -> None:
        raise ServiceError("the model's replica went away.")

    async def embed(self, *_: Any) -> Any:
        raise ServiceError("the model's replica went away.")

    perturb = embed


class Broken(Gone):
    """A model with a fault."""

    async def embed(self, *_: Any) -> Any:
        raise RuntimeError("CUDA error at /opt/secret/kernel.cu")  # a made-up path


def test_alive_and_ready_are_two_answers(ask: Ask, app: Gate, build: Build) -> None:
    assert ask(app, "GET", "/healthz").json() == {"status": "alive"}
    assert ask(app, "GET", "/readyz").json() == {"status": "ready"}
    without_model = build(model=Gone())
    assert ask(without_model, "GET", "/healthz").status_code == 200
    response = ask(without_model, "GET", "/readyz")
    assert response.status_code == 503
    assert error_of(response)["code"] == "service"
    assert "retry-after" in response.headers


@pytest.mark.parametrize(("model", "status", "code"), [(Gone(), 503, "service"), (Broken(), 500, "internal")])
def test_a_failing_model_is_a_typed_error_without_insides(
    ask: Ask, build: Build, model: Any, status: int, code: str
) -> None:
    response = ask(build(model=model), "POST", "/v1/embeddings", json={"cells": [{"counts": {"GENE1": 1}}]})
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert "secret" not in response.text
    assert "CUDA" not in response.text


def test_embeddings_that_are_no_numbers_are_a_fault_and_not_an_answer(
    ask: Ask, build: Build, embedder: Embedder
) -> None:
    class Diverged:
        vocabulary, width = embedder.vocabulary, embedder.width

        def embed_cells(self, cells: Sequence[Any], **_: Any) -> np.ndarray:
            return np.full((len(cells), self.width), np.nan, dtype=np.float32)

    app = build(model=InProcessModel(Diverged()))  # type: ignore[arg-type]
    response = ask(app, "POST", "/v1/embeddings", json={"cells": [{"counts": {"GENE1": 1}}]})
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/embeddings/", 404),
        ("GET", "/v1/embeddings", 405),
        ("DELETE", "/v1/info", 405),
        ("POST", "/healthz", 405),
        ("GET", "/redoc", 404),
    ],
)
def test_unknown_addresses_and_methods_get_the_same_shape(
    ask: Ask, app: Gate, method: str, path: str, status: int
) -> None:
    response = ask(app, method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == "invalid_input"
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_declared_as_json_is_refused(ask: Ask, app: Gate, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    response = ask(app, "POST", "/v1/embeddings", content=b'{"cells": [{"counts": {"GENE1": 1}}]}', headers=headers)
    assert response.status_code == 415
    error_of(response)


def test_every_route_needs_the_key_except_the_probes(ask: Ask, build: Build) -> None:
    app = build(keys=[KEY])
    known = [(method, route.path) for route in routes().routes for method in sorted(route.methods)]  # type: ignore[attr-defined]
    assert {"/v1/embeddings", "/v1/perturbations", "/v1/info", "/docs", "/openapi.json"} < {path for _, path in known}
    for method, path in known:
        without = ask(app, method, path)
        wrong = ask(app, method, path, headers={"Authorization": "Bearer not-the-key-0123456789"})
        right = ask(app, method, path, headers={"Authorization": f"Bearer {KEY}"})
        assert right.status_code != 401, path
        if is_open(path):
            assert without.status_code == wrong.status_code == right.status_code == 200
        else:
            assert without.status_code == wrong.status_code == 401, path
            assert method == "HEAD" or without.json()["error"]["code"] == "unauthorized"


def test_without_keys_the_service_is_open(ask: Ask, app: Gate) -> None:
    assert ask(app, "GET", "/v1/info").status_code == 200


def test_the_openapi_document_is_valid_and_describes_the_answers(ask: Ask, app: Gate, draw_cell: DrawCell) -> None:
    import jsonschema
    from openapi_spec_validator import validate

    document = openapi_document()
    validate(document)
    assert ask(app, "GET", "/openapi.json").json() == json.loads(json.dumps(document))
    cells, edits = [{"counts": draw_cell(1, 5)}], [{"kind": "delete", "genes": ["GENE1"]}]
    asked = {"/v1/embeddings": {"cells": cells}, "/v1/perturbations": {"cells": cells, "edits": edits}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path in asked:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                jsonschema.validate(asked[path], {**schema, "components": document["components"]})
            answer = ask(app, method.upper(), path, **({"json": asked[path]} if path in asked else {}))
            content = operation["responses"][str(answer.status_code)]["content"]
            kind = answer.headers["content-type"].partition(";")[0]
            schema = content[kind]["schema"]
            if kind == "application/json":
                jsonschema.validate(answer.json(), {**schema, "components": document["components"]})


def test_the_documentation_page_loads_its_document(ask: Ask, app: Gate) -> None:
    page = ask(app, "GET", "/docs")
    assert page.status_code == 200
    assert "/openapi.json" in page.text
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]


def test_names_of_the_contract_are_those_of_their_owners() -> None:
    from genescale.training import embedder as embedder_module

    assert get_args(schemas.Layer) == embedder_module.LAYERS
    assert get_args(schemas.Pooling) == embedder_module.POOLINGS
    assert set(get_args(passes.Rows)) == {*embedder_module.POOLINGS, "genes"}
    assert get_args(schemas.Measure) == shift.MEASURES
    assert get_args(schemas.Kind) == requests_module.KINDS


def test_a_refused_method_is_told_all_that_are_possible(ask: Ask, app: Gate) -> None:
    for path, possible in (("/v1/jobs", "GET, POST"), ("/v1/embeddings", "POST"), ("/v1/info", "GET")):
        answer = ask(app, "DELETE", path)
        assert (answer.status_code, answer.headers["allow"]) == (405, possible)
