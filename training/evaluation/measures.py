"""How good held-out predictions are: metrics by fold, over folds and pooled, with intervals and a majority baseline.

Axis suffixes: `u` units, `c` classes, `f` folds.

A metric that has no value (ROC AUC of a fold with one class, R2 of equal numbers) is NaN, is left out of means, and
reads as null in JSON; it is never 0 or 0.5 by fiat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from genescale.platform.errors import InputError, did_you_mean
from genescale.training.evaluation.bootstrap import METHOD, Bootstrap, squared_errors
from genescale.training.evaluation.bootstrap import bootstrap as bootstrapped
from genescale.training.evaluation.calibration import Reliability, reliability
from genescale.training.evaluation.predictions import Predictions
from genescale.training.evaluation.scores import ClassScore, score

CLASS_METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "pr_auc", "brier", "ece")
NUMBER_METRICS = ("r2", "mae", "rmse", "spearman")
WITHIN_FOLDS = ("roc_auc", "pr_auc")
"""Metrics of order: taken within a fold and averaged, because scores of two folds come from two heads (Forman and
Scholz, "Apples-to-apples in cross-validation studies", 2010)."""
LOWER_IS_BETTER = ("brier", "ece", "mae", "rmse")
METRIC_NAMES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "roc_auc": "ROC AUC",
    "pr_auc": "PR AUC",
    "brier": "Brier score",
    "ece": "Calibration error",
    "r2": "R²",
    "mae": "Mean absolute error",
    "rmse": "Root mean squared error",
    "spearman": "Spearman",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What was measured of one head on held-out units. `evaluation["macro_f1"]` is the estimate that is reported."""

    label: str
    unit: Literal["cells", "genes"]
    kind: Literal["classes", "number"]
    classes: tuple[str, ...]
    positive: str
    """The class that two-class ROC AUC and PR AUC look for; empty otherwise, then they are macro one-against-rest."""
    units: int
    """Labelled units that were measured."""
    unlabelled: int
    """Units without a true label, which are not measured."""
    per_fold: tuple[Mapping[str, float], ...]
    """By fold: `fold`, `units` and every metric."""
    mean: Mapping[str, float]
    """Mean over the folds in which a metric has a value."""
    sd: Mapping[str, float]
    """Standard deviation over folds (n - 1); NaN with one fold."""
    pooled: Mapping[str, float]
    """Metrics over the units of all folds together."""
    intervals: Bootstrap
    majority: Mapping[str, float]
    """The same estimates for always saying the most frequent training class (or the training mean); may be empty."""
    per_class: tuple[ClassScore, ...]
    roc_auc_per_class: Mapping[str, float]
    """ROC AUC of each class against the rest, mean over folds."""
    confusion_cc: npt.NDArray[np.int64]
    """(c, c) counts, true class by row, predicted class by column."""
    per_group: tuple[Mapping[str, Any], ...]
    """By group (donor): `group`, `units`, and accuracy and macro F1, or mean absolute error and bias."""
    reliability: Reliability | None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of reading."""
        return CLASS_METRICS if self.kind == "classes" else NUMBER_METRICS

    @property
    def headline(self) -> str:
        """The metric to look at first: ROC AUC for two classes, macro F1 for more, R2 for numbers."""
        if self.kind == "number":
            return "r2"
        return "roc_auc" if len(self.classes) == 2 else "macro_f1"

    def __getitem__(self, metric: str) -> float:
        """The estimate of a metric: mean of folds for ROC AUC and PR AUC, over all units together for the others."""
        if metric not in self.metrics:
            hint = did_you_mean(metric, self.metrics) or f"Metrics: {', '.join(self.metrics)}."
            raise InputError(f"there is no metric '{metric}'.", where=f"evaluation of '{self.label}'", fix=hint)
        return (self.mean if metric in WITHIN_FOLDS else self.pooled)[metric]

    def estimates(self) -> dict[str, float]:
        """The estimate of every metric."""
        return {metric: self[metric] for metric in self.metrics}

    def tracked(self, prefix: str = "test_") -> dict[str, float]:
        """Numbers for a tracked run: estimates, their limits, deviation over folds and the majority baseline."""
        found = {f"{prefix}{metric}": value for metric, value in self.estimates().items()}
        for metric, interval in self.intervals.intervals.items():
            found |= {f"{prefix}{metric}_low": interval.low, f"{prefix}{metric}_high": interval.high}
        found |= {f"{prefix}{metric}_sd": value for metric, value in self.sd.items()}
        found |= {f"{prefix}majority_{metric}": value for metric, value in self.majority.items()}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON; numbers without a value are null."""
        intervals = {name: asdict(interval) for name, interval in self.intervals.intervals.items()}
        drawn = {"method": METHOD, "draws": self.intervals.draws, "drawn": self.intervals.drawn}
        shape = self.reliability
        bins = None if shape is None else {name: getattr(shape, name).tolist() for name in vars(shape)}
        return plain(
            {
                "label": self.label,
                "unit": self.unit,
                "kind": self.kind,
                "classes": list(self.classes),
                "positive": self.positive,
                "units": self.units,
                "unlabelled": self.unlabelled,
                "headline": self.headline,
                "estimates": self.estimates(),
                "intervals": intervals,
                "bootstrap": {**drawn, "notes": list(self.intervals.notes)},
                "per_fold": [dict(row) for row in self.per_fold],
                "mean": dict(self.mean),
                "sd": dict(self.sd),
                "pooled": dict(self.pooled),
                "majority": dict(self.majority),
                "per_class": [asdict(row) for row in self.per_class],
                "roc_auc_per_class": dict(self.roc_auc_per_class),
                "confusion": self.confusion_cc.tolist(),
                "per_group": [dict(row) for row in self.per_group],
                "reliability": bins,
            }
        )


