"""What a fine-tuning run leaves behind: files beside the bundle, and the same with numbers in the tracked run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from genescale.platform.tracking import Run
from genescale.training.evaluation.baselines import Baseline
from genescale.training.evaluation.measures import Evaluation, majority
from genescale.training.evaluation.predictions import Predictions
from genescale.training.evaluation.report import write_report
from genescale.training.evaluation.scores import Scores, score
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.epochs import Fitted
from genescale.training.fitting.task import Task
from genescale.training.labels.split_file import SPLIT_FILE, split_table

PREDICTIONS = "predictions.parquet"
EVALUATION_FOLDER = "evaluation"
_ODD = re.compile(r"[^\w.\- ]+")


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadResult:
    """One head on held-out units: what it said, and how good that is."""

    predictions: Predictions
    """Of the test parts of all folds."""
    evaluation: Evaluation
    train_counts: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Training units of each class by fold; empty for a number."""
    baselines: tuple[Baseline, ...] = ()

    @property
    def scores(self) -> Scores:
        """Scores of the labelled test units; InputError for a number."""
        return _scores(self.predictions)

    @property
    def majority(self) -> Scores:
        """What always saying the most frequent training class scores on the same units."""
        return _scores(majority(self.predictions, self.train_counts))


def write_files(
    out: Path,
    task: Task,
    config: FinetuneConfig,
    heads: Sequence[HeadResult],
    fits: Sequence[Fitted],
    *,
    title: str,
    question: str,
    lineage: Mapping[str, Any],
    counts: Mapping[str, Any],
    notes: Sequence[str],
) -> tuple[Path, ...]:
    """Write report (HTML and JSON), predictions of each head and the split into `out`; the paths, report.html first."""
    out.mkdir(parents=True, exist_ok=True)
    history = {fold: [epoch.metrics() for epoch in fitted.history] for fold, fitted in enumerate(fits)}
    html, content = write_report(
        out,
        title,
        asdict(config),
        [head.evaluation for head in heads],
        [head.predictions for head in heads],
        [head.baselines for head in heads],
        history,
        task.folds,
        question=question,
        lineage=lineage,
        counts=counts,
        notes=notes,
        best_epochs={fold: fitted.best_epoch for fold, fitted in enumerate(fits)},
    )
    tables = []
    for found in (head.predictions for head in heads):
        path = out / (PREDICTIONS if len(heads) == 1 else f"predictions-{_name(found.label)}.parquet")
        pq.write_table(found.table(), path)
        tables.append(path)
    split = out / SPLIT_FILE
    pq.write_table(split_table(task.folds, task.ids_u.tolist(), facts={"unit": task.unit, "label": title}), split)
    return (html, content, *tables, split)


def track(run: Run, heads: Sequence[HeadResult], fits: Sequence[Fitted], files: Sequence[Path]) -> None:
    """Record the epochs of every fold, the measurements and the files; a lone fold or head needs no name."""
    for fold, fitted in enumerate(fits):
        prefix = f"fold{fold}." if len(fits) > 1 else ""
        run.log_metric_rows(
            [
                (epoch.number, {f"{prefix}{_name(name)}": value for name, value in epoch.metrics().items()})
                for epoch in fitted.history
            ]
        )
        run.log_metrics({f"{prefix}best_epoch": float(fitted.best_epoch)})
    for evaluation in (head.evaluation for head in heads):
        prefix = f"test_{_name(evaluation.label)}." if len(heads) > 1 else "test_"
        run.log_metrics(evaluation.tracked(prefix))
    for path in files:
        run.log_file(path, EVALUATION_FOLDER)


def _scores(predictions: Predictions) -> Scores:
    known = predictions.take(predictions.labelled_u)
    return score(known.true_u, known.codes_u, known.classes)


def _name(text: str) -> str:
    """A text as the tracker takes it for a name, and a file system too."""
    return _ODD.sub("-", text)
