"""Pretraining on Ray Train and DeepSpeed: lost workers, lost drivers, the registered bundle, refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import open_bundle
from genescale.platform.errors import (
    ClusterError,
    IntegrityError,
    SettingsError,
    StorageError,
    TrackingError,
    TrainingError,
)
from genescale.platform.memory_tracker import MemoryRun, MemoryTracker
from genescale.platform.patience import Patience
from genescale.platform.settings import Settings
from genescale.platform.storage import Store
from genescale.training.cells import CorpusCells
from genescale.training.engine import OptimizerConfig, TorchEngine
from genescale.training.loop import LoopResult, Row, RunPlan, curve, train_loop
from genescale.training.model import new_model
from genescale.training.pretrain import PretrainResult, pretrain
from genescale.training.recipe import EncoderShape, PretrainConfig
from genescale.training.weights import load_model

CONFIG = PretrainConfig(
    encoder=EncoderShape(width=32, layers=2, heads=2, feed_forward=64, hidden_dropout=0.1, attention_dropout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3, zero_stage=1),
    steps=16,
    token_budget=256,
    lanes=2,
    held_out_cells=24,
    checkpoint_every=4,
    log_every=2,
    model_name="test-model",
)
# Reads of a worker: one for the held-out cells, then one for each training step, some of them ahead of the step. When
# this one is due, the first checkpoint needs no more of them.
DEADLY_READ = 9
Reference = tuple[LoopResult, dict[int, dict[str, float]], dict[str, np.ndarray]]


class DeadlyCorpus:
    """A corpus whose reader is killed with SIGKILL in mid-run: once over all workers, or each time.

    It dies when a checkpoint is stored and not before, so that the run has one to go on from.
    """

    def __init__(
        self,
        corpus: Corpus,
        marker: Path,
        *,
        run: tuple[Store, str],
        once: bool = True,
        rank: int | None = None,
        read: int = DEADLY_READ,
    ) -> None:
        self.corpus, self.marker, self.run, self.once = corpus, marker, run, once
        self.rank, self.read, self.reads = rank, read, 0

    def __getattr__(self, name: str) -> Any:
        if name == "corpus":  # asked for while unpickling, before there is anything to delegate to
            raise AttributeError(name)
        return getattr(self.corpus, name)

    def tokens(self, indices: Sequence[int]) -> list[np.ndarray]:
        import torch.distributed

        self.reads += 1
        chosen = self.rank is None or torch.distributed.get_rank() == self.rank
        if self.reads == self.read and chosen:
            self.await_a_checkpoint()
            if self.claims_the_death():
                os.kill(os.getpid(), signal.SIGKILL)
        return self.corpus.tokens(indices)

    def await_a_checkpoint(self) -> None:
        store, home = self.run
        while not store.exists(f"{home}/checkpoints/ledger.json"):
            time.sleep(0.02)

    def claims_the_death(self) -> bool:
        try:
            self.marker.touch(exist_ok=False)
        except FileExistsError:
            return not self.once
        return True


class AwayTracker(MemoryTracker):
    """A tracker that is away the first times it is given measurements or a model."""

    def __init__(self, refusals: int = 4) -> None:
        super().__init__()
        self.refusals, self.refused, self.askings = refusals, 0, 0

    @contextlib.contextmanager
    def run(self, *arguments: Any, **options: Any) -> Iterator[MemoryRun]:
        with super().run(*arguments, **options) as run:
            take = run.log_metric_rows

            def log_metric_rows(rows: Any, **more: Any) -> None:
                if self.refused < self.refusals:
                    self.refused += 1
                    raise TrackingError("cannot connect to MLflow.")
                take(rows, **more)

            run.log_metric_rows = log_metric_rows  # type: ignore[method-assign]
            yield run

    def register(self, *arguments: Any, **options: Any) -> Any:
        self.askings += 1
        if self.askings == 1:
            raise TrackingError("cannot connect to MLflow.")
        return super().register(*arguments, **options)


@pytest.fixture(scope="module", autouse=True)
def by_value() -> None:
    """Workers cannot import test modules: classes of this one travel by value."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def reference(tiny_corpus: Corpus) -> Reference:
    """The same config on plain torch, in this process, undisturbed."""
    source = CorpusCells(tiny_corpus)
    plan = RunPlan.of(CONFIG, source)
    model = new_model(CONFIG.encoder.for_vocabulary(source.vocabulary), seed=CONFIG.seed)
    engine = TorchEngine(model, CONFIG.optimizer, total_steps=plan.total_steps)
    rows: dict[int, dict[str, float]] = {}

    def on_rows(new: list[Row]) -> None:
        for step, values in new:
            rows.setdefault(step, {}).update(values)

    return train_loop(engine, source, plan, CONFIG, on_rows=on_rows), rows, engine.weights()


