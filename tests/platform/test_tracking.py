"""Both trackers keep the same promises; MLflow's on SQLite with a folder, on SQLite with S3, and on a server."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genescale.platform.bundle import Bundle, write_bundle
from genescale.platform.errors import (
    ForbiddenPathError,
    IntegrityError,
    NotFoundError,
    SettingsError,
    StorageError,
    TrackingError,
)
from genescale.platform.liveness import is_gone, process_label
from genescale.platform.settings import Secret, Settings, StorageSettings, TrackingSettings
from genescale.platform.storage import Store, join
from genescale.platform.tracking import (
    MemoryTracker,
    MlflowTracker,
    ModelVersion,
    Run,
    Tracker,
    fetch_bundle,
    open_tracker,
)
from genescale.platform.vocabulary import Vocabulary

FOLDER = "bundle"


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.build([f"ENSG{i:011d}" for i in range(20)], np.linspace(1, 2, 20), name="tiny")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> Bundle:
    return _bundle(tmp_path_factory.mktemp("bundle") / "b", vocabulary, value=1.0)


def _bundle(folder: Path, vocabulary: Vocabulary, *, value: float) -> Bundle:
    return write_bundle(
        folder,
        kind="masked_gene_model",
        config={"vocab_size": vocabulary.size},
        weights={"w": np.full(3, value, dtype=np.float32)},
        vocabulary=vocabulary,
        lineage={"corpus_version": 3},
        extra={"deep/head.json": b"{}"},
    )


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """SQLite and a folder, both at addresses that need care: a space and a percent sign."""
    folder = tmp_path_factory.mktemp("a b%20c")
    return Settings(tracking=TrackingSettings(uri=f"sqlite:///{folder}/new/m.db", artifact_root=str(folder / "art")))


@pytest.fixture(scope="module")
def on_s3(tmp_path_factory: pytest.TempPathFactory, s3_settings: StorageSettings) -> Settings:
    """SQLite, and artefacts in a bucket whose endpoint and keys only the settings know."""
    Store(s3_settings).create_bucket("s3://tracked")
    uri = f"sqlite:///{tmp_path_factory.mktemp('s3')}/m.db"
    return Settings(storage=s3_settings, tracking=TrackingSettings(uri=uri, artifact_root="s3://tracked/runs"))


@pytest.fixture(scope="module")
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


def _registered(tracker: Tracker, bundle: Bundle, model: str, **options: Any) -> ModelVersion:
    with tracker.run("train") as run:
        run.log_folder(bundle.folder, FOLDER)
        return tracker.register(run, FOLDER, model, **options)


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_registered_bundle_comes_back(tracker: Tracker, bundle: Bundle, model: str, tmp_path: Path) -> None:
    version = _registered(tracker, bundle, model, aliases=["best", "newest"], tags={"corpus_version": 3})
    assert version.digest == bundle.digest
    assert version.tags == {
        "corpus_version": "3",
        "bundle_digest": bundle.digest,
        "vocabulary_digest": bundle.vocabulary.digest,
    }
    for reference in (f"models:/{model}@best", f"models:/{model}@newest", f"models:/{model}/1", version.reference):
        assert tracker.resolve(reference) == version
    assert _contents(tracker.download(version, tmp_path / "to")) == _contents(bundle.folder)


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> Bundle:
    return _bundle(tmp_path_factory.mktemp("other") / "b", vocabulary, value=3.0)


def test_the_same_bundle_is_registered_once(tracker: Tracker, bundle: Bundle, other_bundle: Bundle, model: str) -> None:
    first = _registered(tracker, bundle, model, aliases=["newest"], description="What it is.")
    assert first.description == "What it is."
    assert _registered(tracker, bundle, model, aliases=["newest", "also"]) == first
    second = _registered(tracker, other_bundle, model, aliases=["newest"])
    # The alias has moved on: registering the older bundle once more does not take it back.
    assert _registered(tracker, bundle, model, aliases=["newest"]) == first
    assert tracker.list_versions(model) == [first, second]
    summary = next(found for found in tracker.list_models() if found.name == model)
    assert (summary.aliases, summary.newest) == ({"newest": "2", "also": "1"}, "2")
    with pytest.raises(TrackingError, match="no model is registered"):
        tracker.list_versions(f"{model}-other")


def test_a_run_is_gone_on_with(tracker: Tracker) -> None:
    with tracker.run("train", params={"width": 4}) as run:
        run.log_metric_rows([(step, {"loss": 1.0}) for step in range(3)])
    with tracker.run("train", params={"width": 4}, resume=run.id) as again:
        assert again.id == run.id
        assert again.newest_steps() == {"loss": 2}
        again.log_metric_rows([(3, {"loss": 0.5})], time_ms=1_000)
        assert again.newest_steps() == {"loss": 3}
    with tracker.run("train", resume="0" * 32) as new:
        assert new.id not in ("0" * 32, run.id)


def test_the_runs_below_a_run_are_found_by_name(tracker: Tracker) -> None:
    with tracker.run("sweep") as parent, tracker.run("other") as other:
        assert tracker.children(parent.id) == {}
        ids = {}
        for name, above in (("trial-0", parent), ("trial-1", parent), ("trial-0", parent), ("winner", other)):
            with tracker.run(name, parent=above.id) as child:
                ids.setdefault(above.id, {}).setdefault(name, child.id)
    assert tracker.children(parent.id) == ids[parent.id]
    assert tracker.children(other.id) == {"winner": ids[other.id]["winner"]}


def test_an_alias_moves_and_versions_stay(tracker: Tracker, bundle: Bundle, other_bundle: Bundle, model: str) -> None:
    first = _registered(tracker, bundle, model, aliases=["best"])
    second = _registered(tracker, other_bundle, model)
    assert (first.version, second.version) == ("1", "2")
    assert tracker.resolve(f"models:/{model}@best") == first
    tracker.set_alias(model, "best", second.version)
    assert tracker.resolve(f"models:/{model}@best") == second
    assert tracker.resolve(first.reference) == first
    with pytest.raises(TrackingError, match="no version 9"):
        tracker.set_alias(model, "best", "9")


def test_what_is_not_registered_is_explained(tracker: Tracker, bundle: Bundle, model: str) -> None:
    _registered(tracker, bundle, model, aliases=["best"])
    with pytest.raises(TrackingError, match=r"no alias 'bst'.*@best \(version 1\); versions: 1"):
        tracker.resolve(f"models:/{model}@bst")
    with pytest.raises(TrackingError, match=r"no version 7.*versions: 1"):
        tracker.resolve(f"models:/{model}/7")
    with pytest.raises(TrackingError, match=f"no model is registered as 'x{model}'.*Did you mean '{model}'"):
        tracker.resolve(f"models:/x{model}@best")
    for wrong in ("models:/M", "M@best", "models:/M@", "models:/M/latest", "models:/a/b/1", "models:/M'--@x", ""):
        with pytest.raises(TrackingError, match="models:/NAME@ALIAS"):
            tracker.resolve(wrong)


def test_only_logged_bundles_are_registered(tracker: Tracker, bundle: Bundle, model: str, tmp_path: Path) -> None:
    with tracker.run("train") as run:
        with pytest.raises(TrackingError, match=r"no bundle in its artefact folder 'bundle'.*log_folder"):
            tracker.register(run, FOLDER, model)
        run.log_folder(bundle.folder, FOLDER)
        for folder in ("../bundle", "/etc", "bundle/../../..", "%2e%2e"):
            with pytest.raises(TrackingError, match="outside the run's artefacts"):
                tracker.register(run, folder, model)
        with pytest.raises(TrackingError, match="the tag bundle_digest says other"):
            tracker.register(run, FOLDER, model, tags={"bundle_digest": "other"})
        run.log_text("{}", "odd/bundle.json")
        with pytest.raises(TrackingError, match=r"not the bundle\.json of a bundle"):
            tracker.register(run, "odd", model)
    with pytest.raises(TrackingError, match="no model is registered"):
        tracker.resolve(f"models:/{model}/1")


def test_a_parameter_keeps_its_value(tracker: Tracker) -> None:
    with tracker.run("train", params={"width": 4}) as run:
        run.log_params({"width": 4, "depth": 2})
        with pytest.raises(TrackingError, match="width"):
            run.log_params({"width": 5})


def test_artefacts_cannot_be_logged_elsewhere(tracker: Tracker, bundle: Bundle, tmp_path: Path) -> None:
    with tracker.run("train") as run:
        for name in ("../a.txt", "/tmp/a.txt", "a/%2e%2e/b"):
            with pytest.raises(ForbiddenPathError):
                run.log_text("x", name)
        for attempt in (run.log_file, run.log_folder):
            with pytest.raises(ForbiddenPathError):
                attempt(bundle.folder / "config.json" if attempt == run.log_file else bundle.folder, "../elsewhere")


@dataclasses.dataclass
class _Optimiser:
    rate: float
    key: Secret


def test_a_run_records_what_it_is_given(settings: Settings, recorder: Any, bundle: Bundle, tmp_path: Path) -> None:
    tracker = open_tracker(settings)
    params = {"model": {"width": 4, "nested": {"x": None}}, "optimiser": _Optimiser(0.1, Secret("planted"))}
    with (
        tracker.run("parent") as parent,
        tracker.run("child", params=params, tags={"stage": 1}, parent=parent.id) as run,
    ):
        run.log_metrics({"loss": 2.0}, step=7)
        run.log_metric_rows([(i, {"accuracy": i / 1000, "rate": 0.5}) for i in range(1100)])
        run.log_params({f"p{i}": i for i in range(150)})
        run.set_tags({"later": "yes"})
        run.log_text("τ", "notes/text.md")
        run.log_file(bundle.folder / "config.json")
        run.log_folder(bundle.folder, "deep/er")
    kept = recorder.get_run(run.id)
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == "child"
    assert kept.data.params["model.width"] == "4"
    assert kept.data.params["model.nested.x"] == "None"
    assert kept.data.params["optimiser.rate"] == "0.1"
    assert "planted" not in str(kept.data.params)
    assert kept.data.params["p149"] == "149"
    assert {"stage": "1", "later": "yes", "mlflow.parentRunId": parent.id}.items() <= kept.data.tags.items()
    history = recorder.get_metric_history(run.id, "accuracy")
    assert sorted((point.step, point.value) for point in history) == [(i, i / 1000) for i in range(1100)]
    assert [(point.step, point.value) for point in recorder.get_metric_history(run.id, "loss")] == [(7, 2.0)]
    run.artefacts.fetch(tmp_path / "to")
    expected = {f"deep/er/{name}": data for name, data in _contents(bundle.folder).items()}
    expected |= {"notes/text.md": "τ".encode(), "config.json": (bundle.folder / "config.json").read_bytes()}
    assert _contents(tmp_path / "to") == expected


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(1), "KILLED")]
)
def test_an_exception_ends_the_run(on_disk: Settings, error: BaseException, status: str) -> None:
    memory, tracker = MemoryTracker(), open_tracker(on_disk)
    ids = []

    def fail(each: Tracker) -> None:
        with each.run("train") as run:
            ids.append(run.id)
            raise error

    for each in (memory, tracker):
        with pytest.raises(type(error)) as raised:
            fail(each)
        assert raised.value is error
    assert memory.runs[ids[0]].status == status
    assert tracker.client.get_run(ids[1]).info.status == status


def test_runs_of_several_threads_stay_apart(on_disk: Settings) -> None:
    tracker = open_tracker(on_disk)

    def train(i: int) -> str:
        with tracker.run(f"trial {i}", params={"i": i}) as run:
            for step in range(5):
                run.log_metrics({"loss": i}, step=step)
        return run.id

    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(train, range(8)))
    for i, run_id in enumerate(ids):
        kept = tracker.client.get_run(run_id)
        assert (kept.data.params["i"], kept.data.metrics["loss"], kept.info.status) == (str(i), i, "FINISHED")


_KILLED = """
import os, signal, sys
from genescale.platform.settings import TrackingSettings
from genescale.platform.tracking import MlflowTracker
with MlflowTracker(TrackingSettings(uri=sys.argv[1], artifact_root=sys.argv[2], experiment="killed")).run("r") as run:
    print(run.id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_runs_of_a_killed_process_are_closed(on_disk: Settings) -> None:
    settings = dataclasses.replace(on_disk.tracking, experiment="killed")
    tracker = MlflowTracker(settings)
    command = [sys.executable, "-W", "ignore", "-c", _KILLED, settings.uri, settings.artifact_root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with tracker.run("alive") as alive:
        assert tracker.close_dangling() == 1
        assert tracker.client.get_run(done.stdout.strip()).info.status == "KILLED"
        assert tracker.client.get_run(alive.id).info.status == "RUNNING"
    assert tracker.close_dangling("killed") == 0
    assert tracker.close_dangling("no such experiment") == 0


def test_processes_are_told_apart() -> None:
    host, process, _ = process_label().split(":")
    assert not is_gone(process_label())
    assert is_gone(f"{host}:{process}:1")
    assert not is_gone(f"other-{host}:{process}:1")
    assert not is_gone("")


def test_foreign_sources_are_refused(on_disk: Settings, bundle: Bundle, model: str, tmp_path: Path) -> None:
    # MLflow itself takes any of these: whoever can write to its registry could name any folder of the server.
    tracker = open_tracker(on_disk)
    version = _registered(tracker, bundle, model)
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
    version = _registered(tracker, bundle, model)
    other = _registered(tracker, other_bundle, model)
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
    version = _registered(open_tracker(on_disk), bundle, model)
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


def test_a_registered_bundle_is_fetched_once(settings: Settings, bundle: Bundle, model: str, tmp_path: Path) -> None:
    version = _registered(open_tracker(settings), bundle, model, aliases=["best"])
    fetched = fetch_bundle(f"models:/{model}@best", settings, tmp_path / "cache")
    assert fetched == bundle
    assert fetched.lineage == bundle.lineage
    assert np.array_equal(fetched.weights()["w"], bundle.weights()["w"])
    stamps = {path: path.stat().st_mtime_ns for path in fetched.folder.rglob("*")}
    again = fetch_bundle(version.reference, settings, tmp_path / "cache")
    assert again.folder == fetched.folder
    assert {path: path.stat().st_mtime_ns for path in again.folder.rglob("*")} == stamps
    assert os.listdir(tmp_path / "cache") == [fetched.folder.name]


def test_a_damaged_cache_is_fetched_again(on_s3: Settings, bundle: Bundle, model: str, tmp_path: Path) -> None:
    version = _registered(open_tracker(on_s3), bundle, model)
    fetched = fetch_bundle(version.reference, on_s3, tmp_path)
    (fetched.folder / "model.safetensors").write_bytes(b"garbage")
    assert fetch_bundle(version.reference, on_s3, tmp_path).weights().keys() == bundle.weights().keys()


def test_a_bundle_that_was_exchanged_is_refused(
    on_s3: Settings, bundle: Bundle, vocabulary: Vocabulary, model: str, tmp_path: Path
) -> None:
    tracker, store = open_tracker(on_s3), Store(on_s3.storage)
    version = _registered(tracker, bundle, model)
    store.write(join(version.source, "model.safetensors"), b"garbage")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        fetch_bundle(version.reference, on_s3, tmp_path / "cache")
    # Even a bundle that is whole in itself is not the one that was registered.
    store.upload_folder(_bundle(tmp_path / "other", vocabulary, value=2.0).folder, version.source)
    with pytest.raises(IntegrityError, match="was registered"):
        fetch_bundle(version.reference, on_s3, tmp_path / "cache")
    store.delete_folder(version.source)
    with pytest.raises(NotFoundError):
        fetch_bundle(version.reference, on_s3, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob(".*"))


def test_bundles_are_fetched_from_folders(on_s3: Settings, bundle: Bundle, tmp_path: Path) -> None:
    Store(on_s3.storage).upload_folder(bundle.folder, "s3://tracked/by hand")
    fetched = fetch_bundle("s3://tracked/by hand", on_s3, tmp_path / "cache")
    assert fetched == bundle
    assert fetched.folder.is_relative_to(tmp_path / "cache")
    local = fetch_bundle(str(bundle.folder), on_s3, tmp_path / "cache")
    assert local.folder == bundle.folder
    kept = dataclasses.replace(on_s3, storage=dataclasses.replace(on_s3.storage, allowed_roots=("s3://other",)))
    for reference in ("s3://tracked/by hand", str(bundle.folder)):
        with pytest.raises(StorageError, match="allowed roots"):
            fetch_bundle(reference, kept, tmp_path / "cache")


def test_several_processes_may_fetch_at_once(on_s3: Settings, bundle: Bundle, tmp_path: Path) -> None:
    Store(on_s3.storage).upload_folder(bundle.folder, "s3://tracked/shared")

    def fetch(_: int) -> Bundle:
        return fetch_bundle("s3://tracked/shared", on_s3, tmp_path)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(fetch, range(6)))
    assert {each.folder for each in found} == {found[0].folder}
    assert all(each.weights().keys() == bundle.weights().keys() for each in found)


def test_the_fake_shows_what_was_recorded(bundle: Bundle) -> None:
    tracker = MemoryTracker()
    with tracker.run("train", params={"a": {"b": 1}}, tags={"t": 1}) as run:
        run.log_metric_rows([(0, {"loss": 1.0}), (1, {"loss": 0.5})])
        run.log_file(bundle.folder / "config.json", "sub")
        run.log_text("x", "a.txt")
    kept = tracker.runs[run.id]
    assert (kept.params, kept.tags, kept.metrics) == ({"a.b": "1"}, {"t": "1"}, {"loss": [(0, 1.0), (1, 0.5)]})
    assert kept.files == {"sub/config.json": (bundle.folder / "config.json").read_bytes(), "a.txt": b"x"}


def test_both_trackers_fit_the_protocol(on_disk: Settings) -> None:
    def use(tracker: Tracker, check: Callable[[Run], object]) -> object:
        with tracker.run("r") as run:
            return check(run)

    assert use(MemoryTracker(), lambda run: run.id)
    assert use(open_tracker(on_disk), lambda run: run.id)
