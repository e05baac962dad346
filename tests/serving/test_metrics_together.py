"""Numbers of many processes: reports, the watcher's board, intervals for the tracker, and who reports."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from prometheus_client.parser import text_string_to_metric_families

from genescale.platform.errors import GenescaleError, InputError
from genescale.serving.access.room import Room
from genescale.serving.answering.passes import EmbedPass, Outcome
from genescale.serving.watching import reporter as reporter_module
from genescale.serving.watching.board import FRESH_S, KEPT_S, Board, Interval, versions_of
from genescale.serving.watching.http_numbers import HttpNumbers
from genescale.serving.watching.job_numbers import JobNumbers
from genescale.serving.watching.latencies import class_of, percentile_s
from genescale.serving.watching.model_numbers import ModelNumbers
from genescale.serving.watching.noted import Noted
from genescale.serving.watching.reporter import Reporter
from genescale.serving.watching.reports import Report, Totals, page


def http_numbers() -> HttpNumbers:
    return HttpNumbers(object(), Room(4, 100, retry_after_s=1), {"http": 2, "model": 1})


def ended(
    numbers: HttpNumbers, *, status: int = 200, seconds: float = 0.1, tokens: int = 10, problem: str = ""
) -> None:
    numbers.ended(
        {"path": "/x", "method": "POST"}, Noted(tokens=tokens, cells=1, problem=problem), status, seconds, question=True
    )


def report(process: str, kind: Any = "http", **totals: Any) -> Report:
    return Report(process=process, kind=kind, families=(), totals=Totals(**totals), expected={"http": 2})


def test_one_page_holds_each_process_once_and_each_name_once() -> None:
    first, second = http_numbers(), http_numbers()
    for _ in range(3):
        ended(first)
    ended(second)
    text = page([first.report(), second.report()])[0].decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    found = {
        one.labels["process"]: one.value
        for family in families
        for one in family.samples
        if one.name == "genescale_requests_total"
    }
    assert found == {first.process: 3.0, second.process: 1.0}
    assert first.process != second.process
    assert all("process" in one.labels for family in families for one in family.samples)


@given(st.lists(st.floats(1e-4, 500), min_size=1, max_size=60), st.sampled_from([0.5, 0.95, 0.99, 1.0]))
def test_percentiles_are_within_three_percent_of_the_exact_ones(seconds: list[float], share: float) -> None:
    found = percentile_s(Counter(class_of(one) for one in seconds), share)
    exact = sorted(seconds)[max(1, math.ceil(share * len(seconds))) - 1]
    assert found == pytest.approx(exact, rel=0.03)


def test_an_interval_counts_every_process_and_only_what_is_new() -> None:
    board, interval = Board(), Interval()
    numbers = [http_numbers(), http_numbers()]
    for one in numbers:
        ended(one, seconds=0.1)
        interval.add(board.take(one.report(), 0.0))
    assert interval.metrics(10.0)["answered"] == 2
    interval = Interval()
    ended(numbers[0], seconds=2.0, tokens=500)
    ended(numbers[0], status=500, problem="error")
    ended(numbers[0], status=429, problem="overloaded")
    ended(numbers[0], status=503, problem="draining")
    ended(numbers[0], status=422, problem="invalid_input")
    ended(numbers[0], status=0)
    for one in numbers:
        interval.add(board.take(one.report(), 5.0))
    found = interval.metrics(10.0)
    expected = {
        "requests": 6,
        "answered": 1,
        "failed": 1,
        "refused": 2,
        "mistaken": 1,
        "gone": 1,
        "tokens": 550,
        "cells": 6,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["tokens_per_s"] == 55.0
    assert found["error_rate"] == pytest.approx(1 / 6)
    assert found["latency_p50_ms"] == pytest.approx(2000, rel=0.03)
    assert found["latency_p99_ms"] == pytest.approx(2000, rel=0.03)


def test_an_interval_without_answers_has_no_percentiles() -> None:
    found = Interval().metrics(60.0)
    assert found["requests"] == found["error_rate"] == 0
    assert not [name for name in found if name.startswith("latency")]


def test_a_process_that_was_forgotten_and_speaks_again_is_not_counted_twice() -> None:
    board = Board()
    assert board.take(report("a", requests=5), 0.0).requests == 5
    assert board.reports(KEPT_S + 1) == []
    assert board.take(report("a", requests=6), KEPT_S + 2).requests == 1


def test_a_process_that_died_or_hangs_is_missing_soon_and_forgotten_later() -> None:
    board = Board()
    board.take(report("a", requests=5), 0.0)
    board.take(report("b"), 0.0)
    board.take(report("b"), FRESH_S)
    assert board.fresh("http", FRESH_S) == 2
    assert board.fresh("http", FRESH_S + 1) == 1
    assert {one.process for one in board.reports(FRESH_S + 1)} == {"a", "b"}
    samples = {
        (name, labels): value for family in board.families(FRESH_S + 1) for name, labels, value in family.samples
    }
    assert samples["genescale_report_age_seconds", (("of", "a"), ("kind", "http"))] == FRESH_S + 1
    assert samples["genescale_processes", (("kind", "http"),)] == 1
    assert samples["genescale_processes_expected", (("kind", "http"),)] == 2
    assert {one.process for one in board.reports(KEPT_S + 1)} == {"b"}


def test_versions_that_differ_between_processes_are_all_told() -> None:
    mixed = [report("a", versions={"heart": "3"}), report("b", versions={"heart": "4"})]
    assert versions_of(mixed) == {"heart": "3, 4"}


def test_a_replica_counts_its_batches_and_tells_faults_from_mistakes() -> None:
    numbers = ModelNumbers(budget=100, max_bytes=1_000, held=list)
    cells = [np.arange(5), np.arange(7)]
    passes = [EmbedPass(cells=cells, layer="last", pooling="mean_genes", cost=12)] * 3
    values: list[object] = [np.zeros(2), InputError("no such head."), GenescaleError("not finite.")]
    numbers.ran(passes, [Outcome(value=value, forward_s=0.25) for value in values])
    found = {name: numbers.registry.get_sample_value(f"genescale_model_{name}") for name in (
        "batch_tokens_sum", "batch_passes_sum", "batch_fill_sum", "batch_seconds_sum", "cells_total", "failures_total",
        "held_limit_bytes",
    )}  # fmt: skip
    assert list(found.values()) == [36, 3, pytest.approx(0.36), 0.25, 6, 1, 1_000]


def test_a_replica_counts_loads_and_their_failures() -> None:
    numbers = ModelNumbers(budget=1, max_bytes=1, held=list)
    assert numbers.counting_loads(lambda text: text.upper())("a") == "A"
    with pytest.raises(ZeroDivisionError):
        numbers.counting_loads(lambda n: 1 / n)(0)
    assert numbers.registry.get_sample_value("genescale_model_loads_total") == 1
    assert numbers.registry.get_sample_value("genescale_model_load_failures_total") == 1


class Handle:
    """A watcher as a Serve handle shows it: each method has `remote`."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.heard: list[Any] = []
        self._answer = answer

    @property
    def report(self) -> Handle:
        return self

    reports = report

    async def remote(self, *arguments: Any) -> Any:
        self.heard += arguments
        answer = self._answer()
        return await answer if asyncio.iscoroutine(answer) else answer