class Outcome:
    """A finished run with what it was given."""

    def __init__(self, result: PretrainResult, tracker: MemoryTracker, folder: Path, settings: Settings) -> None:
        self.result, self.tracker, self.folder, self.settings = result, tracker, folder, settings


@pytest.fixture(scope="module")
def outcome(
    ray_local: None,
    tiny_corpus: Corpus,
    settings_for: Callable[[Path], Settings],
    tmp_path_factory: pytest.TempPathFactory,
) -> Outcome:
    """Two workers, the first of which is killed in mid-run, and a tracker that is away for a while."""
    folder = tmp_path_factory.mktemp("pretrain")
    tracker, settings = AwayTracker(), settings_for(folder)
    store = Store(settings.storage)
    corpus: Any = DeadlyCorpus(tiny_corpus, folder / "died", run=(store, str(folder / "runs" / "run")), rank=0)
    where = {"settings": settings, "store": store, "storage_uri": str(folder / "runs"), "tracker": tracker}
    patience = Patience(total_s=60, first_pause_s=0.5, longest_pause_s=2)
    result = pretrain(CONFIG, corpus, workers=2, run_name="run", patience=patience, **where)
    assert (folder / "died").exists()
    assert (tracker.refused, tracker.askings) == (4, 2)
    return Outcome(result, tracker, folder, settings)


