"""Jobs as the HTTP side knows them: asked for, looked at, cancelled, and their results handed out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from genescale.platform.errors import InputError, NotFoundError, ServiceError
from genescale.platform.storage import join
from genescale.serving.access.rates import free_of_charge
from genescale.serving.answering.answers import Answers
from genescale.serving.answering.intake import Intake
from genescale.serving.answering.perturbations import Perturbations
from genescale.serving.answering.questions import Sent
from genescale.serving.jobs.asked import embed_asked, screen_asked
from genescale.serving.jobs.board import Board
from genescale.serving.jobs.contract import (
    EmbedJobAsked,
    JobAnswered,
    JobAsked,
    JobLinkAnswered,
    JobsAnswered,
    ScreenJobAsked,
)
from genescale.serving.jobs.perturbing import job_limits, written
from genescale.serving.jobs.records import JOB_ID, File, Job, Kind, Ticket, new_ticket, owner_of
from genescale.serving.jobs.settings import JobsConfig
from genescale.serving.jobs.telling import answered, clock
from genescale.serving.models.state import MODEL_PARAMETER
from genescale.serving.problems import Problem, RefusedError, refused
from genescale.serving.release import Release
from genescale.serving.watching.reports import Report

CHUNK_BYTES = 1024 * 1024
DEFAULT_PAGE, LARGEST_PAGE = 20, 100
LONGEST_KEY = 256


class Desk(Protocol):
    """Who takes jobs: a supervisor, wherever it is."""

    async def accept(self, ticket: Ticket, body: bytes) -> Ticket:
        """Take a new job, or find the same one; raises ConflictError, OverloadedError and ServiceError."""

    async def wake(self) -> None:
        """Look at the records: something changed there."""

    async def numbers(self) -> Report:
        """How many jobs wait, run and ended."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks."""

    key_id: str = ""
    """Empty where the service has no keys."""
    sees_all: bool = False
    """Whether the jobs of every key are shown."""

    @property
    def owner(self) -> str:
        """Whose jobs its own are."""
        return owner_of(self.key_id)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question for a job as it came, and the model it is for."""

    sent: Sent
    idempotency_key: str
    answers: Answers
    release: Release
    parent_run: str = ""
    """Tracked run of the deployment."""


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file of a result, for streaming."""

    uri: str
    file: File


