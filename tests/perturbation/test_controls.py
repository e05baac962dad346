"""Control edits of the same cell: matched, of equal size, never an edited gene, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genescale.perturbation.editing.controls import matched_controls
from genescale.perturbation.editing.edits import apply
from genescale.perturbation.editing.requests import EditRequest, Kind
from genescale.platform.vocabulary import Vocabulary

N_GENES = 1_000
VOCABULARY = Vocabulary.build(
    [f"ENSG{i:011d}" for i in range(N_GENES)],
    np.ones(N_GENES),
    window=402,
    name="some",
    special=("<pad>", "<mask>", "<cls>", "<eos>"),
)
GENERATOR = np.random.default_rng(0)
EXPRESSION = GENERATOR.lognormal(size=VOCABULARY.size)
GENES = GENERATOR.choice(np.arange(4, VOCABULARY.size), size=400, replace=False)
CELL = np.array([2, *GENES, 3])
RANK = {gene: rank for rank, gene in enumerate(GENES.tolist())}


def controls(request: EditRequest, tokens_t: np.ndarray = CELL, **options: object) -> list[EditRequest]:
    wanted = {"n": 10, "expression_g": EXPRESSION, "seed": 0, "vocabulary": VOCABULARY, **options}
    return matched_controls(tokens_t, request, **wanted)  # type: ignore[arg-type]


def deletion(*genes: int) -> EditRequest:
    return EditRequest(kind="delete", genes=tuple(int(gene) for gene in genes))


def test_controls_stand_near_in_rank_and_expression() -> None:
    level = np.argsort(np.argsort(EXPRESSION[GENES])) / len(GENES)
    rank_off, level_off = [], []
    for rank in range(0, 400, 10):
        for control in controls(deletion(GENES[rank])):
            other = RANK[control.genes[0]]
            rank_off.append(abs(other - rank) / len(GENES))
            level_off.append(abs(level[other] - level[rank]))
    # A third of the cell is what two genes drawn at random are apart.
    assert np.mean(rank_off) < 0.08
    assert np.mean(level_off) < 0.2


def test_a_set_gets_controls_gene_by_gene() -> None:
    request = deletion(GENES[5], GENES[200], GENES[390])
    made = controls(request)
    assert len(made) == 10
    for control in made:
        assert len(set(control.genes)) == 3
        assert [abs(RANK[a] - RANK[b]) < 80 for a, b in zip(control.genes, request.genes, strict=True)] == [True] * 3
    for place in range(3):
        assert len({control.genes[place] for control in made}) == 10


def test_the_draw_depends_on_seed_cell_and_edit_alone() -> None:
    request = deletion(GENES[50])
    assert controls(request) == controls(request)
    assert controls(request) != controls(request, seed=1)
    assert controls(request) != controls(request, CELL[:-2])


def test_excluded_genes_are_never_taken() -> None:
    request = deletion(GENES[50])
    first = {control.genes[0] for control in controls(request)}
    second = {control.genes[0] for control in controls(request, exclude=first)}
    assert len(second) == 10
    assert not first & second


def test_a_small_cell_has_fewer_controls() -> None:
    small = np.array([2, *GENES[:4], 3])
    assert len(controls(deletion(GENES[0]), small)) == 3
    assert controls(deletion(*GENES[:3]), small) == []
    assert controls(deletion(GENES[0]), np.array([2, GENES[0], 3])) == []
    assert controls(deletion(GENES[0]), n=0) == []


def test_an_edit_that_finds_nothing_has_no_controls() -> None:
    missing = int(np.setdiff1d(VOCABULARY.token_ids, GENES)[0])
    assert controls(deletion(missing)) == []
    half = controls(deletion(missing, int(GENES[9])))
    assert [len(control.genes) for control in half] == [1] * 10


def test_an_edit_that_changes_nothing_has_no_controls() -> None:
    first, last = int(GENES[0]), int(GENES[-1])
    assert controls(EditRequest(kind="overexpress", genes=(first,))) == []
    assert controls(EditRequest(kind="inhibit", genes=(last,))) == []
    assert len(controls(EditRequest(kind="activate", genes=(last,)))) == 10


def test_an_inserted_gene_is_matched_by_others_that_the_cell_lacks() -> None:
    missing = np.setdiff1d(VOCABULARY.token_ids, GENES)
    gene = int(missing[7])
    made = controls(EditRequest(kind="overexpress", genes=(gene, int(GENES[3]))))
    assert len(made) == 10
    for control in made:
        inserted, moved = control.genes
        assert inserted in missing
        assert inserted != gene
        assert moved in RANK
    ratio = [EXPRESSION[control.genes[0]] / EXPRESSION[gene] for control in made]
    assert 0.8 < min(ratio) <= max(ratio) < 1.25


def test_controls_carry_the_options_of_their_edit() -> None:
    quartiles = EditRequest(kind="inhibit", genes=(int(GENES[0]),), quartiles=3)
    assert {control.quartiles for control in controls(quartiles)} == {3}
    missing = int(np.setdiff1d(VOCABULARY.token_ids, GENES)[0])
    replaced = EditRequest(kind="replace", genes=(missing, int(GENES[0])), ranks=(7, 99))
    assert {control.ranks for control in controls(replaced)} == {(99,)}


def test_unknown_expression_leaves_rank_alone_to_match() -> None:
    made = controls(deletion(GENES[100]), expression_g=np.full(VOCABULARY.size, np.nan))
    assert len(made) == 10
    assert max(abs(RANK[control.genes[0]] - 100) for control in made) <= 25


@pytest.mark.parametrize("kind", ["delete", "overexpress", "inhibit", "activate"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_control_changes_as_many_genes_as_its_edit(kind: Kind, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 60))
    genes = tuple(data.draw(st.lists(st.sampled_from(GENES[:80].tolist()), min_size=1, max_size=4, unique=True)))
    tokens_t = np.array([2, *GENES[:size], 3])
    request = EditRequest(kind=kind, genes=genes)
    edit = apply(request, tokens_t, VOCABULARY)
    for control in controls(request, tokens_t, n=3):
        other = apply(control, tokens_t, VOCABULARY)
        assert not set(control.genes) & set(genes)
        assert len(other.tokens) == len(edit.tokens)
        assert len(other.absent) == (len(edit.absent) if kind == "overexpress" else 0)
        assert sum(rank is not None for rank in other.ranks) == sum(rank is not None for rank in edit.ranks)
