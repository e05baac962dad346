"""Which jobs wait, which run, and which are of no more interest: the supervisor's picture, without any storage."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from genescale.platform.errors import OverloadedError
from genescale.serving.jobs.records import Ticket
from genescale.serving.jobs.settings import JobsConfig

Clock = Callable[[], float]


@dataclass
class Watched:
    """A job that another supervisor holds: the last sign of life that was seen, and when it was new."""

    sign: tuple[int, int]
    seen_s: float


@dataclass
class Line:
    """The jobs that this supervisor knows of."""

    config: JobsConfig
    clock: Clock = time.monotonic
    waiting: dict[str, Ticket] = field(default_factory=dict)
    running: dict[str, Ticket] = field(default_factory=dict)
    over: dict[str, float] = field(default_factory=dict)
    """Unix time at which each finished job ended."""
    watched: dict[str, Watched] = field(default_factory=dict)

    def check_room(self, owner: str) -> None:
        """OverloadedError when one more job would be too many, for all or for this owner."""
        config = self.config
        if len(self.waiting) >= config.max_queued:
            raise OverloadedError(
                f"{len(self.waiting)} jobs are waiting; {config.max_queued} may.", fix="Try again when some have run."
            )
        own = sum(one.owner == owner for one in (*self.waiting.values(), *self.running.values()))
        if own >= config.max_unfinished_per_key:
            raise OverloadedError(
                f"this key has {own} unfinished jobs; {config.max_unfinished_per_key} are allowed.",
                fix="Wait for one of them, or cancel one.",
            )

    def queue(self, ticket: Ticket) -> None:
        """Let a job wait for its turn."""
        if ticket.id not in self.running and ticket.id not in self.over:
            self.waiting[ticket.id] = ticket

    def begin(self) -> Ticket | None:
        """The job whose turn it is, now running: the oldest of the owner with the fewest running; None without any."""
        if len(self.running) >= self.config.workers or not self.waiting:
            return None
        busy = Counter(one.owner for one in self.running.values())
        ticket = min(self.waiting.values(), key=lambda one: (busy[one.owner], one.id))
        self.running[ticket.id] = self.waiting.pop(ticket.id)
        return ticket

    def ended(self, job_id: str, *, at_s: float) -> None:
        """A job is over."""
        self.forget(job_id)
        self.over[job_id] = at_s

    def forget(self, job_id: str) -> None:
        """Know nothing of a job any more; the next look at the records decides."""
        for known in (self.waiting, self.running, self.over, self.watched):
            known.pop(job_id, None)

    def forget_unless_over(self, job_id: str) -> None:
        """Know nothing of a job that ran and did not end; the next look at the records decides."""
        if job_id not in self.over:
            self.forget(job_id)

    def looks_dead(self, job_id: str, sign: tuple[int, int]) -> bool:
        """Whether the holder of a job gave no new sign of life for the length of a lease, by our own clock.

        A job whose holder lives does not wait here.
        """
        now_s = self.clock()
        before = self.watched.get(job_id)
        if before is None or before.sign != sign:
            self.watched[job_id] = Watched(sign, now_s)
            self.waiting.pop(job_id, None)
            return False
        return now_s - before.seen_s >= self.config.lease_s
