"""Intervals hold the truth as often as they say, with two donors as with thirty."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from genescale.perturbation.statistics.estimates import Drawing, Places, estimate
from genescale.perturbation.statistics.intervals import FEWEST_TO_DRAW, Clustered, intervals
from genescale.platform.errors import SettingsError


def clustered(values_eu: np.ndarray) -> Clustered:
    return Clustered(sums_eu=values_eu, counts_eu=np.ones_like(values_eu))


@pytest.mark.parametrize("donors", [2, 3, 5, 8, 15, 30])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_mean_of_donors_lies_inside_as_often_as_promised(donors: int, confidence: float) -> None:
    values = np.random.default_rng(donors).normal(size=(2000, donors))
    low, high = intervals(clustered(values), confidence=confidence, draws=1000, seed=0)
    assert ((low < 0) & (high > 0)).mean() == pytest.approx(confidence, abs=0.02)


def test_skewed_donors_are_covered_nearly_as_often() -> None:
    values = np.random.default_rng(0).exponential(size=(2000, 12))
    low, high = intervals(clustered(values), confidence=0.95, draws=1000, seed=0)
    assert ((low < 1) & (high > 1)).mean() > 0.88


def test_below_the_fewest_donors_it_is_students_t_and_one_donor_has_none() -> None:
    values = np.array([[0.1, 0.4, 0.9], [0.2, 0.0, 0.0]])
    counts = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    low, high = intervals(Clustered(sums_eu=values, counts_eu=counts), confidence=0.9, draws=500, seed=0)
    wanted = stats.t.interval(0.9, df=2, loc=values[0].mean(), scale=stats.sem(values[0]))
    assert (low[0], high[0]) == pytest.approx(wanted)
    assert np.isnan([low[1], high[1]]).all()


def test_a_bootstrap_follows_the_seed_and_its_skew() -> None:
    values = np.random.default_rng(1).exponential(size=(3, FEWEST_TO_DRAW + 4))
    first, again, other = (intervals(clustered(values), confidence=0.95, draws=500, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.all(first[1] - values.mean(axis=1) > values.mean(axis=1) - first[0])


def test_cells_of_a_single_donor_are_covered_too() -> None:
    """400 edits of 200 cells each, drawn in blocks."""
    generator = np.random.default_rng(0)
    n_edits, n_cells = 400, 200
    edit_r, cell_r = (part.ravel() for part in np.meshgrid(np.arange(n_edits), np.arange(n_cells), indexing="ij"))
    places = Places(edit_r=edit_r, donor_r=np.zeros_like(edit_r), cell_r=cell_r, n_edits=n_edits, n_donors=1)
    values_r = generator.exponential(size=len(edit_r))
    found = estimate(places, values_r, "cell", Drawing(draws=1000))
    assert set(found.over_e) == {"cell"}
    assert ((found.low_e < 1) & (found.high_e > 1)).mean() == pytest.approx(0.95, abs=0.035)
    np.testing.assert_allclose(found.mean_e, values_r.reshape(n_edits, n_cells).mean(axis=1))


@pytest.mark.parametrize(("confidence", "draws"), [(0.0, 10), (1.0, 10), (0.95, -1)])
def test_levels_and_draws_out_of_range_are_refused(confidence: float, draws: int) -> None:
    with pytest.raises(SettingsError):
        intervals(clustered(np.ones((1, 3))), confidence=confidence, draws=draws, seed=0)
