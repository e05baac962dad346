"""Pretraining on Ray Train: a pinned corpus and a recipe become a registered bundle.

The driver plans, starts the workers, follows their measurements and registers the result. Each worker opens the pinned
corpus, builds the engine, goes on from the last checkpoint if there is one, and runs `train_loop`; the first writes the
bundle. Everything of a run stands below `<storage>/<name>/`:

    run.json          what this run is; another run of the same name is refused
    checkpoints/      Ray Train's folder: step_NNNNNN/ with DeepSpeed's files and training.json
    bundle/           the result

A lost worker is replaced and the run goes on from the last checkpoint; after a lost driver the same command does that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genescale.ingestion.corpus import Corpus
from genescale.platform.address import parse
from genescale.platform.bundle import Bundle, open_bundle, write_bundle
from genescale.platform.errors import AlreadyExistsError, ClusterError, GenescaleError, SettingsError
from genescale.platform.log import get_logger
from genescale.platform.progress import SILENT, Progress
from genescale.platform.runs import ModelVersion, Run, Tracker
from genescale.platform.settings import Settings
from genescale.platform.storage import Store, is_remote, join
from genescale.training.batches import CorpusCells, check_workers
from genescale.training.engine import DeepSpeedEngine
from genescale.training.feed import following
from genescale.training.lineage import code_version
from genescale.training.loop import HeldOut, Row, RunPlan, TrainState, curve, train_loop
from genescale.training.model import new_model
from genescale.training.recipe import PretrainConfig

BUNDLE_KIND = "masked_gene_model"
CHECKPOINTS, BUNDLE, RUN_FILE = "checkpoints", "bundle", "run.json"
# A rank whose peer died waits this long in a collective; a slow read or a long evaluation must take less.
COLLECTIVE_TIMEOUT_S = 300
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """A finished run and the model it registered."""

    name: str
    run_id: str
    bundle_uri: str
    bundle_digest: str
    model_version: ModelVersion
    steps: int
    losses: tuple[tuple[int, float], ...]
    """(step, masked-gene loss) of the steps done by this call."""
    held_out_before: HeldOut | None
    held_out_after: HeldOut | None
    tokens_per_s: float
    """Real tokens per second of all workers; 0 when the run was finished before."""
    resumed_from: int
    """Steps that an earlier call had done."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a worker needs; travels through Ray."""

    config: PretrainConfig
    corpus: Corpus
    store: Store
    workers: int
    bundle_uri: str
    lineage: Mapping[str, Any]


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
) -> PretrainResult:
    """Train an encoder on the corpus and register it. Ray must be running.

    The same call again goes on where the last one stopped, or registers its finished bundle once more. Raises
    SettingsError when the name belongs to another run or workers and lanes do not fit, ClusterError when workers cannot
    be placed or are lost too often.
    """
    check_workers(config.lanes, workers)
    plan = RunPlan.of(config, CorpusCells(corpus))
    name = run_name or _default_name(config, corpus)
    # Absolute: workers have another working folder.
    home = join(parse(storage_uri).uri, name)
    _check_room(settings, workers, cpus_per_worker)
    _claim(store, home, _identity(config, corpus, workers))
    with tracker.run(name, params=_parameters(config, corpus, workers), tags={"stage": "pretrain"}) as run:
        job = _Job(
            config=config,
            corpus=corpus,
            store=store,
            workers=workers,
            bundle_uri=join(home, BUNDLE),
            lineage=_lineage(config, corpus, run),
        )
        log.info("pretraining %s: %d steps, %d cells", name, plan.total_steps, len(plan.training.cells))
        progress.start(plan.total_steps, "steps")
        rows = _Rows(run, progress)
        with following(rows.take) as board:
            outcome = _fit(job, board, home, cpus_per_worker)
        version, digest = _register(job, run, tracker, store)
    return PretrainResult(
        name=name,
        run_id=run.id,
        bundle_uri=job.bundle_uri,
        bundle_digest=digest,
        model_version=version,
        losses=curve(rows.by_step, "loss"),
        **outcome,
    )


# --- the worker ------------------------------------------------------------------------------------------------------


