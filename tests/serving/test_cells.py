"""From a request's cell to tokens, and the account of what was not used."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genescale.platform.errors import InputError
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.answering.cells import CellReader, PreparedCell
from genescale.serving.schemas import CellAsked

N_GENES, N_RANKED, WINDOW = 120, 117, 48
Tokens = Callable[[Mapping[str, float]], np.ndarray]
DrawCell = Callable[[int, int], dict[str, float]]


def read(vocabulary: Vocabulary, *, listed: int = 50, **cell: object) -> PreparedCell:
    asked = CellAsked.model_validate(cell)
    return CellReader(vocabulary, window=WINDOW, max_listed_genes=listed).read(asked, where="cells[4]")


@pytest.mark.parametrize("n_genes", [1, 20, WINDOW - 2, WINDOW - 1, 110])
def test_tokens_are_those_of_ingestion(
    vocabulary: Vocabulary, draw_cell: DrawCell, tokens_of: Tokens, n_genes: int
) -> None:
    counts = draw_cell(n_genes, n_genes)
    cell = read(vocabulary, counts=counts)
    assert np.array_equal(cell.tokens, tokens_of(counts))
    assert cell.tokens.dtype == vocabulary.token_dtype
    assert cell.facts.n_genes == n_genes
    assert cell.facts.n_tokens == len(cell.tokens) == min(n_genes + 2, WINDOW)
    assert cell.facts.cropped == (n_genes + 2 > WINDOW)


def test_ids_versions_symbols_and_aliases_lead_to_the_same_tokens(vocabulary: Vocabulary) -> None:
    by_id = {f"ENSG{i:011d}": 1.0 + i for i in range(4, 9)}
    expected = read(vocabulary, counts=by_id).tokens
    for name in ("ENSG00000000005.3", "gene5", "GENE5", "OLD5", "old5"):
        counts = {name if gene == "ENSG00000000005" else gene: count for gene, count in by_id.items()}
        assert np.array_equal(read(vocabulary, counts=counts).tokens, expected)


def test_names_of_one_gene_are_summed_and_reported(vocabulary: Vocabulary) -> None:
    once = read(vocabulary, counts={"GENE5": 9, "GENE6": 4, "GENE7": 8})
    split = read(vocabulary, counts={"GENE5": 2, "GENE6": 4, "OLD5": 3, "ENSG00000000005.1": 4, "GENE7": 8})
    assert np.array_equal(once.tokens, split.tokens)
    assert once.facts.merged == []
    (merged,) = split.facts.merged
    assert (merged.gene, merged.names) == ("ENSG00000000005", ["GENE5", "OLD5", "ENSG00000000005.1"])


def test_every_name_is_used_or_ignored_with_a_reason(vocabulary: Vocabulary) -> None:
    counts = {"GENE1": 3, "GENE2": 0, "NOSUCH": 5, "GENE119": 2, "<cls>": 1, "GENE3": 1}
    facts = read(vocabulary, counts=counts).facts
    assert facts.n_genes == 2
    assert {(one.gene, one.reason) for one in facts.ignored.genes} == {
        ("GENE2", "zero"),
        ("NOSUCH", "unknown"),
        ("<cls>", "unknown"),
        ("GENE119", "no_median"),
    }
    assert (facts.ignored.n, facts.ignored.unknown, facts.ignored.no_median, facts.ignored.zero) == (4, 2, 1, 1)


def test_a_cut_list_keeps_complete_counts_and_names_what_one_can_act_on_first(vocabulary: Vocabulary) -> None:
    counts = {"GENE1": 1, **{f"GENE{i}": 0 for i in range(10, 60)}, **{f"NOSUCH{i}": 1 for i in range(3)}}
    ignored = read(vocabulary, listed=4, counts=counts).facts.ignored
    assert (ignored.n, ignored.zero, ignored.unknown) == (53, 50, 3)
    assert [one.reason for one in ignored.genes] == ["unknown"] * 3 + ["zero"]


@given(st.dictionaries(st.sampled_from([f"GENE{i}" for i in range(130)] + ["OLD5"]), st.integers(0, 5), min_size=1))
@settings(max_examples=60, deadline=None)
def test_accounts_reconcile(vocabulary: Vocabulary, counts: dict[str, int]) -> None:
    try:
        facts = read(vocabulary, listed=1000, counts=counts).facts
    except InputError:
        assert all(not count or int(name[4:] or 0) >= N_RANKED for name, count in counts.items() if name != "OLD5")
        return
    surplus = sum(len(one.names) - 1 for one in facts.merged)
    assert facts.n_genes + facts.ignored.n + surplus == len(counts)
    assert facts.ignored.n == len(facts.ignored.genes)


def test_parallel_arrays_are_the_same_cell_as_their_mapping(vocabulary: Vocabulary, draw_cell: DrawCell) -> None:
    counts = {**draw_cell(3, 70), "NOSUCH": 2, "OLD5": 1, "GENE5": 3, "GENE119": 2, "GENE118": 0}
    by_mapping = read(vocabulary, counts=counts)
    by_arrays = read(vocabulary, genes=list(counts), values=list(counts.values()))
    assert np.array_equal(by_arrays.tokens, by_mapping.tokens)
    assert np.array_equal(by_arrays.uncropped, by_mapping.uncropped)
    assert by_arrays.facts == by_mapping.facts
    assert by_arrays.n_shown == WINDOW - 2


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ({"counts": {}}, "no counts"),
        ({"counts": {"NOSUCH": 4}}, "'NOSUCH'"),
        ({"counts": {"GENE1": 0, "GENE119": 5}}, "1 no median, 1 zero"),
        ({"genes": [], "values": []}, "no counts"),
        ({"genes": ["NOSUCH"], "values": [4]}, "'NOSUCH'"),
        ({"genes": ["GENE1", "GENE2", "GENE1"], "values": [1, 2, 3]}, "'GENE1' stands there twice"),
        ({"tokens": []}, "no gene"),
        ({"tokens": [2, 3]}, "no gene"),
        ({"tokens": [124]}, "token 124 does not exist"),
        ({"tokens": [5, 0]}, "special token"),
        ({"tokens": [5, 2, 6]}, "special token"),
        ({"tokens": [5, 6, 5]}, "token 5 (ENSG00000000001) stands there 2 times"),
    ],
)
def test_a_cell_that_cannot_be_used_is_named(vocabulary: Vocabulary, cell: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(vocabulary, **cell)
    assert caught.value.where.startswith("cells[4].")
    assert said in str(caught.value)


def test_tokens_come_with_or_without_their_frame(
    vocabulary: Vocabulary, draw_cell: DrawCell, tokens_of: Tokens
) -> None:
    framed = tokens_of(draw_cell(1, 30))
    for given_tokens in (framed, framed[1:-1], framed[1:], framed[:-1]):
        cell = read(vocabulary, tokens=given_tokens.tolist())
        assert np.array_equal(cell.tokens, framed)
        assert (cell.facts.n_genes, cell.facts.cropped) == (30, False)


def test_long_tokens_are_cropped_like_long_counts(vocabulary: Vocabulary, draw_cell: DrawCell) -> None:
    by_counts = read(vocabulary, counts=draw_cell(1, 100))
    assert len(by_counts.uncropped) == 102
    by_tokens = read(vocabulary, tokens=by_counts.uncropped.tolist())
    assert np.array_equal(by_tokens.tokens, by_counts.tokens)
    assert np.array_equal(by_tokens.uncropped, by_counts.uncropped)
    assert by_tokens.facts == by_counts.facts
