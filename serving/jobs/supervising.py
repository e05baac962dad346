"""The supervisor: takes jobs, gives each its turn, watches it, and writes down how it stands.

It knows nothing of Ray and nothing of what a job computes: a Runner carries jobs out. Several supervisors may share one
board; an attempt belongs to whoever created it, and who falls silent for the length of a lease loses it to another.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from genescale.platform.errors import (
    ConflictError,
    GenescaleError,
    IntegrityError,
    LimitError,
    NotFoundError,
    ServiceError,
)
from genescale.platform.log import bind, get_logger
from genescale.serving.jobs.board import Board
from genescale.serving.jobs.records import Attempt, Job, Outcome, Progress, Ticket, next_attempt
from genescale.serving.jobs.scheduling import Line
from genescale.serving.jobs.settings import JobsConfig
from genescale.serving.jobs.telling import error_of_job
from genescale.serving.watching.job_numbers import JobNumbers

SECONDS_PER_DAY, SECONDS_PER_HOUR = 86_400.0, 3_600.0
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a running job says of itself."""

    progress: Progress
    run_id: str = ""


class Work(Protocol):
    """A job that is being carried out."""

    async def ended(self) -> Outcome:
        """How it ended; `broken` when the worker is gone."""

    async def snapshot(self) -> Snapshot | None:
        """How far it is; None while it does not say."""

    async def cancel(self) -> None:
        """Ask it to end soon."""

    async def kill(self) -> None:
        """End it now."""


class Runner(Protocol):
    """Carries jobs out."""

    def start(self, ticket: Ticket, attempt: Attempt) -> Work:
        """Begin; what goes wrong is an Outcome."""


