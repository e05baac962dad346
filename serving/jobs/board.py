"""Where jobs are written down: below one folder or s3:// prefix, which outlives the service, Ray and every machine.

records/OWNER/JOB/ticket.json        what was asked; appears last of a new job's files
records/OWNER/JOB/body.json          the question itself
records/OWNER/JOB/cancel.json        somebody asked for its end
records/OWNER/JOB/attempts/NNNNNN.json
repeats/OWNER/DIGEST.json            which job an idempotency key stands for
results/JOB/…                        what it computes
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from genescale.platform.address import parse, within
from genescale.platform.errors import AlreadyExistsError, NotFoundError, SettingsError
from genescale.platform.settings import Settings
from genescale.platform.storage import Store, join
from genescale.serving.jobs.records import (
    JOB_ID,
    Attempt,
    Job,
    Ticket,
    attempt_from,
    ticket_from,
    to_bytes,
)
from genescale.serving.jobs.settings import JobsConfig

RECORDS, REPEATS, RESULTS = "records", "repeats", "results"
TICKET, BODY, CANCEL, ATTEMPTS = "ticket.json", "body.json", "cancel.json", "attempts"


def confined_store(settings: Settings, config: JobsConfig) -> Store:
    """Storage that reaches the jobs' own folder and what jobs may read, and nothing else.

    Raises SettingsError where the settings of storage allow less than that.
    """
    roots = (config.uri, *config.allowed_roots)
    allowed = tuple(parse(root) for root in settings.storage.allowed_roots)
    if allowed and not all(within(parse(root), allowed) for root in roots):
        raise SettingsError(
            "jobs.uri or one of jobs.allowed_roots lies outside storage.allowed_roots.",
            where="jobs",
            fix="Add its folder to storage.allowed_roots, or choose another one.",
        )
    return Store(dataclasses.replace(settings.storage, allowed_roots=roots))


class Board:
    """Reads and writes the records of jobs. Its methods block on storage; raises StorageError."""

    def __init__(self, uri: str, store: Store) -> None:
        self.uri, self.store = uri, store

    def results(self, job_id: str) -> str:
        """The folder that a job writes to."""
        return join(self.uri, RESULTS, job_id)

    def create(self, ticket: Ticket, body: bytes) -> Ticket:
        """Write a new job down; returns the ticket that stands for it, an older one where the question is a repeat.

        The caller compares digests: the same idempotency key may have come with another question.
        """
        if ticket.idempotency:
            first = self._first_of(ticket)
            if first.digest != ticket.digest:
                return first
            ticket = first
            if (there := self.ticket(ticket.owner, ticket.id)) is not None:
                return there
        self.store.write(self._at(ticket, BODY), body)
        self.store.write(self._at(ticket, TICKET), to_bytes(ticket))
        return ticket

    def _first_of(self, ticket: Ticket) -> Ticket:
        """The ticket under the name that was given to this idempotency key first."""
        address = self._repeat(ticket)
        content = json.dumps({"id": ticket.id, "digest": ticket.digest}).encode()
        try:
            self.store.write(address, content, if_absent=True)
            return ticket
        except AlreadyExistsError:
            found: dict[str, Any] = json.loads(self.store.read(address))
            # A first try that was cut off before the ticket is finished under the name it chose.
            return dataclasses.replace(ticket, id=found["id"], digest=found["digest"])

    def repeat_of(self, ticket: Ticket) -> Ticket | None:
        """The job that this idempotency key already stands for, with the digest of its own question; or None."""
        if not ticket.idempotency:
            return None
        try:
            found: dict[str, Any] = json.loads(self.store.read(self._repeat(ticket)))
        except NotFoundError:
            return None
        known = self.ticket(ticket.owner, found["id"])
        # Between the key and the ticket a service may have died: the repeat then makes the job.
        return known if known or found["digest"] == ticket.digest else dataclasses.replace(ticket, **found)

    def ticket(self, owner: str, job_id: str) -> Ticket | None:
        """A key's job, or None."""
        address = join(self.uri, RECORDS, owner, job_id, TICKET)
        try:
            return ticket_from(self.store.read(address), address)
        except NotFoundError:
            return None

    def find(self, job_id: str) -> Ticket | None:
        """Anybody's job, or None."""
        for owner, found in self.names():
            if found == job_id:
                return self.ticket(owner, found)
        return None

    def body(self, ticket: Ticket) -> bytes:
        """The question of a job."""
        return self.store.read(self._at(ticket, BODY))

    def names(self, owner: str = "") -> list[tuple[str, str]]:
        """Owner and name of every job, or of one owner's, the newest first."""
        below = join(self.uri, RECORDS, *([owner] if owner else []))
        prefix = join(self.uri, RECORDS)
        steps = [entry.uri[len(prefix) :].strip("/").split("/") for entry in self.store.list(below)]
        found = {(one[0], one[1]) for one in steps if one[2:] == [TICKET] and JOB_ID.fullmatch(one[1])}
        return sorted(found, key=lambda pair: pair[1], reverse=True)

    def job(self, ticket: Ticket) -> Job:
        """How a job stands; NotFoundError for one that was deleted meanwhile."""
        names = [entry.uri.rpartition("/")[2] for entry in self.store.list(self._at(ticket))]
        attempt = self.newest(ticket, names)
        # Of a deleted job nothing is left, and of a new one there is nothing yet but its ticket.
        if attempt is None and not self.store.exists(self._at(ticket, TICKET)):
            raise NotFoundError("the job was deleted.", where=self._at(ticket))
        return Job(ticket=ticket, attempt=attempt, cancelling=CANCEL in names)

    def jobs(self, names: Iterable[tuple[str, str]]) -> list[Job]:
        """How these jobs stand; one that is deleted meanwhile is left out."""
        found = []
        for owner, job_id in names:
            with contextlib.suppress(NotFoundError):
                if (ticket := self.ticket(owner, job_id)) is not None:
                    found.append(self.job(ticket))
        return found

    def newest(self, ticket: Ticket, names: Iterable[str] | None = None) -> Attempt | None:
        """The attempt that counts; `names` are those of the job's files where they are known."""
        if names is None:
            names = [entry.uri.rpartition("/")[2] for entry in self.store.list(self._at(ticket, ATTEMPTS))]
        numbers = [int(name[:-5]) for name in names if name[:-5].isdigit()]
        if not numbers:
            return None
        address = self._attempt(ticket, max(numbers))
        return attempt_from(self.store.read(address), address)

    def take(self, ticket: Ticket, attempt: Attempt) -> bool:
        """Begin an attempt; false when another supervisor was first."""
        try:
            self.store.write(self._attempt(ticket, attempt.number), to_bytes(attempt), if_absent=True)
        except AlreadyExistsError:
            # The answer to our own create may have been lost and repeated.
            found = self.newest(ticket)
            return found is not None and found.number == attempt.number and found.holder == attempt.holder
        return True

    def write(self, ticket: Ticket, attempt: Attempt) -> None:
        """Write down how one's own attempt stands."""
        self.store.write(self._attempt(ticket, attempt.number), to_bytes(attempt))

    def superseded(self, ticket: Ticket, attempt: Attempt) -> bool:
        """Whether another supervisor took the job meanwhile."""
        return self.store.exists(self._attempt(ticket, attempt.number + 1))

    def ask_to_cancel(self, ticket: Ticket) -> None:
        """Write down that the job shall end."""
        self.store.write(self._at(ticket, CANCEL), b"{}")

    def is_cancelling(self, ticket: Ticket) -> bool:
        """Whether the job shall end."""
        return self.store.exists(self._at(ticket, CANCEL))

    def delete(self, ticket: Ticket) -> None:
        """Remove a job and all it computed.

        Its ticket goes behind its results, so that a deletion that was cut off is gone on with, and before its
        attempts, so that nobody takes it for one that never began.
        """
        self.store.delete_folder(self.results(ticket.id))
        if ticket.idempotency:
            self.store.delete(self._repeat(ticket))
        self.store.delete(self._at(ticket, TICKET))
        self.store.delete_folder(self._at(ticket))

    def _at(self, ticket: Ticket, *parts: str) -> str:
        return join(self.uri, RECORDS, ticket.owner, ticket.id, *parts)

    def _repeat(self, ticket: Ticket) -> str:
        return join(self.uri, REPEATS, ticket.owner, f"{ticket.idempotency}.json")

    def _attempt(self, ticket: Ticket, number: int) -> str:
        return self._at(ticket, ATTEMPTS, f"{number:06d}.json")
