"""Jobs as the clients see them: questions about them, and their results piece by piece."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeVar

import httpx

from genescale.client.cells import json_bytes, plain
from genescale.client.failures import error_classes
from genescale.client.questions import JSON_TYPE, Question, json_object, understood
from genescale.platform.errors import DeadlineError, InputError, ServiceError

PATH, PERTURBATIONS = "/v1/jobs", "/v1/perturbations"
IDEMPOTENCY_HEADER = "Idempotency-Key"
PIECE_BYTES = 16 * 1024 * 1024
FIRST_PAUSE_S, LONGEST_PAUSE_S, GROWTH = 0.5, 5.0, 1.5
ANSWER_FILE = "answer.json"
Answer = TypeVar("Answer")
_ID = re.compile(r"[A-Za-z0-9-]{1,128}")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it stood when the service was asked."""

    id: str
    kind: str
    state: str
    """queued, running, succeeded, failed or cancelled."""
    cancelling: bool
    model: str
    """Name of the model that answers, in one version whatever is rolled out meanwhile."""
    model_version: str
    done: int
    total: int | None
    unit: str
    note: str
    attempt: int
    run: str | None
    """Of the service's experiment tracker."""
    error: Mapping[str, Any] | None
    files: Mapping[str, int]
    """Bytes of each file of the result, the main one first."""

    @property
    def over(self) -> bool:
        """Whether it ended."""
        return self.state in ("succeeded", "failed", "cancelled")

    def check(self) -> Job:
        """The job itself once it succeeded; raises the error that it failed with, ServiceError when it was cancelled.

        A job that is not over yet is no error.
        """
        if self.state == "cancelled":
            raise ServiceError("the job was cancelled.", where=f"job {self.id}")
        if self.state == "failed":
            error = self.error or {}
            kind = error_classes().get(str(error.get("code")), ServiceError)
            raise kind(str(error.get("message", "the job failed.")), where=f"job {self.id}")
        return self


