"""Fits on several workers and in run folders: one curve whatever the workers, on after a kill, refusals."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import (
    ClusterError,
    CorpusError,
    IntegrityError,
    SettingsError,
    StorageError,
    TrainingError,
)
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.training.batches import StepBatch
from genescale.training.checkpoints import Checkpoints, Restored
from genescale.training.engine import TorchEngine
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.encoder_fitting import fit_encoder
from genescale.training.fitting.encoder_model import check_trainable
from genescale.training.fitting.encoder_worker import FitRhythm
from genescale.training.fitting.epochs import Epoch, Fitted
from genescale.training.fitting.examples import NO_LABEL
from genescale.training.heads.spec import HeadSpec
from genescale.training.shards import Snapshot
from tests.training.disturbed_runs import DeadlyCorpus

WORKER_FILE = Path(__file__).with_name("deepspeed_fit_worker.py")
RUNS = ["1:trained", "2:lora"]
# When this read of a worker is due, the first checkpoint of a fit needs no more of them.
DEADLY_READ = 11
SHARED = runpy.run_path(str(WORKER_FILE))
CONFIG: FinetuneConfig = SHARED["CONFIG"]
CELLS: HeadSpec = SHARED["CELLS"]
RHYTHM: FitRhythm = SHARED["RHYTHM"]
labelled, parts, reader, fit = (SHARED[name] for name in ("labelled", "parts", "reader", "fit"))
Weights = dict[str, np.ndarray]
FirstFit = tuple[Fitted, Weights, list[Epoch]]


@pytest.fixture(scope="module")
def undisturbed(tiny_bundle: Bundle, tiny_corpus: Corpus) -> tuple[Fitted, Weights]:
    """In memory, in one process, to the end."""
    fitted: tuple[Fitted, Weights] = fit(tiny_bundle, tiny_corpus, rhythm=SHARED["RHYTHM"])
    return fitted


def curve(fitted: Fitted) -> list[tuple[float, ...]]:
    return [(epoch.train_loss, epoch.validation_loss, epoch.validation_score) for epoch in fitted.history]


# --- on several workers ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(200)
def test_two_workers_follow_the_curve_of_one(tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path) -> None:
    """On DeepSpeed without Ray: a process for each worker. The other ZeRO stages are tried with Ray below."""
    command = [sys.executable, str(WORKER_FILE)]
    rest = ["2", str(tmp_path), tiny_corpus.uri, str(tiny_bundle.folder), *RUNS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), *rest],
            env={**environment, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=150)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)[-6_000:]
    expected = SHARED["trained"]
    for run in RUNS:
        stage, encoder = run.split(":")
        alone = expected(SHARED["job_of"](tiny_corpus, str(tiny_bundle.folder), encoder=encoder))
        found = json.loads((tmp_path / f"{stage}-{encoder}.json").read_text())
        np.testing.assert_allclose(found["losses"], alone["losses"], rtol=1e-4, err_msg=run)
        np.testing.assert_allclose(found["validation"], alone["validation"], rtol=1e-4, err_msg=run)
        assert found["weights"].keys() == alone["weights"].keys()
        for name, values in alone["weights"].items():
            if not name.endswith("key.bias"):  # its gradient is zero but for rounding, which AdamW blows up
                assert found["weights"][name] == pytest.approx(values, rel=1e-4, abs=1e-4), (run, name)


# --- runs that go on -------------------------------------------------------------------------------------------------


DRIVER = """
import runpy, sys, time
from pathlib import Path
from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import open_bundle
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store

shared, store = runpy.run_path(sys.argv[1]), Store(StorageSettings())
corpus = Corpus.open(sys.argv[3], store)

def slow(epoch):
    time.sleep(0.1 if epoch.number < 3 else 600)

shared["fit"](open_bundle(Path(sys.argv[2])), corpus, run_home=sys.argv[4], store=store, corpus=corpus,
    on_epoch=slow, rhythm=shared["RHYTHM"])
