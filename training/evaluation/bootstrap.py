"""Confidence intervals by drawing whole donors (or genes) again: the percentile bootstrap, vectorised over draws.

Axis suffixes: `u` units, `g` clusters (donors, or single units), `b` draws of one block, `c` classes, `k` sums.

Each draw takes as many clusters as there are, with replacement, and weighs a unit by how often its cluster was taken;
the interval runs from the 2.5th to the 97.5th percentile of the metric over all draws (Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993, section 13.3). Whole donors are drawn because cells of one donor resemble each
other: drawing cells would promise far more than a handful of donors can tell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from genescale.platform.errors import SettingsError
from genescale.training.evaluation.calibration import BINS, bin_of
from genescale.training.evaluation.predictions import Predictions
from genescale.training.evaluation.weighted_ranks import Ranking, Values, Weights, rank_metrics, ranking, spearman

METHOD = "95 % percentile bootstrap"
QUANTILES = (0.025, 0.975)
FEW_CLUSTERS = 10
"""Below so many donors the percentile interval is known to be too narrow, and the report says so."""
_WEIGHTS_AT_ONCE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % interval; `undefined` counts draws in which the metric had no value (a class was missing)."""

    low: float
    high: float
    undefined: int = 0


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Intervals by metric, what was drawn (`9 groups`, `412 genes`), and what to keep in mind about them."""

    intervals: Mapping[str, Interval]
    drawn: str
    draws: int
    notes: tuple[str, ...] = ()
    samples: Mapping[str, Values] = field(default_factory=dict, repr=False)
    """Values of every draw, by metric: draws of two heads on the same units with the same seed are the same draws."""
    key: str = ""
    """What was drawn from, and how: equal keys mean equal draws."""


def difference(ours: Bootstrap, theirs: Bootstrap, metric: str) -> Interval | None:
    """Interval of the first head's metric minus the second's, draw by draw; None unless both saw the same draws."""
    if not ours.key or ours.key != theirs.key or metric not in ours.samples or metric not in theirs.samples:
        return None
    return _interval(ours.samples[metric] - theirs.samples[metric])


def bootstrap(predictions: Predictions, *, positive: int = 1, draws: int = 1000, seed: int = 0) -> Bootstrap:
    """Intervals of every metric of labelled predictions.

    ROC AUC and PR AUC are means over folds, because scores of two folds come from two heads; all others are taken over
    the units of all folds together. positive: code of the class that two-class rank metrics look for.
    """
    if draws < 0:
        raise SettingsError(f"{draws} draws.", where="bootstrap", fix="Use 0 for no intervals, or for example 1000.")
    cluster_u, n_clusters, drawn, notes = clusters(predictions)
    if not draws or n_clusters < 2:
        return Bootstrap(intervals={}, drawn=drawn, draws=0, notes=notes)
    by_class = predictions.kind == "classes"
    sums: _Sums = (_ClassSums if by_class else _NumberSums)(predictions, cluster_u)
    rankings = _rankings(predictions, positive) if by_class else []
    generator = np.random.default_rng(seed)
    found: dict[str, list[Values]] = {}
    step = max(1, _WEIGHTS_AT_ONCE // max(len(predictions), n_clusters))
    for start in range(0, draws, step):
        weights_bg = _drawn(generator, min(step, draws - start), n_clusters)
        values, weights_bu = sums.metrics(weights_bg), weights_bg[:, cluster_u]
        if by_class:
            values |= _rank_means(rankings, weights_bu)
        else:
            values["spearman"] = spearman(predictions.true_u, predictions.values_u, weights_bu)
        for name, values_b in values.items():
            found.setdefault(name, []).append(values_b)
    samples = {name: np.concatenate(blocks) for name, blocks in found.items()}
    return Bootstrap(
        intervals={name: _interval(values) for name, values in samples.items()},
        drawn=drawn,
        draws=draws,
        notes=notes,
        samples=samples,
        key=_key(predictions, cluster_u, draws, seed),
    )


def clusters(predictions: Predictions) -> tuple[npt.NDArray[np.int64], int, str, tuple[str, ...]]:
    """Cluster of each unit, how many there are, what they are in words, and what to keep in mind.

    Groups are drawn where there are two or more, otherwise single units; a unit without a group is its own cluster.
    """
    n, unit, groups_u = len(predictions), predictions.unit, predictions.groups_u
    names = set() if groups_u is None else {str(name) for name in np.unique(groups_u)} - {""}
    if groups_u is None or len(names) < 2:
        why = "there is one group only" if names else "no groups are known"
        note = f"Intervals draw single cells, because {why}: they say nothing about how another donor would do."
        return np.arange(n), n, f"{n:,} {unit}", (note,) if unit == "cells" else ()
    lone_u = groups_u == ""
    cluster_u = np.unique(groups_u, return_inverse=True)[1].astype(np.int64)
    cluster_u[lone_u] = n + np.arange(int(lone_u.sum()))
    cluster_u = np.unique(cluster_u, return_inverse=True)[1].astype(np.int64)
    count = int(cluster_u.max()) + 1
    note = f"Intervals rest on {count} groups; with fewer than {FEW_CLUSTERS} they come out too narrow."
    return cluster_u, count, f"{count:,} groups", (note,) if count < FEW_CLUSTERS else ()


def squared_errors(predictions: Predictions) -> Values:
    """(u) Brier score of each unit: sum over classes of squared errors of the probability; halved for two classes.

    Brier, "Verification of forecasts expressed in terms of probability", 1950; with two classes the half is the usual
    squared error of the probability of one of them, from 0 to 1 (as scikit-learn's).
    """
    truth_uc = np.arange(len(predictions.classes)) == predictions.true_u[:, None]
    errors_u: Values = ((predictions.probabilities - truth_uc) ** 2).sum(axis=1, dtype=np.float64)
    return errors_u / 2 if len(predictions.classes) == 2 else errors_u


class _Sums(Protocol):
    def metrics(self, weights_bg: Weights) -> dict[str, Values]:
        """Metrics of each draw, (b) each."""


class _ClassSums:
    """What of a class head's metrics is a sum over units: the confusion matrix, squared errors, calibration bins."""

    def __init__(self, predictions: Predictions, cluster_u: npt.NDArray[np.int64]) -> None:
        from scipy import sparse

        self.n_classes = len(predictions.classes)
        square, codes_u, true_u = self.n_classes**2, predictions.codes_u, predictions.true_u
        confidence_u = predictions.probabilities.max(axis=1).astype(np.float64)
        # One column a sum: the confusion matrix, the squared error, and by bin the hits less the probability.
        columns_u = (true_u * self.n_classes + codes_u, np.full(len(true_u), square), square + 1 + bin_of(confidence_u))
        values_u = (np.ones(len(true_u)), squared_errors(predictions), (codes_u == true_u) - confidence_u)
        places = (np.tile(cluster_u, len(columns_u)), np.concatenate(columns_u))
        shape = (int(cluster_u.max()) + 1, square + 1 + BINS)
        self.sums_gk = sparse.coo_array((np.concatenate(values_u), places), shape=shape).tocsr()

    def metrics(self, weights_bg: Weights) -> dict[str, Values]:
        """Accuracy, balanced accuracy, macro F1, Brier score and calibration error of each draw."""
        sums_bk: Values = np.asarray((self.sums_gk.T @ weights_bg.T.astype(np.float64)).T)
        square = self.n_classes**2
        confusion_bcc = sums_bk[:, :square].reshape(-1, self.n_classes, self.n_classes)
        hits_bc = np.diagonal(confusion_bcc, axis1=1, axis2=2)
        true_bc, predicted_bc = confusion_bcc.sum(axis=2), confusion_bcc.sum(axis=1)
        total_b, either_bc = true_bc.sum(axis=1), true_bc + predicted_bc
        return {
            "accuracy": hits_bc.sum(axis=1) / total_b,
            "balanced_accuracy": _mean(hits_bc / np.maximum(true_bc, 1), true_bc > 0),
            "macro_f1": _mean(2 * hits_bc / np.maximum(either_bc, 1), either_bc > 0),
            "brier": sums_bk[:, square] / total_b,
            "ece": np.abs(sums_bk[:, square + 1 :]).sum(axis=1) / total_b,
        }


class _NumberSums:
    """What of a number head's metrics is a sum over units."""

    def __init__(self, predictions: Predictions, cluster_u: npt.NDArray[np.int64]) -> None:
        true_u = predictions.true_u - predictions.true_u.mean()
        error_u = predictions.values_u - predictions.true_u
        columns_ku = np.stack([np.ones(len(true_u)), true_u, true_u**2, np.abs(error_u), error_u**2])
        self.sums_gk = np.stack([np.bincount(cluster_u, weights=column_u) for column_u in columns_ku], axis=1)

    def metrics(self, weights_bg: Weights) -> dict[str, Values]:
        """R2, mean absolute error and root mean squared error of each draw."""
        total_b, true_b, squares_b, absolute_b, errors_b = (weights_bg.astype(np.float64) @ self.sums_gk).T
        spread_b = squares_b - true_b**2 / total_b
        # A draw of equal values leaves rounding, no spread.
        varied_b = spread_b > 1e-12 * np.maximum(squares_b, 1e-300)
        ratio_b = np.divide(errors_b, spread_b, out=np.full(len(total_b), np.nan), where=varied_b)
        return {"r2": 1 - ratio_b, "mae": absolute_b / total_b, "rmse": np.sqrt(errors_b / total_b)}


def _rankings(predictions: Predictions, positive: int) -> list[list[Ranking]]:
    """By fold, the rankings whose metrics are averaged: of the positive class, or of each class against the rest."""
    codes = [positive] if len(predictions.classes) == 2 else range(len(predictions.classes))
    scores_uc, true_u = predictions.probabilities, predictions.true_u
    return [
        [ranking(scores_uc[:, code], true_u == code, np.flatnonzero(predictions.fold_u == fold)) for code in codes]
        for fold in np.unique(predictions.fold_u)
    ]


def _rank_means(rankings: Sequence[Sequence[Ranking]], weights_bu: Weights) -> dict[str, Values]:
    """Mean over folds of the mean over classes, each over those that have a value."""
    by_fold = []
    for ranked in rankings:
        both_cb = np.array([rank_metrics(each, weights_bu) for each in ranked])
        by_fold.append([_mean(both_cb[:, metric].T, ~np.isnan(both_cb[:, metric].T)) for metric in range(2)])
    both_fb = np.array(by_fold)
    roc_b, pr_b = (_mean(both_fb[:, metric].T, ~np.isnan(both_fb[:, metric].T)) for metric in range(2))
    return {"roc_auc": roc_b, "pr_auc": pr_b}


def _mean(values_bc: npt.NDArray[Any], counts_bc: npt.NDArray[np.bool_]) -> Values:
    """Mean of each row over the marked columns; NaN where none is marked."""
    number_b = counts_bc.sum(axis=1)
    sums_b = np.where(counts_bc, values_bc, 0.0).sum(axis=1)
    return np.divide(sums_b, number_b, out=np.full(len(sums_b), np.nan), where=number_b > 0)


def _drawn(generator: np.random.Generator, draws: int, n_clusters: int) -> Weights:
    """(b, g) how often each cluster was taken."""
    taken = generator.integers(n_clusters, size=(draws, n_clusters)) + np.arange(draws)[:, None] * n_clusters
    return np.bincount(taken.ravel(), minlength=draws * n_clusters).reshape(draws, n_clusters).astype(np.float32)


def _key(predictions: Predictions, cluster_u: npt.NDArray[np.int64], draws: int, seed: int) -> str:
    digest = hashlib.sha256(f"{draws} {seed}".encode())
    for values in (predictions.ids_u, predictions.fold_u, cluster_u):
        digest.update(repr(values.tolist()).encode())
    return digest.hexdigest()


def _interval(values_b: Values) -> Interval:
    defined_b = values_b[~np.isnan(values_b)]
    low, high = np.quantile(defined_b, QUANTILES) if len(defined_b) else (np.nan, np.nan)
    return Interval(low=float(low), high=float(high), undefined=len(values_b) - len(defined_b))