class Jobs:
    """What stands behind the routes of jobs."""

    def __init__(self, desk: Desk, board: Board, config: JobsConfig) -> None:
        self.desk, self.board, self.config = desk, board, config

    async def ask(self, caller: Caller, asked: Asked) -> JobAnswered:
        """Take a job; raises InputError, LimitError, RefusedError for what cannot be one, and what `Desk` raises."""
        kind, content = await asyncio.to_thread(self._read, asked)
        return await self._take(caller, asked, kind, content)

    async def ask_perturbations(self, caller: Caller, asked: Asked) -> JobAnswered:
        """Take a question for perturbations that is too large for one request; LimitError for one that is too large
        for a job as well."""
        content = await asyncio.to_thread(self._read_perturbations, asked.sent, asked.answers)
        return await self._take(caller, asked, "perturbations", content)

    async def job(self, caller: Caller, job_id: str) -> JobAnswered:
        """A job as it stands; RefusedError (404) for one that there is not, or that is another key's."""
        return self._answered(await self._job(caller, job_id))

    async def jobs(self, caller: Caller, *, limit: int, before: str) -> JobsAnswered:
        """The caller's jobs, or everybody's, the newest first, from behind the job `before` on."""
        names = await asyncio.to_thread(self.board.names, "" if caller.sees_all else caller.owner)
        left = [pair for pair in names if not before or pair[1] < before]
        page = await asyncio.to_thread(self.board.jobs, left[:limit])
        more = len(left) > limit
        return JobsAnswered(jobs=[self._answered(job) for job in page], next=left[limit - 1][1] if more else None)

    async def cancel(self, caller: Caller, job_id: str) -> JobAnswered:
        """Ask for the end of a job; nothing happens to one that is over."""
        job = await self._job(caller, job_id)
        if not job.over:
            await asyncio.to_thread(self.board.ask_to_cancel, job.ticket)
            # Written down it is: without a supervisor that hears of it now, the next one reads it.
            with contextlib.suppress(ServiceError):
                await self.desk.wake()
            job = await self._job(caller, job_id)
        return self._answered(job)

    async def file(self, caller: Caller, job_id: str, name: str) -> Download:
        """A file of a job's result, the main one without a name; RefusedError (404, 409) where there is none."""
        job = await self._job(caller, job_id)
        if job.state != "succeeded" or job.attempt is None:
            raise RefusedError(
                Problem(
                    status=409,
                    code="conflict",
                    message=f"the job is {job.state}: a result is there once it succeeded.",
                    details={"state": job.state},
                )
            )
        files = {one.name: one for one in job.attempt.files}
        found = files.get(name) if name else job.attempt.files[0]
        if found is None:
            raise _not_found(f"the result has no file of that name; there are {', '.join(files)}.")
        return Download(uri=join(self.board.results(job.ticket.id), found.path), file=found)

    async def link(self, download: Download) -> JobLinkAnswered | None:
        """A link to the file in object storage; None where it passes through the service."""
        if not self.config.links:
            return None
        url = await asyncio.to_thread(
            self.board.store.presigned, download.uri, valid_s=self.config.link_s, name=download.file.name
        )
        return JobLinkAnswered(url=url, expires=clock(time.time() + self.config.link_s)) if url else None

    def chunks(self, download: Download, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop` of a file."""
        with self.board.store.open(download.uri) as file:
            file.seek(start)
            while start < stop and (chunk := file.read(min(CHUNK_BYTES, stop - start))):
                start += len(chunk)
                yield chunk

    # --- reading a question ------------------------------------------------------------------------------------------

    def _read(self, asked: Asked) -> tuple[Kind, bytes]:
        """Kind and content of a job."""
        job = asked.answers.intake.read(JobAsked, asked.sent.body).root
        if isinstance(job, ScreenJobAsked):
            release, vocabulary = asked.release, asked.answers.vocabulary
            return "screen", _json(screen_asked(job, self.config, vocabulary, release.name))
        if isinstance(job, EmbedJobAsked):
            asked.answers.intake.check_cls(job.pooling, "pooling", fix="Use 'mean_genes'.")
            return "embed", _json(embed_asked(job, self.config))
        content = job.model_dump_json(exclude={"kind"}, exclude_unset=True).encode()
        return "perturbations", self._read_perturbations(Sent(body=content), asked.answers)

    def _read_perturbations(self, sent: Sent, answers: Answers) -> bytes:
        """The question as a worker reads it, once it is known that it can be answered."""
        intake = Intake(answers.vocabulary, answers.info, job_limits(answers.limits, self.config))
        # What a key may ask a minute is about answers at once; jobs are bounded by their number.
        with free_of_charge():
            plan = Perturbations(intake, answers.published).plan(sent)
        return _json(written(plan))

    async def _take(self, caller: Caller, asked: Asked, kind: Kind, content: bytes) -> JobAnswered:
        ticket = new_ticket(
            kind=kind,
            owner=caller.owner,
            release=dataclasses.asdict(asked.release),
            digest=hashlib.sha256(kind.encode() + b"\0" + asked.sent.body).hexdigest(),
            idempotency=_digest_of_key(asked.idempotency_key),
            parent_run=asked.parent_run,
        )
        taken = await self.desk.accept(ticket, content)
        return self._answered(await asyncio.to_thread(self.board.job, taken))

    # --- looking ----------------------------------------------------------------------------------------------------

    async def _job(self, caller: Caller, job_id: str) -> Job:
        found = None
        if JOB_ID.fullmatch(job_id):
            found = await asyncio.to_thread(self.board.ticket, caller.owner, job_id)
            if found is None and caller.sees_all:
                found = await asyncio.to_thread(self.board.find, job_id)
        if found is not None:
            with contextlib.suppress(NotFoundError):
                return await asyncio.to_thread(self.board.job, found)
        raise _not_found("there is no such job of this key.")

    def _answered(self, job: Job) -> JobAnswered:
        return answered(job, keep_days=self.config.keep_days)


def page_of(parameters: Mapping[str, str]) -> tuple[int, str]:
    """`limit` and `before` of a list; RefusedError (422) for anything else."""
    for name in parameters:
        if name not in ("limit", "before", MODEL_PARAMETER):
            raise refused(422, "there is no such parameter; known are limit and before.", where=name[:64])
    limit, before = parameters.get("limit", str(DEFAULT_PAGE)), parameters.get("before", "")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:6]) <= LARGEST_PAGE):
        raise refused(422, f"limit is a number from 1 to {LARGEST_PAGE}.", where="limit")
    if before and not JOB_ID.fullmatch(before):
        raise refused(422, "before is the id of a job.", where="before")
    return int(limit[:6]), before


def no_jobs() -> InputError:
    """What a service without jobs says."""
    return InputError("this service takes no jobs.", fix="Ask one that was started with --jobs-uri.")


def _digest_of_key(key: str) -> str:
    """An idempotency key as it is written down; RefusedError (422) for one that cannot be."""
    if not key:
        return ""
    if len(key) > LONGEST_KEY or not key.isascii() or not key.isprintable():
        raise refused(422, f"the key has up to {LONGEST_KEY} printable ASCII characters.", where="Idempotency-Key")
    return hashlib.sha256(key.encode()).hexdigest()


def _not_found(message: str) -> RefusedError:
    return RefusedError(Problem(status=404, code=NotFoundError.code, message=message))


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode()
