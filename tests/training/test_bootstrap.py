"""The bootstrap draws what it says, its vectorised metrics are those of each draw, and its intervals hold the truth."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from genescale.platform.errors import SettingsError
from genescale.training.evaluation.bootstrap import bootstrap, clusters, difference
from genescale.training.evaluation.measures import class_metrics, measure
from genescale.training.evaluation.predictions import Predictions
from genescale.training.evaluation.weighted_ranks import rank_metrics, ranking, spearman


def made(n: int, n_classes: int, *, groups: int = 0, seed: int = 0, unit: str = "cells", folds: int = 1) -> Predictions:
    generator = np.random.default_rng(seed)
    true = generator.integers(n_classes, size=n)
    scores = generator.normal(size=(n, n_classes))
    scores[np.arange(n), true] += 1.0
    probabilities = np.exp(scores)
    return Predictions(
        label="x",
        unit=unit,  # type: ignore[arg-type]
        classes=tuple(map(str, range(n_classes))),
        ids_u=np.array([f"u{i:06d}" for i in range(n)]),
        fold_u=np.arange(n) % folds,
        groups_u=np.array([f"g{i}" for i in generator.integers(groups, size=n)]) if groups else None,
        true_u=true,
        probabilities_uc=probabilities / probabilities.sum(axis=1, keepdims=True),
    )


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_weighted_areas_are_those_of_repeated_units(seed: int, ties: bool) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=60)
    scores = np.round(scores) if ties else scores
    positive = generator.random(60) < 0.4
    weights = generator.integers(0, 4, size=(5, 60)).astype(np.float32)
    weights[4] = 1
    roc_b, pr_b = rank_metrics(ranking(scores, positive, np.arange(60)), weights)
    for draw in range(5):
        repeated = np.repeat(np.arange(60), weights[draw].astype(int))
        wanted = metrics.roc_auc_score(positive[repeated], scores[repeated])
        assert roc_b[draw] == pytest.approx(wanted, abs=1e-6)
        wanted = metrics.average_precision_score(positive[repeated], scores[repeated])
        assert pr_b[draw] == pytest.approx(wanted, abs=1e-6)


def test_a_draw_without_one_of_the_kinds_has_no_area() -> None:
    weights = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]], dtype=np.float32)
    positive = np.array([True, True, False, False])
    roc_b, pr_b = rank_metrics(ranking(np.arange(4.0), positive, np.arange(4)), weights)
    assert np.isnan(roc_b).tolist() == np.isnan(pr_b).tolist() == [True, True, False]


@pytest.mark.parametrize("seed", range(3))
def test_weighted_spearman_is_that_of_repeated_units(seed: int) -> None:
    generator = np.random.default_rng(seed)
    true, predicted = generator.normal(size=40).round(seed), generator.normal(size=40)
    weights = generator.integers(0, 3, size=(4, 40)).astype(np.float32)
    found = spearman(true, predicted, weights)
    for draw in range(4):
        repeated = np.repeat(np.arange(40), weights[draw].astype(int))
        assert found[draw] == pytest.approx(stats.spearmanr(true[repeated], predicted[repeated]).statistic)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0), np.ones((1, 3), dtype=np.float32))).all()


@pytest.mark.parametrize("groups", [0, 5])
def test_every_draw_is_measured_as_it_would_be_alone(groups: int) -> None:
    """Each draw is made again by hand: the same clusters, repeated, measured by the functions of the estimates."""
    predictions = made(90, 3, groups=groups, seed=3)
    found = bootstrap(predictions, draws=6, seed=11)
    cluster_u, count, _, _ = clusters(predictions)
    taken = np.random.default_rng(11).integers(count, size=(6, count))
    for draw in range(6):
        units = np.concatenate([np.flatnonzero(cluster_u == cluster) for cluster in taken[draw]])
        part = predictions.take(units)
        wanted = class_metrics(part.true_u, part, positive=2)
        assert {name: values[draw] for name, values in found.samples.items()} == pytest.approx(wanted, abs=1e-5)


def test_donors_are_drawn_and_tell_less_than_their_cells() -> None:
    """A donor shifts all its cells: intervals over cells are far too sure of themselves."""
    generator = np.random.default_rng(1)
    groups = np.repeat(np.arange(12), 200)
    right = generator.random(2_400) < np.repeat(generator.uniform(0.5, 1, 12), 200)
    true = generator.integers(2, size=2_400)
    probabilities = np.where((true == 1) == right, 0.2, 0.8)[:, None] * [1, 0] + [0, 0]
    probabilities[:, 1] = 1 - probabilities[:, 0]
    single = Predictions(
        label="x", unit="cells", classes=("a", "b"), ids_u=np.arange(2_400).astype(str),
        fold_u=np.zeros(2_400, dtype=np.int64), true_u=true, probabilities_uc=probabilities,
    )  # fmt: skip
    grouped = Predictions(**{**vars(single), "groups_u": np.array([f"d{i}" for i in groups])})
    narrow = bootstrap(single, draws=500).intervals["accuracy"]
    wide = bootstrap(grouped, draws=500).intervals["accuracy"]
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Accuracy 0.7 of 150 cells, 200 times: 95 % intervals hold it in 90 to 99 of 100."""
    held = 0
    generator = np.random.default_rng(5)
    for trial in range(200):
        true = (generator.random(150) > 0.7).astype(np.int64)
        predictions = Predictions(
            label="x", unit="genes", classes=("a", "b"), ids_u=np.arange(150).astype(str),
            fold_u=np.zeros(150, dtype=np.int64), true_u=true, probabilities_uc=np.tile([0.7, 0.3], (150, 1)),
        )  # fmt: skip
        interval = bootstrap(predictions, draws=200, seed=trial).intervals["accuracy"]
        held += interval.low <= 0.7 <= interval.high
    assert 180 <= held <= 198


