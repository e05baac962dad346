"""Measures agree with scikit-learn and SciPy, and cases in which a metric has no value are what they are said to be."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from genescale.platform.errors import InputError
from genescale.training.evaluation.calibration import bin_of, reliability
from genescale.training.evaluation.measures import CLASS_METRICS, measure
from genescale.training.evaluation.predictions import Predictions

Array = np.ndarray[Any, Any]


def classes(
    true: Array, probabilities: Array, *, folds: Array | None = None, groups: Array | None = None
) -> Predictions:
    n = len(true)
    return Predictions(
        label="cell_type",
        unit="cells",
        classes=tuple(f"class {i}" for i in range(probabilities.shape[1])),
        ids_u=np.array([f"cell{i}" for i in range(n)]),
        fold_u=np.zeros(n, dtype=np.int64) if folds is None else folds,
        groups_u=groups,
        true_u=true,
        probabilities_uc=probabilities,
    )


def numbers(true: Array, predicted: Array, *, groups: Array | None = None) -> Predictions:
    n = len(true)
    ids, folds = np.array([f"cell{i}" for i in range(n)]), np.zeros(n, dtype=np.int64)
    return Predictions(
        label="age", unit="cells", ids_u=ids, fold_u=folds, true_u=true, predicted_u=predicted, groups_u=groups
    )


def drawn(n: int, n_classes: int, seed: int, *, strength: float = 1.0, steps: int = 0) -> tuple[Array, Array]:
    """True classes and probabilities that know something of them; `steps` rounds them, which makes ties."""
    generator = np.random.default_rng(seed)
    true = generator.integers(n_classes, size=n)
    scores = generator.normal(size=(n, n_classes))
    scores[np.arange(n), true] += strength
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    if steps:
        probabilities = np.round(probabilities * steps) / steps
        probabilities[:, 0] = 1 - probabilities[:, 1:].sum(axis=1)
    return true, probabilities


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", [0, 8])
def test_two_classes_as_scikit_learn_measures_them(seed: int, steps: int) -> None:
    true, probabilities = drawn(120, 2, seed, steps=steps)
    found = measure(classes(true, probabilities), bootstrap=0)
    predicted = probabilities.argmax(axis=1)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, predicted))
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(true, predicted))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(true, predicted, average="macro"))
    assert found["roc_auc"] == pytest.approx(metrics.roc_auc_score(true, probabilities[:, 1]))
    assert found["pr_auc"] == pytest.approx(metrics.average_precision_score(true, probabilities[:, 1]))
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(true, probabilities[:, 1]))
    other = measure(classes(true, probabilities), bootstrap=0, positive="class 0")
    assert other.positive == "class 0"
    assert other["roc_auc"] == pytest.approx(found["roc_auc"])
    assert other["pr_auc"] == pytest.approx(metrics.average_precision_score(true == 0, probabilities[:, 0]))
    with pytest.raises(InputError, match="class 0"):
        measure(classes(true, probabilities), positive="klass 0")


@pytest.mark.parametrize("seed", range(3))
def test_several_classes_as_scikit_learn_measures_them(seed: int) -> None:
    true, probabilities = drawn(200, 5, seed)
    found = measure(classes(true, probabilities), bootstrap=0)
    wanted = metrics.roc_auc_score(true, probabilities, multi_class="ovr", average="macro")
    assert found["roc_auc"] == pytest.approx(wanted)
    by_class = metrics.roc_auc_score(true, probabilities, multi_class="ovr", average=None)
    assert list(found.roc_auc_per_class.values()) == pytest.approx(by_class.tolist())
    one_hot = np.eye(5)[true]
    assert found["pr_auc"] == pytest.approx(metrics.average_precision_score(one_hot, probabilities, average="macro"))
    assert found["brier"] == pytest.approx(((probabilities - one_hot) ** 2).sum(axis=1).mean())
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(true, probabilities.argmax(1)))
    assert found.confusion_cc.tolist() == metrics.confusion_matrix(true, probabilities.argmax(1)).tolist()
    assert (found.positive, found.headline) == ("", "macro_f1")


@pytest.mark.parametrize("seed", range(3))
def test_numbers_as_scikit_learn_and_scipy_measure_them(seed: int) -> None:
    generator = np.random.default_rng(seed)
    true = generator.normal(size=80).round(1)
    predicted = (true + generator.normal(size=80)).round(1)
    found = measure(numbers(true, predicted), train_means_by_fold={0: 0.5}, bootstrap=0)
    assert found["r2"] == pytest.approx(metrics.r2_score(true, predicted))
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(true, predicted))
    assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(true, predicted))
    assert found["spearman"] == pytest.approx(stats.spearmanr(true, predicted).statistic)
    assert found.majority["mae"] == pytest.approx(np.abs(true - 0.5).mean())
    # A constant has no order.
    assert math.isnan(found.majority["spearman"])


def test_calibration_error_by_hand() -> None:
    assert bin_of(np.array([0.0, 1 / 15, 0.0667, 0.5, 1.0])).tolist() == [0, 0, 1, 7, 14]
    # Four cells said with 0.6, three of them right, and two with 0.95, one right.
    probabilities = np.array([[0.6, 0.4]] * 4 + [[0.05, 0.95]] * 2)
    true = np.array([0, 0, 0, 1, 1, 0])
    found = reliability(true, probabilities)
    assert found.error == pytest.approx(4 / 6 * abs(0.75 - 0.6) + 2 / 6 * abs(0.5 - 0.95))
    assert found.units_k[[8, 14]].tolist() == [4, 2]
    assert found.accuracy_k[8] == 0.75
    assert np.isnan(found.confidence_k[0])
    assert measure(classes(true, probabilities), bootstrap=0)["ece"] == pytest.approx(found.error)
    assert math.isnan(reliability(np.empty(0, dtype=np.int64), np.empty((0, 2))).error)


def test_calibrated_probabilities_have_a_small_error_and_overconfident_ones_a_large_one() -> None:
    generator = np.random.default_rng(0)
    stated = generator.uniform(0.5, 1, size=20_000)
    true = (generator.uniform(size=20_000) > stated).astype(np.int64)
    assert measure(classes(true, np.stack([stated, 1 - stated], axis=1)), bootstrap=0)["ece"] < 0.01
    sure = np.full(20_000, 0.999)
    gap = 0.999 - (true == 0).mean()
    assert measure(classes(true, np.stack([sure, 1 - sure], axis=1)), bootstrap=0)["ece"] == pytest.approx(gap)


def test_folds_have_their_own_numbers_and_rank_metrics_are_their_mean() -> None:
    true, probabilities = drawn(300, 2, 4)
    folds = np.arange(300) % 3
    # The third fold's head is shifted: within the fold nothing changes, over all units the order does.
    shifted = probabilities.copy()
    shifted[folds == 2, 1] *= 0.2
    shifted[:, 0] = 1 - shifted[:, 1]
    found = measure(classes(true, shifted, folds=folds), bootstrap=0)
    by_fold = [metrics.roc_auc_score(true[folds == f], probabilities[folds == f, 1]) for f in range(3)]
    assert [row["roc_auc"] for row in found.per_fold] == pytest.approx(by_fold)
    assert [row["units"] for row in found.per_fold] == [100, 100, 100]
    assert found["roc_auc"] == found.mean["roc_auc"] == pytest.approx(np.mean(by_fold))
    assert found.sd["roc_auc"] == pytest.approx(np.std(by_fold, ddof=1))
    assert found.pooled["roc_auc"] == pytest.approx(metrics.roc_auc_score(true, shifted[:, 1]))
    assert found.pooled["roc_auc"] < found["roc_auc"]
    assert found["accuracy"] == found.pooled["accuracy"]
    assert math.isnan(measure(classes(true, shifted), bootstrap=0).sd["roc_auc"])


def test_a_class_that_a_fold_does_not_have() -> None:
    true = np.array([0, 1, 0, 1, 0, 0, 2, 0])
    probabilities = np.tile([0.5, 0.3, 0.2], (8, 1))
    folds = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    found = measure(classes(true, probabilities, folds=folds), bootstrap=50)
    # Constant predictions: every area is a half, over the classes that have units on both sides.
    assert [row["roc_auc"] for row in found.per_fold] == [0.5, 0.5]
    assert [row["balanced_accuracy"] for row in found.per_fold] == [0.5, 0.5]
    assert found.roc_auc_per_class == {"class 0": 0.5, "class 1": 0.5, "class 2": 0.5}
    one = measure(classes(np.zeros(5, dtype=np.int64), probabilities[:5]), bootstrap=20)
    assert math.isnan(one["roc_auc"])
    assert math.isnan(one["pr_auc"])
    assert one["accuracy"] == 1.0
    assert one.intervals.intervals["roc_auc"].undefined == 20
    told = json.dumps(one.to_json(), allow_nan=False)
    assert json.loads(told)["estimates"]["roc_auc"] is None
    assert "test_roc_auc" not in one.tracked()


def test_numbers_without_spread_have_no_r2() -> None:
    found = measure(numbers(np.ones(10), np.linspace(0, 1, 10)), bootstrap=20)
    assert math.isnan(found["r2"])
    assert math.isnan(found["spearman"])
    assert found.intervals.intervals["r2"].undefined == 20
    assert found["mae"] == pytest.approx(0.5)


def test_the_majority_is_that_of_the_training_part_of_each_fold() -> None:
    true, probabilities = drawn(100, 3, 1)
    folds = (np.arange(100) >= 50).astype(np.int64)
    counts = {0: [5, 90, 5], 1: [0, 1, 9]}
    found = measure(classes(true, probabilities, folds=folds), train_counts_by_fold=counts, bootstrap=0)
    always = np.where(folds == 0, 1, 2)
    assert found.majority["accuracy"] == pytest.approx((true == always).mean())
    assert found.majority["roc_auc"] == 0.5
    assert found.majority["macro_f1"] == pytest.approx(metrics.f1_score(true, always, average="macro"))
    with pytest.raises(InputError, match="training part of fold 1"):
        measure(classes(true, probabilities, folds=folds), train_counts_by_fold={0: [1, 1, 1]}, bootstrap=0)
    with pytest.raises(InputError, match="fold 0"):
        measure(classes(true, probabilities), train_counts_by_fold={0: [1, 1]}, bootstrap=0)


def test_units_without_a_label_are_counted_and_not_measured() -> None:
    true, probabilities = drawn(50, 2, 2)
    hidden = np.where(np.arange(50) < 20, -1, true)
    found = measure(classes(hidden, probabilities), bootstrap=0)
    assert (found.units, found.unlabelled) == (30, 20)
    assert found["accuracy"] == pytest.approx((probabilities.argmax(1) == true)[20:].mean())
    with pytest.raises(InputError, match="no held-out unit"):
        measure(classes(np.full(50, -1), probabilities))


def test_groups_have_their_own_rows() -> None:
    true, probabilities = drawn(60, 3, 3)
    groups = np.array([f"donor {i % 4}" for i in range(60)])
    groups[0] = ""
    found = measure(classes(true, probabilities, groups=groups), bootstrap=0)
    assert [row["group"] for row in found.per_group] == [f"donor {i}" for i in range(4)]
    assert sum(row["units"] for row in found.per_group) == 59
    mine = groups == "donor 2"
    assert found.per_group[2]["accuracy"] == pytest.approx((probabilities.argmax(1) == true)[mine].mean())
    ages = measure(numbers(np.arange(4.0), np.array([1, 1, 4, 3.0]), groups=np.array(list("aabb"))), bootstrap=0)
    assert [(row["mae"], row["bias"]) for row in ages.per_group] == [(0.5, 0.5), (1.0, 1.0)]


def test_numbers_do_not_depend_on_the_order_of_units() -> None:
    true, probabilities = drawn(80, 3, 6)
    groups = np.array([f"donor {i % 12}" for i in range(80)])
    straight = classes(true, probabilities, groups=groups)
    mixed = straight.take(np.random.default_rng(0).permutation(80))
    assert measure(straight, bootstrap=100).to_json() == measure(mixed, bootstrap=100).to_json()


def test_everything_is_tracked_and_named() -> None:
    true, probabilities = drawn(80, 3, 6)
    found = measure(classes(true, probabilities), train_counts_by_fold={0: [1, 2, 3]}, bootstrap=50)
    tracked = found.tracked()
    assert {f"test_{metric}" for metric in CLASS_METRICS} <= set(tracked)
    assert tracked["test_macro_f1_low"] < tracked["test_macro_f1"] < tracked["test_macro_f1_high"]
    assert tracked["test_majority_roc_auc"] == 0.5
    with pytest.raises(InputError, match="macro_f1"):
        found["macro_f"]
    assert replace(found, kind="number").metrics[0] == "r2"
