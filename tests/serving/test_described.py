"""The OpenAPI document names every header and query parameter, and the service keeps to what it says of them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from genescale.serving.access.scopes import OPEN_PATHS
from genescale.serving.answering.classifications import ClassifyOptions
from genescale.serving.forms.h5ad_cells import FileOptions
from genescale.serving.gate import DEADLINE_HEADER, Gate
from genescale.serving.neighbours.contract import NeighborsOptions
from genescale.serving.problems import retry_headers
from genescale.serving.routes import openapi_document
from genescale.serving.schemas import EmbeddingOptions
from genescale.serving.schemas_tokens import TokensOptions

Ask = Callable[..., httpx.Response]
OPTIONS = {
    "/v1/embeddings": EmbeddingOptions,
    "/v1/tokens": TokensOptions,
    "/v1/classify": ClassifyOptions,
    "/v1/neighbors": NeighborsOptions,
}


@functools.cache
def document() -> dict[str, Any]:
    return openapi_document()


def operations() -> list[tuple[str, str, dict[str, Any]]]:
    paths = document()["paths"]
    return [(path, method, one) for path, methods in paths.items() for method, one in methods.items()]


def resolved(one: dict[str, Any]) -> dict[str, Any]:
    found: Any = document() if "$ref" in one else one
    for step in one.get("$ref", "").removeprefix("#/").split("/") if "$ref" in one else ():
        found = found[step]
    return dict(found)


def parameters(operation: dict[str, Any], place: str) -> dict[str, dict[str, Any]]:
    found = [resolved(one) for one in operation.get("parameters", [])]
    return {one["name"]: one for one in found if one["in"] == place}


def test_every_operation_names_the_headers_that_it_reads() -> None:
    for path, _, operation in operations():
        named = parameters(operation, "header")
        assert "X-Request-ID" in named, path
        assert (DEADLINE_HEADER in named) == (path not in OPEN_PATHS), path


def test_answers_name_the_headers_that_they_bring(ask: Ask, build: Callable[..., Gate]) -> None:
    """What is refused brings exactly the headers of ours that its status is documented with."""
    for path, _, operation in operations():
        for status, response in operation["responses"].items():
            named = set(response["headers"])
            assert "X-Request-ID" in named
            assert (set(retry_headers(1)) <= named) == (status in ("429", "503")), (path, status)
            assert ("WWW-Authenticate" in named) == (status == "401"), (path, status)
    app = build(keys=["the-only-key-0123456789abcdef"])
    refused = ask(app, "POST", "/v1/tokens", json={})
    assert refused.status_code == 401
    named = document()["paths"]["/v1/tokens"]["post"]["responses"]["401"]["headers"]
    assert {name.lower() for name in named} <= set(refused.headers)


@pytest.mark.parametrize("path", OPTIONS)
def test_options_of_a_file_are_query_parameters(path: str) -> None:
    named = parameters(document()["paths"][path]["post"], "query")
    fields = {**OPTIONS[path].model_fields, **FileOptions.model_fields}
    assert set(fields) <= set(named)
    for name in fields:
        assert not named[name]["required"]
        assert "null" not in str(named[name]["schema"])
        assert named[name]["description"].startswith("Of an h5ad body only.")


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "9999999999"])
def test_deadlines_that_the_document_forbids_are_refused(ask: Ask, app: Gate, value: str) -> None:
    schema = parameters(document()["paths"]["/v1/info"]["get"], "header")[DEADLINE_HEADER]["schema"]
    fits = re.fullmatch(r"-?\d+", value) and schema["minimum"] <= int(value) <= schema["maximum"]
    assert not fits
    assert ask(app, "GET", "/v1/info", headers={DEADLINE_HEADER: value}).status_code == 422
    assert ask(app, "GET", "/v1/info", headers={DEADLINE_HEADER: str(schema["maximum"])}).status_code == 200