async def own() -> Report:
    return report("own")


def test_a_reporter_learns_the_run_and_who_else_is_there() -> None:
    async def talk() -> tuple[str, list[str], list[Report]]:
        told, asked = Handle(lambda: "run-7"), Handle(lambda: [report("own"), report("other")])
        first, second = Reporter(lambda: told, every_s=60), Reporter(lambda: asked, every_s=60)
        first.start(own)
        second.start(own)
        async with asyncio.timeout(10):
            while not (first.run_id() and second.reachable):
                await asyncio.sleep(0.005)
        return first.run_id(), [one.process for one in await second.others()], told.heard

    run_id, others, heard = asyncio.run(talk())
    assert (run_id, others) == ("run-7", ["other"])
    assert [one.process for one in heard] == ["own"]


def test_a_watcher_that_is_away_or_hangs_costs_a_scrape_two_seconds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter_module, "CALL_TIMEOUT_S", 0.1)

    def away() -> Any:
        raise RuntimeError("there is no such deployment")

    async def talk(find: Callable[[], Any]) -> tuple[list[Report], float]:
        reporter = Reporter(find, every_s=60)
        reporter.start(own)
        began = time.monotonic()
        await reporter.tell()
        return await reporter.others(), time.monotonic() - began

    for find in (away, lambda: Handle(lambda: asyncio.sleep(60))):
        others, seconds = asyncio.run(talk(find))
        assert others == []
        assert seconds < 10.0


