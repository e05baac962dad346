"""Pretraining that is cut off: other numbers of workers, time that is up, damaged checkpoints, storage that is away."""

from __future__ import annotations

import dataclasses
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import open_bundle
from genescale.platform.errors import (
    ClusterError,
    IntegrityError,
    SettingsError,
    StorageError,
)
from genescale.platform.memory_tracker import MemoryTracker
from genescale.platform.patience import Patience
from genescale.platform.settings import Settings
from genescale.platform.storage import Store
from genescale.training.loop import curve
from genescale.training.pretrain import pretrain
from tests.training.disturbed_runs import CONFIG, DEADLY_READ, DeadlyCorpus, Reference


@pytest.fixture(scope="module", autouse=True)
def by_value() -> None:
    """Workers cannot import test modules: classes of this one travel by value."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_lost_run_goes_on_with_another_number_of_workers_on_the_same_curve(
    ray_local: None,
    tiny_corpus: Corpus,
    settings_for: Callable[[Path], Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Reference,
    stage: int,
) -> None:
    settings = settings_for(tmp_path)
    optimizer = dataclasses.replace(CONFIG.optimizer, zero_stage=stage)
    config = dataclasses.replace(CONFIG, max_failures=0, optimizer=optimizer)
    # A relative folder is the driver's: workers have another working folder.
    monkeypatch.chdir(tmp_path)
    store = Store(settings.storage)
    where = {"settings": settings, "store": store, "storage_uri": "runs", "run_name": "lost"}
    read, run_of = random.SystemRandom().randrange(DEADLY_READ, 17), (store, str(tmp_path / "runs" / "lost"))
    doomed: Any = DeadlyCorpus(tiny_corpus, tmp_path / "died", run=run_of, once=False, read=read)
    tracker = MemoryTracker()
    with pytest.raises(ClusterError, match="--resume"):
        pretrain(config, doomed, tracker=tracker, workers=2, **where)
    assert [run.status for run in tracker.runs.values()] == ["FAILED"]
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(SettingsError, match="seed 0 -> 1"):
        pretrain(other, tiny_corpus, tracker=tracker, **where)
    result = pretrain(config, tiny_corpus, tracker=tracker, workers=1, **where)
    assert result.resumed_from >= CONFIG.checkpoint_every, read
    expected = dict(curve(undisturbed[1], "loss"))
    # One tracked run, each step in it once, by whichever number of workers it was done.
    run = next(iter(tracker.runs.values()))
    assert (len(tracker.runs), run.status) == (1, "FINISHED")
    assert [step for step, _ in run.metrics["loss"]] == list(range(1, CONFIG.steps + 1)), read
    assert dict(run.metrics["loss"]) == pytest.approx(expected, rel=1e-5), read
    assert dict(result.losses) == pytest.approx({step: expected[step] for step, _ in result.losses}, rel=1e-5)
    assert Path(result.bundle_uri) == tmp_path / "runs" / "lost" / "bundle"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_time_that_is_up_ends_with_a_checkpoint_to_go_on_from(
    ray_local: None,
    tiny_corpus: Corpus,
    settings_for: Callable[[Path], Settings],
    tmp_path: Path,
    undisturbed: Reference,
) -> None:
    settings, tracker = settings_for(tmp_path), MemoryTracker()
    where = {"settings": settings, "store": Store(settings.storage), "storage_uri": str(tmp_path), "tracker": tracker}
    stopped = pretrain(CONFIG, tiny_corpus, run_name="short", max_hours=1e-9, **where)
    assert (stopped.finished, stopped.steps, stopped.model_version) == (False, CONFIG.log_every, None)
    assert tracker.models == {}
    result = pretrain(CONFIG, tiny_corpus, run_name="short", **where)
    assert (result.finished, result.resumed_from, result.steps) == (True, 2, CONFIG.steps)
    assert dict(result.losses) == pytest.approx(dict(curve(undisturbed[1], "loss")[2:]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_damaged_checkpoint_is_passed_over_and_without_any_the_run_stops(
    ray_local: None,
    tiny_corpus: Corpus,
    settings_for: Callable[[Path], Settings],
    tmp_path: Path,
    undisturbed: Reference,
) -> None:
    settings, tracker = settings_for(tmp_path), MemoryTracker()
    where = {"settings": settings, "store": Store(settings.storage), "storage_uri": str(tmp_path), "tracker": tracker}
    pretrain(CONFIG, tiny_corpus, run_name="short", **where)
    # As a driver leaves it that is killed just before the end.
    home = tmp_path / "short"
    (home / "finished.json").unlink()
    shutil.copytree(home / "checkpoints", tmp_path / "copy")
    for step in (12, 16):
        shard = next((home / "checkpoints" / f"step_{step:08d}").glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match=r"none of the 2 checkpoints is whole.*never goes back to step 0"):
        pretrain(CONFIG, tiny_corpus, run_name="short", **where)
    # With the older one restored from a copy, the run goes on from it and says so.
    older = "checkpoints/step_00000012"
    shutil.copytree(tmp_path / "copy" / "step_00000012", home / older, dirs_exist_ok=True)
    result = pretrain(CONFIG, tiny_corpus, run_name="short", **where)
    assert (result.finished, result.resumed_from, result.steps) == (True, 12, CONFIG.steps)
    assert any("step_00000016" in remark and "bytes" in remark for remark in result.remarks)
    assert any("goes on from step_00000012" in remark for remark in result.remarks)
    assert dict(result.losses) == pytest.approx(dict(curve(undisturbed[1], "loss")[12:]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_checkpoints_and_bundle_in_object_storage(
    ray_local: None, tiny_corpus: Corpus, settings_for: Callable[[Path], Settings], tmp_path: Path, s3_store: Any
) -> None:
    store, bucket = s3_store
    settings = settings_for(tmp_path)
    where = {"settings": settings, "store": store, "storage_uri": f"{bucket}/runs", "run_name": "remote"}
    doomed: Any = DeadlyCorpus(tiny_corpus, tmp_path / "died", run=(store, f"{bucket}/runs/remote"))
    result = pretrain(CONFIG, doomed, tracker=MemoryTracker(), **where)
    assert result.resumed_from >= CONFIG.checkpoint_every
    names = {entry.uri.removeprefix(f"{bucket}/runs/remote/") for entry in store.list(f"{bucket}/runs/remote")}
    assert {"run.json", "bundle/bundle.json", "checkpoints/step_00000016/checkpoint.json"} <= names
    assert open_bundle(store.download_folder(result.bundle_uri, tmp_path / "bundle")).digest == result.bundle_digest


class FailingStore(Store):
    """A store whose writes below `checkpoints` fail for some seconds, once the first of them is tried."""

    def __init__(self, settings: Any, marker: Path, seconds: float) -> None:
        super().__init__(settings)
        self.marker, self.seconds = marker, seconds

    def __reduce__(self) -> tuple[object, ...]:
        return (FailingStore, (self.settings, self.marker, self.seconds))

    def upload(self, path: Path, uri: str, *, if_absent: bool = False) -> Any:
        if "/checkpoints/" in uri:
            self.marker.touch(exist_ok=True)
            if time.time() - self.marker.stat().st_ctime < self.seconds and not (self.marker.parent / "over").exists():
                self.count()
                raise StorageError("the bucket does not answer.")
            (self.marker.parent / "over").touch()
        return super().upload(path, uri, if_absent=if_absent)

    def count(self) -> None:
        with (self.marker.parent / "refused").open("a") as file:
            file.write("x")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_storage_that_is_away_for_a_while_does_not_end_the_run(
    ray_local: None,
    tiny_corpus: Corpus,
    settings_for: Callable[[Path], Settings],
    tmp_path: Path,
    undisturbed: Reference,
) -> None:
    settings = settings_for(tmp_path)
    store = FailingStore(settings.storage, tmp_path / "marker", seconds=1e6)
    # The outage ends when some attempts have been refused: no clock decides what is tested.
    ender = threading.Thread(target=_end_after, args=(tmp_path, 4), daemon=True)
    ender.start()
    patience = Patience(total_s=120, first_pause_s=0.2, longest_pause_s=1)
    where = {"settings": settings, "store": store, "storage_uri": str(tmp_path / "runs"), "patience": patience}
    result = pretrain(CONFIG, tiny_corpus, tracker=MemoryTracker(), workers=2, **where)
    ender.join(timeout=10)
    assert len((tmp_path / "refused").read_text()) >= 4
    assert (result.resumed_from, result.steps) == (0, CONFIG.steps)
    assert dict(result.losses) == pytest.approx(dict(curve(undisturbed[1], "loss")), rel=1e-5)


def _end_after(folder: Path, refusals: int) -> None:
    while not (folder / "refused").exists() or len((folder / "refused").read_text()) < refusals:
        time.sleep(0.05)
    (folder / "over").touch()
