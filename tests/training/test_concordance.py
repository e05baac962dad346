"""One classifier on two kinds of cells: what agrees, how surely, and which genes change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from genescale.platform.errors import InputError, SettingsError
from genescale.training.labels.concordance import cohen_kappa, concordance

CLASSES = ("insensitive", "sensitive")


def both_classes(sensitive: list[float]) -> np.ndarray:
    return np.column_stack([1 - np.array(sensitive), sensitive])


def test_shares_are_counted_over_the_genes_that_both_have() -> None:
    found = concordance(
        ["g1", "g2", "g3", "g4", "g5", "only"],
        both_classes([0.9, 0.95, 0.1, 0.6, 0.85, 0.5]),
        ["g5", "g4", "g3", "g2", "g1", "never"],
        both_classes([0.3, 0.7, 0.05, 0.9, 0.55, np.nan]),
        CLASSES,
    )
    assert (found.units, found.only_first, found.only_second) == (5, 1, 0)
    assert found.agreement.value == pytest.approx(4 / 5)
    assert (found.confident, found.confident_agreement.value) == (4, pytest.approx(3 / 4))
    assert (found.both_confident, found.both_confident_agreement.value) == (2, 1.0)
    assert found.changed == (("g5", "sensitive", "insensitive"),)
    assert found.to_dict()["classes"] == CLASSES


def test_kappa_and_correlation_are_those_of_the_libraries() -> None:
    from scipy.stats import spearmanr
    from sklearn.metrics import cohen_kappa_score

    draws = np.random.default_rng(0)
    first = draws.dirichlet([1, 1, 1], size=80)
    second = 0.6 * first + 0.4 * draws.dirichlet([1, 1, 1], size=80)
    ids = [f"g{number}" for number in range(80)]
    found = concordance(ids, first, ids, second, ("a", "b", "c"), bootstrap=200)
    calls = first.argmax(axis=1), second.argmax(axis=1)
    assert found.kappa.value == pytest.approx(cohen_kappa_score(*calls))
    # The order of the units is that of their ids, so ties cannot hide a mix-up of columns.
    for code in range(3):
        assert found.spearman[code].value == pytest.approx(spearmanr(first[:, code], second[:, code]).statistic)
    for interval in (found.agreement, found.kappa, *found.spearman):
        assert interval.low < interval.value < interval.high
    assert found.kappa.high - found.kappa.low < 0.5
    assert np.isnan(cohen_kappa(np.zeros(3, dtype=int), np.zeros(3, dtype=int), 2))


def test_the_same_seed_gives_the_same_interval() -> None:
    draws = np.random.default_rng(1).random(30)
    ids = [f"g{number}" for number in range(30)]
    scores = both_classes(draws.tolist()), both_classes(draws[::-1].tolist())
    first, again, other = (concordance(ids, scores[0], ids, scores[1], CLASSES, seed=s).kappa for s in (0, 0, 1))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_without_confident_genes_the_share_is_not_defined() -> None:
    found = concordance(["a", "b"], both_classes([0.6, 0.4]), ["a", "b"], both_classes([0.6, 0.4]), CLASSES)
    assert found.confident == 0
    assert np.isnan([found.confident_agreement.value, found.confident_agreement.low]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second_ids": ["x", "y"]}, "no unit has a score in both"),
        ({"first_ids": ["a", "a"]}, "two scores"),
        ({"classes": ("one",)}, "shape"),
        ({"confidence": 0.0}, "confidence"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(changes: dict[str, Any], message: str) -> None:
    scores = both_classes([0.2, 0.7])
    arguments = {"first_ids": ["a", "b"], "first_uc": scores, "second_ids": ["a", "b"], "second_uc": scores}
    with pytest.raises((InputError, SettingsError), match=message):
        concordance(**{**arguments, "classes": CLASSES, **changes})