def measure(
    predictions: Predictions,
    *,
    train_counts_by_fold: Mapping[int, Sequence[int] | npt.NDArray[Any]] | None = None,
    train_means_by_fold: Mapping[int, float] | None = None,
    positive: str = "",
    seed: int = 0,
    bootstrap: int = 1000,
) -> Evaluation:
    """Measure held-out predictions; units without a true label are counted and left out.

    train_counts_by_fold: training units of each class (c) by fold, for the majority baseline (of numbers:
    train_means_by_fold, the mean of the training numbers); positive: the class that two-class rank metrics look for,
    by default the last; bootstrap: draws of the intervals, 0 for none. Raises InputError when no unit has a label.
    """
    labelled = predictions.take(predictions.labelled_u).sorted()
    if not len(labelled):
        raise InputError(
            "no held-out unit has a true label.", where=f"predictions of '{predictions.label}'", fix="Give labels."
        )
    code = _positive_code(labelled, positive)
    base = _baseline(labelled, train_counts_by_fold, train_means_by_fold)
    per_fold, mean, sd, pooled = _over_folds(labelled, code)
    by_class = labelled.kind == "classes"
    scored = score(labelled.true_u, labelled.codes_u, labelled.classes) if by_class else None
    found = Evaluation(
        label=labelled.label,
        unit=labelled.unit,
        kind=labelled.kind,
        classes=labelled.classes,
        positive=labelled.classes[code] if len(labelled.classes) == 2 else "",
        units=len(labelled),
        unlabelled=len(predictions) - len(labelled),
        per_fold=per_fold,
        mean=mean,
        sd=sd,
        pooled=pooled,
        intervals=bootstrapped(labelled, positive=code, draws=bootstrap, seed=seed),
        majority={},
        per_class=scored.per_class if scored else (),
        roc_auc_per_class=_class_aucs(labelled) if by_class else {},
        confusion_cc=scored.confusion_cc if scored else np.zeros((0, 0), dtype=np.int64),
        per_group=_per_group(labelled),
        reliability=reliability(labelled.true_u, labelled.probabilities) if by_class else None,
    )
    if base is None:
        return found
    _, base_mean, _, base_pooled = _over_folds(base, code)
    return replace(found, majority=replace(found, mean=base_mean, pooled=base_pooled).estimates())


def majority(predictions: Predictions, train_counts_by_fold: Mapping[int, Any]) -> Predictions:
    """The same units, predicted by the shares of the classes in training: always the most frequent class."""
    shares_uc = np.empty((len(predictions), len(predictions.classes)))
    for fold in np.unique(predictions.fold_u):
        counts_c = np.asarray(_of_fold(train_counts_by_fold, int(fold), predictions), dtype=np.float64)
        if counts_c.shape != (len(predictions.classes),) or counts_c.sum() <= 0:
            raise InputError(
                f"fold {fold} has no training units, or not a count for each of {len(predictions.classes)} classes.",
                where=predictions.label,
            )
        shares_uc[predictions.fold_u == fold] = counts_c / counts_c.sum()
    return replace(predictions, probabilities_uc=shares_uc)


def class_metrics(true_u: npt.NDArray[Any], predictions: Predictions, positive: int) -> dict[str, float]:
    """Every metric of CLASS_METRICS over these units; `true_u` are their codes, all of them known."""
    scored = score(true_u, predictions.codes_u, predictions.classes)
    recalls = [row.recall for row in scored.per_class if row.support]
    codes = [positive] if len(predictions.classes) == 2 else range(len(predictions.classes))
    ranks = np.array([_rank_pair(true_u == code, predictions.probabilities[:, code]) for code in codes])
    return {
        "accuracy": scored.accuracy,
        "balanced_accuracy": float(np.mean(recalls)),
        "macro_f1": scored.macro_f1,
        "roc_auc": _nan_mean(ranks[:, 0]),
        "pr_auc": _nan_mean(ranks[:, 1]),
        "brier": float(squared_errors(predictions).mean()),
        "ece": reliability(true_u, predictions.probabilities).error,
    }


