"""The routes: addresses, documentation and error shapes; what is answered is in `answers.py`.

Bodies are read by `reading.py` and not by FastAPI, whose reader lets duplicate keys and NaN through; so the OpenAPI
document is told the request schemas here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from genescale.platform.errors import GenescaleError, InputError
from genescale.platform.log import get_logger
from genescale.serving.answers import Answers
from genescale.serving.config import ServingConfig
from genescale.serving.gate import OPEN_PATHS, Gate
from genescale.serving.media import ARROW_TYPE, JSON_ONLY, JSON_OR_ARROW, sent_form, wanted_form
from genescale.serving.neighbours.answering import NeighborAnswers
from genescale.serving.neighbours.contract import NeighborsAnswered, NeighborsAsked
from genescale.serving.neighbours.reference import Reference
from genescale.serving.problems import JSON_TYPE, Problem, RefusedError, problem_of
from genescale.serving.schemas import (
    ClassifyAnswered,
    ClassifyAsked,
    EmbeddingsAnswered,
    EmbeddingsAsked,
    ErrorAnswered,
    InfoAnswered,
    StatusAnswered,
)
from genescale.serving.schemas_perturb import PerturbationsAnswered, PerturbationsAsked

API_VERSION = "1"
ABOUT = "Embeddings and in-silico perturbations of single cells, by a Geneformer-type model."
# Swagger's page loads its script from a CDN and starts it inline; everything else stays forbidden.
DOCS_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data: https://fastapi.tiangolo.com; "
    "script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "frame-ancestors 'none'"
)
REFUSALS: dict[int, str] = {
    400: "The body is not what it is declared as: strict JSON, or an Arrow stream.",
    401: "No key, or a wrong one.",
    403: "The key has not the scope that this needs.",
    406: "The answer does not come in a form that `Accept` names.",
    408: "The body took too long to arrive.",
    413: "More than a limit allows; `/v1/info` lists the limits.",
    415: "The body is declared as something that is not read here.",
    422: "The request does not fit the schema, or a gene is unknown.",
    429: "All places are taken, or the key asked for more than it may a minute: wait for `Retry-After-Ms`.",
    500: "A fault of the service.",
    503: "The model does not answer, or the service is stopping: wait for `Retry-After-Ms`.",
    504: "The answer took too long.",
}
log = get_logger(__name__)
PROBES, QUESTIONS, FACTS = (500, 503), tuple(REFUSALS), (401, 403, 429, 500)


def http_application(
    answers: Answers, config: ServingConfig, *, reference: Reference | None = None, echo_request_id: bool = True
) -> Gate:
    """The whole HTTP side as one ASGI application: the gate, and the routes behind it."""
    application = routes()
    application.state.answers = answers
    application.state.neighbors = NeighborAnswers(answers, reference) if reference else None
    application.state.retry_after_s = config.retry_after_s
    return Gate(application, config, echo_request_id=echo_request_id)


def routes() -> FastAPI:
    """The routes without a model: enough for the OpenAPI document."""
    # redirect_slashes off: one address per answer, and no redirect that drops a body or a key.
    app = FastAPI(title="Genescale", version=API_VERSION, redirect_slashes=False, docs_url=None, redoc_url=None)
    _post(app, "/v1/embeddings", _embeddings, EmbeddingsAsked, EmbeddingsAnswered, arrow=True)
    _post(app, "/v1/perturbations", _perturbations, PerturbationsAsked, PerturbationsAnswered)
    _post(app, "/v1/classify", _classify, ClassifyAsked, ClassifyAnswered)
    _post(app, "/v1/neighbors", _neighbors, NeighborsAsked, NeighborsAnswered)
    _get(app, "/v1/info", _info, InfoAnswered, FACTS)
    _get(app, "/healthz", _alive, StatusAnswered, PROBES[:1])
    _get(app, "/readyz", _ready, StatusAnswered, PROBES)
    app.add_api_route("/docs", _docs, methods=["GET"], include_in_schema=False)
    app.openapi = lambda: openapi_document(app)  # type: ignore[method-assign]
    for kind in (GenescaleError, RefusedError, HTTPException, Exception):
        app.add_exception_handler(kind, _problem)
    return app


def openapi_document(app: FastAPI | None = None) -> dict[str, Any]:
    """The OpenAPI document of the routes."""
    app = app or routes()
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=ABOUT, routes=app.routes)
        _, asked = models_json_schema(
            [(kind, "validation") for kind in (EmbeddingsAsked, PerturbationsAsked, ClassifyAsked, NeighborsAsked)],
            ref_template="#/components/schemas/{model}",
        )
        components = document.setdefault("components", {})
        components["schemas"] = dict(sorted({**components.get("schemas", {}), **asked["$defs"]}.items()))
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                # Either a key or none: whether a service wants one is its configuration.
                operation["security"] = [] if path in OPEN_PATHS else [{"key": []}, {}]
        app.openapi_schema = document
    return app.openapi_schema


Endpoint = Callable[[Request], Awaitable[Response]]


def _post(
    app: FastAPI,
    path: str,
    endpoint: Endpoint,
    asked: type[BaseModel],
    answered: type[BaseModel],
    *,
    arrow: bool = False,
) -> None:
    stream = {ARROW_TYPE: {"schema": {"type": "string", "format": "binary"}}} if arrow else {}
    body = {JSON_TYPE: {"schema": {"$ref": f"#/components/schemas/{asked.__name__}"}}, **stream}
    extra = {"requestBody": {"content": body, "required": True}}
    refusals = QUESTIONS if arrow else tuple(status for status in QUESTIONS if status != HTTPStatus.NOT_ACCEPTABLE)
    _route(app, "POST", path, endpoint, answered, refusals, forms=stream, openapi_extra=extra)


def _get(app: FastAPI, path: str, endpoint: Endpoint, answered: type[BaseModel], refusals: tuple[int, ...]) -> None:
    _route(app, "GET", path, endpoint, answered, refusals)


def _route(
    app: FastAPI,
    method: str,
    path: str,
    endpoint: Endpoint,
    answered: type[BaseModel],
    refusals: tuple[int, ...],
    *,
    forms: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> None:
    responses: dict[int | str, dict[str, Any]] = {200: {"content": dict(forms)}} if forms else {}
    for status in refusals:
        responses[status] = {"model": ErrorAnswered, "description": REFUSALS[status]}
    app.add_api_route(
        path,
        endpoint,
        methods=[method],
        response_model=answered,
        responses=responses,
        operation_id=endpoint.__name__.strip("_"),
        summary=(endpoint.__doc__ or "").strip().rstrip("."),
        **more,
    )


def _answers(request: Request) -> Answers:
    answers: Answers = request.app.state.answers
    return answers


async def _embeddings(request: Request) -> Response:
    """Embed cells."""
    wanted = wanted_form(request.headers.get("accept", ""), JSON_OR_ARROW)
    sent = sent_form(request.headers.get("content-type", ""), JSON_OR_ARROW)
    body = await _answers(request).embeddings(await request.body(), sent=sent, wanted=wanted)
    return Response(body, media_type=wanted)


async def _perturbations(request: Request) -> Response:
    """Edit genes in cells and say how far the cells move."""
    return _json(await _answers(request).perturbations(await _body(request)))


async def _classify(request: Request) -> Response:
    """Answer cells, or genes in cells, with the heads of a fine-tuned model."""
    return _json(await _answers(request).classifications(await _body(request)))


async def _neighbors(request: Request) -> Response:
    """Find the nearest cells of a published reference."""
    neighbors: NeighborAnswers | None = request.app.state.neighbors
    if neighbors is None:
        raise InputError("this service has no reference.", fix="Ask a service that was started with --index.")
    return _json(await neighbors.neighbors(await _body(request)))


async def _info(request: Request) -> Response:
    """Model, vocabulary, corpus, choices and limits."""
    return _json(_answers(request).info.model_dump_json().encode())


async def _alive(request: Request) -> Response:
    """The process is alive."""
    return _json(StatusAnswered(status="alive").model_dump_json().encode())


async def _ready(request: Request) -> Response:
    """The model is loaded, warm and answers."""
    await _answers(request).ready()
    return _json(StatusAnswered(status="ready").model_dump_json().encode())


async def _docs(request: Request) -> Response:
    """The documentation page."""
    page = get_swagger_ui_html(openapi_url="/openapi.json", title="Genescale")
    page.headers["content-security-policy"] = DOCS_POLICY
    return page


async def _body(request: Request) -> bytes:
    """The body of a request that says it is JSON."""
    sent_form(request.headers.get("content-type", ""), JSON_ONLY)
    return await request.body()


async def _problem(request: Request, error: Exception) -> Response:
    problem = _of_router(request, error) if isinstance(error, HTTPException) else None
    problem = problem or problem_of(error, retry_after_s=request.app.state.retry_after_s)
    if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR and isinstance(error, GenescaleError):
        # Errors outside our tree travel on to the gate, which logs them.
        log.error("request failed", exc_info=error)
    body = problem.body(request.scope.get("request_id", ""))
    return Response(body, status_code=problem.status, media_type=JSON_TYPE, headers=dict(problem.headers))


def _of_router(request: Request, error: HTTPException) -> Problem:
    message = f"{request.method} is not possible here: {HTTPStatus(error.status_code).phrase}."
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = "there is nothing at this address; /openapi.json lists the addresses."
    return Problem(status=error.status_code, code=InputError.code, message=message, headers=dict(error.headers or {}))


def _json(body: bytes) -> Response:
    return Response(body, media_type=JSON_TYPE)
