"""What a worker does with one job, from its ticket to the files of its result; needs no Ray and no HTTP.

What is finished of a job is kept below its results and not computed again: a later attempt goes on there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genescale.platform.bundle import Bundle
from genescale.platform.errors import (
    AlreadyExistsError,
    ClusterError,
    ForbiddenPathError,
    NotFoundError,
    ServiceError,
    StorageError,
)
from genescale.platform.log import bind, get_logger
from genescale.platform.runs import Tracker
from genescale.platform.settings import Settings
from genescale.platform.storage import Store, join
from genescale.serving.config import ServingConfig
from genescale.serving.jobs.board import Board, confined_store
from genescale.serving.jobs.pace import JobStoppedError, Pace
from genescale.serving.jobs.records import Attempt, File, Kind, Outcome, Ticket
from genescale.serving.jobs.telling import error_of_job
from genescale.serving.jobs.tracked import JobRun

# What another attempt cannot mend, though storage raised it.
FINAL = (NotFoundError, ForbiddenPathError, AlreadyExistsError)
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Desk:
    """All that one job has to work with."""

    ticket: Ticket
    asked: Mapping[str, Any]
    """The question as it was written down."""
    bundle: Bundle
    store: Store
    """Reaches what jobs may read and the jobs' own folder."""
    results: str
    scratch: Path
    """Local folder that lasts as long as the attempt."""
    config: ServingConfig
    run: JobRun
    pace: Pace

    def keep(self, path: Path, name: str = "") -> File:
        """Store a local file among the results."""
        name = name or path.name
        self.store.upload(path, join(self.results, name))
        return File(name=name, path=name, size_bytes=path.stat().st_size)

    def kept(self, name: str, path: str) -> File:
        """A file that stands at `path` below the results already, under the name that callers see."""
        return File(name=name, path=path, size_bytes=self.store.stat(join(self.results, path)).size_bytes)


Work = Callable[[Desk], tuple[File, ...]]
"""Carries out one kind of job; returns the files of the result, the main one first."""


class Worker:
    """Carries out one job: `run` on one thread, `pace` and `stop` from others."""

    def __init__(
        self, config: ServingConfig, settings: Settings, *, tracker: Callable[[Settings], Tracker] | None = None
    ) -> None:
        """`tracker` opens another tracker than the one of the settings."""
        self.config, self.settings, self._tracker = config, settings, tracker
        self.pace = Pace()
        self.job_run: JobRun | None = None

    @property
    def run_id(self) -> str:
        """Of the tracked run, empty while there is none."""
        return self.job_run.id if self.job_run else ""

    def run(self, ticket: Ticket, attempt: Attempt) -> Outcome:
        """Carry the job out; whatever goes wrong is an Outcome."""
        with bind(job_id=ticket.id), tempfile.TemporaryDirectory(prefix="genescale-job-") as scratch:
            self.job_run = JobRun(lambda: self._tracked(ticket, attempt))
            try:
                files = self._files(ticket, self.job_run, Path(scratch))
            except JobStoppedError:
                self.job_run.close(KeyboardInterrupt())
                return Outcome(state="cancelled", run_id=self.run_id)
            # Whatever ends a job is told to its caller; the trace belongs into the log.
            except Exception as error:
                log.error("the job failed", exc_info=error)
                self.job_run.close(error)
                return self._failed(ticket, error)
            self.job_run.close()
            return Outcome(state="succeeded", files=files, run_id=self.run_id)

    def _files(self, ticket: Ticket, run: JobRun, scratch: Path) -> tuple[File, ...]:
        from genescale.serving.replicas import cache_folder

        self.pace.start(None, "loading")
        store = confined_store(self.settings, self.config.jobs)
        board = Board(self.config.jobs.uri, store)
        return works()[ticket.kind](
            Desk(
                ticket=ticket,
                asked=_asked(board, ticket),
                bundle=ticket.model.open(self.settings, cache_folder(self.config)),
                store=store,
                results=board.results(ticket.id),
                scratch=scratch,
                config=self.config,
                run=run,
                pace=self.pace,
            )
        )

    def _tracked(self, ticket: Ticket, attempt: Attempt) -> Any:
        release = ticket.model
        return (self._tracker or _open_tracker)(self.settings).run(
            f"job {ticket.kind}",
            params={"job": ticket.id, "kind": ticket.kind, "model_digest": release.digest},
            tags={
                "stage": "job",
                "genescale.job": ticket.id,
                "genescale.owner": ticket.owner,
                "genescale.deployment": ticket.parent_run,
                "model": f"{release.name}/{release.version}",
            },
            parent=ticket.parent_run or None,
            resume=attempt.run_id,
        )

    def _failed(self, ticket: Ticket, error: Exception) -> Outcome:
        again = isinstance(error, (StorageError, ClusterError, ServiceError, OSError)) and not isinstance(error, FINAL)
        told = error_of_job(error, given=_given(self.config, self.settings, ticket))
        return Outcome(state="broken" if again else "failed", error=told, run_id=self.run_id)


def _open_tracker(settings: Settings) -> Tracker:
    # MLflow takes seconds to import, which the job does not wait for.
    from genescale.platform.tracking import open_tracker

    return open_tracker(settings)


def works() -> Mapping[Kind, Work]:
    """What carries out each kind of job."""
    from genescale.serving.jobs.embedding import embed
    from genescale.serving.jobs.perturbing import perturb
    from genescale.serving.jobs.screening import screen

    return {"screen": screen, "embed": embed, "perturbations": perturb}


def _asked(board: Board, ticket: Ticket) -> Mapping[str, Any]:
    asked: Mapping[str, Any] = json.loads(board.body(ticket))
    return asked


def _given(config: ServingConfig, settings: Settings, ticket: Ticket) -> tuple[str, ...]:
    """The addresses that the caller named, which an error may repeat."""
    from genescale.serving.jobs.asked import addresses

    if ticket.kind == "perturbations":
        return ()
    try:
        return addresses(_asked(Board(config.jobs.uri, confined_store(settings, config.jobs)), ticket))
    except StorageError:
        return ()
