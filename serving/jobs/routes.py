"""The addresses of jobs."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import iterate_in_threadpool

from genescale.platform.errors import LimitError
from genescale.serving.access.scopes import ADMIN, JOBS, allows
from genescale.serving.answering.questions import Sent
from genescale.serving.described import parameter
from genescale.serving.jobs.asking import (
    DEFAULT_PAGE,
    LARGEST_PAGE,
    Asked,
    Caller,
    Download,
    Jobs,
    no_jobs,
    page_of,
)
from genescale.serving.jobs.contract import JobAnswered, JobAsked, JobLinkAnswered, JobsAnswered
from genescale.serving.problems import JSON_TYPE, refused
from genescale.serving.routing import FACTS, QUESTIONS, Route, json_answer, json_body
from genescale.serving.services import all_services, services_of

PARQUET_TYPE = "application/vnd.apache.parquet"
TYPE_OF_ENDING = {"parquet": PARQUET_TYPE, "json": JSON_TYPE, "csv": "text/csv", "html": "text/html; charset=utf-8"}
IDEMPOTENCY_HEADER = "Idempotency-Key"
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")


async def _create_job(request: Request) -> Response:
    """Begin a job: a screen, the embedding of a whole object, or many perturbations."""
    body = await json_body(request)
    return _begun(await jobs_of(request).ask(caller_of(request), _asked(request, Sent(body=body))))


async def _jobs(request: Request) -> Response:
    """List the jobs of this key, the newest first."""
    limit, before = page_of(request.query_params)
    found = await jobs_of(request).jobs(caller_of(request), limit=limit, before=before)
    return json_answer(found)


async def _job(request: Request) -> Response:
    """Say how a job stands."""
    found = await jobs_of(request).job(caller_of(request), request.path_params["id"])
    return json_answer(found)


async def _cancel_job(request: Request) -> Response:
    """Ask for the end of a job."""
    found = await jobs_of(request).cancel(caller_of(request), request.path_params["id"])
    return json_answer(found, status=202)


async def _job_result(request: Request) -> Response:
    """Hand out a file of a job's result."""
    jobs = jobs_of(request)
    found = await jobs.file(caller_of(request), request.path_params["id"], request.query_params.get("file", ""))
    link = await jobs.link(found)
    if link is not None:
        answer = json_answer(link, status=307)
        answer.headers["location"] = link.url
        return answer
    return _streamed(request, jobs, found)


async def perturbations_as_job(request: Request, sent: Sent, refusal: LimitError) -> Response:
    """A question for perturbations that is too large for one request, as a job.

    Raises the `refusal` where the service takes no jobs or the caller may have none.
    """
    jobs = all_services(request).jobs
    if jobs is None or not allows(request.scope.get("key_scopes", ()), JOBS):
        raise refusal
    return _begun(await jobs.ask_perturbations(caller_of(request), _asked(request, sent)))


def jobs_of(request: Request) -> Jobs:
    """The jobs of the service; InputError where it takes none."""
    jobs = all_services(request).jobs
    if jobs is None:
        raise no_jobs()
    return jobs


def caller_of(request: Request) -> Caller:
    """Who asks, as the gate found it."""
    scope = request.scope
    return Caller(key_id=scope.get("key_id", ""), sees_all=ADMIN in scope.get("key_scopes", ()))


def _asked(request: Request, sent: Sent) -> Asked:
    services = services_of(request)
    if services.release is None:
        raise no_jobs()
    return Asked(
        sent=sent,
        idempotency_key=request.headers.get(IDEMPOTENCY_HEADER, ""),
        answers=services.answers,
        release=services.release,
        parent_run=services.deployment_run_id(),
    )


def _begun(job: JobAnswered) -> Response:
    answer = json_answer(job, status=202)
    answer.headers["location"] = job.url
    return answer


