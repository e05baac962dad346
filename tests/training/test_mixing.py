"""Mixing of batches within cell types, against clouds of points whose mixing is known."""

from __future__ import annotations

import numpy as np
import pytest

from genescale.training.evaluation.mixing import measure_mixing, neighbours, rejection_rate


def clouds(shift: float, *, cells: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two types far apart, two batches each, the second batch moved by `shift`."""
    draws = np.random.default_rng(seed)
    types, batches = np.repeat(["a", "b"], 2 * cells), np.tile(np.repeat(["x", "y"], cells), 2)
    vectors = draws.normal(size=(4 * cells, 5))
    vectors[types == "b", 0] += 30
    vectors[batches == "y", 1] += shift
    return vectors, types, batches


def test_mixed_batches_are_rejected_as_rarely_as_shuffled_ones_and_separate_ones_always() -> None:
    mixed = measure_mixing(*clouds(0.0), label="cell_type", batch="donor_id")
    apart = measure_mixing(*clouds(12.0), label="cell_type", batch="donor_id")
    assert mixed.rejection < 0.15
    assert abs(mixed.rejection - mixed.rejection_shuffled) < 0.1
    assert apart.rejection > 0.95
    assert apart.rejection_shuffled < 0.15
    assert mixed.mixing > 0.9 > 0.5 > apart.mixing
    assert [one.k for one in mixed.types] == [30, 30]
    for one in mixed.types:
        assert one.inverse_simpson > 0.9 * one.inverse_simpson_whole
    for one in apart.types:
        assert one.inverse_simpson == pytest.approx(1.0, abs=0.05)
    assert mixed.silhouette_label > 0.7


def test_rejection_follows_the_formula() -> None:
    from scipy.stats import chi2

    codes = np.array([0] * 12 + [1] * 8)
    near = np.array([[*range(12, 20), 0, 1]] * 20)
    expected = 10 * np.array([0.6, 0.4])
    statistic = ((np.array([2, 8]) - expected) ** 2 / expected).sum()
    assert chi2.sf(statistic, df=1) < 0.05
    assert rejection_rate(codes, near) == 1.0
    assert rejection_rate(codes, near, level=float(chi2.sf(statistic, df=1)) / 2) == 0.0


def test_batches_that_differ_in_types_only_are_not_blamed() -> None:
    vectors, types, batches = clouds(0.0)
    # Donor x has hardly any cells of type b: within each type, donors still mix.
    keep = ~((types == "b") & (batches == "x")) | (np.arange(len(types)) % 6 == 0)
    found = measure_mixing(vectors[keep], types[keep], batches[keep], label="cell_type", batch="donor_id")
    assert found.rejection < 0.2


def test_small_batches_and_unknown_cells_are_counted() -> None:
    vectors, types, batches = clouds(0.0)
    types, batches = types.astype("<U8"), batches.astype("<U8")
    batches[:3] = "tiny"
    types[-5:] = ""
    batches[types == "b"] = "x"
    found = measure_mixing(vectors, types, batches, label="cell_type", batch="donor_id")
    assert found.unlabelled == 5
    assert [(one.name, one.left_out) for one in found.types] == [("a", 3)]
    assert found.untested == {"b": 235}
    assert found.cells + found.unlabelled == len(vectors)


def test_one_type_alone_has_no_silhouette() -> None:
    vectors, types, batches = clouds(0.0)
    only = types == "a"
    found = measure_mixing(vectors[only], types[only], batches[only], label="cell_type", batch="donor_id")
    assert np.isnan(found.silhouette_label)
    assert len(found.types) == 1


def test_a_cell_is_not_its_own_neighbour() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 3))
    assert not (neighbours(vectors, 7) == np.arange(50)[:, None]).any()
