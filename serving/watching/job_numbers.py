"""The numbers of the supervisor of jobs: how many wait and run, how long they take, and how they end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from genescale.serving.watching.reports import Report, families_of, process_name

SECONDS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 43_200.0, 86_400.0)


class Asked(Protocol):
    """What is known of a job from its beginning."""

    @property
    def kind(self) -> str:
        """Of question."""

    @property
    def created_s(self) -> float:
        """Unix time."""


class JobNumbers:
    """Counts the jobs of one supervisor.

    waiting, running: the jobs that do so now, by id. places: how many may run. most_waiting: how many may wait.
    """

    def __init__(
        self,
        waiting: Callable[[], Mapping[str, Asked]],
        running: Callable[[], Mapping[str, Asked]],
        *,
        places: int,
        most_waiting: int,
    ) -> None:
        self.process = process_name("jobs")
        self.registry = CollectorRegistry()
        for name, about, read in (
            ("jobs_waiting", "Jobs that wait for a place.", lambda: len(waiting())),
            ("jobs_waiting_limit", "Jobs that may wait.", lambda: most_waiting),
            ("jobs_running", "Jobs that run now.", lambda: len(running())),
            ("jobs_places", "Jobs that may run at a time.", lambda: places),
            ("jobs_oldest_waiting_seconds", "Seconds since the oldest waiting job was asked.", lambda: _age(waiting())),
        ):
            Gauge(f"genescale_{name}", about, registry=self.registry).set_function(read)
        self.ends = Counter("genescale_jobs_ended", "Jobs that ended.", ("kind", "state"), registry=self.registry)
        self.breaks = Counter("genescale_jobs_broken", "Attempts that broke.", ("kind",), registry=self.registry)
        self.seconds = Histogram(
            "genescale_job_seconds", "Seconds from question to end.", ("kind",), registry=self.registry, buckets=SECONDS
        )
        ProcessCollector(registry=self.registry)

    def ended(self, job: Asked, state: str, ended_s: float | None) -> None:
        """Count the end of a job at this Unix time, or None for an attempt that broke and is tried again."""
        if ended_s is None:
            self.breaks.labels(job.kind).inc()
            return
        self.ends.labels(job.kind, state).inc()
        self.seconds.labels(job.kind).observe(max(0.0, ended_s - job.created_s))

    def report(self) -> Report:
        """All numbers now."""
        return Report(process=self.process, kind="jobs", families=families_of(self.registry))


def _age(waiting: Mapping[str, Asked]) -> float:
    jobs = list(waiting.values())
    return max(0.0, time.time() - min(job.created_s for job in jobs)) if jobs else 0.0
