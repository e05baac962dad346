"""Pretraining on Ray Train: a pinned corpus and a recipe become a registered bundle.

The driver plans, starts the workers (`worker.py`), follows their measurements and registers the result; what stands
below `<storage>/<name>/` is told in `run_files.py`. A lost worker is replaced and the run goes on from the last
checkpoint, on any number of workers; after a lost driver the same command, or `--resume`, does that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from genescale.ingestion.corpus import Corpus
from genescale.platform.address import parse
from genescale.platform.bundle import Bundle, open_bundle
from genescale.platform.errors import TrackingError
from genescale.platform.journal import Journal, Unsent
from genescale.platform.log import get_logger
from genescale.platform.patience import PATIENT, Patience, patiently
from genescale.platform.progress import SILENT, Progress
from genescale.platform.runs import ModelVersion, Run, Tracker
from genescale.platform.settings import Settings
from genescale.platform.storage import Store, is_remote, join
from genescale.training.batches import check_workers
from genescale.training.cells import CorpusCells
from genescale.training.compiling import check_compiling
from genescale.training.feed import following
from genescale.training.launch import check_room, gpus_for, launch
from genescale.training.lineage import code_version, environment
from genescale.training.loop import HeldOut, Row, RunPlan, curve
from genescale.training.model_card import pretraining_card
from genescale.training.recipe import PretrainConfig
from genescale.training.run_files import BUNDLE, CARD, FINISHED_FILE, Identity, RunFolder
from genescale.training.worker import PretrainJob

Result = TypeVar("Result")
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """A run that is finished and registered, or that stopped in time to go on later."""

    name: str
    run_id: str
    home: str
    """Address of the run's folder."""
    bundle_uri: str
    bundle_digest: str
    """Empty while the run is not finished."""
    model_version: ModelVersion | None
    """None while the run is not finished."""
    steps: int
    losses: tuple[tuple[int, float], ...]
    """(step, masked-gene loss) of the steps done by this call."""
    held_out_before: HeldOut | None
    held_out_after: HeldOut | None
    tokens_per_s: float
    """Real tokens per second of all workers; 0 when the run was finished before."""
    data_wait_share: float
    """Share of the training time spent waiting for batches."""
    mfu: float | None
    """Model FLOP utilisation; None when no step was done."""
    resumed_from: int
    """Steps that an earlier call had done."""
    finished: bool = True
    remarks: tuple[str, ...] = ()
    """What a person should know, such as a damaged checkpoint that was passed over."""
    unsent: Unsent | None = None
    """Measurements that the tracker never took; None when it has them all."""


def pretrain(
    config: PretrainConfig,
    corpus: Corpus,
    *,
    settings: Settings,
    store: Store,
    storage_uri: str,
    tracker: Tracker,
    workers: int = 1,
    cpus_per_worker: int = 1,
    progress: Progress = SILENT,
    run_name: str = "",
    max_hours: float = 0.0,
    patience: Patience = PATIENT,
) -> PretrainResult:
    """Train an encoder on the corpus and register it. Ray must be running.

    The same call again goes on where the last one stopped, on any number of workers; a run that is finished is not
    registered twice. After `max_hours` (0 means no limit) the run writes a checkpoint and stops unfinished. `patience`
    is for storage and tracker that are away for a while. Raises SettingsError when the name belongs to another run or
    workers and lanes do not fit, ClusterError when workers cannot be placed or are lost too often, IntegrityError when
    no checkpoint is whole, TrainingError when the loss is no number.
    """
    check_workers(config.lanes, workers)
    cells = CorpusCells(corpus, patience=patience)
    plan = RunPlan.of(config, cells)
    folder = RunFolder(store, join(parse(storage_uri).uri, run_name or default_name(config, corpus)), patience=patience)
    check_room(settings.cluster, workers, cpus_per_worker)
    _check_devices(config, on_cuda=gpus_for(workers))
    folder.claim(Identity.of(config, corpus))
    before, code = folder.launch(), code_version()
    tags = {"stage": "pretrain", "workers": workers, **{f"environment.{k}": v for k, v in environment().items()}}
    params = {**_parameters(config, corpus), **plan.to_dict()}
    with tracker.run(folder.name, params=params, tags={**tags, **code}, resume=str(before.get("run_id", ""))) as run:
        folder.launched({"run_id": run.id, "workers": workers})
        job = PretrainJob(
            config=config,
            corpus=corpus,
            store=store,
            workers=workers,
            home=folder.uri,
            keep=config.keep,
            lineage={**code, **_lineage(config, corpus), "run_id": run.id},
            deadline=time.time() + 3600 * max_hours if max_hours else None,
            patience=patience,
        )
        log.info("pretraining %s: %d steps, %d cells", folder.name, plan.total_steps, len(plan.training.cells))
        progress.start(plan.total_steps, "steps")
        outcome = folder.finished()
        rows = _Rows(run, progress, _journal_path(settings, run))
        if not outcome:
            outcome = _train(job, rows, cpus_per_worker)
        unsent = rows.close(patience)
        version, digest = None, ""
        if outcome["finished"]:
            folder.write(FINISHED_FILE, json.dumps(outcome).encode())
            card = pretraining_card(config, corpus, outcome, plan=plan.to_dict(), organisms=cells.organisms, code=code)
            folder.write(CARD, card.encode())
            version, digest = _outlast(lambda: _register(job, run, tracker, card), patience)
    return _result(folder, run, outcome, rows, version=version, digest=digest, unsent=unsent)


