"""Addresses and sources that are refused, and servers that are not there."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from genescale.platform.bundle import Bundle
from genescale.platform.errors import (
    SettingsError,
    TrackingError,
)
from genescale.platform.settings import Settings, TrackingSettings
from genescale.platform.tracking import (
    MlflowTracker,
    fetch_bundle,
    open_tracker,
)
from tests.platform.tracking.tracked_bundles import FOLDER, registered


def test_foreign_sources_are_refused(on_disk: Settings, bundle: Bundle, model: str, tmp_path: Path) -> None:
    # MLflow itself takes any of these: whoever can write to its registry could name any folder of the server.
    tracker = open_tracker(on_disk)
    version = registered(tracker, bundle, model)
    shutil.copytree(bundle.folder, tmp_path / "planted")
    root = version.source.removesuffix(f"/{FOLDER}")
    sources = [str(tmp_path / "planted"), "/etc", f"{root}/../../../x", f"{root}/%2e%2e/x", f"{root}x/bundle", root,
               "s3://bucket/bundle", "mlflow-artifacts:/x", "https://host/bundle"]  # fmt: skip
    for source in sources:
        number = str(tracker.client.create_model_version(model, source=source, run_id=version.run_id).version)
        forged = dataclasses.replace(version, version=number, source=source)
        with pytest.raises(TrackingError, match="outside the run's artefacts"):
            tracker.resolve(f"models:/{model}/{number}")
        with pytest.raises(TrackingError, match="outside the run's artefacts"):
            tracker.download(forged, tmp_path / "t")
    number = tracker.client.create_model_version(model, source=version.source).version
    with pytest.raises(TrackingError, match="outside"):
        tracker.resolve(f"models:/{model}/{number}")
    assert not (tmp_path / "t").exists()


def test_foreign_sources_on_a_server_are_refused(
    on_server: Settings, bundle: Bundle, other_bundle: Bundle, model: str, tmp_path: Path
) -> None:
    tracker = open_tracker(on_server)
    version = registered(tracker, bundle, model)
    other = registered(tracker, other_bundle, model)
    root = version.source.removesuffix(f"/{FOLDER}")
    for source in (other.source, root, f"{root}x/bundle", f"{root}/../x", "s3://bucket/bundle", str(bundle.folder)):
        # The server refuses some of them itself, when they are registered; a server that does not is met here.
        forged = dataclasses.replace(version, source=source)
        with pytest.raises(TrackingError, match="outside the run's artefacts"):
            tracker.download(forged, tmp_path / "t")
    source = "s3://bucket/bundle"
    number = tracker.client.create_model_version(model, source=source, run_id=version.run_id).version
    with pytest.raises(TrackingError, match="outside the run's artefacts"):
        fetch_bundle(f"models:/{model}/{number}", on_server, tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_artefacts_outside_the_tracked_root_are_refused(
    on_disk: Settings, bundle: Bundle, model: str, tmp_path: Path
) -> None:
    version = registered(open_tracker(on_disk), bundle, model)
    moved = dataclasses.replace(on_disk, tracking=dataclasses.replace(on_disk.tracking, artifact_root=str(tmp_path)))
    tracker = open_tracker(moved)
    with pytest.raises(TrackingError, match=r"outside the tracked root .*tracking\.artifact_root"):
        tracker.resolve(version.reference)
    with pytest.raises(TrackingError, match="outside the tracked root"), tracker.run("train"):
        pytest.fail("the run must not start")


def test_databases_are_made_where_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = MlflowTracker(TrackingSettings(uri="sqlite:///sub/m.db", artifact_root="art"))
    monkeypatch.chdir("/")
    with tracker.run("train") as run:
        run.log_text("x", "a.txt")
    assert (tmp_path / "sub/m.db").is_file()
    assert [path.name for path in (tmp_path / "art").rglob("*.txt")] == ["a.txt"]


@pytest.mark.parametrize("uri", ["mlruns", "postgresql://u:planted@host/db", "databricks", "", "sqlite://"])
def test_other_addresses_are_refused(uri: str) -> None:
    with pytest.raises(SettingsError, match=r"tracking\.uri") as raised:
        MlflowTracker(TrackingSettings(uri=uri))
    assert "planted" not in str(raised.value)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.db").write_text("this is not a database, however long it may be")
    with pytest.raises(TrackingError, match=r"m\.db"):
        MlflowTracker(TrackingSettings(uri=f"sqlite:///{tmp_path}/m.db"))


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(TrackingError, match=f"{uri}: cannot connect to MLflow"):
            MlflowTracker(TrackingSettings(uri=uri)).resolve("models:/M@x")


def test_opening_a_tracker_is_quiet(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from genescale.platform.settings import TrackingSettings\n"
        "from genescale.platform.tracking import MlflowTracker\n"
        "t = MlflowTracker(TrackingSettings(uri=sys.argv[1], artifact_root=sys.argv[2]))\n"
        "with t.run('r') as run: run.log_text('x', 'a')\n"
    )
    command = [sys.executable, "-W", "default", "-c", code, f"sqlite:///{tmp_path}/m.db", str(tmp_path / "art")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(os.listdir(tmp_path)) == ["art", "m.db"]