"""


@pytest.mark.timeout(120)
def test_a_killed_process_is_gone_on_with_on_the_same_curve(
    undisturbed: tuple[Fitted, Weights], tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    home, store = tmp_path / "run", Store(StorageSettings())
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    arguments = [str(script), str(WORKER_FILE), str(tiny_bundle.folder), tiny_corpus.uri, str(home)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    driver = subprocess.Popen([sys.executable, *arguments], env=environment)
    try:
        while driver.poll() is None and not (home / "checkpoints" / "ledger.json").exists():
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.wait()
    assert not (home / "finished.json").exists()
    told: list[Epoch] = []
    options = {"run_home": str(home), "store": store, "corpus": tiny_corpus, "rhythm": SHARED["RHYTHM"]}
    result, weights = fit(tiny_bundle, tiny_corpus, on_epoch=told.append, **options)
    np.testing.assert_allclose(curve(result), curve(undisturbed[0]), rtol=1e-5)
    for name, expected in undisturbed[1].items():
        np.testing.assert_allclose(weights[name], expected, atol=1e-4, err_msg=name)
    again, same = fit(tiny_bundle, tiny_corpus, **options)
    assert again.history == result.history
    assert all(np.array_equal(same[name], weights[name]) for name in weights)
    with pytest.raises(SettingsError, match=r"started differently \(epochs 5 -> 6\)"):
        fit(tiny_bundle, tiny_corpus, dataclasses.replace(CONFIG, epochs=6), **options)


def test_a_run_folder_keeps_the_best_epoch_and_not_the_last(
    tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    train, validation = parts(labelled(tiny_corpus))
    # The better the training labels are learned, the worse these are predicted: the best epoch is an early one.
    wrong = np.where(validation.targets[0] == NO_LABEL, NO_LABEL, (validation.targets[0] + 1) % 3)
    examples = (train, dataclasses.replace(validation, targets=(wrong,)))
    config = dataclasses.replace(CONFIG, patience=3, epochs=9, learning_rate=3e-2)
    kept, weights = fit_encoder(tiny_bundle, reader(tiny_corpus), *examples, (CELLS,), config)
    options = {"run_home": str(tmp_path / "run"), "store": Store(StorageSettings())}
    stored, same = fit_encoder(tiny_bundle, reader(tiny_corpus), *examples, (CELLS,), config, **options)
    assert stored.history == kept.history
    assert stored.best_epoch == len(stored.history) - 3
    assert all(np.array_equal(same[name], weights[name]) for name in weights)
    assert all(torch.equal(a, b) for a, b in zip(stored.head.parameters(), kept.head.parameters(), strict=True))


def test_a_fit_whose_process_died_before_its_last_checkpoint_was_noted_goes_on(
    tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, epochs=1)
    options = {"run_home": str(tmp_path), "store": Store(StorageSettings()), "corpus": tiny_corpus}
    result, weights = fit(tiny_bundle, tiny_corpus, config, **options)
    # The manifest was the last that it wrote.
    for name in ("checkpoints/ledger.json", "fitted.safetensors", "finished.json"):
        (tmp_path / name).unlink()
    again, same = fit(tiny_bundle, tiny_corpus, config, **options)
    assert again.history == result.history
    assert all(np.array_equal(same[name], weights[name]) for name in weights)


def test_a_checkpoint_that_only_one_worker_cannot_read_is_no_reason_to_give_up_the_run(
    tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that gave up alone would leave the others waiting for it; a start of all of them mends it."""
    options = {"run_home": str(tmp_path), "store": Store(StorageSettings()), "corpus": tiny_corpus}
    config = dataclasses.replace(CONFIG, epochs=1)
    fit(tiny_bundle, tiny_corpus, config, **options)
    (tmp_path / "finished.json").unlink()
    fetch, reads = Checkpoints.fetch, []

    def read(self: Checkpoints, name: str, scratch: Path) -> Restored:
        reads.append(name)
        if len(reads) > 1:
            raise IntegrityError("differs from its recorded digest.", where=name)
        return fetch(self, name, scratch)

    monkeypatch.setattr(Checkpoints, "fetch", read)
    with pytest.raises(StorageError, match=r"found whole by the first worker.*differs from its recorded digest"):
        fit(tiny_bundle, tiny_corpus, config, **options)


