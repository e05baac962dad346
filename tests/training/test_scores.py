"""Scores agree with scikit-learn, and the majority baseline is what it says."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from genescale.training.evaluation.scores import majority_scores, score

CLASSES = ("a", "b", "c", "d")


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_those_of_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    true_n, predicted_n = generator.integers(3, size=50), generator.integers(4, size=50)
    ours = score(true_n, predicted_n, CLASSES)
    assert ours.accuracy == pytest.approx(metrics.accuracy_score(true_n, predicted_n))
    assert ours.macro_f1 == pytest.approx(metrics.f1_score(true_n, predicted_n, average="macro"))
    table = metrics.precision_recall_fscore_support(true_n, predicted_n, labels=range(4), zero_division=0)
    for row, precision, recall, f1, support in zip(ours.per_class, *table, strict=True):
        assert (row.precision, row.recall, row.f1, row.support) == pytest.approx((precision, recall, f1, support))
    assert ours.confusion_cc.tolist() == metrics.confusion_matrix(true_n, predicted_n, labels=range(4)).tolist()


def test_majority_baseline_predicts_the_most_frequent_training_class() -> None:
    baseline = majority_scores(np.array([1, 1, 1, 0, 2]), np.array([0, 0, 1, 2]), CLASSES)
    assert baseline.accuracy == 0.25
    assert baseline.confusion_cc[:, 1].sum() == 4