def default_name(config: PretrainConfig, corpus: Corpus) -> str:
    """The same name for the same run, so that the same command goes on with it."""
    text = json.dumps([config.digest, corpus.uri, corpus.version, corpus.vocabulary.digest])
    return f"{config.model_name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


# --- training --------------------------------------------------------------------------------------------------------


def _train(job: PretrainJob, rows: _Rows, cpus_per_worker: int) -> dict[str, Any]:
    """Run the workers to the end, or to the deadline; what the first of them measured, as plain values."""
    try:
        with following(rows.take, rows.remark) as board:
            outcome = launch(
                job,
                board,
                cpus_per_worker=cpus_per_worker,
                max_failures=job.config.max_failures,
                again=f"`genescale pretrain --resume {job.home}` goes on from the last checkpoint.",
            )
    except BaseException:
        rows.close(Patience(total_s=min(10.0, job.patience.total_s)))
        raise
    if "failed" in outcome:
        rows.close(job.patience)
        raise outcome["failed"]
    measured = {name: outcome[name] for name in ("held_out_before", "held_out_after")}
    return {**outcome, **{name: value and dataclasses.asdict(value) for name, value in measured.items()}}


# --- tracking --------------------------------------------------------------------------------------------------------


class _Rows:
    """Measurements as they arrive at the driver: kept by step, logged once, drawn as progress."""

    def __init__(self, run: Run, progress: Progress, journal_path: Path) -> None:
        self.by_step: dict[int, dict[str, float]] = {}
        self.remarks: list[str] = []
        self._known = run.newest_steps()
        self._run, self._progress, self._drawn = run, progress, 0
        self._journal = Journal(run, journal_path, known=self._known)

    def take(self, rows: list[Row]) -> None:
        """Take rows; what a restarted worker or an earlier driver measured before is not logged twice."""
        new = []
        for step, values in rows:
            known = self.by_step.setdefault(step, {})
            fresh = {
                name: value for name, value in values.items() if name not in known and step > self._known.get(name, -1)
            }
            known.update(values)
            if fresh:
                new.append((step, fresh))
        if new:
            self._journal.log_metric_rows(new)
        newest = max((step for step, _ in rows), default=0)
        if newest > self._drawn:
            losses = curve(self.by_step, "loss")
            self._progress.advance(newest - self._drawn, f"loss {losses[-1][1]:.3f}" if losses else "")
            self._drawn = newest

    def remark(self, text: str) -> None:
        """Take a sentence for the person who started the run."""
        log.warning("%s", text)
        self.remarks.append(text)

    def close(self, patience: Patience) -> Unsent | None:
        """Wait for the tracker to have everything; what it does not have is kept in a file, and told."""
        unsent = self._journal.close(timeout_s=patience.total_s)
        if unsent is not None:
            self.remark(
                f"{unsent.rows} rows of measurements could not be sent and are kept in {unsent.path}"
                f" ({unsent.dropped} older ones were given up); the same command sends them."
            )
        return unsent