def number_metrics(true_u: npt.NDArray[Any], predicted_u: npt.NDArray[Any]) -> dict[str, float]:
    """Every metric of NUMBER_METRICS; R2 and Spearman are NaN where a side does not vary."""
    from scipy import stats
    from sklearn import metrics

    varied = len(true_u) > 1 and np.ptp(true_u) > 0
    ranked = varied and np.ptp(predicted_u) > 0
    return {
        "r2": float(metrics.r2_score(true_u, predicted_u)) if varied else math.nan,
        "mae": float(metrics.mean_absolute_error(true_u, predicted_u)),
        "rmse": float(metrics.root_mean_squared_error(true_u, predicted_u)),
        "spearman": float(stats.spearmanr(true_u, predicted_u).statistic) if ranked else math.nan,
    }


def plain(value: Any) -> Any:
    """The same as JSON has it: NumPy numbers as Python's, numbers without a value as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _over_folds(
    predictions: Predictions, positive: int
) -> tuple[tuple[Mapping[str, float], ...], dict[str, float], dict[str, float], dict[str, float]]:
    """Metrics by fold, their mean and deviation, and over all units together."""

    def metrics_of(part: Predictions) -> dict[str, float]:
        if part.kind == "classes":
            return class_metrics(part.true_u, part, positive)
        return number_metrics(part.true_u, part.values_u)

    rows = []
    for fold in np.unique(predictions.fold_u).tolist():
        part = predictions.take(predictions.fold_u == fold)
        rows.append({"fold": fold, "units": len(part), **metrics_of(part)})
    pooled = metrics_of(predictions)
    columns = {metric: np.array([row[metric] for row in rows], dtype=np.float64) for metric in pooled}
    mean = {metric: _nan_mean(values_f) for metric, values_f in columns.items()}
    sd = {metric: _nan_sd(values_f) for metric, values_f in columns.items()}
    return tuple(rows), mean, sd, pooled


def _rank_pair(positive_u: npt.NDArray[np.bool_], scores_u: npt.NDArray[Any]) -> tuple[float, float]:
    from sklearn import metrics

    if positive_u.all() or not positive_u.any():
        return math.nan, math.nan
    return float(metrics.roc_auc_score(positive_u, scores_u)), float(
        metrics.average_precision_score(positive_u, scores_u)
    )


def _class_aucs(predictions: Predictions) -> dict[str, float]:
    by_fold: dict[str, list[float]] = {name: [] for name in predictions.classes}
    for fold in np.unique(predictions.fold_u):
        part = predictions.take(predictions.fold_u == fold)
        for code, name in enumerate(predictions.classes):
            by_fold[name].append(_rank_pair(part.true_u == code, part.probabilities[:, code])[0])
    return {name: _nan_mean(np.array(values)) for name, values in by_fold.items()}


def _per_group(predictions: Predictions) -> tuple[Mapping[str, Any], ...]:
    if predictions.groups_u is None:
        return ()
    rows: list[dict[str, Any]] = []
    for group in np.unique(predictions.groups_u[predictions.groups_u != ""]).tolist():
        part = predictions.take(predictions.groups_u == group)
        row: dict[str, Any] = {"group": str(group), "units": len(part)}
        if part.kind == "classes":
            scored = score(part.true_u, part.codes_u, part.classes)
            row |= {"classes": sum(each.support > 0 for each in scored.per_class), "accuracy": scored.accuracy}
            row |= {"macro_f1": scored.macro_f1}
        else:
            error_u = part.values_u - part.true_u
            row |= {"mae": float(np.abs(error_u).mean()), "bias": float(error_u.mean())}
        rows.append(row)
    return tuple(rows)


def _baseline(
    predictions: Predictions, counts: Mapping[int, Any] | None, means: Mapping[int, float] | None
) -> Predictions | None:
    if predictions.kind == "classes":
        return None if counts is None else majority(predictions, counts)
    if means is None:
        return None
    values_u = np.array([_of_fold(means, int(fold), predictions) for fold in predictions.fold_u], dtype=np.float64)
    return replace(predictions, predicted_u=values_u)


def _of_fold(by_fold: Mapping[int, Any], fold: int, predictions: Predictions) -> Any:
    if fold not in by_fold:
        raise InputError(f"nothing is known of the training part of fold {fold}.", where=predictions.label)
    return by_fold[fold]


def _positive_code(predictions: Predictions, positive: str) -> int:
    if not positive:
        return len(predictions.classes) - 1
    if positive not in predictions.classes:
        hint = did_you_mean(positive, predictions.classes) or f"Classes: {', '.join(predictions.classes)}."
        raise InputError(f"there is no class '{positive}'.", where=predictions.label, fix=hint)
    return predictions.classes.index(positive)


def _nan_mean(values: npt.NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _nan_sd(values: npt.NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else math.nan
