"""A real service watched: one scrape sees every process, and the deployment is a run of the tracker."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from genescale.platform.settings import Secret, Settings
from genescale.platform.tracking import open_tracker
from genescale.serving.config import ServingConfig

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle

KEY = "a-service-key-0123456789abcdef"
N_REQUESTS = 12
Sample = tuple[dict[str, str], float]


def scraped(url: str) -> dict[str, list[Sample]]:
    """Samples of /metrics by name."""
    response = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=20)
    assert response.status_code == 200, response.text
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(response.text):
        for one in family.samples:
            found.setdefault(one.name, []).append((one.labels, one.value))
    return found


def total(samples: dict[str, list[Sample]], name: str, **labels: str) -> float:
    return sum(value for given, value in samples.get(name, ()) if labels.items() <= given.items())


def until(condition: Callable[[], Any], *, within_s: float) -> Any:
    """What `condition` gives once it is true; fails after `within_s`."""
    end_s = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < end_s, "it did not become true in time"
        time.sleep(0.3)
    return found


@pytest.mark.slow
def test_one_scrape_sees_every_process_and_the_tracker_gets_the_run(
    ray_local: None, bundle: Bundle, settings_for: Callable[[Path], Settings], tmp_path: Path
) -> None:
    from genescale.serving.app import service

    settings = settings_for(tmp_path)
    config = ServingConfig(
        port=0, num_cpus=0.5, ingress_replicas=2, api_keys=(Secret(KEY),), tracking_interval_s=2.0, tokens_per_batch=200
    )
    with service(bundle, config, settings) as running:
        body = {"cells": [{"counts": {"GENE1": 3, "GENE2": 5}}]}
        for _ in range(N_REQUESTS):
            answer = httpx.post(
                f"{running.url}/v1/embeddings", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=30
            )
            assert answer.status_code == 200
        assert httpx.post(f"{running.url}/v1/embeddings", json=body).status_code == 401

        def everything() -> dict[str, list[Sample]] | None:
            samples = scraped(running.url)
            there = total(samples, "genescale_requests_total", route="/v1/embeddings", code="200") == N_REQUESTS
            return samples if there and total(samples, "genescale_model_batch_seconds_count") else None

        samples = until(everything, within_s=25)
        processes = {labels["process"] for labels, _ in samples["process_resident_memory_bytes"]}
        assert sorted(name.partition("-")[0] for name in processes) == ["http", "http", "model", "watcher"]
        assert total(samples, "genescale_processes", kind="http") == 2
        assert total(samples, "genescale_processes_expected", kind="http") == 2
        assert total(samples, "genescale_processes", kind="model") == 1
        assert total(samples, "genescale_model_cells_total") >= N_REQUESTS
        assert total(samples, "genescale_model_held") == 1
        assert total(samples, "genescale_key_requests_total", key="config-1") >= N_REQUESTS
        assert total(samples, "genescale_tracking_up") == 1
        began = time.monotonic()
    assert time.monotonic() - began < 40

    tracker = open_tracker(settings)
    experiment = tracker.client.get_experiment_by_name(settings.tracking.experiment)
    (run,) = tracker.client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.tiny-encoder.digest"] == bundle.digest
    assert run.data.params["serving.limits.max_cells"] == "256"
    assert KEY not in str(run.data.to_dictionary())
    history = {name: tracker.client.get_metric_history(run.info.run_id, name) for name in ("answered", "mistaken")}
    assert {name: sum(point.value for point in points) for name, points in history.items()} == {
        "answered": N_REQUESTS,
        "mistaken": 1,
    }
    assert 0 < max(point.step for point in history["answered"]) < 120
    assert run.data.metrics["latency_p50_ms"] > 0


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.slow
def test_a_tracker_that_hangs_delays_neither_the_start_nor_an_answer_nor_the_stop_by_much(
    ray_local: None,
    bundle: Bundle,
    settings_for: Callable[[Path], Settings],
    tmp_path: Path,
    silent_server: str,
) -> None:
    from genescale.serving.app import service

    settings = settings_for(tmp_path)
    settings = replace(settings, tracking=replace(settings.tracking, uri=silent_server))
    body = {"cells": [{"counts": {"GENE1": 3, "GENE2": 5}}]}
    with service(bundle, ServingConfig(port=0, num_cpus=0.5, tracking_interval_s=0.5), settings) as running:
        slowest = 0.0
        for _ in range(20):
            began = time.monotonic()
            assert httpx.post(f"{running.url}/v1/embeddings", json=body, timeout=30).status_code == 200
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 5
        samples = until(lambda: waiting(running.url), within_s=20)
        assert total(samples, "genescale_tracking_enabled") == 1
        began = time.monotonic()
    # Serve's own stop takes seconds; the tracker is given five of them, and not one more.
    assert time.monotonic() - began < 40


def waiting(url: str) -> dict[str, list[Sample]] | None:
    samples = scraped(url)
    return samples if total(samples, "genescale_tracking_waiting") >= 2 else None


@pytest.mark.slow
def test_a_watcher_that_is_killed_comes_back_and_goes_on_with_the_same_run(
    ray_local: None, bundle: Bundle, settings_for: Callable[[Path], Settings], tmp_path: Path
) -> None:
    from genescale.serving.app import service

    settings = settings_for(tmp_path)
    with service(bundle, ServingConfig(port=0, num_cpus=0.5, tracking_interval_s=1.0), settings) as running:
        before = until(lambda: watcher_in(running.url), within_s=30)
        tracker = open_tracker(settings)
        experiment = until(
            lambda: tracker.client.get_experiment_by_name(settings.tracking.experiment), within_s=30
        ).experiment_id
        (run,) = until(lambda: tracker.client.search_runs([experiment]), within_s=30)
        os.kill(int(before.split("-")[-2]), signal.SIGKILL)
        assert scraped(running.url)["genescale_requests_total"] is not None
        until(lambda: watcher_in(running.url) not in ("", before), within_s=60)
        until(lambda: len(tracker.client.get_metric_history(run.info.run_id, "requests")) > 3, within_s=30)
    (found,) = tracker.client.search_runs([experiment])
    assert (found.info.run_id, found.info.status) == (run.info.run_id, "FINISHED")


def watcher_in(url: str) -> str:
    """The watcher's name in a scrape, empty while it is not there."""
    names = {labels["process"] for labels, _ in scraped(url).get("process_resident_memory_bytes", ())}
    return next((name for name in names if name.startswith("watcher-")), "")
