"""The trials of a sweep under Ray Tune: who draws, who stops, and what is kept of each, all on the driver.

Ray Tune starts the trials, shares the cluster among them and asks its ASHA scheduler whom to stop. What must survive a
kill is not left to its own state files, which lag behind: every draw, report and end is written to the sweep's folder
as it happens, and a sweep that goes on tells the scheduler and Optuna what they knew.

Trials share their processes (`reuse_actors`): starting one costs seconds, fitting a head often less. A trial whose
process dies takes no other with it, and the next one gets a new process.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune as ray_tune
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from genescale.platform.errors import GenescaleError, SettingsError
from genescale.platform.progress import Progress
from genescale.platform.storage import join
from genescale.training.sweeps.sampling import Drawing
from genescale.training.sweeps.sweep_spec import SweepConfig, TuneSpec
from genescale.training.sweeps.trial import SCORE, STEP, TrialHook, TrialInputs, run_trial
from genescale.training.sweeps.trial_records import Status, SweepFolder, Trial, advanced

STATE = "ray"
"""Folder of Ray Tune's own files, inside the sweep's; gone when the trials are done."""
BECAUSE = "the trial failed: "
OnTrialEnd = Callable[[Trial], Trial]


class Trials:
    """The trials of a sweep as they go; every change is in the sweep's folder before anything else happens."""

    def __init__(
        self, spec: TuneSpec, folder: SweepFolder, progress: Progress, on_end: OnTrialEnd = lambda trial: trial
    ) -> None:
        self.spec, self.folder, self.progress, self.on_end = spec, folder, progress, on_end
        self.drawing = Drawing(spec)
        self.by_number = folder.trials()
        self.unfinished = [trial.number for trial in self.by_number.values() if not trial.ended]

    @property
    def ended(self) -> list[Trial]:
        """Those of which nothing is left to do, by number."""
        return [trial for _, trial in sorted(self.by_number.items()) if trial.ended]

    def next(self) -> Trial | None:
        """The next trial to run: one that was cut off, else a new one; None when all are drawn."""
        if self.unfinished:
            trial = self.by_number[self.unfinished.pop(0)]
            trial = replace(trial, epochs=(), steps=(), score=None, best_epoch=0, error="")
        elif len(self.by_number) >= self.spec.sweep.trials:
            return None
        else:
            # Not how many there are: a damaged file may have been deleted, and its number is free.
            number = next(number for number in itertools.count() if number not in self.by_number)
            trial = Trial(number=number, sample=self.drawing.sample(number, self.by_number.values()))
        return self.keep(trial)

    def started(self, number: int) -> None:
        """A trial begins, for the first time or again."""
        trial = self.by_number[number]
        self.keep(replace(trial, attempts=trial.attempts + 1))

    def reported(self, number: int, report: Mapping[str, Any]) -> None:
        """A trial has reported."""
        self.keep(advanced(self.by_number[number], report))

    def over(self, number: int, *, stopped: bool = False, error: str = "") -> None:
        """A trial has ended."""
        status: Status = "failed" if error else "stopped" if stopped else "finished"
        trial = self.keep(replace(self.by_number[number], status=status, error=error))
        self.keep(self.on_end(trial))
        note = f"{trial.name} failed" if error else f"{trial.name} scored {trial.score or 0:.3f}"
        self.progress.advance(1, note)

    def keep(self, trial: Trial) -> Trial:
        """Note a trial, here and in the folder."""
        if trial != self.by_number.get(trial.number):
            self.folder.keep(trial)
            self.by_number[trial.number] = trial
        return trial


def run_trials(trials: Trials, inputs: TrialInputs, hook: TrialHook | None = None) -> None:
    """Run what is left of a sweep; Ray must be running. KeyboardInterrupt when Ctrl-C ended it early."""
    spec, done = trials.spec, trials.ended
    trials.progress.start(spec.sweep.trials, "trials")
    trials.progress.advance(len(done))
    left = spec.sweep.trials - len(done)
    if left <= 0:
        return
    state = join(trials.folder.uri, STATE)
    filesystem, path = trials.folder.store.arrow_filesystem(state)
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(_trial, inputs=inputs, hook=hook), _bundle_of(spec.sweep)
    )
    with _quiet():
        Tuner(
            trainable,
            param_space={},
            tune_config=TuneConfig(
                search_alg=_Search(trials),
                scheduler=scheduler_of(spec, len(inputs.folds), done),
                num_samples=left,
                max_concurrent_trials=at_once(spec.sweep),
                reuse_actors=True,
            ),
            run_config=RunConfig(
                name="trials",
                storage_path=path.rstrip("/"),
                storage_filesystem=filesystem,
                verbose=0,
                callbacks=[_Keeper(trials)],
                failure_config=FailureConfig(max_failures=spec.sweep.retries),
            ),
        ).fit()
    if len(trials.ended) < spec.sweep.trials:
        # Ray Tune answers Ctrl-C by returning what it has; the caller must not take that for all.
        raise KeyboardInterrupt
    trials.folder.store.delete_folder(state)


