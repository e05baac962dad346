"""Edits: what stays, what goes, what is compared with what. Token 0 <pad>, 1 <mask>, framed also 2 <cls>, 3 <eos>."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genescale.perturbation.editing.cell import Cell, gene_span
from genescale.perturbation.editing.edits import Edit, apply, delete, overexpress
from genescale.perturbation.editing.requests import KINDS, EditRequest, parse_kind
from genescale.platform.errors import InputError
from genescale.platform.vocabulary import Vocabulary

N_GENES = 30
WINDOW = 8


def vocabulary(*, framed: bool) -> Vocabulary:
    ids = [f"ENSG{i:011d}" for i in range(N_GENES)]
    special = ("<pad>", "<mask>", "<cls>", "<eos>") if framed else ("<pad>", "<mask>")
    return Vocabulary.build(ids, np.ones(N_GENES), window=WINDOW, name="tiny", special=special)


BARE, FRAMED = vocabulary(framed=False), vocabulary(framed=True)


def cell(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.uint16)


def compared(edit: Edit) -> list[int]:
    """The genes that are compared, after checking that both sides name the same ones in the same order."""
    kept = edit.tokens[edit.kept].tolist()
    assert edit.baseline[edit.kept_baseline].tolist() == kept
    return kept


def test_delete_takes_genes_out_and_tells_their_ranks() -> None:
    edit = delete(cell(2, 10, 11, 12, 13, 3), [12, 10], FRAMED)
    assert edit.tokens.tolist() == [2, 11, 13, 3]
    assert edit.tokens.dtype == np.uint16
    assert edit.baseline.tolist() == [2, 10, 11, 12, 13, 3]
    assert edit.ranks == (2, 0)
    assert compared(edit) == [11, 13]
    assert edit.found
    assert edit.changed
    assert edit.absent == ()


def test_deleting_an_absent_gene_is_an_answer() -> None:
    edit = delete(cell(10, 11), [20], BARE)
    assert edit.ranks == (None,)
    assert edit.absent == (20,)
    assert not edit.found
    assert not edit.changed
    assert compared(edit) == [10, 11]


def test_a_set_that_is_half_there_deletes_that_half() -> None:
    edit = delete(cell(10, 11, 12), [20, 11], BARE)
    assert (edit.tokens.tolist(), edit.ranks, edit.absent, edit.found) == ([10, 12], (None, 1), (20,), False)


def test_deleting_every_gene_leaves_only_special_tokens() -> None:
    edit = delete(cell(2, 10, 3), [10], FRAMED)
    assert edit.tokens.tolist() == [2, 3]
    assert compared(edit) == []
    assert delete(cell(10), [10], BARE).tokens.tolist() == []


def test_a_cropped_cell_is_not_refilled_unless_asked() -> None:
    shown, everything = cell(2, 10, 11, 12, 13, 14, 15, 3), cell(10, 11, 12, 13, 14, 15, 16, 17, 18)
    assert delete(shown, [11, 13], FRAMED).tokens.tolist() == [2, 10, 12, 14, 15, 3]
    edit = delete(shown, [11, 13], FRAMED, uncropped_t=everything)
    assert edit.tokens.tolist() == [2, 10, 12, 14, 15, 16, 17, 3]
    assert edit.n_refilled == 2
    assert compared(edit) == [10, 12, 14, 15]


def test_refill_skips_genes_that_are_deleted_themselves() -> None:
    edit = delete(cell(10, 11), [10, 12], BARE, uncropped_t=cell(10, 11, 12, 13))
    assert edit.tokens.tolist() == [11, 13]
    assert edit.ranks == (0, None)


def test_refill_refuses_another_cell() -> None:
    with pytest.raises(InputError, match="does not begin with the genes"):
        delete(cell(10, 11), [10], BARE, uncropped_t=cell(11, 10, 12))


def test_overexpress_moves_genes_to_the_front_in_the_order_given() -> None:
    edit = overexpress(cell(2, 10, 11, 12, 13, 3), [13, 11], FRAMED)
    assert edit.tokens.tolist() == [2, 13, 11, 10, 12, 3]
    assert edit.baseline.tolist() == [2, 10, 11, 12, 13, 3]
    assert edit.ranks == (3, 1)
    assert compared(edit) == [10, 12]
    assert edit.n_cut == 0


def test_overexpressing_an_absent_gene_inserts_it() -> None:
    edit = overexpress(cell(10, 11), [20], BARE)
    assert (edit.tokens.tolist(), edit.baseline.tolist(), edit.ranks) == ([20, 10, 11], [10, 11], (None,))
    assert compared(edit) == [10, 11]


def test_a_full_window_is_cut_on_both_sides() -> None:
    full = cell(2, 10, 11, 12, 13, 14, 15, 3)
    edit = overexpress(full, [20, 21], FRAMED)
    assert edit.tokens.tolist() == [2, 20, 21, 10, 11, 12, 13, 3]
    assert edit.baseline.tolist() == [2, 10, 11, 12, 13, 3]
    assert edit.n_cut == 2
    assert compared(edit) == [10, 11, 12, 13]


def test_the_cut_takes_other_genes_when_an_edited_one_ranks_last() -> None:
    edit = overexpress(cell(10, 11, 12, 13, 14, 15, 16, 17), [20, 17], BARE)
    assert edit.tokens.tolist() == [20, 17, 10, 11, 12, 13, 14, 15]
    assert edit.baseline.tolist() == [10, 11, 12, 13, 14, 15, 17]
    assert compared(edit) == [10, 11, 12, 13, 14, 15]


def test_overexpressing_the_first_gene_changes_nothing() -> None:
    edit = overexpress(cell(2, 10, 11, 3), [10], FRAMED)
    assert not edit.changed
    assert edit.ranks == (0,)


def test_more_genes_than_the_window_holds_are_refused() -> None:
    with pytest.raises(InputError, match="do not fit into a window of 8"):
        overexpress(cell(2, 10, 3), range(10, 17), FRAMED)


@pytest.mark.parametrize(
    ("genes", "said"),
    [([], "at least one gene"), ([10, 10], "twice"), ([2], "no gene"), ([34], "no gene"), ([-1], "no gene")],
)
@pytest.mark.parametrize("kind", [delete, overexpress])
def test_genes_that_cannot_be_edited_are_refused(kind: object, genes: list[int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        kind(cell(2, 10, 11, 3), genes, FRAMED)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (np.array([[10, 11]]), "one row of token ids"),
        (np.array([10.0, 11.0]), "one row of token ids"),
        (np.array([10, 99]), "do not fit a vocabulary"),
        (np.array([10, 11, 0, 0]), "special token stands among the genes"),
    ],
)
def test_tokens_that_are_no_cell_are_refused(tokens: np.ndarray, said: str) -> None:
    with pytest.raises(InputError, match=said):
        delete(tokens, [10], FRAMED)


def test_kinds_are_a_closed_set() -> None:
    assert KINDS == ("delete", "overexpress", "inhibit", "activate", "replace")
    assert [parse_kind(kind) for kind in KINDS] == list(KINDS)
    with pytest.raises(InputError, match="Did you mean 'delete'"):
        parse_kind("delet")


def test_gene_span_leaves_out_the_frame() -> None:
    assert gene_span(cell(2, 10, 11, 3), FRAMED) == slice(1, 3)
    assert gene_span(cell(10, 11), BARE) == slice(0, 2)
    assert gene_span(cell(2, 3), FRAMED) == slice(1, 1)


def test_a_refilling_deletion_asks_for_the_whole_cell() -> None:
    request = EditRequest(kind="delete", genes=(10,), refill=True)
    with pytest.raises(InputError, match="needs the genes beyond the window"):
        apply(request, cell(10, 11), BARE)
    edit = apply(request, cell(10, 11), BARE, uncropped_t=cell(10, 11, 12))
    assert edit.tokens.tolist() == [11, 12]


def test_a_checked_cell_is_edited_like_its_tokens() -> None:
    tokens = cell(2, 10, 11, 12, 13, 3)
    checked = Cell.of(tokens, FRAMED)
    for kind in KINDS:
        request = EditRequest(kind=kind, genes=(12,), ranks=(0,) if kind == "replace" else ())
        assert apply(request, checked, FRAMED).tokens.tolist() == apply(request, tokens, FRAMED).tokens.tolist()


@st.composite
def cells_and_genes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    genes = st.integers(4, 3 + N_GENES)
    ranked = draw(st.lists(genes, unique=True, max_size=WINDOW - 2))
    return ranked, draw(st.lists(genes, unique=True, min_size=1, max_size=WINDOW - 2))


@settings(max_examples=200, deadline=None)
@given(cells_and_genes())
def test_every_edit_keeps_the_others_in_order_and_in_the_window(drawn: tuple[list[int], list[int]]) -> None:
    ranked, genes = drawn
    framed = cell(2, *ranked, 3)
    others = [gene for gene in ranked if gene not in genes]

    gone = apply(EditRequest(kind="delete", genes=tuple(genes)), framed, FRAMED)
    assert gone.tokens.tolist() == [2, *others, 3]
    assert compared(gone) == others
    assert [ranked.index(g) if g in ranked else None for g in genes] == list(gone.ranks)

    front = apply(EditRequest(kind="overexpress", genes=tuple(genes)), framed, FRAMED)
    shown = compared(front)
    assert front.tokens.tolist() == [2, *genes, *shown, 3]
    assert shown == others[: len(others) - front.n_cut]
    assert len(front.tokens) <= WINDOW
    assert front.n_cut == max(0, 2 + len(genes) + len(others) - WINDOW)
    assert front.baseline.tolist() == [2, *[g for g in ranked if g in genes or g in shown], 3]
