"""MLflow on disk, on S3 and behind a server, the fake beside them, and two bundles."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genescale.platform.bundle import Bundle
from genescale.platform.settings import Settings, StorageSettings, TrackingSettings
from genescale.platform.storage import Store
from genescale.platform.tracking import (
    MemoryTracker,
    Tracker,
    open_tracker,
)
from genescale.platform.vocabulary import Vocabulary
from tests.platform.tracking.tracked_bundles import make_bundle


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary.build([f"ENSG{i:011d}" for i in range(20)], np.linspace(1, 2, 20), name="tiny")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "b", vocabulary, value=1.0)


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("other") / "b", vocabulary, value=3.0)


@pytest.fixture(scope="session")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """SQLite and a folder, both at addresses that need care: a space and a percent sign."""
    folder = tmp_path_factory.mktemp("a b%20c")
    return Settings(tracking=TrackingSettings(uri=f"sqlite:///{folder}/new/m.db", artifact_root=str(folder / "art")))


@pytest.fixture(scope="session")
def on_s3(tmp_path_factory: pytest.TempPathFactory, s3_settings: StorageSettings) -> Settings:
    """SQLite, and artefacts in a bucket whose endpoint and keys only the settings know."""
    Store(s3_settings).create_bucket("s3://tracked")
    uri = f"sqlite:///{tmp_path_factory.mktemp('s3')}/m.db"
    return Settings(storage=s3_settings, tracking=TrackingSettings(uri=uri, artifact_root="s3://tracked/runs"))


@pytest.fixture(scope="session")
def on_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """An MLflow server that hands out artefacts itself."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-W", "ignore", "-m", "mlflow", "server", "--workers", "1", "--serve-artifacts"]
    places = ["--backend-store-uri", f"sqlite:///{folder}/m.db", "--artifacts-destination", str(folder / "kept")]
    host, port = address.split(":")
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, *places, "--host", host, "--port", port],
            stdout=log,
            stderr=log,
            start_new_session=True,
            # Jobs would start seven more processes that nothing here needs.
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
    try:
        _wait_until_healthy(f"http://{address}/health", server, folder / "log")
        yield Settings(tracking=TrackingSettings(uri=f"http://{address}", artifact_root=str(folder / "unused")))
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the MLflow server did not start: {log.read_text()[-2000:]}")


BACKENDS = ["on_disk", "on_s3", "on_server"]


@pytest.fixture(params=BACKENDS)
def settings(request: pytest.FixtureRequest) -> Settings:
    """Settings of each kind of MLflow, with an experiment of this test's own."""
    base: Settings = request.getfixturevalue(request.param)
    name = request.node.name.replace("[", "-").rstrip("]")
    return dataclasses.replace(base, tracking=dataclasses.replace(base.tracking, experiment=name))


@pytest.fixture
def recorder(settings: Settings) -> Any:
    """What MLflow itself says afterwards."""
    return open_tracker(settings).client


@pytest.fixture(params=["memory", *BACKENDS])
def tracker(request: pytest.FixtureRequest) -> Tracker:
    """The fake and every kind of MLflow."""
    return MemoryTracker() if request.param == "memory" else open_tracker(request.getfixturevalue(request.param))


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """A model name of this test's own."""
    return f"M {request.node.name}".replace("[", "-").rstrip("]").replace("/", "-")
