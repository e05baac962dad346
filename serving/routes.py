"""The routes: addresses, documentation and error shapes; what is answered is in `answers.py`."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException

from genescale.platform.errors import GenescaleError, InputError
from genescale.platform.log import get_logger
from genescale.serving.config import ServingConfig
from genescale.serving.gate import Gate
from genescale.serving.media import JSON_OR_ARROW, sent_form, wanted_form
from genescale.serving.neighbours.contract import NeighborsAnswered, NeighborsAsked
from genescale.serving.problems import JSON_TYPE, Problem, RefusedError, problem_of
from genescale.serving.routing import FACTS, PROBES, Route, add_route, json_answer, json_body, openapi_of
from genescale.serving.schemas import (
    ClassifyAnswered,
    ClassifyAsked,
    EmbeddingsAnswered,
    EmbeddingsAsked,
    InfoAnswered,
    StatusAnswered,
)
from genescale.serving.schemas_perturb import PerturbationsAnswered, PerturbationsAsked
from genescale.serving.services import Services, services_of

API_VERSION = "1"
ABOUT = "Embeddings and in-silico perturbations of single cells, by a Geneformer-type model."
# Swagger's page loads its script from a CDN and starts it inline; everything else stays forbidden.
DOCS_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data: https://fastapi.tiangolo.com; "
    "script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "frame-ancestors 'none'"
)
log = get_logger(__name__)


def http_application(services: Services, config: ServingConfig, *, echo_request_id: bool = True) -> Gate:
    """The whole HTTP side as one ASGI application: the gate, and the routes behind it."""
    application = routes()
    application.state.services = services
    return Gate(application, config, echo_request_id=echo_request_id)


def routes() -> FastAPI:
    """The routes without a model: enough for the OpenAPI document."""
    # redirect_slashes off: one address per answer, and no redirect that drops a body or a key.
    app = FastAPI(title="Genescale", version=API_VERSION, redirect_slashes=False, docs_url=None, redoc_url=None)
    for route in ROUTES:
        add_route(app, route)
    app.add_api_route("/docs", _docs, methods=["GET"], include_in_schema=False)
    app.openapi = lambda: openapi_document(app)  # type: ignore[method-assign]
    for kind in (GenescaleError, RefusedError, HTTPException, Exception):
        app.add_exception_handler(kind, _problem)
    return app


def openapi_document(app: FastAPI | None = None) -> dict[str, Any]:
    """The OpenAPI document of the routes."""
    app = app or routes()
    if app.openapi_schema is None:
        app.openapi_schema = openapi_of(app, ROUTES, about=ABOUT)
    return app.openapi_schema


async def _embeddings(request: Request) -> Response:
    """Embed cells."""
    wanted = wanted_form(request.headers.get("accept", ""), JSON_OR_ARROW)
    sent = sent_form(request.headers.get("content-type", ""), JSON_OR_ARROW)
    body = await services_of(request).answers.embeddings(await request.body(), sent=sent, wanted=wanted)
    return Response(body, media_type=wanted)


async def _perturbations(request: Request) -> Response:
    """Edit genes in cells and say how far the cells move."""
    return json_answer(await services_of(request).answers.perturbations(await json_body(request)))


async def _classify(request: Request) -> Response:
    """Answer cells, or genes in cells, with the heads of a fine-tuned model."""
    return json_answer(await services_of(request).answers.classifications(await json_body(request)))


async def _neighbors(request: Request) -> Response:
    """Find the nearest cells of a published reference."""
    neighbors = services_of(request).neighbors
    if neighbors is None:
        raise InputError("this service has no reference.", fix="Ask a service that was started with --index.")
    return json_answer(await neighbors.neighbors(await json_body(request)))


async def _info(request: Request) -> Response:
    """Model, vocabulary, corpus, choices and limits."""
    return json_answer(services_of(request).answers.info.model_dump_json().encode())


async def _alive(request: Request) -> Response:
    """The process is alive."""
    return json_answer(StatusAnswered(status="alive").model_dump_json().encode())


async def _ready(request: Request) -> Response:
    """The model is loaded, warm and answers."""
    await services_of(request).answers.ready()
    return json_answer(StatusAnswered(status="ready").model_dump_json().encode())


async def _docs(request: Request) -> Response:
    """The documentation page."""
    page = get_swagger_ui_html(openapi_url="/openapi.json", title="Genescale")
    page.headers["content-security-policy"] = DOCS_POLICY
    return page


async def _problem(request: Request, error: Exception) -> Response:
    problem = _of_router(request, error) if isinstance(error, HTTPException) else None
    problem = problem or problem_of(error, retry_after_s=services_of(request).retry_after_s)
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


ROUTES = (
    Route(
        method="POST",
        path="/v1/embeddings",
        endpoint=_embeddings,
        asked=EmbeddingsAsked,
        answered=EmbeddingsAnswered,
        sent=JSON_OR_ARROW,
        given=JSON_OR_ARROW,
    ),
    Route(
        method="POST",
        path="/v1/perturbations",
        endpoint=_perturbations,
        asked=PerturbationsAsked,
        answered=PerturbationsAnswered,
    ),
    Route(method="POST", path="/v1/classify", endpoint=_classify, asked=ClassifyAsked, answered=ClassifyAnswered),
    Route(method="POST", path="/v1/neighbors", endpoint=_neighbors, asked=NeighborsAsked, answered=NeighborsAnswered),
    Route(method="GET", path="/v1/info", endpoint=_info, answered=InfoAnswered, refusals=FACTS),
    Route(method="GET", path="/healthz", endpoint=_alive, answered=StatusAnswered, refusals=PROBES[:1]),
    Route(method="GET", path="/readyz", endpoint=_ready, answered=StatusAnswered, refusals=PROBES),
)
