"""How well predicted classes agree with the true ones: pure functions of class codes.

Axis suffixes: `n` cells, `c` classes. Codes are int64 positions in the list of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """Scores of one class; `support` is its number of true cells."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Agreement on one set of cells; `confusion_cc[i, j]` counts cells of true class i predicted as class j."""

    accuracy: float
    macro_f1: float
    per_class: tuple[ClassScore, ...]
    confusion_cc: np.ndarray


def score(true_n: np.ndarray, predicted_n: np.ndarray, classes: Sequence[str]) -> Scores:
    """Accuracy, macro F1, per-class table and confusion matrix of two code arrays.

    Macro F1 is the plain mean over the classes that occur among the true or the predicted cells (as scikit-learn's
    default); a class without true positives has F1 = 0.
    """
    confusion_cc = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion_cc, (true_n, predicted_n), 1)
    hits_c, true_c, predicted_c = np.diag(confusion_cc), confusion_cc.sum(axis=1), confusion_cc.sum(axis=0)
    precision_c = hits_c / np.maximum(predicted_c, 1)
    recall_c = hits_c / np.maximum(true_c, 1)
    f1_c = 2 * hits_c / np.maximum(true_c + predicted_c, 1)
    present_c = (true_c + predicted_c) > 0
    return Scores(
        accuracy=float(hits_c.sum() / max(len(true_n), 1)),
        macro_f1=float(f1_c[present_c].mean()) if present_c.any() else 0.0,
        per_class=tuple(
            ClassScore(name=name, precision=float(p), recall=float(r), f1=float(f), support=int(s))
            for name, p, r, f, s in zip(classes, precision_c, recall_c, f1_c, true_c, strict=True)
        ),
        confusion_cc=confusion_cc,
    )


def majority_scores(train_n: np.ndarray, true_n: np.ndarray, classes: Sequence[str]) -> Scores:
    """What predicting the most frequent training class for every cell would score: the bar a head must pass."""
    majority = int(np.bincount(train_n, minlength=len(classes)).argmax())
    return score(true_n, np.full(len(true_n), majority, dtype=np.int64), classes)