def _journal_path(settings: Settings, run: Run) -> Path:
    folder = settings.tracking.journal_folder or str(Path(tempfile.gettempdir()) / "genescale-metrics")
    return Path(folder).absolute() / f"{run.id}.jsonl"


def _register(job: PretrainJob, run: Run, tracker: Tracker, card: str) -> tuple[ModelVersion, str]:
    """Log the bundle and its card as artefacts of the run, and add the bundle to the registered model."""
    bundle_uri = join(job.home, BUNDLE)
    with tempfile.TemporaryDirectory(prefix="genescale-") as temporary:
        folder = Path(bundle_uri)
        if is_remote(bundle_uri):
            folder = job.store.download_folder(bundle_uri, Path(temporary) / BUNDLE)
        bundle: Bundle = open_bundle(folder)
        run.log_folder(folder, BUNDLE)
        run.log_text(card, CARD)
        aliases = (job.config.alias,) if job.config.alias else ()
        tags = {"kind": bundle.kind, "vocabulary": job.corpus.vocabulary.digest, "corpus_version": job.corpus.version}
        name = job.config.model_name
        return tracker.register(run, BUNDLE, name, aliases=aliases, tags=tags, description=card), bundle.digest


def _outlast(operation: Callable[[], Result], patience: Patience) -> Result:
    """The result of `operation`, tried again while the tracker is away."""
    for pause_s in patience.pauses_s():
        try:
            return patiently(operation, patience=patience, what="registering the model")
        except TrackingError as error:
            log.warning("the tracker is away and is asked again in %.0f s: %s", pause_s, error)
            time.sleep(pause_s)
    return operation()


def _result(
    folder: RunFolder,
    run: Run,
    outcome: Mapping[str, Any],
    rows: _Rows,
    *,
    version: ModelVersion | None,
    digest: str,
    unsent: Unsent | None,
) -> PretrainResult:
    done_before = not rows.by_step
    measured = {name: outcome[name] and HeldOut(**outcome[name]) for name in ("held_out_before", "held_out_after")}
    return PretrainResult(
        name=folder.name,
        run_id=run.id,
        home=folder.uri,
        bundle_uri=folder.place(BUNDLE),
        bundle_digest=digest,
        model_version=version,
        steps=outcome["steps"],
        losses=curve(rows.by_step, "loss"),
        tokens_per_s=0.0 if done_before else outcome["tokens_per_s"],
        data_wait_share=outcome["data_wait_share"],
        mfu=outcome["mfu"],
        resumed_from=outcome["steps"] if done_before else outcome["resumed_from"],
        finished=outcome["finished"],
        remarks=tuple(rows.remarks),
        unsent=unsent,
        **measured,
    )


# --- what a run is ---------------------------------------------------------------------------------------------------


def _check_devices(config: PretrainConfig, *, on_cuda: bool) -> None:
    """SettingsError when the recipe asks for what the workers' devices cannot do."""
    config.optimizer.check_device(on_cuda=on_cuda)
    if config.compile:
        check_compiling(on_cuda=on_cuda, zero_stage=config.optimizer.zero_stage)


def _parameters(config: PretrainConfig, corpus: Corpus) -> dict[str, Any]:
    # What may differ when a run is gone on with is no parameter: trackers refuse another value.
    return {**Identity.of(config, corpus).fixed(), "recipe_digest": config.digest, "cells": corpus.n_cells}


def _lineage(config: PretrainConfig, corpus: Corpus) -> dict[str, Any]:
    return {
        "stage": "pretrain",
        "corpus_uri": corpus.uri,
        "corpus_version": corpus.version,
        "vocabulary_digest": corpus.vocabulary.digest,
        "recipe": config.to_dict(),
    }