@pytest.mark.timeout(400)
def test_a_killed_worker_does_not_change_the_loss_curve(outcome: Outcome, reference: Reference) -> None:
    undisturbed, rows, _ = reference
    found, expected = dict(outcome.result.losses), dict(curve(rows, "loss"))
    assert list(found) == list(range(1, CONFIG.steps + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    before, after = outcome.result.held_out_before, outcome.result.held_out_after
    assert before is not None
    assert after is not None
    assert undisturbed.state.before is not None
    assert undisturbed.state.held_out is not None
    assert before.loss == pytest.approx(undisturbed.state.before.loss, rel=1e-6)
    assert after.loss == pytest.approx(undisturbed.state.held_out.loss, rel=1e-5)
    assert after.loss < before.loss


def test_the_run_went_on_from_a_checkpoint(outcome: Outcome) -> None:
    assert outcome.result.resumed_from >= CONFIG.checkpoint_every
    assert outcome.result.steps == CONFIG.steps
    kept = sorted(path.name for path in (outcome.folder / "runs" / "run" / "checkpoints").glob("step_*"))
    assert len(kept) == CONFIG.keep
    assert kept[-1] == "step_00000016"


def test_every_step_is_tracked_once(outcome: Outcome) -> None:
    run = outcome.tracker.runs[outcome.result.run_id]
    for name, values in run.metrics.items():
        steps = [step for step, _ in values]
        assert len(steps) == len(set(steps)), name
    assert [step for step, _ in run.metrics["loss"]] == list(range(1, CONFIG.steps + 1))
    assert [step for step, _ in run.metrics["held_out_loss"]] == [0, CONFIG.steps]
    assert run.metrics.keys() >= {
        "learning_rate",
        "tokens_per_s",
        "masked_accuracy",
        "data_wait_share",
        "mfu",
        "gradient_norm",
    }
    assert run.status == "FINISHED"
    assert outcome.result.unsent is None


def test_the_run_says_what_it_is(outcome: Outcome, tiny_corpus: Corpus) -> None:
    run, result = outcome.tracker.runs[outcome.result.run_id], outcome.result
    assert run.params["recipe_digest"] == CONFIG.digest
    assert run.params["corpus_version"] == str(tiny_corpus.version)
    assert run.params["vocabulary"] == tiny_corpus.vocabulary.digest
    assert run.params["held_out_by"] == "donor"
    assert run.tags["workers"] == "2"
    assert run.tags["environment.torch"] == version("torch")
    assert run.tags["genescale_version"] == version("genescale")
    assert result.model_version is not None
    card = result.model_version.description
    assert run.files["model_card.md"].decode() == card
    assert (Path(result.home) / "model_card.md").read_text() == card
    assert result.held_out_after is not None
    for told in (
        f"version {tiny_corpus.version}",
        tiny_corpus.vocabulary.digest,
        CONFIG.digest,
        f"{result.held_out_after.loss:.4f}",
        "atlas-0, atlas-1",
        "split by donor",
        "## Limits",
    ):
        assert told in card, told


@pytest.mark.timeout(400)
def test_a_finished_run_is_neither_trained_nor_registered_again(outcome: Outcome, tiny_corpus: Corpus) -> None:
    where = {"settings": outcome.settings, "store": Store(outcome.settings.storage), "tracker": outcome.tracker}
    again = pretrain(CONFIG, tiny_corpus, storage_uri=str(outcome.folder / "runs"), run_name="run", **where)
    assert again.model_version == outcome.result.model_version
    assert (again.run_id, again.steps, again.losses) == (outcome.result.run_id, CONFIG.steps, ())
    assert again.held_out_after == outcome.result.held_out_after
    assert len(outcome.tracker.models[CONFIG.model_name]) == 1
    assert len(outcome.tracker.runs) == 1


def test_the_bundle_is_registered_and_says_where_it_comes_from(
    outcome: Outcome,
    tiny_corpus: Corpus,
    reference: Reference,
) -> None:
    registered = outcome.tracker.resolve(f"models:/{CONFIG.model_name}@{CONFIG.alias}")
    assert registered == outcome.result.model_version
    bundle = open_bundle(outcome.tracker.download(registered, outcome.folder / "downloaded"))
    assert bundle.digest == outcome.result.bundle_digest == open_bundle(Path(outcome.result.bundle_uri)).digest
    assert bundle.lineage["corpus_uri"] == tiny_corpus.uri
    assert bundle.lineage["corpus_version"] == tiny_corpus.version
    assert bundle.lineage["recipe"] == CONFIG.to_dict()
    assert bundle.lineage["run_id"] == outcome.result.run_id
    assert bundle.vocabulary == tiny_corpus.vocabulary
    assert load_model(bundle).config.width == 32
    for name, expected in reference[2].items():
        # The gradient of a key bias is zero but for rounding, which AdamW blows up.
        if not name.endswith("key.bias"):
            np.testing.assert_allclose(bundle.weights()[name], expected, atol=1e-4, err_msg=name)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_a_lost_run_goes_on_with_another_number_of_workers_on_the_same_curve(
    ray_local: None,
    tiny_corpus: Corpus,
    settings_for: Callable[[Path], Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reference: Reference,
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
    expected = dict(curve(reference[1], "loss"))
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
    reference: Reference,
) -> None:
    settings, tracker = settings_for(tmp_path), MemoryTracker()
    where = {"settings": settings, "store": Store(settings.storage), "storage_uri": str(tmp_path), "tracker": tracker}
    stopped = pretrain(CONFIG, tiny_corpus, run_name="short", max_hours=1e-9, **where)
    assert (stopped.finished, stopped.steps, stopped.model_version) == (False, CONFIG.log_every, None)
    assert tracker.models == {}
    result = pretrain(CONFIG, tiny_corpus, run_name="short", **where)
    assert (result.finished, result.resumed_from, result.steps) == (True, 2, CONFIG.steps)
    assert dict(result.losses) == pytest.approx(dict(curve(reference[1], "loss")[2:]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_damaged_checkpoint_is_passed_over_and_without_any_the_run_stops(
    ray_local: None,
    tiny_corpus: Corpus,
    settings_for: Callable[[Path], Settings],
    tmp_path: Path,
    reference: Reference,
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
    assert dict(result.losses) == pytest.approx(dict(curve(reference[1], "loss")[12:]), rel=1e-5)


@pytest.mark.timeout(400)
def test_a_loss_that_is_no_number_stops_with_its_cells_and_registers_nothing(
    ray_local: None, tiny_corpus: Corpus, settings_for: Callable[[Path], Settings], tmp_path: Path
) -> None:
    settings, tracker = settings_for(tmp_path), MemoryTracker()
    where = {"settings": settings, "store": Store(settings.storage), "storage_uri": str(tmp_path), "tracker": tracker}
    wild = dataclasses.replace(CONFIG.optimizer, learning_rate=1e30, warmup_steps=0, clip=0.0, zero_stage=0)
    config = dataclasses.replace(CONFIG, optimizer=wild, log_every=1, checkpoint_every=1)
    with pytest.raises(
        TrainingError, match=r"step 2 is nan.*atlas-[01] row \d+.*The last good checkpoint is step_00000001"
    ):
        pretrain(config, tiny_corpus, **where)
    assert tracker.models == {}
    assert [run.status for run in tracker.runs.values()] == ["FAILED"]


class BrokenCorpus(DeadlyCorpus):
    """A corpus with a damaged part."""

    def tokens(self, indices: Sequence[int]) -> list[np.ndarray]:
        raise IntegrityError("page checksum differs.", where="part-0.parquet")


@pytest.mark.timeout(400)
def test_an_error_of_a_worker_arrives_as_itself(
    ray_local: None, tiny_corpus: Corpus, settings_for: Callable[[Path], Settings], tmp_path: Path
) -> None:
    settings = settings_for(tmp_path)
    where = {"settings": settings, "store": Store(settings.storage), "storage_uri": str(tmp_path)}
    broken: Any = BrokenCorpus(tiny_corpus, tmp_path / "unused", run=(Store(settings.storage), str(tmp_path)))
    with pytest.raises(IntegrityError, match="page checksum"):
        pretrain(dataclasses.replace(CONFIG, max_failures=0), broken, tracker=MemoryTracker(), **where)


def test_workers_that_do_not_divide_the_lanes_are_refused_before_anything_starts(
    tiny_corpus: Corpus, settings_for: Callable[[Path], Settings], tmp_path: Path
) -> None:
    settings = settings_for(tmp_path)
    where = {"settings": settings, "store": Store(settings.storage), "storage_uri": str(tmp_path)}
    with pytest.raises(SettingsError, match="2 lanes"):
        pretrain(CONFIG, tiny_corpus, tracker=MemoryTracker(), workers=3, **where)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"compile": True}, {"optimizer": OptimizerConfig(offload=True)}])
def test_what_needs_gpus_is_refused_on_processors_before_anything_starts(
    ray_local: None,
    tiny_corpus: Corpus,
    settings_for: Callable[[Path], Settings],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    settings = settings_for(tmp_path)
    where = {"settings": settings, "store": Store(settings.storage), "storage_uri": str(tmp_path)}
    with pytest.raises(SettingsError, match=r"CUDA|needs GPUs"):
        pretrain(dataclasses.replace(CONFIG, **changes), tiny_corpus, tracker=MemoryTracker(), workers=2, **where)
    assert list(tmp_path.iterdir()) == []


def test_more_workers_than_processors_are_refused(
    ray_local: None, tiny_corpus: Corpus, settings_for: Callable[[Path], Settings], tmp_path: Path
) -> None:
    settings = settings_for(tmp_path)
    where = {"settings": settings, "store": Store(settings.storage), "storage_uri": str(tmp_path)}
    config = dataclasses.replace(CONFIG, lanes=4)
    with pytest.raises(ClusterError, match="4 workers"):
        pretrain(config, tiny_corpus, tracker=MemoryTracker(), workers=4, **where)


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
    reference: Reference,
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
    assert dict(result.losses) == pytest.approx(dict(curve(reference[1], "loss")), rel=1e-5)


def _end_after(folder: Path, refusals: int) -> None:
    while not (folder / "refused").exists() or len((folder / "refused").read_text()) < refusals:
        time.sleep(0.05)
    (folder / "over").touch()


SETTINGS = """
[tracking]
uri = "sqlite:///{folder}/mlflow.db"
artifact_root = "{folder}/artifacts"
journal_folder = "{folder}/journal"
[cluster]
num_cpus = 2
num_gpus = 0
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_driver_is_gone_on_with_by_resume(tiny_corpus: Corpus, tmp_path: Path, reference: Reference) -> None:
    (tmp_path / "settings.toml").write_text(SETTINGS.format(folder=tmp_path))
    recipe = tmp_path / "recipe.toml"
    optimizer = "[optimizer]\nlearning_rate = 1e-2\nwarmup_steps = 3\nzero_stage = 1\n"
    shape = "[encoder]\nwidth = 32\nlayers = 2\nheads = 2\nfeed_forward = 64\n"
    shape += "hidden_dropout = 0.1\nattention_dropout = 0.1\n"
    values = {name: getattr(CONFIG, name) for name in ("token_budget", "lanes", "held_out_cells")}
    # More steps than the first driver will live to see.
    values |= {"steps": 4_000, "checkpoint_every": 4, "log_every": 2, "model_name": '"killed"'}
    recipe.write_text("".join(f"{name} = {value}\n" for name, value in values.items()) + shape + optimizer)
    command = [sys.executable, "-m", "genescale.platform.cli", "pretrain"]
    options = ["--settings", str(tmp_path / "settings.toml"), "--output", str(tmp_path / "runs")]
    began = [*command, str(recipe), "--corpus", tiny_corpus.uri, "--workers", "2", "--name", "killed", *options]
    driver = subprocess.Popen(began, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ledger = tmp_path / "runs" / "killed" / "checkpoints" / "ledger.json"
    try:
        while not ledger.exists() and driver.poll() is None:
            time.sleep(0.1)
        time.sleep(random.SystemRandom().uniform(0, 2))
    finally:
        driver.kill()
        driver.wait()
    done = json.loads(ledger.read_text())[-1]["steps"]
    # Far enough for its schedule to be the same, near enough to finish: the rest is stopped by the clock.
    resumed = [*command, "--resume", "killed", "--workers", "1", "--max-hours", "1e-9", "--json", *options]
    answer = subprocess.run(resumed, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(answer.stdout)
    assert result["resumed_from"] >= 4
    assert result["resumed_from"] >= done
    assert not result["finished"]
    losses = dict(result["losses"])
    config = dataclasses.replace(CONFIG, steps=4_000, evaluate_every=0)
    source = CorpusCells(tiny_corpus)
    plan = RunPlan.of(config, source)
    model = new_model(config.encoder.for_vocabulary(source.vocabulary), seed=config.seed)
    engine = TorchEngine(model, config.optimizer, total_steps=plan.total_steps)
    rows: dict[int, dict[str, float]] = {}
    stop = max(losses)
    train_loop(
        engine,
        source,
        plan,
        dataclasses.replace(config, log_every=1, checkpoint_every=10**6),
        on_rows=lambda new: [rows.setdefault(step, {}).update(values) for step, values in new] and None,
        should_stop=lambda: max(rows) >= stop,
    )
    expected = dict(curve(rows, "loss"))
    assert losses == pytest.approx({step: expected[step] for step in losses}, rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lost_node_is_outlived(
    tiny_corpus: Corpus, settings_for: Callable[[Path], Settings], tmp_path: Path, reference: Reference
) -> None:
    """In a process of its own: it joins a cluster of two nodes and loses one."""
    script = tmp_path / "lose_a_node.py"
    script.write_text(LOSE_A_NODE)
    arguments = [sys.executable, str(script), str(Path(__file__)), tiny_corpus.uri, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4_000:]
    assert (tmp_path / "lost").exists()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["resumed_from"] >= CONFIG.checkpoint_every
    found = {int(step): loss for step, loss in result["losses"]}
    assert found == pytest.approx(dict(curve(reference[1], "loss")), rel=1e-5)


LOSE_A_NODE = """
import json, runpy, sys, threading, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from genescale.ingestion.corpus import Corpus
from genescale.platform.memory_tracker import MemoryTracker
from genescale.platform.settings import ClusterSettings, Settings, StorageSettings
from genescale.platform.storage import Store
from genescale.training.pretrain import pretrain

shared, folder = runpy.run_path(sys.argv[1]), Path(sys.argv[3])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)
CONFIG = shared["CONFIG"]


class SlowCorpus(shared["DeadlyCorpus"]):
    def tokens(self, indices):
        time.sleep(0.4)
        return self.corpus.tokens(indices)


def lose() -> None:
    ledger = folder / "run" / "checkpoints" / "ledger.json"
    while not ledger.exists():
        time.sleep(0.1)
    # The two workers fill two of the three nodes: one that is not the driver's goes.
    free = ray._private.state.available_resources_per_node()
    busy = [node for node in nodes if free[node.node_id].get("CPU", 0) < 1]
    cluster.remove_node(busy[0], allow_graceful=False)
    (folder / "lost").touch()


threading.Thread(target=lose, daemon=True).start()
store = Store(StorageSettings())
result = pretrain(
    CONFIG,
    SlowCorpus(Corpus.open(sys.argv[2], store), folder / "unused", run=(store, "")),
    settings=Settings(cluster=ClusterSettings(address=cluster.address)),
    store=store,
    storage_uri=str(folder),
    tracker=MemoryTracker(),
    workers=2,
    run_name="run",
)
(folder / "result.json").write_text(json.dumps({"resumed_from": result.resumed_from, "losses": result.losses}))
ray.shutdown()
cluster.shutdown()
"""
