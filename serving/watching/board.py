"""The newest report of every process of a service, and what they add up to: the watcher's memory.

A process that died stays on the board for a while with its last numbers, so that what it counted is scraped at least
once; one that hangs stays with growing age, which is what an alert looks at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from genescale.serving.watching.latencies import percentile_s, since
from genescale.serving.watching.reports import Family, Kind, Report, Totals

REPORT_EVERY_S = 5.0
# After three missed reports a process counts as missing; a minute of scrapes later it is forgotten.
FRESH_S, KEPT_S = 3 * REPORT_EVERY_S + 1.0, 120.0
REPORTING: tuple[Kind, ...] = ("http", "model")
PERCENTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
_SUMS = tuple(field.name for field in fields(Totals) if field.type == "int")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A report and when it came."""

    report: Report
    came_s: float


class Board:
    """Holds reports by process. Times are seconds of one clock that the caller reads."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        # Of forgotten processes too: one that could not be heard for long goes on counting where it was.
        self._counted: dict[str, Totals] = {}
        self._expected: dict[str, int] = {}

    def take(self, report: Report, now_s: float) -> Totals:
        """Keep a report; returns what its process has counted since the one before."""
        before = self._counted.get(report.process, Totals())
        self._entries[report.process] = Entry(report=report, came_s=now_s)
        self._counted[report.process] = report.totals
        self._expected.update(report.expected)
        return difference(report.totals, before)

    def reports(self, now_s: float) -> list[Report]:
        """The newest report of each process that was heard of lately."""
        self._entries = {name: one for name, one in self._entries.items() if now_s - one.came_s <= KEPT_S}
        return [one.report for one in self._entries.values()]

    def fresh(self, kind: Kind, now_s: float) -> int:
        """How many processes of this kind report in time."""
        return sum(one.report.kind == kind and now_s - one.came_s <= FRESH_S for one in self._entries.values())

    def families(self, now_s: float) -> tuple[Family, ...]:
        """What the watcher itself says of the processes."""
        ages = tuple(
            (
                "genescale_report_age_seconds",
                (("of", name), ("kind", one.report.kind)),
                now_s - one.came_s,
            )
            for name, one in self._entries.items()
        )
        there: dict[str, int] = {kind: self.fresh(kind, now_s) for kind in REPORTING}
        return (
            Family(
                name="genescale_report_age_seconds",
                about="Seconds since a process was heard of.",
                kind="gauge",
                samples=ages,
            ),
            _by_kind("genescale_processes", "Processes that report in time.", there),
            _by_kind("genescale_processes_expected", "Processes that the service was started with.", self._expected),
        )


class Interval:
    """What all processes counted since the interval began, for the tracker."""

    def __init__(self) -> None:
        self._sum, self._latencies = Counter(dict.fromkeys(_SUMS, 0)), Counter[int]()

    def add(self, part: Totals) -> None:
        """Count what one process counted."""
        self._sum.update({name: getattr(part, name) for name in _SUMS})
        self._latencies.update(part.latencies)

    def metrics(self, seconds: float) -> dict[str, float]:
        """Counts, rates and percentiles of an interval of this length; no percentiles where nothing was answered."""
        n = self._sum["requests"]
        rates = {f"{name}_per_s": self._sum[name] / seconds for name in ("requests", "tokens", "cells")}
        found = {name: percentile_s(self._latencies, share) for name, share in PERCENTILES.items()}
        return {
            **{name: float(self._sum[name]) for name in _SUMS},
            **rates,
            "error_rate": self._sum["failed"] / n if n else 0.0,
            "refusal_rate": self._sum["refused"] / n if n else 0.0,
            **{f"latency_{name}_ms": 1000 * value for name, value in found.items() if value is not None},
        }


def difference(now: Totals, before: Totals) -> Totals:
    """What was counted between two reports of one process."""
    sums = {name: getattr(now, name) - getattr(before, name) for name in _SUMS}
    return Totals(latencies=since(now.latencies, before.latencies), versions=now.versions, **sums)


def versions_of(reports: Sequence[Report]) -> dict[str, str]:
    """The version of each model that is served now, as the HTTP processes say; several where they differ."""
    found: dict[str, set[str]] = {}
    for report in reports:
        for name, version in report.totals.versions.items():
            found.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(versions)) for name, versions in found.items()}


def _by_kind(name: str, about: str, numbers: Mapping[str, int]) -> Family:
    samples = tuple((name, (("kind", kind),), float(n)) for kind, n in numbers.items())
    return Family(name=name, about=about, kind="gauge", samples=samples)
