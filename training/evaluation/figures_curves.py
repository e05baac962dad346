"""The numbers behind ROC, precision-recall and confusion figures.

Axis suffixes: `u` units, `c` classes, `f` folds, `x` places of the common axis.

Curves of several folds or classes are averaged upwards: at each place of the horizontal axis, the mean height of the
curves there (Fawcett, "An introduction to ROC analysis", 2006, section 8: vertical averaging).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.training.evaluation.predictions import Predictions

PLACES = 101
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """A curve in the unit square, by rising x."""

    name: str
    x: Values
    y: Values


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """Single curves (one a fold, or with more than two classes one a class) and their mean; `base` is chance."""

    single: tuple[Curve, ...]
    mean: Curve
    base: float


def roc_curves(predictions: Predictions, positive: int) -> Curves | None:
    """True positive rate over false positive rate; None when no fold has both kinds of units."""
    return _curves(predictions, positive, _roc, base=0.5)


def precision_recall_curves(predictions: Predictions, positive: int) -> Curves | None:
    """Precision over recall; `base` is the share of positive units (mean over classes when there are more than two)."""
    shares = np.bincount(predictions.true_u, minlength=len(predictions.classes)) / max(len(predictions), 1)
    base = float(shares[positive]) if len(predictions.classes) == 2 else float(shares[shares > 0].mean())
    return _curves(predictions, positive, _precision_recall, base=base)


def _curves(predictions: Predictions, positive: int, of: Any, *, base: float) -> Curves | None:
    folds = np.unique(predictions.fold_u)
    two = len(predictions.classes) == 2
    codes = [positive] if two else range(len(predictions.classes))
    single = []
    for code in codes:
        by_fold = []
        for fold in folds:
            part = predictions.take(predictions.fold_u == fold)
            curve = of(part.true_u == code, part.probabilities[:, code])
            if curve is not None:
                by_fold.append(Curve(name=f"fold {fold + 1}", x=curve[0], y=curve[1]))
        if two:
            single = by_fold
        elif by_fold:
            mean = _mean(by_fold)
            single.append(Curve(name=predictions.classes[code], x=mean.x, y=mean.y))
    if not single:
        return None
    return Curves(single=tuple(single), mean=single[0] if len(single) == 1 else _mean(single), base=base)


def _roc(positive_u: npt.NDArray[np.bool_], scores_u: npt.NDArray[Any]) -> tuple[Values, Values] | None:
    from sklearn import metrics

    if positive_u.all() or not positive_u.any():
        return None
    false_x, true_x, _ = metrics.roc_curve(positive_u, scores_u)
    return false_x, true_x


def _precision_recall(positive_u: npt.NDArray[np.bool_], scores_u: npt.NDArray[Any]) -> tuple[Values, Values] | None:
    from sklearn import metrics

    if positive_u.all() or not positive_u.any():
        return None
    precision_x, recall_x, _ = metrics.precision_recall_curve(positive_u, scores_u)
    recall_x, precision_x = recall_x[::-1], precision_x[::-1].copy()
    # Precision at no recall is 1 by agreement only; drawn is that of the highest score.
    precision_x[0] = precision_x[1]
    return recall_x, precision_x


def _mean(curves: list[Curve]) -> Curve:
    places_x = np.linspace(0, 1, PLACES)
    heights = np.stack([np.interp(places_x, curve.x, curve.y) for curve in curves])
    # All curves begin where they begin, however steeply they rise there.
    first = float(np.mean([curve.y[0] for curve in curves]))
    return Curve(name="mean", x=np.append(0.0, places_x), y=np.append(first, heights.mean(axis=0)))


def thinned(curve: Curve, most: int = 240) -> Curve:
    """The curve with at most so many points, its ends and evenly spaced ones between: a figure has no more pixels."""
    if len(curve.x) <= most:
        return curve
    kept = np.unique(np.linspace(0, len(curve.x) - 1, most).round().astype(np.int64))
    return Curve(name=curve.name, x=curve.x[kept], y=curve.y[kept])
