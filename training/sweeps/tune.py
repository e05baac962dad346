"""Sweep the settings of a head with Ray Tune, refit the best one, and measure it once on the test part.

Axis suffixes: `n` cells, `d` width.

Every trial fits a head on the same cached vectors (the encoder is frozen), reports each epoch, and may be stopped early
(ASHA). Trials see the train and validation parts only. The driver alone writes to MLflow: a parent run for the sweep, a
child for every trial, and one for the winner. A sweep that was cut off goes on where it was when it is started again
with the same model, corpus and spec.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune as ray_tune
from ray.tune import Callback, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import ClusterError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store, join
from genescale.platform.tracking import Run, Tracker
from genescale.training.fitting.finetune import (
    FinetuneConfig,
    FinetuneResult,
    Task,
    finetune,
    head_spec,
    prepare,
    task_vectors,
)
from genescale.training.fitting.head_fitting import Epoch, Vectors, fit_head
from genescale.training.sweeps.sweep_spec import TuneSpec

METRIC = "best_macro_f1"
"""Highest macro F1 on the validation part up to now: what a stopped trial is worth."""
_PROGRESS: contextvars.ContextVar[Progress] = contextvars.ContextVar("sweep_progress", default=SILENT)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a sweep; `error` is empty unless it failed."""

    name: str
    sample: dict[str, Any]
    """The settings it drew."""
    epochs: int
    macro_f1: float
    """Its best macro F1 on the validation part."""
    error: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class TuneResult:
    """A finished sweep: all trials best first, and the best settings refitted and measured on the test part."""

    best: FinetuneConfig
    trials: tuple[Trial, ...]
    winner: FinetuneResult
    run_id: str
    uri: str
    """Folder of Ray Tune's state."""


def tune(
    bundle: Bundle,
    corpus: Corpus,
    spec: TuneSpec,
    *,
    tracker: Tracker,
    out: Path,
    sweep_uri: str,
    store: Store,
    embeddings_uri: str = "",
    model_name: str = "",
    aliases: Sequence[str] = (),
    progress: Progress = SILENT,
) -> TuneResult:
    """Run the sweep, then fit the best settings again into `out` and record and register them as `finetune` does.

    Ray must be running (`ray_cluster`). `sweep_uri` is a folder that all nodes reach: Ray Tune keeps the state of the
    sweep there. Raises ClusterError when every trial failed, with the first reason.
    """
    task = prepare(bundle, corpus, spec.finetune)
    vectors_nd = task_vectors(bundle, corpus, task, spec.finetune, store, embeddings_uri, progress)
    parts = {
        name: Vectors(cells_nd=vectors_nd[positions_n], codes_n=task.cells.codes_n[positions_n])
        for name, positions_n in (("train", task.split.train), ("validation", task.split.validation))
    }
    params: dict[str, Any] = {"trials": spec.sweep.trials, "sampler": spec.sweep.sampler, "sweep_seed": spec.sweep.seed}
    params |= {"corpus_uri": corpus.uri, "corpus_version": corpus.version, "parent": bundle.digest}
    with tracker.run(f"tune {spec.finetune.label}", params=params, tags={"stage": "tune"}) as run:
        name = f"sweep-{sweep_key(bundle, corpus, spec)[:16]}"
        trials = _sweep(spec, task, parts, sweep_uri, name, store, progress)
        _record_trials(tracker, run, trials)
        best = spec.trial_config(trials[0].sample)
        winner = finetune(
            bundle,
            corpus,
            best,
            tracker=tracker,
            out=out,
            vectors_nd=vectors_nd,
            model_name=model_name,
            aliases=aliases,
            parent_run=run.id,
            progress=progress,
        )
        run.log_params({f"best_{key}": value for key, value in trials[0].sample.items()})
        run.log_metrics({METRIC: trials[0].macro_f1, "test_macro_f1": winner.macro_f1})
    return TuneResult(best=best, trials=trials, winner=winner, run_id=run.id, uri=join(sweep_uri, name))


