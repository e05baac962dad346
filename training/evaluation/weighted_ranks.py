"""Rank metrics of weighted units, for many weightings at once: what a bootstrap draws, without sorting for every draw.

Axis suffixes: `u` units, `s` units in order of score, `t` distinct scores, `b` weightings (draws).

A weight is how often a unit was drawn. With all weights 1 the numbers are those of scikit-learn (`roc_auc_score`,
`average_precision_score`) and of SciPy (`spearmanr`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranking:
    """Units from the highest score to the lowest, and where a new score begins."""

    order_s: npt.NDArray[np.int64]
    """Positions of the units."""
    positive_s: npt.NDArray[np.float32]
    """1 for units of the class that is looked for, else 0."""
    starts_t: npt.NDArray[np.int64] | None
    """Place of the first unit of each distinct score; None when no two scores are equal."""


def ranking(scores_u: npt.NDArray[Any], positive_u: npt.NDArray[np.bool_], units: npt.NDArray[np.int64]) -> Ranking:
    """The ranking of some units (positions) by score; sorted once for all weightings."""
    order_s = units[np.argsort(-scores_u[units], kind="stable")]
    return Ranking(
        order_s=order_s, positive_s=positive_u[order_s].astype(np.float32), starts_t=_starts(scores_u[order_s])
    )


def rank_metrics(ranked: Ranking, weights_bu: Weights) -> tuple[Values, Values]:
    """ROC AUC and average precision, (b) each, for every weighting; NaN where one of the two kinds has no weight.

    ROC AUC is the area under the trapezoids between distinct scores (Fawcett 2006), which counts ties as half;
    average precision is the sum of precision times gain of recall (as scikit-learn's).
    """
    weights_bs = weights_bu[:, ranked.order_s]
    hits_bt = _per_score(weights_bs * ranked.positive_s, ranked.starts_t)
    all_bt = _per_score(weights_bs, ranked.starts_t)
    # Sums of counts below 2^24 are exact in float32, which halves the memory that is moved.
    hits_before_bt, all_before_bt = np.cumsum(hits_bt, axis=1), np.cumsum(all_bt, axis=1)
    positives_b, total_b = hits_before_bt[:, -1].astype(np.float64), all_before_bt[:, -1].astype(np.float64)
    negatives_b = total_b - positives_b
    area_b = ((all_bt - hits_bt) * (hits_before_bt - hits_bt / 2)).sum(axis=1, dtype=np.float64)
    precision_bt = np.divide(hits_before_bt, all_before_bt, out=np.zeros_like(hits_before_bt), where=all_before_bt > 0)
    gained_b = (hits_bt * precision_bt).sum(axis=1, dtype=np.float64)
    defined_b = (positives_b > 0) & (negatives_b > 0)
    return (
        np.where(defined_b, area_b / np.maximum(positives_b * negatives_b, 1), np.nan),
        np.where(defined_b, gained_b / np.maximum(positives_b, 1), np.nan),
    )


def spearman(true_u: npt.NDArray[Any], predicted_u: npt.NDArray[Any], weights_bu: Weights) -> Values:
    """Spearman's correlation, (b), for every weighting: Pearson's on middle ranks; NaN where one side is constant."""
    weights = weights_bu.astype(np.float64)
    total_b = weights.sum(axis=1)
    sides = [_middle_ranks(values_u, weights) for values_u in (true_u, predicted_u)]
    x_bu, y_bu = (ranks - ((weights * ranks).sum(axis=1) / np.maximum(total_b, 1))[:, None] for ranks in sides)
    spread_b = np.sqrt((weights * x_bu**2).sum(axis=1) * (weights * y_bu**2).sum(axis=1))
    shared_b = (weights * x_bu * y_bu).sum(axis=1)
    return np.divide(shared_b, spread_b, out=np.full(len(total_b), np.nan), where=spread_b > 0)


def _middle_ranks(values_u: npt.NDArray[Any], weights_bu: Values) -> Values:
    """Rank of each unit among all that were drawn, the mean of the ranks of its equals."""
    order_s = np.argsort(values_u, kind="stable")
    starts_t = _starts(values_u[order_s])
    drawn_bt = _per_score(weights_bu[:, order_s], starts_t)
    middle_bt = np.cumsum(drawn_bt, axis=1) - (drawn_bt - 1) / 2
    if starts_t is not None:
        middle_bt = np.repeat(middle_bt, np.diff(np.append(starts_t, len(order_s))), axis=1)
    ranks_bu = np.empty_like(middle_bt)
    ranks_bu[:, order_s] = middle_bt
    return ranks_bu


def _starts(sorted_s: npt.NDArray[Any]) -> npt.NDArray[np.int64] | None:
    changes_s = np.flatnonzero(np.diff(sorted_s) != 0) + 1
    if len(changes_s) == len(sorted_s) - 1:
        return None
    return np.concatenate(([0], changes_s)).astype(np.int64)


def _per_score(values_bs: npt.NDArray[Any], starts_t: npt.NDArray[np.int64] | None) -> npt.NDArray[Any]:
    return values_bs if starts_t is None else np.add.reduceat(values_bs, starts_t, axis=1)
