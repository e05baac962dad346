"""Summaries and moments against plain NumPy and SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from genescale.perturbation.screening.moments import Moments, fold, merge, observed
from genescale.perturbation.statistics.effects import summarise
from genescale.platform.errors import InputError


def shifts(rows: list[dict[str, Any]]) -> pl.DataFrame:
    blank = {
        "symbol": "A",
        "kind": "delete",
        "outcome": "edited",
        "goal_shift": None,
        "donor_id": None,
        "cell_type": "b",
    }
    schema = {"goal_shift": pl.Float64, "donor_id": pl.String, "cell_type": pl.String, "shift": pl.Float64}
    return pl.DataFrame([{**blank, **row} for row in rows], schema_overrides=schema)


def test_means_and_intervals_over_cells() -> None:
    values = [0.1, 0.2, 0.4]
    table = shifts(
        [
            *({"gene_id": "A", "shift": value} for value in values),
            {"gene_id": "A", "shift": 0.0, "outcome": "absent"},
            {"gene_id": "A", "shift": None, "outcome": "undefined"},
            {"gene_id": "B", "symbol": "B", "shift": 0.9},
            {"gene_id": "C", "symbol": "C", "shift": 0.0, "outcome": "absent"},
        ]
    )
    best, a, never = summarise(table).iter_rows(named=True)
    low, high = stats.t.interval(0.95, df=2, loc=np.mean(values), scale=stats.sem(values))
    assert (a["n_cells"], a["n_edited"], a["n_absent"], a["n_undefined"]) == (5, 3, 1, 1)
    assert a["over"] == "cell"
    assert [a["mean_shift"], a["sd_shift"], a["ci_low"], a["ci_high"]] == pytest.approx(
        [np.mean(values), np.std(values, ddof=1), low, high]
    )
    assert (best["gene_id"], best["mean_shift"], best["ci_low"], best["sd_shift"]) == ("B", 0.9, None, None)
    assert (never["gene_id"], never["mean_shift"], never["n_edited"]) == ("C", None, 0)


def test_three_donors_make_donors_the_observations() -> None:
    """Many cells of one donor must not make an effect look sure."""
    values = {"d1": [0.1] * 50, "d2": [0.3, 0.5], "d3": [0.8]}
    table = shifts([{"gene_id": "A", "shift": v, "donor_id": d} for d, of_donor in values.items() for v in of_donor])
    (row,) = summarise(table).iter_rows(named=True)
    means = [0.1, 0.4, 0.8]
    low, high = stats.t.interval(0.95, df=2, loc=np.mean(means), scale=stats.sem(means))
    assert (row["over"], row["n_donors"], row["n_observations"], row["n_edited"]) == ("donor", 3, 3, 53)
    assert [row["mean_shift"], row["ci_low"], row["ci_high"]] == pytest.approx([np.mean(means), low, high])
    (by_cell,) = summarise(table, over="cell").iter_rows(named=True)
    assert by_cell["mean_shift"] == pytest.approx(np.mean([v for of_donor in values.values() for v in of_donor]))


def test_groups_split_genes_and_keep_unknown_types() -> None:
    table = shifts(
        [
            {"gene_id": "A", "shift": 0.1, "cell_type": "b"},
            {"gene_id": "A", "shift": 0.3, "cell_type": "t"},
            {"gene_id": "A", "shift": 0.2, "cell_type": None},
        ]
    )
    summary = summarise(table, by=["cell_type"])
    assert summary.select("cell_type", "mean_shift").rows() == [("t", 0.3), (None, 0.2), ("b", 0.1)]
    with pytest.raises(InputError, match="no column 'tissue'"):
        summarise(table, by=["tissue"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(4, 6), st.floats(-1, 1)), max_size=40), st.integers(1, 10))
def test_merged_moments_are_those_of_all_observations(rows: list[tuple[int, int, float]], size: int) -> None:
    edits, tokens, cosines = (np.array(column) for column in zip(*rows, strict=True)) if rows else [np.zeros(0)] * 3
    pieces = [
        merge([observed(edits[i : i + size], tokens[i : i + size], cosines[i : i + size])])
        for i in range(0, len(rows), size)
    ]
    merged: Moments = fold(pieces)
    expected = sorted({(int(e), int(t)) for e, t, _ in rows})
    assert list(zip(merged.edit_p.tolist(), merged.token_p.tolist(), strict=True)) == expected
    for at, (edit, token) in enumerate(expected):
        values = cosines[(edits == edit) & (tokens == token)]
        assert merged.count_p[at] == len(values)
        assert merged.mean_p[at] == pytest.approx(values.mean(), abs=1e-12)
        if len(values) > 1:
            assert merged.deviation_p[at] == pytest.approx(values.std(ddof=1), abs=1e-9)
        else:
            assert np.isnan(merged.deviation_p[at])