def sweep_key(bundle: Bundle, corpus: Corpus, spec: TuneSpec) -> str:
    """Digest of everything that decides a sweep: another one never goes on in its folder."""
    content = [bundle.digest, corpus.uri, corpus.version, asdict(spec)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _sweep(
    spec: TuneSpec,
    task: Task,
    parts: Mapping[str, Vectors],
    sweep_uri: str,
    name: str,
    store: Store,
    progress: Progress,
) -> tuple[Trial, ...]:
    """All trials, best first; equal ones in the order of their names."""
    progress.start(spec.sweep.trials, "trials")
    filesystem, folder = store.arrow_filesystem(sweep_uri)
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(_trial, spec=spec, classes=task.spec.classes, width=task.spec.width, parts=parts),
        {"cpu": 1},
    )
    path = f"{folder.rstrip('/')}/{name}"
    with _quiet(), _shown(progress):
        if Tuner.can_restore(path, storage_filesystem=filesystem):
            tuner = Tuner.restore(
                path,
                trainable=trainable,
                resume_unfinished=True,
                resume_errored=True,
                storage_filesystem=filesystem,
            )
        else:
            tuner = Tuner(
                trainable,
                param_space=spec.space(),
                tune_config=_tune_config(spec),
                run_config=RunConfig(
                    name=name,
                    storage_path=folder,
                    storage_filesystem=filesystem,
                    verbose=0,
                    callbacks=[_TrialEnds()],
                ),
            )
        results = tuner.fit()
    if results.num_terminated + results.num_errors < spec.sweep.trials:
        # Ray Tune answers Ctrl-C by saving its state and returning what it has; the caller must not take that for all.
        raise KeyboardInterrupt
    trials = [_trial_of(result, number) for number, result in enumerate(results)]
    if all(trial.error for trial in trials):
        raise ClusterError(f"every trial failed: {trials[0].error}", where=path, fix="Correct the cause and run again.")
    return tuple(sorted(trials, key=lambda trial: (bool(trial.error), -trial.macro_f1, trial.name)))


def _tune_config(spec: TuneSpec) -> TuneConfig:
    sweep = spec.sweep
    at_once = sweep.at_once or max(1, int(ray.cluster_resources().get("CPU", 1)))
    search: Any = BasicVariantGenerator(random_state=sweep.seed, max_concurrent=at_once)
    if sweep.sampler == "optuna":
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        search = ConcurrencyLimiter(OptunaSearch(seed=sweep.seed), max_concurrent=at_once)
    scheduler = ASHAScheduler(
        time_attr="epoch",
        max_t=spec.finetune.epochs,
        grace_period=min(sweep.grace_epochs, spec.finetune.epochs),
        reduction_factor=sweep.reduction_factor,
    )
    return TuneConfig(metric=METRIC, mode="max", search_alg=search, scheduler=scheduler, num_samples=sweep.trials)


def _trial(
    sample: dict[str, Any], *, spec: TuneSpec, classes: tuple[str, ...], width: int, parts: Mapping[str, Vectors]
) -> None:
    """One trial, in a Ray worker: fit with the drawn settings and report every epoch."""
    config = spec.trial_config(sample)
    best = 0.0

    def report(epoch: Epoch) -> None:
        nonlocal best
        best = max(best, epoch.validation_macro_f1)
        ray_tune.report({"epoch": epoch.number, METRIC: best, **epoch.metrics()})

    fit_head(head_spec(width, classes, config), parts["train"], parts["validation"], config, on_epoch=report)


class _TrialEnds(Callback):
    """Moves the progress line; Ray Tune stores callbacks, so it holds no state of its own."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended or was stopped."""
        score = (trial.last_result or {}).get(METRIC, 0.0)
        _PROGRESS.get().advance(1, f"last macro F1 {score:.3f}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed; the reason is in the result."""
        _PROGRESS.get().advance(1, "a trial failed")


def _trial_of(result: Any, number: int) -> Trial:
    metrics = result.metrics or {}
    return Trial(
        name=str(metrics.get("trial_id", number)),
        sample=dict(result.config or {}),
        epochs=int(metrics.get("epoch", 0)),
        macro_f1=float(metrics.get(METRIC, 0.0)),
        error=str(result.error or "").strip(),
    )


def _record_trials(tracker: Tracker, run: Run, trials: Sequence[Trial]) -> None:
    for trial in trials:
        tags = {"stage": "trial", "trial": trial.name, **({"error": trial.error[:500]} if trial.error else {})}
        with tracker.run(f"trial {trial.name}", params=trial.sample, tags=tags, parent=run.id) as child:
            child.log_metrics({METRIC: trial.macro_f1, "epochs": float(trial.epochs)})


@contextlib.contextmanager
def _shown(progress: Progress) -> Iterator[None]:
    token = _PROGRESS.set(progress)
    try:
        yield
    finally:
        _PROGRESS.reset(token)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray Tune without its own tables and per-trial log files, and without the signal handlers it leaves behind.

    What it would say is in our progress line, in the trials' errors and in MLflow.
    """
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        logger.setLevel(level)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