def test_what_is_drawn_is_said() -> None:
    grouped = bootstrap(made(60, 2, groups=4), draws=10)
    assert grouped.drawn == "4 groups"
    assert "too narrow" in grouped.notes[0]
    assert bootstrap(made(300, 2, groups=12), draws=10).notes == ()
    ungrouped = bootstrap(made(60, 2), draws=10)
    assert ungrouped.drawn == "60 cells"
    assert "no groups are known" in ungrouped.notes[0]
    assert "one group only" in bootstrap(made(60, 2, groups=1), draws=10).notes[0]
    genes = bootstrap(made(60, 2, unit="genes"), draws=10)
    assert (genes.drawn, genes.notes) == ("60 genes", ())
    mixed = made(60, 2, groups=3)
    lone = Predictions(**{**vars(mixed), "groups_u": np.where(np.arange(60) < 5, "", mixed.groups_u)})
    assert bootstrap(lone, draws=10).drawn == "8 groups"
    with pytest.raises(SettingsError, match="-1 draws"):
        bootstrap(mixed, draws=-1)


def test_no_draws_and_a_single_unit_give_no_interval() -> None:
    assert bootstrap(made(60, 2), draws=0).intervals == {}
    assert bootstrap(made(60, 2).take(np.array([0])), draws=10).intervals == {}


def test_two_heads_on_the_same_units_are_compared_draw_by_draw() -> None:
    better, worse = made(400, 3, groups=15, seed=0), made(400, 3, groups=15, seed=0)
    flat = 0.25 * worse.probabilities + 0.25
    scrambled = np.where(np.arange(400)[:, None] % 4 == 0, flat[:, [1, 2, 0]], flat)
    worse = Predictions(**{**vars(worse), "probabilities_uc": scrambled / scrambled.sum(axis=1, keepdims=True)})
    shuffled = worse.take(np.random.default_rng(0).permutation(400))
    ours, theirs = measure(better, bootstrap=300), measure(shuffled, bootstrap=300)
    gain = difference(ours.intervals, theirs.intervals, "accuracy")
    assert gain is not None
    assert 0 < gain.low <= ours["accuracy"] - theirs["accuracy"] <= gain.high
    alone = ours.intervals.intervals["accuracy"]
    assert gain.high - gain.low < 1.5 * (alone.high - alone.low)
    # Other units, other draws or another seed cannot be paired.
    assert difference(ours.intervals, measure(better.take(np.arange(399)), bootstrap=300).intervals, "accuracy") is None
    assert difference(ours.intervals, measure(better, bootstrap=300, seed=1).intervals, "accuracy") is None
    assert difference(ours.intervals, measure(better, bootstrap=0).intervals, "accuracy") is None


def test_ten_thousand_cells_take_seconds() -> None:
    predictions = made(10_000, 3, groups=20, folds=2)
    began = time.process_time()
    assert bootstrap(predictions, draws=1000).draws == 1000
    assert time.process_time() - began < 15
