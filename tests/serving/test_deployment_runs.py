"""A deployment as a run: what is recorded, and that a tracker that is away or hangs holds nobody up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from genescale.platform.errors import TrackingError
from genescale.platform.memory_tracker import MemoryRun, MemoryTracker
from genescale.platform.patience import Patience
from genescale.platform.runs import Run
from genescale.platform.settings import Secret
from genescale.serving.config import ServingConfig
from genescale.serving.release import Release
from genescale.serving.watching import deployment_run
from genescale.serving.watching.deployment_run import DeploymentRun
from genescale.serving.watching.watcher import shown_config, watched

SOON = Patience(total_s=10**9, first_pause_s=0.01, longest_pause_s=0.02)


def until(condition: Callable[[], Any]) -> None:
    end_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end_s, "it did not become true"
        time.sleep(0.005)


class Flaky:
    """A tracker that fails while `away`, in memory otherwise."""

    def __init__(self) -> None:
        self.memory, self.away = MemoryTracker(), True

    @contextmanager
    def open(self) -> Iterator[Run]:
        self.check()
        with self.memory.run("serve tiny 3") as run:
            yield _Checked(run, self)

    def check(self) -> None:
        if self.away:
            raise TrackingError("does not answer.", where="http://secret-host/secret-path")

    @property
    def run(self) -> MemoryRun:
        (found,) = self.memory.runs.values()
        return found


class _Checked:
    def __init__(self, run: MemoryRun, tracker: Flaky) -> None:
        self._run, self._tracker, self.id = run, tracker, run.id

    def log_metric_rows(self, rows: Any, *, time_ms: int | None = None) -> None:
        self._tracker.check()
        self._run.log_metric_rows(rows)

    def set_tags(self, tags: Any) -> None:
        self._tracker.check()
        self._run.set_tags(tags)


def test_measurements_wait_for_a_tracker_that_is_away_and_arrive_in_order() -> None:
    tracker = Flaky()
    run = DeploymentRun(tracker.open, pauses=SOON)
    for step in range(5):
        run.log({"requests": float(step)}, step=step)
    run.label({"serving.tiny": "4"})
    until(lambda: not run.reachable)
    assert (run.id, run.waiting) == ("", 5)
    tracker.away = False
    until(lambda: not run.waiting)
    assert run.id == tracker.run.id
    assert tracker.run.status == "RUNNING"
    tracker.away = True
    run.log({"requests": 5.0}, step=5)
    until(lambda: not run.reachable)
    tracker.away = False
    assert run.end(timeout_s=5) == 0
    assert tracker.run.metrics["requests"] == [(step, float(step)) for step in range(6)]
    assert tracker.run.tags == {"serving.tiny": "4"}
    assert tracker.run.status == "FINISHED"


def test_a_dead_tracker_costs_old_measurements_which_are_counted() -> None:
    run = DeploymentRun(Flaky().open, most_waiting=3, pauses=SOON)
    for step in range(10):
        run.log({"requests": 1.0}, step=step)
    assert (run.waiting, run.dropped) == (3, 7)
    assert run.end(timeout_s=5) == 10


def test_a_tracker_that_hangs_holds_up_neither_a_measurement_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()

    @contextmanager
    def hang() -> Iterator[Run]:
        hanging.wait()
        raise TrackingError("at last.")
        yield

    run = DeploymentRun(hang, pauses=SOON)
    for step in range(100):
        run.log({"requests": 1.0}, step=step)
    assert run.reachable
    monkeypatch.setattr(deployment_run, "SILENT_S", 0.05)
    until(lambda: not run.reachable)
    # It hangs still: what came back did not wait for it.
    assert run.end(timeout_s=0.2) == 100
    hanging.set()


def test_what_the_tracker_says_does_not_reach_the_log(caplog: pytest.LogCaptureFixture) -> None:
    run = DeploymentRun(Flaky().open, pauses=SOON)
    run.log({"requests": 1.0}, step=0)
    until(lambda: not run.reachable)
    run.end(timeout_s=5)
    assert "secret" not in caplog.text


def test_a_run_records_choices_and_limits_and_neither_keys_nor_places() -> None:
    config = ServingConfig(
        api_keys=(Secret("a-planted-key-0123456789"),),
        index="s3://planted-bucket/index",
        cache="planted-cache",
        replicas=2,
    )
    release = Release(
        name="enc", version="7", digest="d" * 64, address="s3://planted-bucket/m", folder="planted-folder"
    )
    params = watched({"heart": release}, config).params
    assert params["model"] == {"heart": {"registered": "enc", "version": "7", "digest": "d" * 64}}
    assert params["serving"]["replicas"] == 2
    assert params["serving"]["limits"]["max_cells"] == 256
    assert params["serving"]["has_keys"] is True
    assert "planted" not in str(params)
    assert "***" not in str(shown_config(config))


def test_several_models_are_named_in_the_title() -> None:
    releases = {name: Release(name=name, version="1", digest=name, address="", folder="") for name in ("heart", "lung")}
    assert watched(releases, ServingConfig()).title == "serve heart 1 and others"
