"""Rank value: one order on every machine, ties by token id, the window and its frame."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genescale.platform.errors import InputError, LimitError
from genescale.platform.rank_value import falling_order, normalised, rank_value_tokens
from genescale.platform.vocabulary import MASK, PAD, Vocabulary

GENES = 200


def vocabulary(*, window: int = 4_096, framed: bool = True, medians: Any = None) -> Vocabulary:
    values = np.linspace(0.5, 4.0, GENES) if medians is None else medians
    special = ("<pad>", "<mask>", "<cls>", "<eos>") if framed else (PAD, MASK)
    return Vocabulary.build([f"ENSG{i:06d}" for i in range(len(values))], values, window=window, special=special)


cells = st.lists(
    st.tuples(st.integers(4, GENES + 3), st.integers(1, 6)), min_size=0, max_size=80, unique_by=lambda pair: pair[0]
)


@given(cells, st.sampled_from([1.0, 2.0]), st.randoms(use_true_random=False))
def test_order_is_falling_with_ties_by_token_whatever_the_input_order(
    cell: list[tuple[int, int]], step: float, random: Any
) -> None:
    # Few distinct medians make many exact ties.
    v = vocabulary(medians=step * (1 + np.arange(GENES) % 5))
    random.shuffle(cell)
    tokens, counts = [token for token, _ in cell], [count for _, count in cell]
    expected = sorted(cell, key=lambda pair: (-(pair[1] / v.medians_t[pair[0]]), pair[0]))
    ranked = rank_value_tokens(tokens, counts, v)
    assert ranked.input_ids.tolist() == [v.cls, *(token for token, _ in expected), v.eos]
    assert ranked.input_ids.dtype == np.uint16
    assert (ranked.n_genes, ranked.cropped, ranked.n_unranked) == (len(cell), False, 0)


@settings(max_examples=50)
@given(st.lists(st.floats(1e-6, 1e9), max_size=60), st.integers(0, 3))
def test_order_is_exact_where_values_differ_in_the_last_bits(values: list[float], copies: int) -> None:
    # Each value comes with its neighbours, which share all the bits that the fast way looks at.
    near = [np.nextafter(v, np.inf) for v in values] + values * (1 + copies) + [np.nextafter(v, 0.0) for v in values]
    array = np.array(near, dtype=np.float64)
    assert falling_order(array).tolist() == np.argsort(-array, kind="stable").tolist()


def test_order_holds_beyond_the_fast_ways_limit() -> None:
    values = np.random.default_rng(0).integers(1, 50, 70_000).astype(np.float64)
    assert np.array_equal(falling_order(values), np.argsort(-values, kind="stable"))


def test_library_size_does_not_change_the_order() -> None:
    v, rng = vocabulary(), np.random.default_rng(1)
    tokens = rng.permutation(np.arange(4, GENES + 4))[:120]
    counts = rng.integers(1, 30, 120)
    by_value = sorted(
        range(120), key=lambda i: (-(normalised(counts[i], counts.sum()) / v.medians_t[tokens[i]]), tokens[i])
    )
    assert rank_value_tokens(tokens, counts, v).input_ids[1:-1].tolist() == [tokens[i] for i in by_value]


def test_normalised_is_counts_per_ten_thousand() -> None:
    assert normalised([1, 3], 4).tolist() == [2_500.0, 7_500.0]
    assert normalised(np.array([1, 3]), np.array([2, 6])).tolist() == [5_000.0, 5_000.0]


@pytest.mark.parametrize(("framed", "window", "kept"), [(True, 12, 10), (False, 12, 12), (True, 202, 200)])
def test_the_window_counts_special_tokens(framed: bool, window: int, kept: int) -> None:
    v = vocabulary(framed=framed, window=window)
    ranked = rank_value_tokens(v.token_ids, np.ones(GENES), v)
    assert ranked.input_ids.size == kept + (2 if framed else 0)
    assert ranked.cropped == (kept < GENES)
    assert ranked.n_genes == GENES
    # Equal counts: the gene with the smallest median comes first.
    assert ranked.input_ids[1 if framed else 0] == v.token_ids[0]
    assert rank_value_tokens(v.token_ids, np.ones(GENES), v, window=7).input_ids.size == 7


def test_genes_without_a_median_are_counted_not_ranked() -> None:
    medians = np.ones(10)
    medians[3] = np.nan
    v = vocabulary(medians=medians)
    ranked = rank_value_tokens(v.token_ids, np.arange(1, 11), v)
    assert (ranked.n_genes, ranked.n_unranked) == (10, 1)
    assert v.token_ids[3] not in ranked.input_ids


def test_wide_vocabularies_use_wider_tokens() -> None:
    v = vocabulary(medians=np.ones(70_000))
    ranked = rank_value_tokens([69_999], [1], v)
    assert ranked.input_ids.dtype == np.uint32
    assert ranked.input_ids.tolist() == [2, 69_999, 3]


@pytest.mark.parametrize(
    ("tokens", "counts", "message"),
    [
        ([5, 5], [1, 1], "twice"),
        ([5, 0], [1, 1], "special token"),
        ([5, -1], [1, 1], "token ids outside"),
        ([5, GENES + 4], [1, 1], "token ids outside"),
        ([5, 6], [1, 0], "zero, negative"),
        ([5, 6], [1, -2], "zero, negative"),
        ([5, 6], [1, float("nan")], "zero, negative"),
        ([5, 6], [1, float("inf")], "zero, negative"),
        ([5, 6], [1], "one count belongs to each gene"),
    ],
)
def test_what_is_not_a_cell_is_refused(tokens: list[int], counts: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rank_value_tokens(tokens, counts, vocabulary())


def test_a_window_without_room_for_a_gene_is_refused() -> None:
    with pytest.raises(LimitError, match="holds no gene"):
        rank_value_tokens([5], [1], vocabulary(), window=2)
