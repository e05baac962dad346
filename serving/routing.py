"""What a route is: its address, who answers, and what the OpenAPI document says of it.

Bodies are read by `forms/reading.py` and not by FastAPI, whose reader lets duplicate keys and NaN through; so the
OpenAPI document is told the request schemas here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from genescale.serving.access.scopes import OPEN_PATHS
from genescale.serving.answering.questions import Sent
from genescale.serving.described import describe_headers, file_parameters
from genescale.serving.forms.media import JSON_ONLY, JSON_OR_ARROW, sent_form, wanted_form
from genescale.serving.models.documented import describe_model_choice
from genescale.serving.models.state import MODEL_PARAMETER
from genescale.serving.problems import JSON_TYPE
from genescale.serving.schemas import ErrorAnswered

REFUSALS: dict[int, str] = {
    400: "The body is not what it is declared as: strict JSON, or an Arrow stream.",
    401: "No key, or a wrong one.",
    403: "The key has not the scope that this needs.",
    404: "There is no model, or nothing else, of that name here.",
    406: "The answer does not come in a form that `Accept` names.",
    408: "The body took too long to arrive.",
    409: "It does not go with what is under way, or was asked before.",
    413: "More than a limit allows; `/v1/info` lists the limits.",
    415: "The body is declared as something that is not read here.",
    422: "The request does not fit the schema, or a gene is unknown.",
    429: "All places are taken, or the key asked for more than it may a minute: wait for `Retry-After-Ms`.",
    500: "A fault of the service.",
    503: "The model does not answer, or the service is stopping: wait for `Retry-After-Ms`.",
    504: "The answer took too long.",
}
PROBES, FACTS = (500, 503), (401, 403, 429, 500)
# A caller may name a deadline with every question: one that is no number, and one that passed.
OF_DEADLINES = (422, 504)
QUESTIONS = tuple(status for status in REFUSALS if status not in (HTTPStatus.NOT_ACCEPTABLE, HTTPStatus.CONFLICT))
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class Route:
    """One address and what is said of it; its operation id and summary are the name and docstring of `endpoint`."""

    method: str
    path: str
    endpoint: Endpoint
    answered: type[BaseModel]
    asked: type[BaseModel] | None = None
    """What a body is, None where none is read."""
    options: type[BaseModel] | None = None
    """What the query parameters of a body without options (an h5ad file) are; None where none is read."""
    refusals: Sequence[int] = QUESTIONS
    status: int = 200
    """Of an answer that is no refusal."""
    sent: Sequence[str] = (JSON_TYPE,)
    """Media types of bodies that are read."""
    given: Sequence[str] = (JSON_TYPE,)
    """Media types of answers; with more than one, 406 is a possible refusal."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More of the OpenAPI operation, such as its parameters."""


def add_route(app: FastAPI, route: Route) -> None:
    """Make the application answer at the route's address."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    refusals = {*route.refusals, *([HTTPStatus.NOT_ACCEPTABLE] if len(route.given) > 1 else [])}
    if route.path not in OPEN_PATHS:
        refusals |= set(OF_DEADLINES)
    responses: dict[int | str, dict[str, Any]] = {}
    if others := [kind for kind in route.given if kind != JSON_TYPE]:
        responses[route.status] = {"content": dict.fromkeys(others, binary)}
    for status in sorted(refusals):
        responses[int(status)] = {"model": ErrorAnswered, "description": REFUSALS[status]}
    extra = dict(route.extra)
    if route.options is not None:
        extra["parameters"] = [*extra.get("parameters", []), *file_parameters(route.options)]
    if route.asked is not None:
        schema = {"schema": {"$ref": f"#/components/schemas/{route.asked.__name__}"}}
        content = {kind: schema if kind == JSON_TYPE else binary for kind in route.sent}
        extra["requestBody"] = {"content": content, "required": True}
    app.add_api_route(
        route.path,
        route.endpoint,
        methods=[route.method],
        status_code=route.status,
        response_model=route.answered,
        responses=responses,
        operation_id=route.endpoint.__name__.strip("_"),
        summary=(route.endpoint.__doc__ or "").strip().rstrip("."),
        openapi_extra=extra or None,
    )


def openapi_of(app: FastAPI, routes: Sequence[Route], *, about: str) -> dict[str, Any]:
    """The OpenAPI document of an application with these routes."""
    document = get_openapi(title=app.title, version=app.version, description=about, routes=app.routes)
    _, asked = models_json_schema(
        [(route.asked, "validation") for route in routes if route.asked is not None],
        ref_template="#/components/schemas/{model}",
    )
    components = document.setdefault("components", {})
    components["schemas"] = dict(sorted({**components.get("schemas", {}), **asked["$defs"]}.items()))
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            # Either a key or none: whether a service wants one is its configuration.
            operation["security"] = [] if path in OPEN_PATHS else [{"key": []}, {}]
    describe_model_choice(document)
    describe_headers(document)
    return document


async def sent_by(request: Request, readable: Sequence[str]) -> Sent:
    """What a request brings, in one of the forms that are `readable`; 415 for another one."""
    form = sent_form(request.headers.get("content-type", ""), readable)
    # Which model is asked is no option of the question.
    parameters = [pair for pair in request.query_params.multi_items() if pair[0] != MODEL_PARAMETER]
    return Sent(body=await request.body(), form=form, parameters=parameters)


async def answer_in_form(
    request: Request, answer: Callable[[Sent, str], Awaitable[bytes]], readable: Sequence[str]
) -> Response:
    """The answer to a question of cells, in the form that `Accept` prefers; 406 for none that there is."""
    wanted = wanted_form(request.headers.get("accept", ""), JSON_OR_ARROW)
    return Response(await answer(await sent_by(request, readable), wanted), media_type=wanted)


async def json_body(request: Request) -> bytes:
    """The body of a request that says it is JSON; 415 for one that does not."""
    sent_form(request.headers.get("content-type", ""), JSON_ONLY)
    return await request.body()


def json_answer(answered: BaseModel | bytes, *, status: int = 200) -> Response:
    """An answer in JSON, of a model or of bytes that are rendered already."""
    body = answered if isinstance(answered, bytes) else answered.model_dump_json().encode()
    return Response(body, status_code=status, media_type=JSON_TYPE)
