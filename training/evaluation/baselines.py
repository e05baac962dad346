"""Simple classifiers on the same cells or genes and in the same folds: the bar a head on a large encoder must pass.

Axis suffixes: `u` units, `k` features, `c` classes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import GenescaleError, SettingsError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store
from genescale.training.evaluation.baselines_features import FEATURE_NAMES, Features, cell_features, gene_features
from genescale.training.evaluation.baselines_models import CLASSIFIERS, REGRESSORS, TREES, Part, fit_and_predict
from genescale.training.evaluation.measures import Evaluation, measure
from genescale.training.evaluation.predictions import Predictions
from genescale.training.labels.splits import at_most

if TYPE_CHECKING:
    from genescale.training.fitting.task import Task


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Which baselines are measured, and on how much; the defaults take a few minutes for 10,000 cells."""

    models: tuple[str, ...] = ()
    """Of CLASSIFIERS (for numbers REGRESSORS); empty for all."""
    features: tuple[Features, ...] = ()
    """Empty for rank_vectors and log_expression, for genes also rank_averages."""
    max_train_units: int = 10_000
    """Training units of a fold at most, drawn at random within classes; every test unit is predicted."""
    gene_cells: int = 1_000
    """Cells that describe a gene: one feature each."""
    trees: int = TREES
    """Trees of the random forest."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_train_units", 2), ("gene_cells", 1), ("trees", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"{getattr(self, name)} is too small.", where=name, fix=f"Use {least} or more.")
        for name, known in (("models", {*CLASSIFIERS, *REGRESSORS}), ("features", set(FEATURE_NAMES))):
            if unknown := sorted(set(getattr(self, name)) - known):
                raise SettingsError(f"'{unknown[0]}' is unknown.", where=name, fix=f"Use {', '.join(sorted(known))}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """One classifier on one kind of features: what it scored, or why it was not measured."""

    name: str
    """logistic_regression, random_forest, linear_svm or ridge_regression."""
    features: str
    """rank_vectors, rank_averages or log_expression."""
    evaluation: Evaluation | None = None
    predictions: Predictions | None = None
    why_not: str = ""
    """Why it was not measured; empty when it was."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Sizes by fold: training units used, features, penalty chosen; seconds over all folds."""

    def to_json(self) -> dict[str, Any]:
        """Name, features, estimates with their intervals, folds and facts, or why it was not measured."""
        found: dict[str, Any] = {"name": self.name, "features": self.features, "facts": dict(self.facts)}
        if self.evaluation is None:
            return {**found, "not_measured": self.why_not}
        told = self.evaluation.to_json()
        return {**found, **{key: told[key] for key in ("estimates", "intervals", "per_fold", "mean", "sd")}}


def measure_baselines(
    task: Task,
    corpus: Corpus,
    config: BaselineConfig = BaselineConfig(),
    *,
    head: int = 0,
    store: Store | None = None,
    positive: str = "",
    bootstrap: int = 1000,
    bootstrap_seed: int = 0,
    progress: Progress = SILENT,
) -> tuple[Baseline, ...]:
    """Fit every baseline on the training part of every fold of `task` and measure it on the test part.

    head: number of the target, of a task with several; bootstrap_seed: that of the head's own measurement, so that both
    are compared draw by draw. What cannot be measured (a source is gone, a class has one
    training unit) is returned with the reason; it is never left out.
    """
    classes = task.specs[head].classes
    models = config.models or (CLASSIFIERS if classes else REGRESSORS)
    cells_only: tuple[Features, ...] = ("rank_vectors", "log_expression")
    kinds = config.features or (cells_only if task.unit == "cells" else ("rank_averages", *cells_only))
    progress.start(len(models) * len(kinds), "baselines")
    found = []
    for kind in kinds:
        try:
            features_uk, facts = _features(kind, task, corpus, config, store)
        except GenescaleError as error:
            found += [Baseline(name=name, features=kind, why_not=str(error)) for name in models]
            progress.advance(len(models))
            continue
        for name in models:
            baseline = _measured(name, kind, features_uk, task, head, config, positive, bootstrap, bootstrap_seed)
            found.append(replace(baseline, facts={**facts, **baseline.facts}))
            progress.advance()
    return tuple(found)


def _features(
    kind: Features, task: Task, corpus: Corpus, config: BaselineConfig, store: Store | None
) -> tuple[Any, dict[str, Any]]:
    """Features (u, k) of all units, and how they were made."""
    index_n = task.examples.index_n
    if task.unit == "cells":
        # A cell task has one row a unit, but not necessarily in the order of the units.
        cell_u = np.empty(task.n_units, dtype=np.int64)
        cell_u[task.examples.unit_r] = index_n[task.examples.row_cell_r]
        return cell_features(kind, corpus, cell_u, store), {}
    generator = np.random.default_rng(config.seed)
    chosen_n = np.sort(generator.choice(index_n, min(config.gene_cells, len(index_n)), replace=False))
    return gene_features(kind, corpus, task.ids_u, chosen_n, store), {"cells": len(chosen_n)}


def _measured(
    name: str,
    kind: Features,
    features_uk: Any,
    task: Task,
    head: int,
    config: BaselineConfig,
    positive: str,
    bootstrap: int,
    bootstrap_seed: int,
) -> Baseline:
    began = time.perf_counter()
    try:
        predictions, facts = _predicted(name, features_uk, task, head, config)
    except GenescaleError as error:
        return Baseline(name=name, features=kind, why_not=str(error))
    seconds = time.perf_counter() - began
    evaluation = measure(predictions, positive=positive, bootstrap=bootstrap, seed=bootstrap_seed)
    return Baseline(
        name=name,
        features=kind,
        evaluation=evaluation,
        predictions=predictions,
        facts={"folds": facts, "seconds": round(seconds, 2)},
    )


def _predicted(
    name: str, features_uk: Any, task: Task, head: int, config: BaselineConfig
) -> tuple[Predictions, list[dict[str, Any]]]:
    """Predictions of the test units of every fold, and what was fitted in each."""
    targets_u, classes = task.targets_u(head), task.specs[head].classes
    known_u = targets_u >= 0 if classes else ~np.isnan(targets_u)
    tests, answers, folds, facts = [], [], [], []
    for fold, split in enumerate(task.folds.splits):
        train, validation, test = (part[known_u[part]] for part in (split.train, split.validation, split.test))
        train = at_most(train, config.max_train_units, config.seed, classes_of=targets_u if classes else None)
        answer = fit_and_predict(
            name,
            Part(features_uk=features_uk[train], targets_u=targets_u[train]),
            Part(features_uk=features_uk[validation], targets_u=targets_u[validation]),
            features_uk[test],
            n_classes=len(classes),
            seed=config.seed,
            trees=config.trees,
        )
        tests.append(test)
        answers.append(answer.values)
        folds.append(np.full(len(test), fold, dtype=np.int64))
        facts.append({"fold": fold, **answer.facts})
    units, values = np.concatenate(tests), np.concatenate(answers)
    predictions = Predictions(
        label=task.specs[head].label,
        unit="genes" if task.unit == "genes" else "cells",
        classes=classes,
        ids_u=task.ids_u[units],
        names_u=None if task.names_u is None else task.names_u[units],
        datasets_u=None if task.datasets_u is None else task.datasets_u[units],
        source_rows_u=None if task.source_rows_u is None else task.source_rows_u[units],
        groups_u=task.groups_u[units],
        fold_u=np.concatenate(folds),
        true_u=targets_u[units],
        probabilities_uc=values if classes else None,
        predicted_u=None if classes else values,
    )
    return predictions, facts
