"""Supervisors on one board, and jobs that end when a test says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from genescale.platform.settings import Settings
from genescale.serving.jobs.board import Board, confined_store
from genescale.serving.jobs.records import Attempt, File, Job, Outcome, Progress, Ticket, new_ticket
from genescale.serving.jobs.settings import JobsConfig
from genescale.serving.jobs.supervising import Snapshot, Supervisor

RELEASE = {"name": "tiny", "version": "3", "digest": "0" * 64, "address": "", "folder": ""}
DONE = Outcome(state="succeeded", files=(File(name="a.parquet", path="a.parquet", size_bytes=1),))


class ScriptedWork:
    """A job that ends when a test says so."""

    def __init__(self, ticket: Ticket, attempt: Attempt) -> None:
        self.ticket, self.attempt = ticket, attempt
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.progress = Progress()
        self.cancelled = self.killed = False
        self.obeys = True

    async def ended(self) -> Outcome:
        return await self.outcome

    async def snapshot(self) -> Snapshot | None:
        return Snapshot(progress=self.progress, run_id="run-1")

    async def cancel(self) -> None:
        self.cancelled = True
        if self.obeys:
            self.end(Outcome(state="cancelled"))

    async def kill(self) -> None:
        self.killed = True
        self.end(Outcome(state="broken"))

    def end(self, outcome: Outcome) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class ScriptedRunner:
    def __init__(self) -> None:
        self.works: list[ScriptedWork] = []
        self.at_start: Callable[[ScriptedWork], None] = lambda work: None

    def start(self, ticket: Ticket, attempt: Attempt) -> ScriptedWork:
        work = ScriptedWork(ticket, attempt)
        self.works.append(work)
        self.at_start(work)
        return work


class Scene:
    """One board, and supervisors on it."""

    def __init__(self, config: JobsConfig) -> None:
        self.config = config
        self.board = Board(config.uri, confined_store(Settings(), config))
        self.runner = ScriptedRunner()

    def supervisor(self, name: str = "one", runner: ScriptedRunner | None = None) -> Supervisor:
        return Supervisor(self.board, self.config, runner or self.runner, name=name)

    def job(self, ticket: Ticket) -> Job:
        return self.board.job(ticket)

    async def until(self, reached: Callable[[], Any], within_s: float = 30.0) -> None:
        deadline = time.monotonic() + within_s
        while not await asyncio.to_thread(reached):
            assert time.monotonic() < deadline, "not reached in time"
            await asyncio.sleep(0.01)


def ticket_of(owner: str = "key-ana", **fields: Any) -> Ticket:
    return new_ticket(**{"kind": "embed", "owner": owner, "release": RELEASE, "digest": "d", **fields})


def play(scene: Scene, part: Callable[[Supervisor], Awaitable[None]]) -> None:
    """Run `part` beside a supervisor."""

    async def whole() -> None:
        supervisor = scene.supervisor()
        running = asyncio.create_task(supervisor.run())
        try:
            await part(supervisor)
        finally:
            await supervisor.stop()
            await running

    asyncio.run(whole())
