"""Fixtures shared by all tests: shared data, a local Ray, an S3 endpoint on loopback, throw-away settings."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genescale.platform.settings import ClusterSettings, Secret, Settings, StorageSettings, TrackingSettings

if TYPE_CHECKING:
    from genescale.platform.storage import Store

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real atlases and golden outputs; the test is skipped where it is absent, and CI must have it."""
    folder = Path(os.environ.get("GENESCALE_SHARED") or ROOT.parent / "shared" / "data")
    if not (folder / "golden").is_dir():
        message = f"no shared data at {folder}: set GENESCALE_SHARED to its folder"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local Ray with two processors for the whole test session."""
    from genescale.platform.cluster import ray_cluster

    temp_dir = tmp_path_factory.mktemp("ray")
    with ray_cluster(Settings(cluster=ClusterSettings(num_cpus=2, num_gpus=0, temp_dir=str(temp_dir)))):
        yield


@pytest.fixture(scope="session")
def s3_settings() -> Iterator[StorageSettings]:
    """Storage settings of an S3 endpoint that lives on a free loopback port for the session."""
    from genescale.serving.demo.object_storage import embedded_endpoint

    with embedded_endpoint() as settings:
        yield settings


@pytest.fixture
def s3_store(s3_settings: StorageSettings) -> tuple[Store, str]:
    """A Store on the session's S3 endpoint, and the address of a new bucket."""
    from genescale.platform.storage import Store

    store = Store(s3_settings)
    bucket = f"s3://test-{uuid.uuid4().hex[:12]}"
    store.create_bucket(bucket)
    return store, bucket


@pytest.fixture
def local_store() -> Store:
    """A Store that may read and write anywhere on local disk."""
    from genescale.platform.storage import Store

    return Store(StorageSettings())


@pytest.fixture(scope="session")
def settings_for() -> Callable[[Path], Settings]:
    """Settings with MLflow on SQLite and every folder below the given one."""

    def make(folder: Path) -> Settings:
        return Settings(
            storage=StorageSettings(access_key_id=Secret(), secret_access_key=Secret()),
            tracking=TrackingSettings(uri=f"sqlite:///{folder / 'mlflow.db'}", artifact_root=str(folder / "artifacts")),
            cluster=ClusterSettings(num_cpus=2, num_gpus=0),
        )

    return make