def test_reports_go_on_when_the_watcher_comes_back() -> None:
    answers = iter([RuntimeError("away"), RuntimeError("away"), "run-1"])

    def answer() -> str:
        found = next(answers, "run-1")
        if isinstance(found, Exception):
            raise found
        return found

    async def talk() -> str:
        reporter = Reporter(lambda: Handle(answer), every_s=0.01)
        reporter.start(own)
        for _ in range(1000):
            if reporter.run_id():
                break
            await asyncio.sleep(0.01)
        return reporter.run_id()

    assert asyncio.run(talk()) == "run-1"


@dataclass(frozen=True, kw_only=True)
class Job:
    kind: str = "embed"
    created_s: float = 0.0


def test_jobs_are_counted_by_how_they_end_and_broken_attempts_apart() -> None:
    waiting = {"a": Job(created_s=time.time() - 50), "b": Job(created_s=time.time() - 5)}
    numbers = JobNumbers(lambda: waiting, lambda: {"c": Job()}, places=2, most_waiting=9)
    numbers.ended(Job(created_s=100.0), "failed", 107.0)
    numbers.ended(Job(), "broken", None)
    value = numbers.registry.get_sample_value
    assert value("genescale_jobs_ended_total", {"kind": "embed", "state": "failed"}) == 1
    assert value("genescale_jobs_ended_total", {"kind": "embed", "state": "broken"}) is None
    assert value("genescale_jobs_broken_total", {"kind": "embed"}) == 1
    assert value("genescale_job_seconds_sum", {"kind": "embed"}) == 7.0
    assert (value("genescale_jobs_waiting"), value("genescale_jobs_running"), value("genescale_jobs_places")) == (
        2,
        1,
        2,
    )
    assert value("genescale_jobs_oldest_waiting_seconds") == pytest.approx(50, abs=2)


class JobsDesk:
    """The supervisor of jobs, which answers or does not."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.desk, self._answer = self, answer

    async def numbers(self) -> Report:
        found: Report = await self._answer()
        return found


async def of_jobs() -> Report:
    return JobNumbers(dict, dict, places=3, most_waiting=9).report()


async def broken() -> Report:
    raise RuntimeError("there is no supervisor")


async def silent() -> Report:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize(("answer", "told"), [(of_jobs, True), (broken, False), (silent, False)])
def test_a_scrape_tells_of_jobs_and_does_without_when_nobody_answers(
    build: Callable[..., Any],
    ask: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[], Any],
    told: bool,
) -> None:
    from genescale.serving.watching import metrics_route

    monkeypatch.setattr(metrics_route, "PROBE_TIMEOUT_S", 0.2)
    app = build()
    watch = metrics_route.watch_of(app.app)
    app.app.state.watch = replace(watch, services=replace(watch.services, jobs=JobsDesk(answer)))
    response = ask(app, "GET", "/metrics")
    assert response.status_code == 200
    assert ("genescale_jobs_places" in response.text) == told
    assert "genescale_ready" in response.text