def test_what_stopped_a_fit_is_told_and_not_that_its_checkpoint_failed_too(
    tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TorchEngine.step

    def broken(self: TorchEngine, batch: StepBatch) -> torch.Tensor:
        return step(self, batch) * (math.nan if batch.step > RHYTHM.checkpoint_every else 1)

    def full(self: Snapshot, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TorchEngine, "step", broken)
    monkeypatch.setattr(Snapshot, "write", full)
    options = {"run_home": str(tmp_path), "store": Store(StorageSettings()), "corpus": tiny_corpus}
    with pytest.raises(TrainingError, match=r"the loss of step 4 is nan.*There is no checkpoint before it"):
        fit(tiny_bundle, tiny_corpus, rhythm=RHYTHM, **options)


def test_a_loss_that_is_no_number_stops_with_its_cells_named(
    tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, encoder_learning_rate=1e30)
    options = {"run_home": str(tmp_path / "run"), "store": Store(StorageSettings()), "corpus": tiny_corpus}
    with pytest.raises(TrainingError, match=r"Its cells: atlas-\d row \d+"):
        fit(tiny_bundle, tiny_corpus, config, **options)
    assert not (tmp_path / "run" / "finished.json").exists()


@pytest.mark.slow
def test_a_run_folder_in_object_storage(
    tiny_bundle: Bundle, tiny_corpus: Corpus, undisturbed: tuple[Fitted, Weights], s3_store: tuple[Store, str]
) -> None:
    store, bucket = s3_store
    result, weights = fit(
        tiny_bundle, tiny_corpus, run_home=f"{bucket}/fit", store=store, corpus=tiny_corpus, rhythm=SHARED["RHYTHM"]
    )
    assert result.history == undisturbed[0].history
    assert all(np.array_equal(weights[name], undisturbed[1][name]) for name in weights)
    assert store.exists(f"{bucket}/fit/finished.json")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("encoder", "stage"), [("trained", 3), ("lora", 0)])
def test_two_workers_of_which_one_is_killed_follow_the_curve_of_one(
    ray_local: None, tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path, encoder: Any, stage: int
) -> None:
    config = dataclasses.replace(CONFIG, encoder=encoder, zero_stage=stage, frozen_layers=1, epochs=3)
    alone, expected = fit(tiny_bundle, tiny_corpus, config, rhythm=SHARED["RHYTHM"])
    home, store = tmp_path / "run", Store(StorageSettings())
    doomed: Any = DeadlyCorpus(tiny_corpus, tmp_path / "died", run=(store, str(home)), rank=0, read=DEADLY_READ)
    told: list[Epoch] = []
    result, weights = fit(
        tiny_bundle,
        tiny_corpus,
        config,
        workers=2,
        run_home=str(home),
        store=store,
        corpus=doomed,
        on_epoch=told.append,
        rhythm=SHARED["RHYTHM"],
    )
    assert (tmp_path / "died").exists()
    np.testing.assert_allclose(curve(result), curve(alone), rtol=1e-4)
    assert result.best_epoch == alone.best_epoch
    assert [epoch.number for epoch in told] == [1, 2, 3]
    for name, values in expected.items():
        if not name.endswith("key.bias"):  # its gradient is zero but for rounding, which AdamW blows up
            np.testing.assert_allclose(weights[name], values, atol=2e-4, err_msg=name)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"encoder": "frozen"}, {}, "frozen"),
        ({"frozen_layers": 2}, {}, "nothing is left to train"),
        ({"encoder": "lora", "lora_matrices": ("gate",)}, {}, "'gate' is no matrix"),
        ({"lanes": 3}, {"workers": 2}, "cannot be shared evenly"),
        ({}, {"workers": 2}, "run folder"),
        ({"compile": True, "device": "cpu"}, {}, "CUDA"),
        ({"zero_stage": 5}, {}, "zero_stage"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_cells_are_read(
    tiny_bundle: Bundle, tiny_corpus: Corpus, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    def unread(index_n: np.ndarray) -> list[np.ndarray]:
        raise AssertionError("cells were read")

    examples = parts(labelled(tiny_corpus))
    with pytest.raises(SettingsError, match=message):
        fit_encoder(tiny_bundle, unread, *examples, (CELLS,), dataclasses.replace(CONFIG, **changes), **options)


def test_embeddings_can_be_trained_alone_where_no_layer_is_read() -> None:
    check_trainable(CONFIG, layers=0)
    for changes in ({"encoder": "lora"}, {"frozen_layers": 1}):
        with pytest.raises(SettingsError, match="Read a later layer"):
            check_trainable(dataclasses.replace(CONFIG, **changes), layers=0)


def test_several_workers_without_ray_are_refused(
    tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another test's Ray may be running.
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ClusterError, match="Ray"):
        fit(tiny_bundle, tiny_corpus, workers=2, run_home=str(tmp_path / "run"), corpus=tiny_corpus)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("empty", [False, True])
def test_a_part_without_labels_is_refused(tiny_bundle: Bundle, tiny_corpus: Corpus, part: int, empty: bool) -> None:
    examples = list(parts(labelled(tiny_corpus)))
    missing = np.full_like(examples[part].targets[0], NO_LABEL)
    unlabelled = dataclasses.replace(examples[part], targets=(missing,))
    examples[part] = unlabelled.take(np.zeros(0, np.int64)) if empty else unlabelled
    with pytest.raises(CorpusError):
        fit_encoder(tiny_bundle, reader(tiny_corpus), *examples, (CELLS,), CONFIG)
