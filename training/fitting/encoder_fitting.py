"""Fitting heads together with the encoder: in this process, or on Ray Train with DeepSpeed, the same batches.

The engines, the loop, the checkpoints and the way a run goes on after a kill are those of pretraining. With a run
folder the same call goes on from the last checkpoint, on any number of workers that divides `lanes`; a finished run is
read and not trained again. Without one, everything stays in memory.

    run.json            what is fitted: settings, bundle, examples
    base/               the bundle that several workers start from
    checkpoints/        see `checkpoints.py`
    fitted.safetensors  encoder and heads of the best epoch
    finished.json       the history
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import ClusterError, SettingsError
from genescale.platform.log import get_logger
from genescale.platform.patience import PATIENT, Patience, patiently
from genescale.platform.settings import ClusterSettings, StorageSettings
from genescale.platform.storage import Store, join
from genescale.training.batches import check_workers
from genescale.training.compiling import check_compiling
from genescale.training.embedder import layers_to_run, pick_device
from genescale.training.feed import following
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.encoder_model import check_trainable, encoder_from, heads_from
from genescale.training.fitting.encoder_plan import CellsOf, FitState, check_labels
from genescale.training.fitting.encoder_worker import FITTED, FitJob, FitRhythm, optimizer_config
from genescale.training.fitting.epochs import Course, Epoch, Fitted, OnEpoch, nothing
from genescale.training.fitting.examples import Examples
from genescale.training.fitting.lora import check_matrices
from genescale.training.heads.spec import HeadSpec
from genescale.training.launch import check_room, gpus_for, launch
from genescale.training.loop import train_loop
from genescale.training.meter import Row
from genescale.training.run_files import FINISHED_FILE, RunFolder
from genescale.training.worker import run_job

BASE = "base"
KEPT, MAX_FAILURES = 2, 3
LOCAL, RHYTHM = ClusterSettings(), FitRhythm()
log = get_logger(__name__)


def fit_encoder(
    bundle: Bundle,
    cells_of: CellsOf,
    examples_train: Examples,
    examples_validation: Examples,
    specs: Sequence[HeadSpec],
    config: FinetuneConfig,
    *,
    run_home: str = "",
    store: Store | None = None,
    corpus: Corpus | None = None,
    on_epoch: OnEpoch = nothing,
    workers: int = 0,
    cluster: ClusterSettings = LOCAL,
    patience: Patience = PATIENT,
    rhythm: FitRhythm = RHYTHM,
) -> tuple[Fitted, dict[str, np.ndarray]]:
    """Fit heads and encoder, as `config.encoder` says: the heads of the best epoch, and the whole bundle's weights.

    cells_of: from global corpus indices (n) to tokens; several workers read `corpus` themselves, and need Ray to be
    running and `run_home` in a `store` that all of them reach. workers: 0 takes `config.workers`. Weights are float32
    under the bundle's names, low-rank additions merged. Raises SettingsError, CorpusError or ClusterError before
    anything is trained when the parts do not fit, TrainingError when the loss is no number, IntegrityError when no
    checkpoint is whole.
    """
    workers = workers or config.workers
    _check(bundle, specs, config, workers)
    check_labels({"training": examples_train, "validation": examples_validation}, specs, config)
    job = FitJob(
        store=store or Store(StorageSettings()),
        workers=workers,
        home=run_home,
        keep=KEPT,
        patience=patience,
        config=config,
        specs=tuple(specs),
        train=examples_train,
        validation=examples_validation,
        bundle_uri=str(bundle.folder),
        corpus=corpus,
        cells_of=cells_of if workers == 1 else None,
        rhythm=rhythm,
    )
    follower = _Follower(on_epoch)
    if run_home:
        folder = RunFolder(job.store, run_home, patience=patience)
        outcome, weights = _run(dataclasses.replace(job, home=folder.uri), folder, bundle, follower, cluster)
    else:
        _refuse_workers(workers)
        outcome, weights = _in_memory(job, follower)
    course = Course(config.patience)
    for epoch in outcome["history"]:
        course.add(Epoch(**epoch))
    fitted = Fitted(heads=heads_from(weights, specs), best_epoch=course.best_epoch, history=tuple(course.history))
    return fitted, {**bundle.weights(), **encoder_from(weights)}


def _check(bundle: Bundle, specs: Sequence[HeadSpec], config: FinetuneConfig, workers: int) -> None:
    """SettingsError for what cannot be fitted, before anything is read."""
    if config.encoder == "frozen":
        raise SettingsError(
            "the encoder is frozen: there is nothing to fit in it.", where="encoder", fix="Use 'trained' or 'lora'."
        )
    if len({(spec.layer, spec.pooling, spec.width) for spec in specs}) != 1 or specs[0].type != "linear":
        raise SettingsError("heads that are fitted together must be linear ones that read the same vectors.")
    check_trainable(config, layers_to_run(specs[0].layer, int(bundle.config["num_hidden_layers"])))
    check_workers(config.lanes, workers)
    optimizer_config(config)
    if config.encoder == "lora":
        check_matrices(config.lora_matrices)
    if config.compile and workers == 1:
        check_compiling(on_cuda=pick_device(config.device).type == "cuda")


def _refuse_workers(workers: int) -> None:
    if workers > 1:
        raise SettingsError(
            f"{workers} workers need a run folder to meet in.",
            where="workers",
            fix="Give run_home and store, which all workers reach, or use one worker.",
        )


# --- in memory -------------------------------------------------------------------------------------------------------


def _in_memory(job: FitJob, follower: _Follower) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    training = job.training()
    best: dict[str, np.ndarray] = {}

    def keep(state: FitState) -> None:
        if state.measured and state.best == len(state.history):
            best.update(training.engine.weights())

    result = train_loop(
        training.engine,
        training.source,
        training.plan,
        training.rhythm,
        start=training.state(None),
        on_rows=follower.rows,
        on_checkpoint=keep,
    )
    return training.outcome(result), best


# --- in a run folder -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FitIdentity:
    """What a fit computes: the same in every call that may go on with it."""

    values: Mapping[str, Any]

    @classmethod
    def of(cls, job: FitJob, bundle: Bundle) -> FitIdentity:
        """The identity of this job."""
        values = {
            "recipe": dataclasses.asdict(job.config),
            "bundle": bundle.digest,
            "heads": [dataclasses.asdict(spec) for spec in job.specs],
            "train": _digest(job.train),
            "validation": _digest(job.validation),
            "corpus_version": job.corpus.version if job.corpus else None,
        }
        # As it will be read again: tuples are lists.
        return cls(values=json.loads(json.dumps(values)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dict(self.values)


def _digest(examples: Examples) -> str:
    digest = hashlib.sha256(examples.rows_digest().encode())
    for target_r in examples.targets:
        digest.update(np.ascontiguousarray(target_r).tobytes())
    return digest.hexdigest()


def _run(
    job: FitJob, folder: RunFolder, bundle: Bundle, follower: _Follower, cluster: ClusterSettings
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    folder.claim(FitIdentity.of(job, bundle))
    outcome = folder.finished()
    if not outcome:
        outcome = _on_ray(job, bundle, follower, cluster) if job.workers > 1 else run_job(job, lambda rank: follower)
        if "failed" in outcome:
            raise outcome["failed"]
        folder.write(FINISHED_FILE, json.dumps(outcome).encode())
    with tempfile.TemporaryDirectory(prefix="genescale-fitted-") as scratch:
        path = Path(scratch) / FITTED
        address = folder.place(FITTED)
        patiently(lambda: job.store.download(address, path), patience=job.patience, what=f"reading {address}")
        return outcome, load_file(path)


def _on_ray(job: FitJob, bundle: Bundle, follower: _Follower, cluster: ClusterSettings) -> dict[str, Any]:
    import ray

    if not ray.is_initialized():
        raise ClusterError(
            "several workers need Ray, which is not running.", where="workers", fix="Start it, or use one."
        )
    if job.corpus is None:
        raise SettingsError("several workers read the corpus themselves.", where="corpus", fix="Give the corpus.")
    check_room(cluster, job.workers, 1)
    if job.config.compile:
        check_compiling(on_cuda=gpus_for(job.workers), zero_stage=job.config.zero_stage)
    base = join(job.home, BASE)
    patiently(lambda: job.store.upload_folder(bundle.folder, base), patience=job.patience, what=f"writing {base}")
    with following(follower.rows, follower.remark) as board:
        return launch(
            dataclasses.replace(job, bundle_uri=base),
            board,
            cpus_per_worker=1,
            max_failures=MAX_FAILURES,
            again="the same command goes on from the last checkpoint.",
        )


class _Follower:
    """Tells the caller about each epoch once, whoever measured it and however often."""

    def __init__(self, on_epoch: OnEpoch) -> None:
        self._on_epoch, self._told = on_epoch, 0

    def rows(self, rows: list[Row]) -> None:
        """Take rows of measurements."""
        for _, values in rows:
            number = int(values.get("epoch_ended", 0))
            if number > self._told:
                self._told = number
                self._on_epoch(_epoch(number, values))

    def remark(self, text: str) -> None:
        """Take a sentence for the person who started the run."""
        log.warning("%s", text)


def _epoch(number: int, values: Mapping[str, float]) -> Epoch:
    """The epoch whose `metrics` these are."""
    named = {
        name.removeprefix("validation_"): value for name, value in values.items() if name.startswith("validation_")
    }
    loss, score = (named.pop(name, math.nan) for name in ("loss", "score"))
    train_loss = values.get("train_loss", math.nan)
    return Epoch(number=number, train_loss=train_loss, validation_loss=loss, validation_score=score, scores=named)
