"""Heads on the vectors of a task, fold by fold, and what they say of held-out units.

Axis suffixes: `r` rows, `u` units, `d` width, `c` classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genescale.training.evaluation.out_of_distribution import Reference, reference
from genescale.training.evaluation.predictions import Predictions
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.epochs import Fitted, OnEpoch, nothing
from genescale.training.fitting.examples import NO_LABEL, Examples, unit_means
from genescale.training.fitting.task import Task
from genescale.training.fitting.vector_fitting import fit_vectors, fit_vectors_for


def fit_frozen(
    task: Task, vectors_rd: np.ndarray, config: FinetuneConfig, fold: int = 0, *, on_epoch: OnEpoch = nothing
) -> Fitted:
    """Fit the heads of `task` on the training part of one fold; its validation part chooses the epoch.

    With `config.refit` the heads are then fitted anew on train and validation together, for the best epoch's number of
    epochs; the history stays that of the first fit.
    """
    split = task.folds.splits[fold]
    examples, rows_of = task.examples, task.examples.rows_of
    fitted = fit_vectors(
        task.specs,
        vectors_rd[rows_of(split.train)],
        examples.take(split.train),
        vectors_rd[rows_of(split.validation)],
        examples.take(split.validation),
        config,
        on_epoch=on_epoch,
    )
    if not config.refit:
        return fitted
    both = np.sort(np.concatenate([split.train, split.validation]))
    again = fit_units(task, vectors_rd, config, both, epochs=fitted.best_epoch)
    return Fitted(heads=again.heads, best_epoch=fitted.best_epoch, history=fitted.history)


def fit_units(task: Task, vectors_rd: np.ndarray, config: FinetuneConfig, units: np.ndarray, *, epochs: int) -> Fitted:
    """Fit the heads of `task` on exactly these units, for exactly so many epochs of the schedule."""
    rows = task.examples.rows_of(units)
    return fit_vectors_for(task.specs, vectors_rd[rows], task.examples.take(units), config, epochs=epochs)


def predict_units(
    fitted: Fitted,
    task: Task,
    vectors_rd: np.ndarray,
    units: np.ndarray,
    *,
    head: int = 0,
    fold: int = 0,
    cells: Sequence[np.ndarray] | None = None,
) -> Predictions:
    """What one head says of these units; a gene's answer is the mean over its rows, with their spread.

    cells: tokens of the cell behind each of the units' rows, for a head with weights of genes.
    """
    answers_rc = fitted.heads[head].answer(vectors_rd[task.examples.rows_of(units)], cells)
    return predictions_of(task, answers_rc, task.examples.take(units), head, fold)


def predictions_of(task: Task, answers_rc: np.ndarray, examples: Examples, head: int = 0, fold: int = 0) -> Predictions:
    """Predictions from a head's answers (r, c) at the rows of `examples`, which hold whole units."""
    units = np.unique(examples.unit_r)
    spec = task.specs[head]
    mean_uc, spread_uc, rows_u = unit_means(answers_rc, examples.unit_r, units)
    genes = task.unit == "genes"
    return Predictions(
        label=spec.label,
        unit="genes" if genes else "cells",
        classes=spec.classes,
        ids_u=task.ids_u[units],
        fold_u=np.full(len(units), fold, dtype=np.int64),
        true_u=task.targets_u(head)[units],
        probabilities_uc=mean_uc if spec.classes else None,
        predicted_u=None if spec.classes else mean_uc[:, 0],
        names_u=None if task.names_u is None else task.names_u[units],
        datasets_u=None if task.datasets_u is None else task.datasets_u[units],
        source_rows_u=None if task.source_rows_u is None else task.source_rows_u[units],
        groups_u=task.groups_u[units],
        spread_u=_spread(mean_uc, spread_uc) if genes else None,
        rows_u=rows_u.astype(np.int64) if genes else None,
    )


def fold_reference(task: Task, vectors_rd: np.ndarray, head: int = 0, fold: int = 0) -> Reference:
    """The training rows of a fold say what is usual, its validation rows how far the usual lies."""
    split, examples = task.folds.splits[fold], task.examples
    rows, codes_r = _labelled(task, head, examples.rows_of(split.train))
    return reference(vectors_rd[rows], codes_r, vectors_rd[examples.rows_of(split.validation)])


def whole_reference(task: Task, vectors_rd: np.ndarray, by_fold: Sequence[Reference], head: int = 0) -> Reference:
    """All rows say what is usual; how far it lies is said by each fold's test rows, under the reference of that fold.

    A test unit stands in no row of its fold's reference, so its distances are not too small: a gene has many rows.
    """
    rows, codes_r = _labelled(task, head, np.arange(len(vectors_rd)))
    far = [
        usual.distances(vectors_rd[task.examples.rows_of(split.test)])
        for usual, split in zip(by_fold, task.folds.splits, strict=True)
    ]
    return reference(vectors_rd[rows], codes_r, distances_u=np.concatenate(far))


def held_out_scores(
    task: Task, vectors_rd: np.ndarray, head: int = 0, fold: int = 0, *, usual: Reference | None = None
) -> np.ndarray:
    """(u) out-of-distribution score of each test unit of a fold: a gene's is the mean over the cells it is read from.

    `usual` is what `fold_reference` made of this fold, which is done here when it is not given.
    """
    usual = usual or fold_reference(task, vectors_rd, head, fold)
    split, examples = task.folds.splits[fold], task.examples
    rows, units = examples.rows_of(split.test), np.unique(split.test)
    return unit_means(usual.scores(vectors_rd[rows])[:, None], examples.unit_r[rows], units)[0][:, 0]


def _labelled(task: Task, head: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(rows with a class, their codes); for a number all rows and None."""
    if not task.specs[head].classes:
        return rows, None
    target_r = task.examples.targets[head]
    rows = rows[target_r[rows] != NO_LABEL]
    return rows, target_r[rows]


def training_counts(task: Task, head: int, config: FinetuneConfig) -> dict[int, np.ndarray]:
    """By fold, the training units of each class (c) of one head: what the majority baseline knows."""
    spec, targets_u = task.specs[head], task.targets_u(head)
    return {
        fold: np.bincount(known[known >= 0], minlength=spec.outputs)
        for fold, known in ((fold, targets_u[fitted_units(task, fold, config)]) for fold in range(task.n_folds))
    }


def training_means(task: Task, head: int, config: FinetuneConfig) -> dict[int, float]:
    """By fold, the mean of the training numbers of one head."""
    targets_u = task.targets_u(head)
    return {fold: float(np.nanmean(targets_u[fitted_units(task, fold, config)])) for fold in range(task.n_folds)}


def fitted_units(task: Task, fold: int, config: FinetuneConfig) -> np.ndarray:
    """The units that the head of a fold is fitted on."""
    split = task.folds.splits[fold]
    return np.sort(np.concatenate([split.train, split.validation])) if config.refit else split.train


def _spread(mean_uc: np.ndarray, spread_uc: np.ndarray) -> np.ndarray:
    """(u) spread of the probability of the predicted class."""
    return spread_uc[np.arange(len(mean_uc)), mean_uc.argmax(axis=1)]
