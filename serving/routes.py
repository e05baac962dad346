"""The routes: addresses, documentation and error shapes; what is answered is in `answering/answers.py`."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from genescale.platform.errors import GenescaleError, InputError, LimitError
from genescale.platform.log import get_logger
from genescale.serving.config import ServingConfig
from genescale.serving.forms.media import CELL_FORMS, JSON_OR_ARROW
from genescale.serving.gate import Gate
from genescale.serving.jobs.routes import AS_JOB, JOB_ROUTES, REPEAT, perturbations_as_job
from genescale.serving.models.routes import MODEL_ROUTES
from genescale.serving.neighbours.contract import NeighborsAnswered, NeighborsAsked, NeighborsOptions
from genescale.serving.neighbours.view_routes import REFERENCE_ROUTES, neighbors_of
from genescale.serving.page.site_files import add_site
from genescale.serving.problems import JSON_TYPE, Problem, RefusedError, problem_of
from genescale.serving.routing import (
    FACTS,
    PROBES,
    Route,
    add_route,
    answer_in_form,
    json_answer,
    openapi_of,
    sent_by,
)
from genescale.serving.schemas import (
    ClassifyAnswered,
    ClassifyAsked,
    ClassifyOptions,
    EmbeddingOptions,
    EmbeddingsAnswered,
    EmbeddingsAsked,
    InfoAnswered,
    StatusAnswered,
)
from genescale.serving.schemas_perturb import PerturbationsAnswered, PerturbationsAsked
from genescale.serving.schemas_tokens import TokensAnswered, TokensAsked, TokensOptions
from genescale.serving.services import Services, all_services, services_of
from genescale.serving.watching.metrics_route import add_metrics, add_metrics_route
from genescale.serving.watching.noted import note_problem

API_VERSION = "1"
ABOUT = "Embeddings and in-silico perturbations of single cells, by a Geneformer-type model."
log = get_logger(__name__)


def http_application(services: Services, config: ServingConfig, *, echo_request_id: bool = True) -> Gate:
    """The whole HTTP side as one ASGI application: the gate, and the routes behind it."""
    application = routes()
    application.state.services = services
    gate = Gate(application, config, echo_request_id=echo_request_id)
    add_metrics(application, gate.numbers, services)
    return gate


def routes() -> FastAPI:
    """The routes without a model: enough for the OpenAPI document."""
    # redirect_slashes off: one address per answer, and no redirect that drops a body or a key.
    app = FastAPI(title="Genescale", version=API_VERSION, redirect_slashes=False, docs_url=None, redoc_url=None)
    for route in ROUTES:
        add_route(app, route)
    add_metrics_route(app)
    add_site(app)
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
    return await answer_in_form(request, services_of(request).answers.embeddings, CELL_FORMS)


async def _tokens(request: Request) -> Response:
    """Rank and tokenise cells as the model would take them."""
    return await answer_in_form(request, services_of(request).answers.tokens, CELL_FORMS)


async def _perturbations(request: Request) -> Response:
    """Edit genes in cells and say how far the cells move."""
    try:
        return await answer_in_form(request, services_of(request).answers.perturbations, JSON_OR_ARROW)
    except LimitError as refusal:
        return await perturbations_as_job(request, await sent_by(request, JSON_OR_ARROW), refusal)


async def _classify(request: Request) -> Response:
    """Answer cells, or genes in cells, with the heads of a fine-tuned model."""
    return await answer_in_form(request, services_of(request).answers.classifications, CELL_FORMS)


async def _neighbors(request: Request) -> Response:
    """Find the nearest cells of a published reference."""
    return await answer_in_form(request, neighbors_of(request).neighbors, CELL_FORMS)


async def _info(request: Request) -> Response:
    """Model, vocabulary, corpus, choices and limits."""
    services = services_of(request)
    info = services.answers.info
    if services.models is not None:
        info = info.model_copy(update={"models": services.models.versions.models})
    return json_answer(info)


async def _alive(request: Request) -> Response:
    """The process is alive."""
    return json_answer(StatusAnswered(status="alive"))


async def _ready(request: Request) -> Response:
    """The model is loaded, warm and answers."""
    await services_of(request).answers.ready()
    return json_answer(StatusAnswered(status="ready"))


async def _problem(request: Request, error: Exception) -> Response:
    problem = _of_router(request, error) if isinstance(error, HTTPException) else None
    problem = problem or problem_of(error, retry_after_s=all_services(request).retry_after_s)
    note_problem(problem.code)
    if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR and isinstance(error, GenescaleError):
        # Errors outside our tree travel on to the gate, which logs them.
        log.error("request failed", exc_info=error)
    body = problem.body(request.scope.get("request_id", ""))
    return Response(body, status_code=problem.status, media_type=JSON_TYPE, headers=dict(problem.headers))


def _of_router(request: Request, error: HTTPException) -> Problem:
    message = f"{request.method} is not possible here: {HTTPStatus(error.status_code).phrase}."
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = "there is nothing at this address; /openapi.json lists the addresses."
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_methods_there(request))
    return Problem(status=error.status_code, code=InputError.code, message=message, headers=headers)


def _methods_there(request: Request) -> list[str]:
    """Methods of all routes at this address: the router knows those of the first one only."""
    there = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in there for method in getattr(route, "methods", None) or ()})


ROUTES = (
    Route(
        method="POST",
        path="/v1/embeddings",
        endpoint=_embeddings,
        asked=EmbeddingsAsked,
        options=EmbeddingOptions,
        answered=EmbeddingsAnswered,
        sent=CELL_FORMS,
        given=JSON_OR_ARROW,
    ),
    Route(
        method="POST",
        path="/v1/tokens",
        endpoint=_tokens,
        asked=TokensAsked,
        options=TokensOptions,
        answered=TokensAnswered,
        sent=CELL_FORMS,
        given=JSON_OR_ARROW,
    ),
    Route(
        method="POST",
        path="/v1/perturbations",
        endpoint=_perturbations,
        asked=PerturbationsAsked,
        answered=PerturbationsAnswered,
        sent=JSON_OR_ARROW,
        given=JSON_OR_ARROW,
        extra={"parameters": [REPEAT], "responses": AS_JOB},
    ),
    Route(
        method="POST",
        path="/v1/classify",
        endpoint=_classify,
        asked=ClassifyAsked,
        options=ClassifyOptions,
        answered=ClassifyAnswered,
        sent=CELL_FORMS,
        given=JSON_OR_ARROW,
    ),
    Route(
        method="POST",
        path="/v1/neighbors",
        endpoint=_neighbors,
        asked=NeighborsAsked,
        options=NeighborsOptions,
        answered=NeighborsAnswered,
        sent=CELL_FORMS,
        given=JSON_OR_ARROW,
    ),
    *REFERENCE_ROUTES,
    *JOB_ROUTES,
    *MODEL_ROUTES,
    Route(method="GET", path="/v1/info", endpoint=_info, answered=InfoAnswered, refusals=FACTS),
    Route(method="GET", path="/healthz", endpoint=_alive, answered=StatusAnswered, refusals=PROBES[:1]),
    Route(method="GET", path="/readyz", endpoint=_ready, answered=StatusAnswered, refusals=PROBES),
)