def _worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs; the first one's return value is the outcome of the run."""
    import ray
    import ray.train

    job: _Job = arguments["job"]
    source = CorpusCells(job.corpus)
    plan = RunPlan.of(job.config, source)
    encoder = job.config.encoder.for_vocabulary(source.vocabulary)
    engine = DeepSpeedEngine(
        new_model(encoder, seed=job.config.seed, attention=job.config.attention),
        job.config.optimizer,
        total_steps=plan.total_steps,
        lanes=job.config.lanes,
    )
    start = TrainState()
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            start = TrainState.read(Path(folder))
            engine.resume(Path(folder))

    def on_rows(rows: list[Row]) -> None:
        if engine.rank == 0:
            ray.get(arguments["board"].add.remote(rows))

    # Says how far an earlier attempt came, so that progress is counted from there.
    on_rows([(start.steps, {})])

    def on_checkpoint(state: TrainState) -> None:
        with tempfile.TemporaryDirectory(prefix="genescale-") as folder:
            engine.save(Path(folder))
            if engine.rank == 0:
                state.write(Path(folder))
            ray.train.report(
                {"steps": state.steps},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"step_{state.steps:06d}{'_final' if state.finished else ''}",
            )

    result = train_loop(engine, source, plan, job.config, start=start, on_rows=on_rows, on_checkpoint=on_checkpoint)
    weights = engine.weights()
    if engine.rank == 0:
        _write_bundle(job, encoder.to_hf(), weights, result.state)
    return {
        "steps": result.state.steps,
        "held_out_before": result.state.before,
        "held_out_after": result.state.after,
        "tokens_per_s": result.tokens_per_s,
        "resumed_from": start.steps,
    }


def _write_bundle(job: _Job, config: dict[str, Any], weights: Mapping[str, Any], state: TrainState) -> None:
    measured = {"steps": state.steps, "held_out": dataclasses.asdict(state.after) if state.after else None}
    with tempfile.TemporaryDirectory(prefix="genescale-") as temporary:
        folder = Path(temporary) / BUNDLE
        write_bundle(
            folder,
            kind=BUNDLE_KIND,
            config=config,
            weights=weights,
            vocabulary=job.corpus.vocabulary,
            lineage={**job.lineage, **measured},
        )
        # What an earlier attempt left there may have another lineage.
        job.store.delete_folder(job.bundle_uri)
        job.store.upload_folder(folder, job.bundle_uri)


# --- the driver ------------------------------------------------------------------------------------------------------


def _fit(job: _Job, board: Any, home: str, cpus_per_worker: int) -> dict[str, Any]:
    """Run the workers to the end; the outcome that the first of them returned."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    filesystem, path = job.store.arrow_filesystem(home)
    use_gpu = ray.cluster_resources().get("GPU", 0) >= job.workers
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "board": board},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=job.workers, use_gpu=use_gpu, resources_per_worker=_resources(cpus_per_worker, use_gpu)
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=path,
            storage_filesystem=filesystem,
            # Bounded on both sides: Ray's default is to start a failing controller again without end.
            failure_config=FailureConfig(
                max_failures=job.config.max_failures, controller_failure_limit=job.config.max_failures
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=job.config.keep),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        return dict(trainer.fit().return_value)
    except TrainingFailedError as error:
        raise _cause(error, home) from error


def _cause(error: Any, home: str) -> GenescaleError:
    """The error a worker raised on purpose, else ClusterError with what Ray says."""
    for failure in getattr(error, "worker_failures", {}).values():
        for known in (failure, getattr(failure, "cause", None), getattr(failure, "_base_exc", None)):
            if isinstance(known, GenescaleError):
                return known
    return ClusterError(
        f"training failed: {error}",
        where=home,
        fix="The same command goes on from the last checkpoint once the cause is gone.",
    )


def _register(job: _Job, run: Run, tracker: Tracker, store: Store) -> tuple[ModelVersion, str]:
    """Log the bundle as an artefact of the run and add it to the registered model."""
    with tempfile.TemporaryDirectory(prefix="genescale-") as temporary:
        folder = Path(job.bundle_uri)
        if is_remote(job.bundle_uri):
            folder = store.download_folder(job.bundle_uri, Path(temporary) / BUNDLE)
        bundle: Bundle = open_bundle(folder)
        run.log_folder(folder, BUNDLE)
        aliases = (job.config.alias,) if job.config.alias else ()
        tags = {"kind": bundle.kind, "vocabulary": job.corpus.vocabulary.digest}
        return tracker.register(run, BUNDLE, job.config.model_name, aliases=aliases, tags=tags), bundle.digest


class _Rows:
    """Measurements as they arrive at the driver: kept by step, logged once, drawn as progress."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self.by_step: dict[int, dict[str, float]] = {}
        self._run, self._progress, self._drawn = run, progress, 0

    def take(self, rows: list[Row]) -> None:
        """Take rows; steps that a restarted worker did again have the same values and are not logged twice."""
        new = []
        for step, values in rows:
            known = self.by_step.setdefault(step, {})
            fresh = {name: value for name, value in values.items() if name not in known}
            known.update(values)
            if fresh:
                new.append((step, fresh))
        if new:
            self._run.log_metric_rows(new)
        newest = max((step for step, _ in rows), default=0)
        if newest > self._drawn:
            losses = curve(self.by_step, "loss")
            self._progress.advance(newest - self._drawn, f"loss {losses[-1][1]:.3f}" if losses else "")
            self._drawn = newest


