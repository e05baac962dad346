"""Runs: what they record, how they end, and how they are gone on with."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from genescale.platform.bundle import Bundle
from genescale.platform.database import opened_by_one
from genescale.platform.errors import (
    ForbiddenPathError,
    TrackingError,
)
from genescale.platform.liveness import is_gone, process_label
from genescale.platform.settings import Secret, Settings
from genescale.platform.tracking import (
    MemoryTracker,
    MlflowTracker,
    Tracker,
    open_tracker,
)
from tests.platform.tracking.tracked_bundles import contents


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
    expected = {f"deep/er/{name}": data for name, data in contents(bundle.folder).items()}
    expected |= {"notes/text.md": "τ".encode(), "config.json": (bundle.folder / "config.json").read_bytes()}
    assert contents(tmp_path / "to") == expected


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
tracker = MlflowTracker(TrackingSettings(uri=sys.argv[1], artifact_root=sys.argv[2], experiment="killed"))
with tracker.run("r", tags={"of": "x"}) as run:
    print(run.id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_runs_of_a_killed_process_are_closed(on_disk: Settings) -> None:
    settings = dataclasses.replace(on_disk.tracking, experiment="killed")
    tracker = MlflowTracker(settings)
    command = [sys.executable, "-W", "ignore", "-c", _KILLED, settings.uri, settings.artifact_root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with tracker.run("alive", tags={"of": "x"}) as alive:
        # The newest with the tag, but not the one that lives.
        assert tracker.left_open("of", "x") == done.stdout.strip()
        assert tracker.left_open("of", "y") == ""
        assert tracker.close_dangling() == 1
        assert tracker.left_open("of", "x") == ""
        assert tracker.client.get_run(done.stdout.strip()).info.status == "KILLED"
        assert tracker.client.get_run(alive.id).info.status == "RUNNING"
    assert tracker.close_dangling("killed") == 0
    assert tracker.close_dangling("no such experiment") == 0


def test_a_run_that_is_just_gone_on_with_is_not_taken_for_a_dead_one(
    on_disk: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MlflowTracker(dataclasses.replace(on_disk.tracking, experiment="resumed"))
    client, closed = tracker.client, list[int]()
    with tracker.run("train") as run:
        pass
    client.set_tag(run.id, "genescale.process", f"{process_label().split(':')[0]}:1:dead")

    def looked_in_between(name: str) -> Any:
        asked = getattr(client, name)

        def then(*arguments: Any, **options: Any) -> Any:
            answer = asked(*arguments, **options)
            with monkeypatch.context() as patch:
                patch.setattr(client, name, asked)
                closed.append(tracker.close_dangling())
            return answer

        return then

    for name in ("update_run", "set_tag"):
        monkeypatch.setattr(client, name, looked_in_between(name))
    with tracker.run("train", resume=run.id):
        assert client.get_run(run.id).info.status == "RUNNING"
    assert closed == [0, 0]


def test_a_new_database_is_opened_by_one_at_a_time(tmp_path: Path) -> None:
    inside: list[str] = []

    def open_it(name: str) -> None:
        with opened_by_one(f"sqlite:///{tmp_path}/mlflow.db"):
            inside.append(f"{name} in")
            time.sleep(0.05)
            inside.append(f"{name} out")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(open_it, "abc"))
    assert all(after == before.replace("in", "out") for before, after in zip(inside[::2], inside[1::2], strict=True))


def test_processes_are_told_apart() -> None:
    host, process, _ = process_label().split(":")
    assert not is_gone(process_label())
    assert is_gone(f"{host}:{process}:1")
    assert not is_gone(f"other-{host}:{process}:1")
    assert not is_gone("")


def test_a_process_that_ends_while_it_is_looked_at_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    host, ended = process_label().split(":")[0], subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert is_gone(f"{host}:{ended.pid}:1")
