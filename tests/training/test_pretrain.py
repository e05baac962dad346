"""Pretraining on Ray Train and DeepSpeed: lost workers, lost drivers, the registered bundle, refusals."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import open_bundle
from genescale.platform.errors import (
    ClusterError,
    IntegrityError,
    SettingsError,
    TrainingError,
)
from genescale.platform.memory_tracker import MemoryTracker
from genescale.platform.patience import Patience
from genescale.platform.settings import Settings
from genescale.platform.storage import Store
from genescale.training.engine import OptimizerConfig
from genescale.training.loop import curve
from genescale.training.pretrain import PretrainResult, pretrain
from genescale.training.weights import load_model
from tests.training.disturbed_runs import CONFIG, AwayTracker, DeadlyCorpus, Reference


@pytest.fixture(scope="module", autouse=True)
def by_value() -> None:
    """Workers cannot import test modules: classes of this one travel by value."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


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
def test_a_killed_worker_does_not_change_the_loss_curve(outcome: Outcome, undisturbed: Reference) -> None:
    expected_end, rows, _ = undisturbed
    found, expected = dict(outcome.result.losses), dict(curve(rows, "loss"))
    assert list(found) == list(range(1, CONFIG.steps + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    before, after = outcome.result.held_out_before, outcome.result.held_out_after
    assert before is not None
    assert after is not None
    assert expected_end.state.before is not None
    assert expected_end.state.held_out is not None
    assert before.loss == pytest.approx(expected_end.state.before.loss, rel=1e-6)
    assert after.loss == pytest.approx(expected_end.state.held_out.loss, rel=1e-5)
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
    undisturbed: Reference,
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
    for name, expected in undisturbed[2].items():
        # The gradient of a key bias is zero but for rounding, which AdamW blows up.
        if not name.endswith("key.bias"):
            np.testing.assert_allclose(bundle.weights()[name], expected, atol=1e-4, err_msg=name)


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
    with pytest.raises(IntegrityError, match="page checksum") as raised:
        pretrain(dataclasses.replace(CONFIG, max_failures=0), broken, tracker=MemoryTracker(), **where)
    assert type(raised.value) is IntegrityError


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


def test_a_damaged_record_of_a_finished_run_leaves_no_journal_at_work(
    tiny_corpus: Corpus, settings_for: Callable[[Path], Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genescale.training.pretrain.check_room", lambda *_: None)
    monkeypatch.setattr("genescale.training.pretrain.gpus_for", lambda workers: False)
    settings = settings_for(tmp_path)
    where = {"settings": settings, "store": Store(settings.storage), "storage_uri": str(tmp_path)}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finished.json").write_text("{", encoding="utf-8")
    before = set(threading.enumerate())
    with pytest.raises(IntegrityError, match="is not JSON"):
        pretrain(CONFIG, tiny_corpus, tracker=MemoryTracker(), run_name="run", **where)
    assert [thread.name for thread in set(threading.enumerate()) - before] == []


def test_more_workers_than_processors_are_refused(
    ray_local: None, tiny_corpus: Corpus, settings_for: Callable[[Path], Settings], tmp_path: Path
) -> None:
    settings = settings_for(tmp_path)
    where = {"settings": settings, "store": Store(settings.storage), "storage_uri": str(tmp_path)}
    config = dataclasses.replace(CONFIG, lanes=4)
    with pytest.raises(ClusterError, match="4 workers"):
        pretrain(config, tiny_corpus, tracker=MemoryTracker(), workers=4, **where)