class Supervisor:
    """Runs the jobs of one board; `name` is its own, and no other's, ever."""

    def __init__(self, board: Board, config: JobsConfig, runner: Runner, *, name: str) -> None:
        self.board, self.config, self.runner, self.name = board, config, runner, name
        self._line = Line(config)
        self.numbers = JobNumbers(
            lambda: self._line.waiting,
            lambda: self._line.running,
            places=config.workers,
            most_waiting=config.max_queued,
        )
        self._accepting = asyncio.Lock()
        self._wake = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()
        self._looked_s = float("-inf")

    async def accept(self, ticket: Ticket, body: bytes) -> Ticket:
        """Take a new job, or find the one that the same question made before; returns its ticket.

        Raises ConflictError when its idempotency key came with another question, OverloadedError without room.
        """
        async with self._accepting:
            known = await asyncio.to_thread(self.board.repeat_of, ticket)
            if known is None:
                if self._stopping.is_set():
                    raise ServiceError("this supervisor of jobs is stopping.", fix="Try again in a moment.")
                self._line.check_room(ticket.owner)
                known = await asyncio.to_thread(self.board.create, ticket, body)
                if known.digest == ticket.digest:
                    self._line.queue(known)
        if known.digest != ticket.digest:
            raise ConflictError(
                "this Idempotency-Key came with another question before.",
                where="Idempotency-Key",
                fix="Use a new key for a new job.",
            )
        self.wake()
        return known

    def wake(self) -> None:
        """Look at the records now: something changed there."""
        self._looked_s = float("-inf")
        self._wake.set()

    async def run(self) -> None:
        """Work until `stop`; storage that is away is waited for."""
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                if time.monotonic() - self._looked_s >= self.config.lease_s / 2:
                    self._looked_s = time.monotonic()
                    await self._look_round()
            # Nobody waits for this task: what ended it would be seen by nobody, and no job would begin any more.
            except Exception as error:
                log.error("the records of jobs cannot be read; trying again", exc_info=error)
            self._begin()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self.config.heartbeat_s)

    async def stop(self) -> None:
        """Give back what runs, so that the next supervisor goes on with it at once."""
        self._stopping.set()
        self._wake.set()
        # Not cancelled: what a thread is writing then would come behind the word that the job is given back.
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _begin(self) -> None:
        while not self._stopping.is_set() and (ticket := self._line.begin()) is not None:
            task = asyncio.create_task(self._drive(ticket))
            self._tasks[ticket.id] = task
            task.add_done_callback(partial(self._let_go, ticket.id))

    def _let_go(self, job_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(job_id, None)

    # --- the records ---------------------------------------------------------------------------------------------

    async def _look_round(self) -> None:
        """Find jobs that nobody carries out, and delete those that ended long ago."""
        names = await asyncio.to_thread(self.board.names)
        there = {job_id for _, job_id in names}
        for job_id in [one for one in self._line.over if one not in there]:
            self._line.forget(job_id)
        for owner, job_id in names:
            if job_id in self._line.running:
                continue
            ended_s = self._line.over.get(job_id)
            if ended_s is not None and time.time() - ended_s < self.config.keep_days * SECONDS_PER_DAY:
                continue
            try:
                ticket = await asyncio.to_thread(self.board.ticket, owner, job_id)
                if ticket is not None:
                    await self._judge(await asyncio.to_thread(self.board.job, ticket))
            except NotFoundError:
                # Another supervisor deleted it meanwhile.
                continue
            # The others are older: one that cannot be read must not keep them waiting.
            except IntegrityError as error:
                log.error("the records of the job %s cannot be read", job_id, exc_info=error)

    async def _judge(self, job: Job) -> None:
        ticket, attempt = job.ticket, job.attempt
        if attempt is not None and attempt.over:
            ended_s = attempt.ended_s or 0.0
            self._line.ended(ticket.id, at_s=ended_s)
            if time.time() - ended_s >= self.config.keep_days * SECONDS_PER_DAY:
                await asyncio.to_thread(self.board.delete, ticket)
                self._line.forget(ticket.id)
                log.info("deleted the job %s, which ended %g days ago", ticket.id, self.config.keep_days)
        elif not self._is_held(ticket, attempt):
            self._line.queue(ticket)
            if job.cancelling:
                await self._close_unbegun(ticket, attempt)

    def _is_held(self, ticket: Ticket, attempt: Attempt | None) -> bool:
        """Whether another supervisor carries the job out, as far as its signs of life say."""
        taken = self._taken_by_another(attempt)
        return taken is not None and not self._line.looks_dead(ticket.id, (taken.number, taken.beat))

    def _taken_by_another(self, attempt: Attempt | None) -> Attempt | None:
        return attempt if attempt and attempt.state == "running" and attempt.holder != self.name else None

    async def _close_unbegun(self, ticket: Ticket, before: Attempt | None) -> None:
        """Write down the end of a cancelled job that nobody carries out."""
        if ticket.id in self._line.running:
            return
        closed = replace(next_attempt(before, self.name), state="cancelled", ended_s=time.time())
        if await asyncio.to_thread(self.board.take, ticket, closed):
            self._line.ended(ticket.id, at_s=closed.ended_s or 0.0)

    # --- one job -------------------------------------------------------------------------------------------------

    async def _drive(self, ticket: Ticket) -> None:
        """Carry out one attempt at a job, whatever comes of it."""
        with bind(job_id=ticket.id):
            try:
                attempt = await self._taken(ticket)
                if attempt is not None and not attempt.over:
                    attempt = await self._carried_out(ticket, attempt)
                if attempt is not None and attempt.over:
                    self._line.ended(ticket.id, at_s=attempt.ended_s or 0.0)
                    self.numbers.ended(ticket, attempt.state, attempt.ended_s or time.time())
                    log.info("the job %s %s", ticket.id, attempt.state)
                elif attempt is not None:
                    self.numbers.ended(ticket, attempt.state, None)
                    # What is away for a moment, storage say, gets the time to come back.
                    await self._pause(self.config.heartbeat_s * 2.0**attempt.breaks)
                self._line.forget_unless_over(ticket.id)
            # A supervisor outlives any one job; the next look at the records decides what becomes of it.
            except Exception as error:
                log.error("the job %s could not be carried on", ticket.id, exc_info=error)
                await self._pause(self.config.heartbeat_s)
                self._line.forget(ticket.id)
            finally:
                self.wake()

    async def _pause(self, seconds: float) -> None:
        """Wait, but not for longer than this supervisor works."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _taken(self, ticket: Ticket) -> Attempt | None:
        """A new attempt that is ours, or the last one of a job that is over; None when another supervisor has it."""
        job = await asyncio.to_thread(self.board.job, ticket)
        if job.attempt is not None and job.attempt.over:
            return job.attempt
        # While the job waited here for its turn, another supervisor may have taken it.
        if self._stopping.is_set() or self._is_held(ticket, job.attempt):
            return None
        attempt = next_attempt(job.attempt, self.name)
        if job.cancelling:
            attempt = replace(attempt, state="cancelled", ended_s=time.time())
        elif attempt.breaks >= self.config.tries:
            error = attempt.error or _gave_up(attempt.breaks)
            attempt = replace(attempt, state="failed", ended_s=time.time(), error=error)
        if not await asyncio.to_thread(self.board.take, ticket, attempt):
            return None
        if self._taken_by_another(job.attempt):
            log.warning("the supervisor of the job %s fell silent; going on with it", ticket.id)
        return attempt

    async def _carried_out(self, ticket: Ticket, attempt: Attempt) -> Attempt | None:
        """The attempt as it ended; None when it was lost to another supervisor, or given back."""
        work = self.runner.start(ticket, replace(attempt, error=None))
        ended, stopping = asyncio.ensure_future(work.ended()), asyncio.ensure_future(self._stopping.wait())
        watch = _Watch(self, ticket, attempt, work)
        try:
            while True:
                await asyncio.wait(
                    [ended, stopping], timeout=self.config.heartbeat_s, return_when=asyncio.FIRST_COMPLETED
                )
                if ended.done():
                    return await watch.close(ended.result())
                if stopping.done():
                    await watch.release()
                    return None
                if not await watch.beat():
                    return None
        finally:
            stopping.cancel()
            ended.cancel()
            await work.kill()


class _Watch:
    """One attempt while it runs: its signs of life, and its end."""

    def __init__(self, supervisor: Supervisor, ticket: Ticket, attempt: Attempt, work: Work) -> None:
        self.board, self.config = supervisor.board, supervisor.config
        self.ticket, self.attempt, self.work = ticket, attempt, work
        self.written_s = time.monotonic()
        self.cancelled_s: float | None = None
        self.late = False

    async def beat(self) -> bool:
        """Give a sign of life; false when the attempt is no longer ours."""
        said = await self.work.snapshot()
        self.attempt = replace(
            self.attempt,
            beat=self.attempt.beat + 1,
            progress=said.progress if said else self.attempt.progress,
            run_id=said.run_id or self.attempt.run_id if said else self.attempt.run_id,
        )
        # So long after the last one another supervisor may take the job: two must never run it, also if storage hangs.
        lost_after_s = self.config.lease_s - self.config.heartbeat_s
        left_s = self.written_s + lost_after_s - time.monotonic()
        try:
            # Who was held up himself gets to ask whether the job is still his.
            async with asyncio.timeout(max(left_s, self.config.heartbeat_s)):
                if await asyncio.to_thread(self.board.superseded, self.ticket, self.attempt):
                    log.warning("another supervisor went on with the job %s", self.ticket.id)
                    return False
                await asyncio.to_thread(self.board.write, self.ticket, self.attempt)
                self.written_s = time.monotonic()
                cancelling = await asyncio.to_thread(self.board.is_cancelling, self.ticket)
        except (GenescaleError, TimeoutError) as error:
            log.warning("a sign of life of the job %s could not be written", self.ticket.id, exc_info=error)
            return time.monotonic() - self.written_s < lost_after_s
        self.late = self.late or time.time() - self.attempt.started_s > self.config.max_hours * SECONDS_PER_HOUR
        if cancelling or self.late:
            await self._cancel()
        return True

    async def close(self, outcome: Outcome) -> Attempt | None:
        """Write down how it ended; None when another supervisor went on with the job meanwhile."""
        said = await self.work.snapshot()
        state, error = outcome.state, outcome.error
        if state == "broken" and self.cancelled_s is not None:
            state = "cancelled"
        if state == "cancelled" and self.late:
            state, error = "failed", _too_long(self.config.max_hours)
        self.attempt = replace(
            self.attempt,
            beat=self.attempt.beat + 1,
            state=state,
            ended_s=None if state == "broken" else time.time(),
            progress=said.progress if said else self.attempt.progress,
            run_id=outcome.run_id or self.attempt.run_id,
            error=error,
            files=outcome.files,
        )
        await asyncio.to_thread(self.board.write, self.ticket, self.attempt)
        lost = await asyncio.to_thread(self.board.superseded, self.ticket, self.attempt)
        return None if lost else self.attempt

    async def release(self) -> None:
        """Give the job back: its work ends, and the next supervisor goes on where it stood."""
        await self.work.kill()
        self.attempt = replace(self.attempt, beat=self.attempt.beat + 1, state="released")
        await asyncio.to_thread(self.board.write, self.ticket, self.attempt)

    async def _cancel(self) -> None:
        now_s = time.monotonic()
        if self.cancelled_s is None:
            self.cancelled_s = now_s
            await self.work.cancel()
        elif now_s - self.cancelled_s >= self.config.stop_s:
            await self.work.kill()


def _gave_up(breaks: int) -> dict[str, object]:
    return error_of_job(
        ServiceError(
            f"the job's worker died {breaks} times in a row without getting further.",
            fix="Ask for less in one job, or tell the operator of the service.",
        )
    )


def _too_long(hours: float) -> dict[str, object]:
    return error_of_job(LimitError(f"the job took longer than {hours:g} hours.", fix="Ask for less in one job."))