@dataclass(frozen=True, kw_only=True)
class JobsPage:
    """Jobs, the newest first; `next` is what to give as `before` for older ones, None on the last page."""

    jobs: tuple[Job, ...]
    next: str | None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some bytes of a file, and how many it has; or a link to where they are had."""

    content: bytes = b""
    size_bytes: int = 0
    link: str = ""


def job_of(answer: Mapping[str, Any]) -> Job:
    """A job in an answer."""
    progress, model = answer["progress"], answer["model"]
    return Job(
        **{name: answer[name] for name in ("id", "kind", "state", "cancelling", "attempt", "run", "error")},
        **{name: progress[name] for name in ("done", "total", "unit", "note")},
        model=model["name"],
        model_version=model["version"],
        files=MappingProxyType({one["name"]: one["bytes"] for one in answer["files"]}),
    )


def asked(job: Mapping[str, Any], idempotency_key: str | None) -> Question[Job]:
    """A new job. Asked again under its key, which is made up where none is given, it is the same job."""
    key = idempotency_key or secrets.token_hex(16)
    return _question("POST", PATH, content=json_bytes(plain(job)), headers={IDEMPOTENCY_HEADER: key})


def looked_at(job_id: str) -> Question[Job]:
    """How a job stands."""
    return _question("GET", _path(job_id))


def cancelled(job_id: str) -> Question[Job]:
    """The end of a job."""
    return _question("POST", f"{_path(job_id)}/cancel")


def listed(limit: int, before: str | None) -> Question[JobsPage]:
    """Jobs of this key."""
    path = f"{PATH}?limit={limit}" + (f"&before={before}" if before else "")

    def read(response: httpx.Response) -> JobsPage:
        answer = json_object(response)
        return understood(
            lambda: JobsPage(jobs=tuple(job_of(one) for one in answer["jobs"]), next=answer["next"]), PATH
        )

    return Question(method="GET", path=path, headers={"Accept": JSON_TYPE}, read=read)


def or_job(question: Question[Answer]) -> Question[Answer | Job]:
    """A question that the service may take as a job, where it is too large to be answered at once."""

    def read(response: httpx.Response) -> Answer | Job:
        if response.status_code == httpx.codes.ACCEPTED:
            return understood(lambda: job_of(json_object(response)), question.path)
        return question.read(response)

    headers = {**question.headers, IDEMPOTENCY_HEADER: secrets.token_hex(16)}
    return replace(question, headers=headers, read=read)  # type: ignore[arg-type, return-value]


class Waiting:
    """When a job is looked at again."""

    def __init__(self, job_id: str, timeout_s: float | None, now_s: float) -> None:
        self._id, self._pause_s = job_id, FIRST_PAUSE_S
        self._until_s = None if timeout_s is None else now_s + timeout_s
        self._timeout_s = timeout_s

    def pause_s(self, now_s: float) -> float:
        """Seconds until then; DeadlineError when the patience of the caller ends before. The job itself goes on."""
        if self._until_s is not None and now_s >= self._until_s:
            raise DeadlineError(
                f"the job did not end within {self._timeout_s:g} s; it goes on.", where=f"job {self._id}"
            )
        pause_s = self._pause_s
        self._pause_s = min(LONGEST_PAUSE_S, pause_s * GROWTH)
        return pause_s if self._until_s is None else min(pause_s, max(0.0, self._until_s - now_s))


class Download:
    """A file of a result on its way into `into`: piece by piece, so that a connection that breaks costs one piece."""

    def __init__(self, job_id: str, file: str, into: BinaryIO) -> None:
        self._path = f"{_path(job_id)}/result" + (f"?file={file}" if file else "")
        self._into, self._start, self._size = into, 0, -1

    @property
    def done(self) -> bool:
        """Whether all of it is there."""
        return self._start == self._size

    def question(self) -> Question[Piece]:
        """The next piece, or a link to where it is."""
        return Question(method="GET", path=self._path, headers=self._headers(), read=self._piece)

    def behind(self, link: str) -> Question[Piece]:
        """The next piece, from where a link says."""
        return Question(method="GET", path=link, headers=self._headers(), read=self._piece)

    def take(self, piece: Piece) -> None:
        """Write a piece down."""
        if self._size not in (-1, piece.size_bytes) or (not piece.content and piece.size_bytes):
            raise ServiceError("the result changed while it was read.", where=self._path.partition("?")[0])
        self._into.write(piece.content)
        self._size = piece.size_bytes
        self._start += len(piece.content)

    def _headers(self) -> dict[str, str]:
        return {"Range": f"bytes={self._start}-{self._start + PIECE_BYTES - 1}", "Accept": "*/*"}

    def _piece(self, response: httpx.Response) -> Piece:
        if response.has_redirect_location:
            return Piece(link=response.headers["location"])
        found = _RANGE.fullmatch(response.headers.get("content-range", ""))
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            # All of it was small enough to come at once, and what was taken of it before stays.
            return Piece(content=response.content[self._start :], size_bytes=len(response.content))
        if found is None or int(found[1]) != self._start:
            raise ServiceError("the service sent another part of the result.", where=self._path.partition("?")[0])
        return Piece(content=response.content, size_bytes=int(found[3]))


@contextlib.contextmanager
def whole_file(to: str | Path) -> Iterator[BinaryIO]:
    """A file that appears at `to` when the block ends well, and not at all otherwise."""
    path = Path(to)
    part = path.with_name(f".{path.name}-{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _path(job_id: str) -> str:
    if not _ID.fullmatch(job_id):
        raise InputError("this is no id of a job.", where="job_id", fix="Give the `id` of a Job.")
    return f"{PATH}/{job_id}"


def _question(
    method: str, path: str, *, content: bytes | None = None, headers: Mapping[str, str] = MappingProxyType({})
) -> Question[Job]:
    return Question(
        method=method,
        path=path,
        content=content,
        headers={"Content-Type": JSON_TYPE, "Accept": JSON_TYPE, **headers},
        read=lambda response: understood(lambda: job_of(json_object(response)), path),
    )