def _streamed(request: Request, jobs: Jobs, found: Download) -> Response:
    """The file, or the range of it that a caller who was cut off asks for."""
    size = found.file.size_bytes
    start, stop = _range_of(request.headers.get("range", ""), size)
    headers = {
        "content-disposition": f'attachment; filename="{found.file.name}"',
        "content-length": str(stop - start),
        "accept-ranges": "bytes",
    }
    partial = "range" in request.headers and (start, stop) != (0, size)
    if partial:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    chunks: AsyncIterator[bytes] = iterate_in_threadpool(jobs.chunks(found, start, stop))
    kind = TYPE_OF_ENDING.get(found.file.name.rpartition(".")[2], "application/octet-stream")
    return StreamingResponse(chunks, status_code=206 if partial else 200, headers=headers, media_type=kind)


def _range_of(header: str, size: int) -> tuple[int, int]:
    """First byte, and the one behind the last, of a range; all of the file for a header that is not understood."""
    found = _RANGE.fullmatch(header.strip())
    if found is None:
        return 0, size
    start, last = int(found[1]), int(found[2]) if found[2] else size - 1
    if start >= size or last < start:
        raise refused(416, f"the file has {size:,} bytes.", where="Range")
    return start, min(last + 1, size)


TEXT = {"type": "string"}
ID = parameter("id", "path", TEXT, "Of the job.")
REPEAT = parameter(
    IDEMPOTENCY_HEADER,
    "header",
    {"type": "string", "minLength": 1, "maxLength": 256},
    "A text of the caller's own: the same question under the same key is the same job, however often it is asked.",
)
PAGE = {"type": "integer", "minimum": 1, "maximum": LARGEST_PAGE, "default": DEFAULT_PAGE}
LIMIT = parameter("limit", "query", PAGE, "Jobs of a page.")
BEFORE = parameter("before", "query", TEXT, "`next` of the page before.")
FILE = parameter("file", "query", TEXT, "Name of one of the job's `files`; the main one without it.")
FROM = parameter("Range", "header", TEXT, "`bytes=N-`, to go on with a download that was cut off.")
BINARY = {"schema": {"type": "string", "format": "binary"}}
CONTENT = {kind.partition(";")[0]: BINARY for kind in TYPE_OF_ENDING.values()}
FILE_ANSWERS: dict[str, Any] = {
    "200": {"description": "The file.", "content": CONTENT},
    "206": {"description": "The range of it that was asked for.", "content": CONTENT},
    "416": {
        "description": "The file ends before the range begins.",
        "content": {JSON_TYPE: {"schema": {"$ref": "#/components/schemas/ErrorAnswered"}}},
    },
}
AS_JOB: dict[str, Any] = {
    "202": {
        "description": "The question is too large to be answered at once: it is a job now, at the address in "
        "`Location`. Only where the service takes jobs, and for keys with the scope `jobs`.",
        "content": {JSON_TYPE: {"schema": {"$ref": "#/components/schemas/JobAnswered"}}},
    }
}
LOOKS = (*FACTS, 404, 422, 503)
JOB_ROUTES = (
    Route(
        method="POST",
        path="/v1/jobs",
        endpoint=_create_job,
        asked=JobAsked,
        answered=JobAnswered,
        refusals=(*QUESTIONS, 409),
        status=202,
        extra={"parameters": [REPEAT]},
    ),
    Route(
        method="GET",
        path="/v1/jobs",
        endpoint=_jobs,
        answered=JobsAnswered,
        refusals=(*FACTS, 422, 503),
        extra={"parameters": [LIMIT, BEFORE]},
    ),
    Route(
        method="GET",
        path="/v1/jobs/{id}",
        endpoint=_job,
        answered=JobAnswered,
        refusals=LOOKS,
        extra={"parameters": [ID]},
    ),
    Route(
        method="POST",
        path="/v1/jobs/{id}/cancel",
        endpoint=_cancel_job,
        answered=JobAnswered,
        refusals=(*LOOKS, 408, 413, 504),
        status=202,
        extra={"parameters": [ID]},
    ),
    Route(
        method="GET",
        path="/v1/jobs/{id}/result",
        endpoint=_job_result,
        answered=JobLinkAnswered,
        refusals=(*LOOKS, 409, 504),
        status=307,
        extra={"parameters": [ID, FILE, FROM], "responses": FILE_ANSWERS},
    ),
)
