"""Jobs on Ray: a detached actor that supervises, and an actor for each job that runs.

The supervisor is no part of the Serve application, so that jobs outlive its restarts. What Ray itself forgets stands in
storage: the next supervisor goes on there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
import uuid
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from genescale.platform.errors import GenescaleError, ServiceError
from genescale.platform.log import get_logger
from genescale.platform.settings import Settings
from genescale.serving.config import ServingConfig
from genescale.serving.jobs.asking import Jobs
from genescale.serving.jobs.board import Board, confined_store
from genescale.serving.jobs.records import Attempt, Outcome, Ticket
from genescale.serving.jobs.supervising import Snapshot, Supervisor
from genescale.serving.jobs.work import Worker
from genescale.serving.watching.reports import Report

log = get_logger(__name__)
NAMESPACE = "genescale"
# Calls that one actor answers at a time: the supervisor waits most of the time.
CALLS_AT_ONCE = 256
ANSWER_S, STOP_S = 30.0, 20.0
SAYS_NOTHING_S = 1.0
REPLACE_TRIES, REPLACE_PAUSE_S = 10, 0.5


class JobWorker:
    """A Ray actor that carries out one job."""

    def __init__(self, config: ServingConfig, settings: Settings) -> None:
        import torch

        from genescale.serving.replicas import prepare_process

        prepare_process(settings, config)
        torch.set_num_threads(max(1, round(config.jobs.num_cpus)))
        self._worker = Worker(config, settings)

    def run(self, ticket: Ticket, attempt: Attempt) -> Outcome:
        """Carry the job out."""
        return self._worker.run(ticket, attempt)

    def snapshot(self) -> Snapshot:
        """How far it is."""
        return Snapshot(progress=self._worker.pace.now, run_id=self._worker.run_id)

    def cancel(self) -> None:
        """End soon."""
        self._worker.pace.stop()


class RayWork:
    """A job on an actor of its own."""

    def __init__(self, actor: ActorHandle, ticket: Ticket, attempt: Attempt) -> None:
        self._actor = actor
        self._run = actor.run.remote(ticket, attempt)
        self._said: Snapshot | None = None

    async def ended(self) -> Outcome:
        """How it ended; `broken` when its process died."""
        try:
            outcome: Outcome = await self._run
            return outcome
        except RayError:
            return Outcome(state="broken")

    async def snapshot(self) -> Snapshot | None:
        """How far it is; what it last said when it is too busy to say."""
        with contextlib.suppress(TimeoutError, RayError):
            async with asyncio.timeout(SAYS_NOTHING_S):
                self._said = await self._actor.snapshot.remote()
        return self._said

    async def cancel(self) -> None:
        """Ask it to end soon. A worker that has no place yet ends when it gets one."""
        self._actor.cancel.remote()

    async def kill(self) -> None:
        """End its process."""
        await asyncio.to_thread(ray.kill, self._actor)


class RayRunner:
    """Starts an actor for each job."""

    def __init__(self, config: ServingConfig, settings: Settings) -> None:
        self._config, self._settings = config, settings
        jobs = config.jobs
        # Several threads: the job runs on one, questions about it are answered on the others.
        self._actor = ray.remote(num_cpus=jobs.num_cpus, num_gpus=jobs.num_gpus, max_concurrency=3)(JobWorker)

    def start(self, ticket: Ticket, attempt: Attempt) -> RayWork:
        """Begin; the actor waits for a place on the cluster if need be."""
        return RayWork(self._actor.remote(self._config, self._settings), ticket, attempt)


class JobSupervisor:
    """A detached Ray actor: the Supervisor of one board."""

    async def __init__(  # type: ignore[misc]
        self, config: ServingConfig, settings: Settings, signature: str
    ) -> None:
        from genescale.serving.replicas import prepare_process

        prepare_process(settings, config)
        logging.getLogger("ray").setLevel(logging.ERROR)
        self._signature = signature
        board = Board(config.jobs.uri, confined_store(settings, config.jobs))
        runner = RayRunner(config, settings)
        self._supervisor = Supervisor(board, config.jobs, runner, name=f"supervisor-{uuid.uuid4().hex}")
        # Here and not at the first call: one that Ray started again has nobody who would call it.
        self._running = asyncio.create_task(self._supervisor.run())

    async def signature(self) -> str:
        """What this supervisor was made of."""
        return self._signature

    async def accept(self, ticket: Ticket, body: bytes) -> Ticket:
        """Take a new job."""
        return await self._supervisor.accept(ticket, body)

    async def wake(self) -> None:
        """Look at the records now."""
        self._supervisor.wake()

    async def numbers(self) -> Report:
        """How many jobs wait, run and ended."""
        return self._supervisor.numbers.report()

    async def stop(self) -> None:
        """Give back what runs."""
        await self._supervisor.stop()


class RayDesk:
    """The supervisor as the HTTP side sees it; it is made, or made anew, where there is none."""

    def __init__(self, config: ServingConfig, settings: Settings) -> None:
        self._config, self._settings = without_keys(config), settings
        self._signature = signature_of(self._config, settings)
        self._actor: ActorHandle | None = None

    def begin(self) -> None:
        """Make sure that a supervisor works."""
        self._supervisor()

    async def accept(self, ticket: Ticket, body: bytes) -> Ticket:
        """Take a new job; raises what Supervisor.accept raises, and ServiceError without a supervisor."""
        taken: Ticket = await self._asked("accept", ticket, body)
        return taken

    async def wake(self) -> None:
        """Let the supervisor look at the records now; without one the next will."""
        await self._asked("wake")

    async def numbers(self) -> Report:
        """How many jobs wait, run and ended; raises ServiceError without a supervisor."""
        report: Report = await self._asked("numbers")
        return report

    async def _asked(self, method: str, *arguments: Any) -> Any:
        try:
            actor = await asyncio.to_thread(self._supervisor)
            async with asyncio.timeout(ANSWER_S):
                return await getattr(actor, method).remote(*arguments)
        except RayTaskError as error:
            if isinstance(error.cause, GenescaleError):
                raise error.cause from None
            raise
        except (RayActorError, TimeoutError, GetTimeoutError) as error:
            self._actor = None
            raise ServiceError("the supervisor of jobs does not answer.", fix="Try again in a moment.") from error

    def _supervisor(self) -> ActorHandle:
        # Read once: a call on another thread may find meanwhile that it does not answer.
        actor = self._actor
        if actor is None:
            actor = self._actor = supervisor(self._config, self._settings, self._signature)
        return actor


def jobs_on_ray(config: ServingConfig, settings: Settings) -> Jobs | None:
    """The jobs of a service, with their supervisor at work: what was left unfinished goes on. None without any."""
    if not config.jobs.on:
        return None
    board = Board(config.jobs.uri, confined_store(settings, config.jobs))
    desk = RayDesk(config, settings)
    try:
        desk.begin()
    except (RayError, ServiceError) as error:
        # Questions are answered all the same; the first one about a job tries again.
        log.error("the supervisor of jobs could not be started", exc_info=error)
    return Jobs(desk, board, config.jobs)


def supervisor(config: ServingConfig, settings: Settings, signature: str) -> ActorHandle:
    """The supervisor of this cluster and board, working; one of other code or settings is stopped and replaced.

    Raises ServiceError when that does not come about.
    """
    for _ in range(REPLACE_TRIES):
        actor = _named(config, settings, signature)
        try:
            if ray.get(actor.signature.remote(), timeout=ANSWER_S) == signature:
                return actor
            _retire(actor)
        except RayActorError:
            # One that was just ended still has the name for a moment.
            time.sleep(REPLACE_PAUSE_S)
    raise ServiceError("the supervisor of jobs could not be started.", fix="Try again in a moment.")


def stop_supervisor(config: ServingConfig) -> bool:
    """Stop the supervisor, which gives back what runs; false when there is none."""
    try:
        actor = ray.get_actor(name_of(config), namespace=NAMESPACE)
    except ValueError:
        return False
    _retire(actor)
    return True


def name_of(config: ServingConfig) -> str:
    """The name of the supervisor of one board: there is one for each on a cluster."""
    return f"genescale-jobs-{hashlib.sha256(config.jobs.uri.encode()).hexdigest()[:16]}"


def signature_of(config: ServingConfig, settings: Settings) -> str:
    """What tells a supervisor of this code and these settings from another."""
    content = [version("genescale"), asdict(config), asdict(settings)]
    return hashlib.sha256(json.dumps(content, default=_hidden, sort_keys=True).encode()).hexdigest()


def without_keys(config: ServingConfig) -> ServingConfig:
    """The config for processes that answer nobody and outlive the service: without its keys, address and cache.

    Whatever of it changes, the supervisor is replaced; what changes with every start must not be in it.
    """
    return replace(config, api_keys=(), keys_file="", host="127.0.0.1", port=0, cache="")


def _named(config: ServingConfig, settings: Settings, signature: str) -> ActorHandle:
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=1, max_concurrency=CALLS_AT_ONCE)(JobSupervisor)
    named: ActorHandle = actor.options(
        name=name_of(config), namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote(config, settings, signature)
    return named


def _retire(actor: ActorHandle) -> None:
    # What it cannot give back is taken over when its lease has passed.
    with contextlib.suppress(RayError, GetTimeoutError):
        ray.get(actor.stop.remote(), timeout=STOP_S)
    ray.kill(actor)


def _hidden(value: Any) -> str:
    """Secrets by their digest, so that a changed one is seen and none is written."""
    reveal = getattr(value, "reveal", None)
    return hashlib.sha256(reveal().encode()).hexdigest() if reveal else str(value)
