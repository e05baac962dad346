"""What one process says of itself, and many of them as one page for Prometheus.

Every sample of a process carries its name in the label `process`: counters of processes that come and go must not be
added up before `rate` has looked at each of them, and one scrape must see all of them, whoever answers it.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

Kind = Literal["http", "model", "jobs", "watcher"]
PROCESS = "process"
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One metric of one process: its samples as (name, labels, value)."""

    name: str
    about: str
    kind: str
    samples: tuple[tuple[str, Labels, float], ...]


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Questions that an HTTP process has answered since it began, for the tracker; probes and facts are not counted."""

    requests: int = 0
    answered: int = 0
    refused: int = 0
    """For want of room or rate, or because the service stops."""
    mistaken: int = 0
    """Other refusals that are the caller's (4xx)."""
    failed: int = 0
    """Failures of ours, and answers that came too late (5xx)."""
    gone: int = 0
    """Callers who left before the answer."""
    tokens: int = 0
    cells: int = 0
    latencies: Counter[int] = field(default_factory=Counter)
    """How many answers took how long, by class of `latencies.py`."""
    versions: dict[str, str] = field(default_factory=dict)
    """Version of each model by name, as it is served now."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The numbers of one process at one moment."""

    process: str
    kind: Kind
    families: tuple[Family, ...]
    totals: Totals = Totals()
    """Only of HTTP processes."""
    expected: dict[str, int] = field(default_factory=dict)
    """How many processes of each kind the service should have, as an HTTP process knows it."""


def process_name(kind: Kind) -> str:
    """A name for this process that no earlier or later one has: `http-node3-4711-9f2c`."""
    return f"{kind}-{socket.gethostname()[:32]}-{os.getpid()}-{uuid.uuid4().hex[:4]}"


def families_of(registry: CollectorRegistry) -> tuple[Family, ...]:
    """The metrics of a registry as plain values, which travel between processes."""
    return tuple(
        Family(
            name=metric.name,
            about=metric.documentation,
            kind=metric.type,
            samples=tuple(
                (one.name, tuple(one.labels.items()), one.value)
                for one in metric.samples
                # When a counter was made is of no use to a reader, and doubles the page.
                if not one.name.endswith("_created")
            ),
        )
        for metric in registry.collect()
    )


class _Merged(Collector):
    def __init__(self, reports: Iterable[Report]) -> None:
        self._reports = reports

    def collect(self) -> Iterable[Metric]:
        merged: dict[str, Metric] = {}
        for report in self._reports:
            for family in report.families:
                metric = merged.setdefault(family.name, Metric(family.name, family.about, family.kind))
                for name, labels, value in family.samples:
                    metric.add_sample(name, {PROCESS: report.process, **dict(labels)}, value)
        return merged.values()


def page(reports: Sequence[Report], accept: str = "") -> tuple[bytes, str]:
    """The text for a scraper, in the form that its header `Accept` prefers, and its content type."""
    registry = CollectorRegistry()
    registry.register(_Merged(reports))
    encoder, content_type = choose_encoder(accept)
    text: bytes = encoder(registry)
    return text, content_type
