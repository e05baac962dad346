"""Jobs on a real Ray: they outlive the service, the worker's and the supervisor's death, and Ray itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from genescale.client import GenescaleClient, Job
from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.cluster import ray_cluster
from genescale.platform.settings import ClusterSettings, Settings, TrackingSettings
from genescale.serving.app import service
from genescale.serving.config import ServingConfig
from tests.serving.jobs_side import jobs_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
CELLS = [{"id": str(at), "counts": {f"GENE{gene}": gene + at + 1 for gene in range(30)}} for at in range(96)]
# Long enough to be interrupted: each part of the answer takes seconds on one processor.
LONG = {
    "kind": "perturbations",
    "cells": CELLS,
    "edits": [{"kind": "delete", "genes": [f"GENE{gene}"]} for gene in range(30)] * 8,
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    tracking = TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_root=str(tmp_path / "artefacts"))
    return Settings(cluster=ClusterSettings(num_cpus=2), tracking=tracking)


@pytest.fixture
def serve_it(tmp_path: Path, bundle: Bundle, settings: Settings) -> Callable[..., Any]:
    (tmp_path / "data").mkdir()

    @contextmanager
    def served() -> Iterator[GenescaleClient]:
        config = ServingConfig(
            port=0, device="cpu", tokens_per_batch=512, jobs=jobs_config(tmp_path, heartbeat_s=0.3, lease_s=8.0)
        )
        with (
            service(bundle.folder, config, settings) as running,
            GenescaleClient(running.url, timeout_s=60) as client,
        ):
            yield client

    return served


def reached(client: GenescaleClient, job_id: str, enough: Callable[[Job], bool], within_s: float = 90.0) -> Job:
    deadline = time.monotonic() + within_s
    while not enough(job := client.job(job_id)):
        assert not job.over, job
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
    return job


def process_of(title: str) -> int:
    """Process id of the one Ray worker with this title on the Ray that this process started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            named = (folder / "cmdline").read_bytes().startswith(title.encode())
            if named and parent(parent(int(folder.name))) == os.getpid():
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    (only,) = found
    return only


def parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("PPid:")).split()[1])


def test_a_job_outlives_its_worker_its_supervisor_and_ray(
    serve_it: Callable[..., Any], settings: Settings, tmp_path: Path
) -> None:
    with ray_cluster(settings), serve_it() as client:
        job = client.submit_job(LONG)
        reached(client, job.id, lambda one: one.done > 0)
        os.kill(process_of("ray::JobWorker"), signal.SIGKILL)
        second = reached(client, job.id, lambda one: one.attempt == 2 and one.done > 0)
        os.kill(process_of("ray::JobSupervisor"), signal.SIGKILL)
        third = reached(client, job.id, lambda one: one.attempt == 3 and one.done >= second.done)
    # Ray and everything on it are gone here; what was kept stands in the folder.
    parts = set((tmp_path / "jobs" / "results" / job.id / "parts").iterdir())
    assert len(parts) * 8 >= third.done - 8
    written = {part: part.stat().st_mtime_ns for part in parts}
    with ray_cluster(settings), serve_it() as client:
        done = client.wait_for_job(job.id, timeout_s=200)
        assert (done.attempt, done.done) == (4, len(CELLS))
        assert {part: part.stat().st_mtime_ns for part in written} == written
        client.job_result(job.id, tmp_path / "answer.json", file="answer.json")
        assert (tmp_path / "answer.json").stat().st_size == done.files["answer.json"]


def test_a_screen_and_an_embedding_run_beside_the_service(
    serve_it: Callable[..., Any], settings: Settings, tmp_path: Path, reference_corpus: Corpus
) -> None:
    import shutil

    shutil.copytree(reference_corpus.uri, tmp_path / "data" / "corpus")
    corpus = str(tmp_path / "data" / "corpus")
    with ray_cluster(settings), serve_it() as client:
        screen = client.submit_job(
            {
                "kind": "screen",
                "corpus": corpus,
                "edits": {"genes": ["GENE1"], "controls": 1},
                "cells": {"max_cells": 4},
            }
        )
        embedding = client.submit_job({"kind": "embed", "source": corpus})
        # Jobs do not stand in the way of questions.
        assert client.embeddings(CELLS[:1]).embeddings.shape[0] == 1
        for job in (screen, embedding):
            done = client.wait_for_job(job.id, timeout_s=120)
            assert done.run
        assert client.job_result(embedding.id, tmp_path / "vectors.parquet").stat().st_size > 1_000
