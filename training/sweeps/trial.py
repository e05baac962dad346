"""One trial, in a Ray worker: fit with the drawn settings, and report what the scheduler needs to judge it.

Axis suffixes: `r` rows, `d` width.

A report costs a message to the driver and back, so a trial reports only where the scheduler decides (its rungs) and at
its end; the epochs between travel with the next report. With several folds it reports after each of them, with the mean
over the folds done: all trials see the same folds in the same order, so poor ones can be stopped after few.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import TrainingError
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.epochs import Epoch, Fitted
from genescale.training.fitting.examples import Examples
from genescale.training.fitting.task import Task, head_specs
from genescale.training.fitting.vector_fitting import fit_vectors
from genescale.training.sweeps.sweep_spec import SweepConfig, TuneSpec

SCORE, STEP = "score", "step"
Report = dict[str, Any]
TrialHook = Callable[[int, Mapping[str, Any]], None]
"""Called in the trial's own process before it starts, with its number and its settings: for probes and licences."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldRows:
    """The examples of one fold that a trial may see, and their rows among the task's; the test part is not here."""

    train: Examples
    validation: Examples
    train_rows: np.ndarray
    validation_rows: np.ndarray


class Held(Protocol):
    """A bundle that is there as long as this object is kept (`freight.Received`)."""

    bundle: Bundle


@dataclass(frozen=True, kw_only=True, eq=False)
class TrialInputs:
    """What all trials share: it lies once in the object store of each node, and its arrays are read where they lie."""

    spec: TuneSpec
    width: int
    classes: tuple[tuple[str, ...], ...]
    """Of each target; empty for a number."""
    folds: tuple[FoldRows, ...]
    vectors: Mapping[tuple[str, str], tuple[np.ndarray, ...]]
    """By layer and pooling: (train, validation) vectors (r, d) of the only fold, or those of all rows."""
    corpus: Corpus | None = None
    """For trials that train the encoder."""
    receive: Callable[[], Held] | None = None
    """For trials that train the encoder: fetches the pretrained model."""

    def parts(self, fold: int, config: FinetuneConfig) -> tuple[np.ndarray, np.ndarray]:
        """Train and validation vectors (r, d) of one fold."""
        found = self.vectors[vector_kind(config)]
        if len(self.folds) == 1:
            return found[0], found[1]
        rows = self.folds[fold]
        return found[0][rows.train_rows], found[0][rows.validation_rows]


def vector_kind(config: FinetuneConfig) -> tuple[str, str]:
    """Which cached vectors a fit reads: layer and pooling; genes are read from their own tokens."""
    return str(config.layer), str(config.pooling) if config.unit == "cells" else "token"


def fold_rows(task: Task) -> tuple[FoldRows, ...]:
    """Train and validation rows of every fold of a task."""
    examples = task.examples
    return tuple(
        FoldRows(
            train=examples.take(split.train),
            validation=examples.take(split.validation),
            train_rows=examples.rows_of(split.train),
            validation_rows=examples.rows_of(split.validation),
        )
        for split in task.folds.splits
    )


def shared_vectors(vectors_rd: np.ndarray, folds: tuple[FoldRows, ...]) -> tuple[np.ndarray, ...]:
    """What `TrialInputs.vectors` holds of one kind of vectors."""
    if len(folds) > 1:
        return (vectors_rd,)
    return vectors_rd[folds[0].train_rows], vectors_rd[folds[0].validation_rows]


def rungs(epochs: int, sweep: SweepConfig) -> tuple[int, ...]:
    """Epochs (or folds) after which asynchronous successive halving decides; rising.

    Method: Li et al., A system for massively parallel hyperparameter tuning, MLSys 2020 (arXiv:1810.05934).
    """
    if sweep.scheduler == "none":
        return ()
    found, rung = [], min(sweep.grace_epochs, epochs)
    while rung < epochs:
        found.append(rung)
        rung *= sweep.reduction_factor
    return tuple(found)


def run_trial(drawn: Mapping[str, Any], *, inputs: TrialInputs, report: Callable[[Report], None]) -> None:
    """Fit the settings `drawn["sample"]` on every fold, and report; TrainingError when no epoch has a score."""
    config = inputs.spec.trial_config(drawn["sample"])
    course = _Reports(config, inputs, report)
    for fold in range(len(inputs.folds)):
        with warnings.catch_warnings():
            # Arrays in the object store are read-only, which torch remarks upon; nothing here writes to them.
            warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
            fitted = _fitted(inputs, config, fold, course.epoch)
        course.fold_ends(fitted)


def _fitted(inputs: TrialInputs, config: FinetuneConfig, fold: int, on_epoch: Callable[[Epoch], None]) -> Fitted:
    specs, rows = head_specs(inputs.width, inputs.classes, config), inputs.folds[fold]
    if config.encoder == "frozen":
        train_rd, validation_rd = inputs.parts(fold, config)
        return fit_vectors(specs, train_rd, rows.train, validation_rd, rows.validation, config, on_epoch=on_epoch)
    from genescale.training.fitting.encoder_fitting import fit_encoder

    corpus = inputs.corpus
    if corpus is None or inputs.receive is None:
        raise TrainingError("a trial that trains the encoder got no model or no cells.")
    held = inputs.receive()
    fitted, _ = fit_encoder(
        held.bundle,
        lambda index_n: corpus.tokens(index_n.tolist()),
        rows.train,
        rows.validation,
        specs,
        config,
        on_epoch=on_epoch,
    )
    return fitted


class _Reports:
    """Collects epochs, and reports them where the scheduler decides."""

    def __init__(self, config: FinetuneConfig, inputs: TrialInputs, report: Callable[[Report], None]) -> None:
        self.report, self.n_folds, self.fold = report, len(inputs.folds), 0
        self.rungs = rungs(config.epochs, inputs.spec.sweep) if self.n_folds == 1 else ()
        self.began = time.monotonic()
        self.waiting: list[dict[str, Any]] = []
        self.best, self.best_epoch = -math.inf, 0
        self.done: list[float] = []

    def epoch(self, epoch: Epoch) -> None:
        """An epoch has ended."""
        values = {"fold": self.fold, "epoch": epoch.number, **epoch.metrics()}
        self.waiting.append({name: _plain(value) for name, value in values.items()})
        if epoch.validation_score > self.best:
            self.best, self.best_epoch = epoch.validation_score, epoch.number
        self.last = epoch.number
        if epoch.number in self.rungs:
            self._send(epoch.number, ended=False)

    def fold_ends(self, fitted: Fitted) -> None:
        """A fold is fitted."""
        self.best_epoch = fitted.best_epoch
        if not math.isfinite(self.best):
            raise TrainingError("no epoch has a validation score that is a number.", fix="Lower the learning rate.")
        if self.n_folds == 1:
            self._send(self.last, ended=True)
            return
        self.done.append(self.best)
        self.fold += 1
        self.best = -math.inf
        self._send(self.fold, ended=self.fold == self.n_folds)

    def _send(self, step: int, *, ended: bool) -> None:
        if not self.done and not math.isfinite(self.best):
            return
        score = sum(self.done) / len(self.done) if self.done else self.best
        waiting, self.waiting = self.waiting, []
        self.report(
            {
                STEP: step,
                SCORE: score,
                "best_epoch": self.best_epoch,
                "epochs": waiting,
                "seconds": time.monotonic() - self.began,
                "ended": ended,
            }
        )


def _plain(value: Any) -> Any:
    """A number as JSON can hold it; None for what is no number."""
    return value if not isinstance(value, float) or math.isfinite(value) else None
