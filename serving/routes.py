"""The routes: addresses, documentation and error shapes; what is answered is in `answers.py`.

Bodies are read by `reading.py` and not by FastAPI, whose reader lets duplicate keys and NaN through; so the OpenAPI
document is told the request schemas here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
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
from genescale.serving.problems import JSON_TYPE, Problem, RefusedError, problem_of, refused
from genescale.serving.schemas import (
    ClassifyAnswered,
    ClassifyAsked,
    EmbeddingsAnswered,
    EmbeddingsAsked,
    ErrorAnswered,
    InfoAnswered,
    PerturbationsAnswered,
    PerturbationsAsked,
    StatusAnswered,
)

API_VERSION = "1"
ABOUT = "Embeddings and in-silico perturbations of single cells, by a Geneformer-type model."
# Swagger's page loads its script from a CDN and starts it inline; everything else stays forbidden.
DOCS_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data: https://fastapi.tiangolo.com; "
    "script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "frame-ancestors 'none'"
)
REFUSALS: dict[int, str] = {
    400: "The body is no strict JSON.",
    401: "No key, or a wrong one.",
    408: "The body took too long to arrive.",
    413: "More than a limit allows; `/v1/info` lists the limits.",
    415: "The body is not declared as JSON.",
    422: "The request does not fit the schema, or a gene is unknown.",
    500: "A fault of the service.",
    503: "All places are taken, or the model does not answer: wait for `Retry-After`.",
    504: "The answer took too long.",
}
log = get_logger(__name__)
PROBES, QUESTIONS, FACTS = (500, 503), tuple(REFUSALS), (401, 500)


def http_application(answers: Answers, config: ServingConfig, *, echo_request_id: bool = True) -> Gate:
    """The whole HTTP side as one ASGI application: the gate, and the routes behind it."""
    application = routes()
    application.state.answers = answers
    application.state.retry_after_s = config.retry_after_s
    return Gate(application, config, echo_request_id=echo_request_id)


def routes() -> FastAPI:
    """The routes without a model: enough for the OpenAPI document."""
    # redirect_slashes off: one address per answer, and no redirect that drops a body or a key.
    app = FastAPI(title="Genescale", version=API_VERSION, redirect_slashes=False, docs_url=None, redoc_url=None)
    _post(app, "/v1/embeddings", _embeddings, EmbeddingsAsked, EmbeddingsAnswered)
    _post(app, "/v1/perturbations", _perturbations, PerturbationsAsked, PerturbationsAnswered)
    _post(app, "/v1/classify", _classify, ClassifyAsked, ClassifyAnswered)
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
            [(kind, "validation") for kind in (EmbeddingsAsked, PerturbationsAsked, ClassifyAsked)],
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


def _post(app: FastAPI, path: str, endpoint: Endpoint, asked: type[BaseModel], answered: type[BaseModel]) -> None:
    body = {"content": {JSON_TYPE: {"schema": {"$ref": f"#/components/schemas/{asked.__name__}"}}}, "required": True}
    _route(app, "POST", path, endpoint, answered, QUESTIONS, openapi_extra={"requestBody": body})


def _get(app: FastAPI, path: str, endpoint: Endpoint, answered: type[BaseModel], refusals: tuple[int, ...]) -> None:
    _route(app, "GET", path, endpoint, answered, refusals)


def _route(
    app: FastAPI,
    method: str,
    path: str,
    endpoint: Endpoint,
    answered: type[BaseModel],
    refusals: tuple[int, ...],
    **more: Any,
) -> None:
    app.add_api_route(
        path,
        endpoint,
        methods=[method],
        response_model=answered,
        responses={status: {"model": ErrorAnswered, "description": REFUSALS[status]} for status in refusals},
        operation_id=endpoint.__name__.strip("_"),
        summary=(endpoint.__doc__ or "").strip().rstrip("."),
        **more,
    )


def _answers(request: Request) -> Answers:
    answers: Answers = request.app.state.answers
    return answers


async def _embeddings(request: Request) -> Response:
    """Embed cells."""
    return _json(await _answers(request).embeddings(await _body(request)))


async def _perturbations(request: Request) -> Response:
    """Delete or overexpress genes in cells and say how far the cells move."""
    return _json(await _answers(request).perturbations(await _body(request)))


async def _classify(request: Request) -> Response:
    """Answer cells, or genes in cells, with the heads of a fine-tuned model."""
    return _json(await _answers(request).classifications(await _body(request)))


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
    """The body of a request that says it is JSON: a browser's form on another site cannot say that."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON_TYPE:
        raise refused(415, f"the body must be declared as {JSON_TYPE}.", where="Content-Type")
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
