"""Edits that move genes by rank: inhibit, activate, replace. Gene i of the vocabulary has the token 4 + i."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genescale.perturbation.editing.edits import Edit, apply, shifted_rank
from genescale.perturbation.editing.requests import EditOptions, EditRequest, Kind
from genescale.perturbation.perturb import Readouts, perturb_cell
from genescale.perturbation.readouts.shift import cosine
from genescale.platform.errors import InputError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.embedder import Embedder

N_GENES = 40
VOCABULARY = Vocabulary.build(
    [f"ENSG{i:011d}" for i in range(N_GENES)],
    np.ones(N_GENES),
    window=N_GENES + 2,
    name="tiny",
    special=("<pad>", "<mask>", "<cls>", "<eos>"),
)
SIXTEEN = list(range(10, 26))


def cell(genes: list[int]) -> np.ndarray:
    return np.array([2, *genes, 3], dtype=np.uint16)


def edited(kind: Kind, genes: list[int], of: list[int], **options: object) -> Edit:
    return apply(EditRequest(kind=kind, genes=tuple(genes), **options), cell(of), VOCABULARY)  # type: ignore[arg-type]


def genes_of(edit: Edit) -> list[int]:
    assert edit.tokens[0] == 2
    assert edit.tokens[-1] == 3
    assert edit.tokens.dtype == np.uint16
    return edit.tokens[1:-1].tolist()


# Among 16 genes the quartiles begin at ranks 0, 4, 8, 12 and their middles are 2, 6, 10, 14. The table is what the
# published options document for a shift of 1 ("genes in the 4th quartile will move to the middle of the 3rd …, in the
# 1st to the front of the 1st") and of 2 ("genes in the 3rd or 4th quartile will move to the bottom of the 4th").
@pytest.mark.parametrize(
    ("kind", "quartiles", "to"),
    [
        ("activate", 1, [0, 2, 6, 10]),
        ("activate", 2, [0, 0, 2, 6]),
        ("activate", 3, [0, 0, 0, 2]),
        ("inhibit", 1, [6, 10, 14, 15]),
        ("inhibit", 2, [10, 14, 15, 15]),
        ("inhibit", 3, [14, 15, 15, 15]),
    ],
)
def test_a_gene_moves_to_the_middle_of_the_quartile_or_to_the_end(kind: Kind, quartiles: int, to: list[int]) -> None:
    for rank, gene in enumerate(SIXTEEN):
        edit = edited(kind, [gene], SIXTEEN, quartiles=quartiles)
        assert genes_of(edit).index(gene) == to[rank // 4]
        assert edit.ranks == (rank,)


def test_one_quartile_is_the_default() -> None:
    assert genes_of(edited("activate", [24], SIXTEEN)) == genes_of(edited("activate", [24], SIXTEEN, quartiles=1))


def test_genes_that_come_to_one_place_keep_the_order_of_the_cell() -> None:
    edit = edited("activate", [20, 18, 19], SIXTEEN, quartiles=1)
    assert genes_of(edit) == [10, 11, 12, 13, 14, 15, 18, 19, 20, 16, 17, 21, 22, 23, 24, 25]
    last = edited("inhibit", [24, 22], SIXTEEN, quartiles=1)
    assert genes_of(last) == [*range(10, 22), 23, 25, 22, 24]


def test_a_chosen_rank_never_turns_an_edit_into_its_opposite() -> None:
    assert genes_of(edited("activate", [20], SIXTEEN, rank=3)).index(20) == 3
    assert not edited("activate", [11], SIXTEEN, rank=3).changed
    assert genes_of(edited("inhibit", [11], SIXTEEN, rank=12)).index(11) == 12
    assert not edited("inhibit", [25], SIXTEEN, rank=12).changed
    assert genes_of(edited("inhibit", [11], SIXTEEN, rank=1000)).index(11) == 15


def test_activating_to_the_front_is_overexpression() -> None:
    front = edited("activate", [20, 13], SIXTEEN, rank=0)
    over = edited("overexpress", [20, 13], SIXTEEN)
    assert genes_of(front) == genes_of(over)
    assert front.kept.tolist() == over.kept.tolist()


def test_replacing_gives_each_gene_its_rank() -> None:
    edit = edited("replace", [10, 25], SIXTEEN, ranks=(8, 2))
    assert genes_of(edit)[8] == 10
    assert genes_of(edit)[2] == 25
    assert edit.ranks == (0, 15)
    assert genes_of(edited("replace", [10], SIXTEEN, ranks=(99,)))[-1] == 10


@pytest.mark.parametrize("kind", ["inhibit", "activate", "replace"])
def test_an_absent_gene_is_answered_and_the_others_of_its_set_move(kind: Kind) -> None:
    ranks = {"ranks": (15, 15)} if kind == "replace" else {}
    alone = {"ranks": (15,)} if kind == "replace" else {}
    missing = edited(kind, [5], SIXTEEN, **alone)
    assert not missing.changed
    assert missing.absent == (5,)
    assert missing.tokens[missing.kept].tolist() == SIXTEEN
    half = edited(kind, [5, 17], SIXTEEN, **ranks)
    assert half.absent == (5,)
    assert genes_of(half) == genes_of(edited(kind, [17], SIXTEEN, **alone))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "delete", "quartiles": 1}, "takes no quartiles"),
        ({"kind": "replace", "ranks": (1,), "rank": 1}, "takes no rank"),
        ({"kind": "activate", "quartiles": 4}, "by 4 quartiles"),
        ({"kind": "activate", "quartiles": 0}, "by 0 quartiles"),
        ({"kind": "activate", "quartiles": 1, "rank": 3}, "not both"),
        ({"kind": "inhibit", "rank": -1}, "rank -1 does not exist"),
        ({"kind": "replace"}, "0 ranks are given for 1 genes"),
        ({"kind": "replace", "ranks": (-2,)}, "rank -2 does not exist"),
        ({"kind": "delete", "ranks": (2,)}, "takes no ranks"),
        ({"kind": "inhibit", "refill": True}, "only a deletion"),
        ({"kind": "delte"}, "Did you mean 'delete'"),
        ({"kind": "delete", "genes": ()}, "at least one gene"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        EditRequest(**{"genes": (10,), **options})  # type: ignore[arg-type]


def test_the_options_of_a_screen_become_the_requests_of_its_edits() -> None:
    options = EditOptions(kind="replace", target_ranks={10: 4, 11: 0})
    assert options.request((11, 10)) == EditRequest(kind="replace", genes=(11, 10), ranks=(0, 4))
    with pytest.raises(InputError, match="no rank to be given"):
        options.request((10, 12))
    with pytest.raises(InputError, match="takes no quartiles"):
        EditOptions(kind="delete", quartiles=2)
    with pytest.raises(InputError, match="takes no target ranks"):
        EditOptions(kind="delete", target_ranks={10: 1})


gene_tokens = st.integers(4, 3 + N_GENES)


@st.composite
def moves(draw: st.DrawFn) -> tuple[list[int], EditRequest]:
    """A cell and a request that moves genes; some of them may be absent from the cell."""
    ranked = draw(st.lists(gene_tokens, unique=True, max_size=N_GENES))
    genes = tuple(draw(st.lists(gene_tokens, unique=True, min_size=1, max_size=6)))
    kind: Kind = draw(st.sampled_from(["inhibit", "activate", "replace"]))
    if kind == "replace":
        ranks = st.lists(st.integers(0, N_GENES), min_size=len(genes), max_size=len(genes))
        return ranked, EditRequest(kind=kind, genes=genes, ranks=tuple(draw(ranks)))
    if draw(st.booleans()):
        return ranked, EditRequest(kind=kind, genes=genes, rank=draw(st.integers(0, N_GENES)))
    return ranked, EditRequest(kind=kind, genes=genes, quartiles=draw(st.sampled_from([None, 1, 2, 3])))


@settings(max_examples=150, deadline=None)
@given(moves())
def test_a_move_keeps_every_gene_and_the_order_of_the_others(drawn: tuple[list[int], EditRequest]) -> None:
    ranked, request = drawn
    edit = apply(request, cell(ranked), VOCABULARY)
    after = genes_of(edit)
    others = [gene for gene in ranked if gene not in request.genes]
    assert sorted(after) == sorted(ranked)
    assert [gene for gene in after if gene not in request.genes] == others
    assert edit.baseline.tolist() == cell(ranked).tolist()
    assert edit.tokens[edit.kept].tolist() == others
    assert edit.baseline[edit.kept_baseline].tolist() == others
    assert edit.ranks == tuple(ranked.index(gene) if gene in ranked else None for gene in request.genes)
    assert set(edit.absent) == set(request.genes) - set(ranked)


@settings(max_examples=150, deadline=None)
@given(moves())
def test_one_gene_comes_exactly_where_it_is_promised(drawn: tuple[list[int], EditRequest]) -> None:
    ranked, request = drawn
    gene = request.genes[0]
    if gene not in ranked:
        return
    before, last = ranked.index(gene), len(ranked) - 1
    after = genes_of(apply(request.on((gene,), request.ranks[:1]), cell(ranked), VOCABULARY)).index(gene)
    if request.kind == "replace":
        assert after == min(request.ranks[0], last)
    elif request.rank is not None:
        assert after == (
            min(before, request.rank) if request.kind == "activate" else max(before, min(request.rank, last))
        )
    else:
        assert (after <= before) if request.kind == "activate" else (after >= before)
        sign = -1 if request.kind == "activate" else 1
        assert after == shifted_rank(before, len(ranked), sign * (request.quartiles or 1))


@settings(max_examples=100, deadline=None)
@given(st.lists(gene_tokens, unique=True, min_size=1, max_size=N_GENES), st.data())
def test_replacing_back_restores_the_cell(ranked: list[int], data: st.DataObject) -> None:
    gene = data.draw(st.sampled_from(ranked))
    away = edited("replace", [gene], ranked, ranks=(data.draw(st.integers(0, N_GENES)),))
    back = edited("replace", [gene], genes_of(away), ranks=(ranked.index(gene),))
    assert genes_of(back) == ranked


@settings(max_examples=100, deadline=None)
@given(st.lists(gene_tokens, unique=True, min_size=2, max_size=N_GENES), st.data())
def test_deleting_after_any_move_is_deleting_at_once(ranked: list[int], data: st.DataObject) -> None:
    gene = data.draw(st.sampled_from(ranked))
    moved = edited("inhibit", [gene], ranked, quartiles=data.draw(st.sampled_from([1, 2, 3])))
    assert genes_of(edited("delete", [gene], genes_of(moved))) == genes_of(edited("delete", [gene], ranked))


@pytest.mark.parametrize("kind", ["inhibit", "activate", "replace"])
def test_moves_are_read_out_like_any_edit(framed: Embedder, kind: Kind) -> None:
    tokens_t = np.array([2, *range(10, 50), 3])
    gene, absent = 30, 5
    ranks = {"ranks": (0,)} if kind == "replace" else {}
    requests = [EditRequest(kind=kind, genes=(token,), **ranks) for token in (gene, absent)]  # type: ignore[arg-type]
    moved, unmoved = perturb_cell(framed, tokens_t, requests, readouts=Readouts(gene_shifts_of="all"))
    edit = apply(requests[0], tokens_t, framed.vocabulary)
    before_td, after_td = framed.embed_genes([edit.baseline, edit.tokens])
    cosines = cosine(after_td[edit.kept], before_td[edit.kept_baseline])
    assert moved.cosine == pytest.approx(cosines.mean(), abs=1e-6)
    assert moved.shift is not None
    assert moved.shift > 1e-4
    assert moved.n_compared == 39
    assert gene not in moved.gene_cosines
    assert (unmoved.cosine, unmoved.absent) == (1.0, (absent,))
