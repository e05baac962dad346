"""Moments that screens merge, against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genescale.perturbation.screening.moments import Moments, fold, merge, observed


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
