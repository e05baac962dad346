"""What a caller is told of a job: its records in the words of the HTTP contract, and errors without our own places."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from genescale.platform.errors import ForbiddenPathError, InputError, NotFoundError
from genescale.serving.jobs.contract import JobAnswered, JobError, JobFile, JobProgress
from genescale.serving.jobs.records import Job
from genescale.serving.problems import problem_of
from genescale.serving.schemas import ModelFacts

# An absolute path or an address of object storage, up to a blank or a sign that ends it in a sentence.
_VERSION = re.compile(r"@[0-9]+$")
_PLACE = re.compile(r"(?<![\w/])(?:s3://|file://|/)[^\s'\",;:)]*[^\s'\",;:).]")


def error_of_job(error: BaseException, *, given: tuple[str, ...] = ()) -> dict[str, Any]:
    """Code, message and details of what ended a job; `given` are the addresses that the caller named itself."""
    if isinstance(error, (NotFoundError, ForbiddenPathError)) and given:
        # What a job reads is what its caller named: storage that refuses is an error of the question here.
        what = "nothing that can be read is stored at an address of the question."
        error = InputError(what, fix="Check the address.")
    problem = problem_of(error)
    details = {name: _without_places(value, given) for name, value in problem.details.items()}
    return {"code": problem.code, "message": _without_places(problem.message, given), "details": details}


def answered(job: Job, *, keep_days: float) -> JobAnswered:
    """A job as the routes tell it."""
    ticket, attempt = job.ticket, job.attempt
    url = f"/v1/jobs/{ticket.id}"
    ended_s = attempt.ended_s if attempt and job.over else None
    files = attempt.files if attempt and job.state == "succeeded" else ()
    progress = attempt.progress if attempt else None
    return JobAnswered(
        id=ticket.id,
        kind=ticket.kind,
        state=job.state,
        cancelling=job.cancelling,
        model=ModelFacts(name=ticket.model.name, version=ticket.model.version, digest=ticket.model.digest),
        created=clock(ticket.created_s),
        started=clock(attempt.started_s) if attempt else None,
        ended=None if ended_s is None else clock(ended_s),
        deleted=None if ended_s is None else clock(ended_s + timedelta(days=keep_days).total_seconds()),
        progress=JobProgress(
            done=progress.done if progress else 0,
            total=progress.total if progress else None,
            unit=progress.unit if progress else "",
            note=progress.note if progress else "",
        ),
        error=_error(attempt.error) if attempt and attempt.error and job.state == "failed" else None,
        run=attempt.run_id or None if attempt else None,
        attempt=attempt.number if attempt else 0,
        url=url,
        result=f"{url}/result" if files else None,
        files=[JobFile(name=one.name, bytes=one.size_bytes, url=f"{url}/result?file={one.name}") for one in files],
    )


def clock(unix_s: float) -> str:
    """A time as the contract has it."""
    return datetime.fromtimestamp(unix_s, tz=UTC).isoformat(timespec="milliseconds")


def _error(error: Mapping[str, Any]) -> JobError:
    return JobError(code=error["code"], message=error["message"], details=dict(error["details"]))


def _without_places(value: Any, given: tuple[str, ...]) -> Any:
    """A text with every path and address that the caller did not name itself taken out."""
    if not isinstance(value, str):
        return value
    known = tuple(_VERSION.sub("", one) for one in given)
    return _PLACE.sub(lambda found: found[0] if known and found[0].startswith(known) else "…", value)