def at_once(sweep: SweepConfig) -> int:
    """How many trials run at the same time; SettingsError when not even one fits the cluster."""
    have = ray.cluster_resources()
    fit = []
    for name, each, held in (
        ("cpu", sweep.resources.cpu, have.get("CPU", 0.0)),
        ("gpu", sweep.resources.gpu, have.get("GPU", 0.0)),
        ("memory_gb", sweep.resources.memory_gb, have.get("memory", 0.0) / 1e9),
    ):
        if each and each > held:
            raise SettingsError(
                f"a trial asks for {each:g}, and the whole Ray cluster has {held:g}.",
                where=f"sweep: resources: {name}",
                fix="Ask for less, or join a larger cluster (cluster.address).",
            )
        if each:
            fit.append(int(held / each + 1e-9))
    return min(sweep.at_once, *fit) if sweep.at_once else min(fit)


def scheduler_of(spec: TuneSpec, folds: int, done: list[Trial]) -> TrialScheduler:
    """The scheduler, knowing what the trials in `done` had reported."""
    if spec.sweep.scheduler == "none":
        return FIFOScheduler()
    longest = spec.finetune.epochs if folds == 1 else folds
    scheduler = ASHAScheduler(
        time_attr=STEP,
        metric=SCORE,
        mode="max",
        max_t=longest,
        grace_period=min(spec.sweep.grace_epochs, longest) if folds == 1 else 1,
        reduction_factor=spec.sweep.reduction_factor,
    )
    for trial in done:
        known: Any = _Known(trial.name)
        scheduler.on_trial_add(None, known)
        for step, score in trial.steps:
            scheduler.on_trial_result(None, known, {STEP: step, SCORE: score})
    return scheduler


@dataclass(frozen=True)
class _Known:
    """A trial of an earlier run, as far as the scheduler looks at it."""

    trial_id: str


def _bundle_of(sweep: SweepConfig) -> dict[str, float]:
    wanted = {"cpu": sweep.resources.cpu, "gpu": sweep.resources.gpu, "memory": sweep.resources.memory_gb * 1e9}
    return {name: value for name, value in wanted.items() if value}


def _trial(drawn: dict[str, Any], *, inputs: TrialInputs, hook: TrialHook | None) -> None:
    """What runs in a Ray worker."""
    import torch

    # More threads than processors reserved would slow the trials beside this one.
    torch.set_num_threads(max(1, int(inputs.spec.sweep.resources.cpu)))
    try:
        if hook is not None:
            hook(int(drawn["number"]), drawn["sample"])
        run_trial(drawn, inputs=inputs, report=ray_tune.report)
    except Exception as error:
        # On one line, because Ray hands the driver the trace as a text.
        said = " ".join(str(error).split()) or "no message"
        kind = "" if isinstance(error, GenescaleError) else f"{type(error).__name__}: "
        raise RuntimeError(f"{BECAUSE}{kind}{said}") from error


class _DriverOnly:
    """Ray Tune keeps copies of searcher and callbacks in its files, which are never read back: they are empty."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class _Search(_DriverOnly, Searcher):
    """Hands out the next trial; what is learned from it is in `Trials`."""

    def __init__(self, trials: Trials) -> None:
        super().__init__()
        self.trials = trials

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Number and settings of the next trial."""
        trial = self.trials.next()
        if trial is None:
            return None
        return {"number": trial.number, "sample": dict(trial.sample)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial has ended; `_Keeper` takes it down."""

    def save(self, checkpoint_path: str) -> None:
        """An empty file in place of a state: the sweep's folder has it all."""
        Path(checkpoint_path).write_bytes(b"")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from its own folder."""


class _Keeper(_DriverOnly, Callback):
    """Takes down what happens to trials, as it happens."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins."""
        self.trials.started(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has reported."""
        if STEP in result:
            self.trials.reported(trial.config["number"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended, by itself or because the scheduler stopped it."""
        self.trials.over(trial.config["number"], stopped=not (trial.last_result or {}).get("ended"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed for good."""
        self.trials.over(trial.config["number"], error=reason(_error_text(trial)))


def reason(text: str) -> str:
    """Why a trial failed, in one line, from what Ray says of it."""
    if "OutOfMemoryError" in text and "node" in text:
        return "out of memory: Ray ended its process to save the machine. Run fewer at once, or give each less to do."
    if any(sign in text for sign in ("ActorDiedError", "actor died", "The actor is dead", "died unexpectedly")):
        return (
            "its process was killed from outside (the system's out-of-memory killer does so), or crashed. "
            "If memory is short, run fewer at once."
        )
    if BECAUSE in text:
        return text.rsplit(BECAUSE, 1)[1].splitlines()[0].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason is known."


def _error_text(trial: Any) -> str:
    path = trial.error_file
    try:
        return Path(path).read_text(encoding="utf-8") if path else ""
    except OSError:
        return ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray Tune without its own tables and per-trial log files, and without the signal handlers it leaves behind.

    What it would say is in our progress line, in the trials' errors and in MLflow.
    """
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.air")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
