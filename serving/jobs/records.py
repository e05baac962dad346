"""What is written down about a job: a ticket that never changes, and one record for each attempt to carry it out.

Each file has a single writer. The ticket is written once; an attempt belongs to the supervisor that created it, and its
creation is conditional, so of two that try to take a job one wins. The newest attempt says how the job stands.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from genescale.platform.errors import IntegrityError
from genescale.serving.release import Release

Kind = Literal["screen", "embed", "perturbations"]
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Record = TypeVar("Record", "Ticket", "Attempt")
FINISHED: tuple[State, ...] = ("succeeded", "failed", "cancelled")
JOB_ID = re.compile(r"[0-9]{8}t[0-9]{9}-[0-9a-f]{16}")
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What was asked, by whom, of which model."""

    id: str
    kind: Kind
    owner: str
    """Folder name of the key that asked; see `owner_of`."""
    created_s: float
    """Unix time."""
    release: Mapping[str, str]
    """The model as it stood when the job was asked for; fields of Release."""
    digest: str
    """Of kind and question, so that a repeat can be told from another question under the same idempotency key."""
    idempotency: str = ""
    """Digest of the idempotency key, empty without one."""
    parent_run: str = ""
    """Tracked run of the deployment that took the job."""
    schema_version: int = SCHEMA_VERSION

    @property
    def model(self) -> Release:
        """The model that answers."""
        return Release(**self.release)


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a result; `path` is its place below the job's results."""

    name: str
    path: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is. `total` is None while nobody knows."""

    done: int = 0
    total: int | None = None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a job, and how it stands or ended."""

    number: int
    holder: str
    """The supervisor that carries it out."""
    state: Literal["running", "released", "broken", "succeeded", "failed", "cancelled"] = "running"
    """`released` was given back by a supervisor that stopped, `broken` lost its worker; both go on in the next one."""
    beat: int = 0
    """Rises with every sign of life."""
    breaks: int = 0
    """Attempts in a row, before this one, that broke without getting further."""
    reached: int = 0
    """The furthest that earlier attempts came, in units of their progress."""
    started_s: float = 0.0
    """Unix time at which the job first began."""
    ended_s: float | None = None
    progress: Progress = Progress()
    error: Mapping[str, Any] | None = None
    run_id: str = ""
    """Of the tracked run."""
    files: tuple[File, ...] = field(default=())

    @property
    def over(self) -> bool:
        """Whether the job ended with this attempt."""
        return self.state in FINISHED


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the work of an attempt ended; `broken` may do better in another one."""

    state: Literal["broken", "succeeded", "failed", "cancelled"]
    error: Mapping[str, Any] | None = None
    run_id: str = ""
    files: tuple[File, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it stands."""

    ticket: Ticket
    attempt: Attempt | None
    cancelling: bool
    """Whether somebody asked for its end."""

    @property
    def state(self) -> State:
        """How it stands, in the words of the HTTP contract."""
        if self.attempt is None or self.attempt.state in ("released", "broken"):
            # Nobody holds it, so nothing has to be stopped.
            return "cancelled" if self.cancelling else "queued"
        return self.attempt.state  # type: ignore[return-value]

    @property
    def over(self) -> bool:
        """Whether it ended."""
        return self.state in FINISHED


def new_id(now_s: float) -> str:
    """A name that cannot be guessed; names of later jobs sort behind those of earlier ones."""
    moment = datetime.fromtimestamp(now_s, tz=UTC)
    return f"{moment:%Y%m%dt%H%M%S}{moment.microsecond // 1000:03d}-{secrets.token_hex(8)}"


def new_ticket(**fields: Any) -> Ticket:
    """A ticket for a new job, with a name of its own."""
    now_s = time.time()
    return Ticket(id=new_id(now_s), created_s=now_s, **fields)


def owner_of(key_id: str) -> str:
    """The folder of a key's jobs; without keys there is one caller, and its jobs lie apart from those of any key."""
    return f"key-{key_id}" if key_id else "anyone"


def next_attempt(before: Attempt | None, holder: str) -> Attempt:
    """The attempt that follows `before`, whose holder gave it back, broke, or is gone."""
    now_s = time.time()
    if before is None:
        return Attempt(number=1, holder=holder, started_s=now_s)
    further = before.progress.done > before.reached
    breaks = before.breaks if before.state == "released" else 0 if further else before.breaks + 1
    return Attempt(
        number=before.number + 1,
        holder=holder,
        started_s=before.started_s,
        breaks=breaks,
        reached=max(before.reached, before.progress.done),
        progress=before.progress,
        error=before.error,
        run_id=before.run_id,
    )


def to_bytes(record: Ticket | Attempt) -> bytes:
    """A record as it is stored."""
    return json.dumps(dataclasses.asdict(record), sort_keys=True).encode()


def ticket_from(data: bytes, where: str) -> Ticket:
    """A stored ticket; IntegrityError for anything else."""
    try:
        return Ticket(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise IntegrityError("this is no ticket of a job.", where=where) from error


def attempt_from(data: bytes, where: str) -> Attempt:
    """A stored attempt; IntegrityError for anything else."""
    try:
        content = json.loads(data)
        files = tuple(File(**one) for one in content.pop("files"))
        return Attempt(**{**content, "files": files, "progress": Progress(**content["progress"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError("this is no attempt at a job.", where=where) from error
