"""Jobs in this process: for tests, notebooks and ASGI servers without Ray."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from genescale.platform.runs import Tracker
from genescale.platform.settings import Settings
from genescale.serving.config import ServingConfig
from genescale.serving.jobs.asking import Jobs
from genescale.serving.jobs.board import Board, confined_store
from genescale.serving.jobs.records import Attempt, Outcome, Ticket
from genescale.serving.jobs.supervising import Runner, Snapshot, Supervisor
from genescale.serving.jobs.work import Worker
from genescale.serving.watching.reports import Report

Answer = TypeVar("Answer")
STOP_S = 30.0


class ThreadWork:
    """A job on a thread; it ends where it next reports progress, because a thread cannot be killed."""

    def __init__(self, worker: Worker, run: Future[Outcome]) -> None:
        self._worker, self._run = worker, run

    async def ended(self) -> Outcome:
        """How it ended."""
        return await asyncio.wrap_future(self._run)

    async def snapshot(self) -> Snapshot | None:
        """How far it is."""
        return Snapshot(progress=self._worker.pace.now, run_id=self._worker.run_id)

    async def cancel(self) -> None:
        """Ask it to end soon."""
        self._worker.pace.stop()

    async def kill(self) -> None:
        """Ask it to end soon, which is all that can be done to a thread."""
        self._worker.pace.stop()


class ThreadRunner:
    """Carries jobs out on threads of this process."""

    def __init__(
        self, config: ServingConfig, settings: Settings, *, tracker: Callable[[Settings], Tracker] | None = None
    ) -> None:
        self._config, self._settings, self._tracker = config, settings, tracker
        self._threads = ThreadPoolExecutor(config.jobs.workers, thread_name_prefix="genescale-job")

    def start(self, ticket: Ticket, attempt: Attempt) -> ThreadWork:
        """Begin."""
        worker = Worker(self._config, self._settings, tracker=self._tracker)
        return ThreadWork(worker, self._threads.submit(worker.run, ticket, attempt))


class LocalDesk:
    """A supervisor on an event loop of its own, for the length of a block.

    `runner` may be another one; jobs of this process run on threads.
    """

    def __init__(self, config: ServingConfig, settings: Settings, *, runner: Runner | None = None) -> None:
        self.board = Board(config.jobs.uri, confined_store(settings, config.jobs))
        self._config = config
        self._runner = runner or ThreadRunner(config, settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="genescale-jobs", daemon=True)

    @property
    def jobs(self) -> Jobs:
        """What stands behind the routes."""
        return Jobs(self, self.board, self._config.jobs)

    async def accept(self, ticket: Ticket, body: bytes) -> Ticket:
        """Take a new job."""
        return await asyncio.wrap_future(self._there(self._supervisor.accept(ticket, body)))

    async def wake(self) -> None:
        """Look at the records now."""
        self._loop.call_soon_threadsafe(self._supervisor.wake)

    async def numbers(self) -> Report:
        """How many jobs wait, run and ended."""
        return self._supervisor.numbers.report()

    def __enter__(self) -> LocalDesk:
        self._thread.start()
        self._supervisor = self._there(self._made()).result()
        self._running = self._there(self._supervisor.run())
        return self

    def __exit__(self, *_: object) -> None:
        self._there(self._supervisor.stop()).result(STOP_S)
        self._running.result(STOP_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_S)
        self._loop.close()

    async def _made(self) -> Supervisor:
        name = f"in-process-{uuid.uuid4().hex}"
        return Supervisor(self.board, self._config.jobs, self._runner, name=name)

    def _there(self, what: Coroutine[Any, Any, Answer]) -> Future[Answer]:
        return asyncio.run_coroutine_threadsafe(what, self._loop)