def _claim(store: Store, home: str, identity: dict[str, Any]) -> None:
    """Take the run's folder, or make sure that it is this run's; SettingsError when it is another's."""
    data = json.dumps(identity, indent=1, sort_keys=True).encode()
    try:
        store.write(join(home, RUN_FILE), data, if_absent=True)
        return
    except AlreadyExistsError:
        stored = json.loads(store.read(join(home, RUN_FILE)))
    different = sorted(key for key in identity | stored if identity.get(key) != stored.get(key))
    # At stage 0 every worker holds everything, so a checkpoint does not depend on their number.
    if different == ["workers"] and identity["optimizer.zero_stage"] == 0:
        return
    if different:
        changes = ", ".join(f"{key} {stored.get(key)!r} -> {identity.get(key)!r}" for key in different[:5])
        fix = "Give the same options to go on with it, or another --name to start a new one."
        if different == ["workers"]:
            fix = "At ZeRO stages 1 to 3 checkpoints belong to a number of workers: use that one, or another --name."
        raise SettingsError(f"this run was started differently ({changes}).", where=home, fix=fix)


def _identity(config: PretrainConfig, corpus: Corpus, workers: int) -> dict[str, Any]:
    described = {"corpus_uri": corpus.uri, "corpus_version": corpus.version, "vocabulary": corpus.vocabulary.digest}
    return {**config.flat(), **described, "workers": workers}


def _default_name(config: PretrainConfig, corpus: Corpus) -> str:
    """The same name for the same run, so that the same command goes on with it."""
    text = json.dumps([config.digest, corpus.uri, corpus.version, corpus.vocabulary.digest])
    return f"{config.model_name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _check_room(settings: Settings, workers: int, cpus_per_worker: int) -> None:
    import ray

    cpus = ray.cluster_resources().get("CPU", 0)
    # A cluster may grow; a local Ray will not, and Ray Train would wait for it until its own timeout.
    if not settings.cluster.address and workers * cpus_per_worker > cpus:
        raise ClusterError(
            f"{workers} workers with {cpus_per_worker} processors each do not fit on {cpus:g}.",
            where="local Ray",
            fix="Use fewer workers, or raise cluster.num_cpus.",
        )


def _resources(cpus_per_worker: int, use_gpu: bool) -> dict[str, float]:
    return {"CPU": cpus_per_worker, "GPU": 1} if use_gpu else {"CPU": cpus_per_worker}


def _parameters(config: PretrainConfig, corpus: Corpus, workers: int) -> dict[str, Any]:
    return {**_identity(config, corpus, workers), "cells": corpus.n_cells}


def _lineage(config: PretrainConfig, corpus: Corpus, run: Run) -> dict[str, Any]:
    return {
        **code_version(),
        "stage": "pretrain",
        "corpus_uri": corpus.uri,
        "corpus_version": corpus.version,
        "vocabulary_digest": corpus.vocabulary.digest,
        "recipe": config.to_dict(),
        "run_id": run.id,
    }
