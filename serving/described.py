"""What the OpenAPI document says beside bodies: headers of requests and answers, and options as query parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from genescale.serving.access.scopes import OPEN_PATHS
from genescale.serving.forms.h5ad_cells import FileOptions

REQUEST_HEADERS: dict[str, dict[str, Any]] = {
    "RequestId": {
        "name": "X-Request-ID",
        "in": "header",
        "description": "An id of yours, to find the request in logs and to quote: 1 to 128 of A-Z a-z 0-9 . _ : - "
        "Without one, or with another, the service makes its own.",
        "schema": {"type": "string"},
    },
    "Deadline": {
        "name": "X-Genescale-Deadline-Ms",
        "in": "header",
        "description": "Milliseconds from the arrival of the request after which the answer is of no use: the work is "
        "dropped and the answer is 504. The service's own limit stays the longest.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999},
    },
}
ANSWER_HEADERS: dict[str, dict[str, Any]] = {
    "RequestId": {"description": "The id of the request.", "schema": {"type": "string"}},
    "RetryAfter": {"description": "Seconds to wait before asking again.", "schema": {"type": "integer", "minimum": 0}},
    "RetryAfterMs": {
        "description": "The same in milliseconds, for who can wait so shortly.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "Authenticate": {"description": "How to send a key.", "schema": {"type": "string"}},
}
_NAMES = {
    "RequestId": "X-Request-ID",
    "RetryAfter": "Retry-After",
    "RetryAfterMs": "Retry-After-Ms",
    "Authenticate": "WWW-Authenticate",
}
_OF_STATUS = {"401": ("Authenticate",), "429": ("RetryAfter", "RetryAfterMs"), "503": ("RetryAfter", "RetryAfterMs")}


def describe_headers(document: dict[str, Any]) -> None:
    """Add to an OpenAPI document which headers each operation reads and answers with."""
    components = document.setdefault("components", {})
    components["parameters"] = {**components.get("parameters", {}), **REQUEST_HEADERS}
    components["headers"] = {**components.get("headers", {}), **ANSWER_HEADERS}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            read = ["RequestId"] if path in OPEN_PATHS else list(REQUEST_HEADERS)
            refs = [{"$ref": f"#/components/parameters/{name}"} for name in read]
            operation["parameters"] = [*operation.get("parameters", []), *refs]
            for status, response in operation["responses"].items():
                names = ("RequestId", *_OF_STATUS.get(status, ()))
                given = {_NAMES[name]: {"$ref": f"#/components/headers/{name}"} for name in names}
                response["headers"] = {**response.get("headers", {}), **given}


def file_parameters(options: type[BaseModel]) -> list[dict[str, Any]]:
    """The query parameters of a question whose body is an h5ad file: its options, and how the file is read."""
    return [*_parameters(options), *_parameters(FileOptions)]


def parameter(name: str, where: str, schema: dict[str, Any], what: str = "") -> dict[str, Any]:
    """A parameter as the OpenAPI document has it; `where` is path, query or header; those of a path are required."""
    described = {"description": what} if what else {}
    return {"name": name, "in": where, "required": where == "path", **described, "schema": schema}


def _parameters(kind: type[BaseModel]) -> Iterator[dict[str, Any]]:
    for name, schema in kind.model_json_schema()["properties"].items():
        plain = {key: value for key, value in schema.items() if key not in ("title", "description", "examples")}
        choices = [one for one in plain.pop("anyOf", []) if one != {"type": "null"}]
        if choices:
            # A parameter is left out where a body says null.
            plain = {**{key: value for key, value in plain.items() if value is not None}, **choices[0]}
        described = f"Of an h5ad body only. {schema.get('description', '')}".strip()
        yield parameter(name, "query", plain, described)
