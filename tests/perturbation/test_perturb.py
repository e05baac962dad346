"""One cell before and after its edits, against the definitions computed by hand with the same model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from genescale.perturbation import perturb
from genescale.perturbation.perturb import EditAnswer, EditRequest, Readouts, perturb_cell, perturb_cells
from genescale.perturbation.readouts.shift import Measure
from genescale.perturbation.readouts.states import States
from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.embedder import Embedder, Layer

MakeCell = Callable[[Vocabulary, list[int]], np.ndarray]


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def deletion(embedder: Embedder, *genes: int) -> EditRequest:
    return EditRequest(kind="delete", genes=tuple(embedder.vocabulary.token(f"GENE{gene}") for gene in genes))


def overexpression(embedder: Embedder, *genes: int) -> EditRequest:
    return EditRequest(kind="overexpress", genes=deletion(embedder, *genes).genes)


def toward(goal: np.ndarray, layer: Layer = "second_to_last", measure: Measure = "remaining_genes") -> States:
    pooling = Readouts(measure=measure).pooling
    return States(names=("goal",), vectors_sd=goal[None], goal="goal", layer=layer, pooling=pooling)


def same_bits(one: EditAnswer, other: EditAnswer) -> bool:
    return (
        (one.cosine, one.goal_shift, one.ranks, one.reason)
        == (other.cosine, other.goal_shift, other.ranks, other.reason)
        and one.gene_tokens.tolist() == other.gene_tokens.tolist()
        and one.gene_cosine_values.tobytes() == other.gene_cosine_values.tobytes()
    )


@pytest.mark.parametrize("layer", ["last", "second_to_last"])
@pytest.mark.parametrize("measure", ["remaining_genes", "cls", "mean_pooled"])
def test_measures_are_what_they_say(framed: Embedder, make_cell: MakeCell, measure: Measure, layer: Layer) -> None:
    before, after = make_cell(framed.vocabulary, [5, 6, 7, 8]), make_cell(framed.vocabulary, [5, 7, 8])
    (original,), (edited,) = framed.embed_genes([before], layer=layer), framed.embed_genes([after], layer=layer)
    goal = np.random.default_rng(0).normal(size=framed.width)
    expected = {
        "remaining_genes": cosine(edited[[1, 2, 3]], original[[1, 3, 4]]).mean(),
        "cls": cosine(edited[0], original[0]),
        "mean_pooled": cosine(edited[1:-1].mean(0), original[1:-1].mean(0)),
    }
    states = (edited[0], original[0]) if measure == "cls" else (edited[1:-1].mean(0), original[1:-1].mean(0))
    how = Readouts(layer=layer, measure=measure, states=toward(goal, layer, measure))
    (answer,) = perturb_cell(framed, before, [deletion(framed, 6)], readouts=how)
    assert answer.cosine == pytest.approx(expected[measure], abs=1e-6)
    assert answer.shift == 1 - answer.cosine
    assert answer.goal_shift == pytest.approx(cosine(states[0], goal) - cosine(states[1], goal), abs=1e-6)
    assert answer.found == {framed.vocabulary.token("GENE6"): 1}
    assert answer.n_compared == 3
    assert 1e-4 < answer.shift < 1


def test_gene_cosines_belong_to_their_genes(bare: Embedder, make_cell: MakeCell) -> None:
    """The published code stores those of an overexpression under the next gene."""
    before, after = make_cell(bare.vocabulary, [5, 6, 7, 8]), make_cell(bare.vocabulary, [7, 5, 6, 8])
    (original,), (edited,) = bare.embed_genes([before]), bare.embed_genes([after])
    (answer,) = perturb_cell(bare, before, [overexpression(bare, 7)], readouts=Readouts(gene_shifts_of="all"))
    token = bare.vocabulary.token
    expected = {
        token("GENE5"): cosine(edited[1], original[0]),
        token("GENE6"): cosine(edited[2], original[1]),
        token("GENE8"): cosine(edited[3], original[3]),
    }
    assert answer.gene_cosines == pytest.approx(expected, abs=1e-7)
    some = Readouts(gene_shifts_of=[token("GENE6"), token("GENE7"), token("GENE40")])
    (of_one,) = perturb_cell(bare, before, [overexpression(bare, 7)], readouts=some)
    assert of_one.gene_cosines == {token("GENE6"): answer.gene_cosines[token("GENE6")]}
    (of_none,) = perturb_cell(bare, before, [overexpression(bare, 7)])
    assert of_none.gene_cosines == {}


def test_an_absent_gene_moves_nothing(framed: Embedder, make_cell: MakeCell) -> None:
    cell = make_cell(framed.vocabulary, [5, 6])
    how = Readouts(gene_shifts_of="all", states=toward(np.ones(framed.width)))
    (answer,) = perturb_cell(framed, cell, [deletion(framed, 9)], readouts=how)
    assert (answer.cosine, answer.shift, answer.goal_shift) == (1.0, 0.0, 0.0)
    assert answer.absent == deletion(framed, 9).genes
    assert answer.found == {}
    assert set(answer.gene_cosines.values()) == {1.0}
    assert len(answer.gene_cosines) == 2


def test_a_cell_without_its_only_gene_has_no_shift(framed: Embedder, bare: Embedder, make_cell: MakeCell) -> None:
    for embedder in (framed, bare):
        cell = make_cell(embedder.vocabulary, [5])
        how = Readouts(states=toward(np.ones(embedder.width)))
        (answer,) = perturb_cell(embedder, cell, [deletion(embedder, 5)], readouts=how)
        assert (answer.cosine, answer.shift, answer.goal_shift) == (None, None, None)
        assert answer.reason == "the edit leaves no gene in the cell"


def test_overexpressing_all_genes_leaves_none_to_compare_but_moves_the_cell(
    bare: Embedder, make_cell: MakeCell
) -> None:
    cell, request = make_cell(bare.vocabulary, [5, 6]), overexpression(bare, 6, 5)
    (none,) = perturb_cell(bare, cell, [request])
    assert none.cosine is None
    assert "no gene beside" in none.reason
    (moved,) = perturb_cell(bare, cell, [request], readouts=Readouts(measure="mean_pooled"))
    assert moved.shift is not None
    assert moved.shift > 1e-5


def test_a_cut_cell_is_compared_with_the_equally_cut_original(bare: Embedder, make_cell: MakeCell) -> None:
    full = make_cell(bare.vocabulary, list(range(10, 10 + bare.window)))
    cut, edited = full[:-1], np.concatenate([make_cell(bare.vocabulary, [5]), full[:-1]])
    (answer,) = perturb_cell(bare, full, [overexpression(bare, 5)])
    (of_cut,), (of_edited,) = bare.embed_genes([cut]), bare.embed_genes([edited])
    assert answer.cosine == pytest.approx(cosine(of_edited[1:], of_cut).mean(), abs=1e-7)
    assert (answer.n_cut, answer.n_compared) == (1, bare.window - 1)


def test_the_shorter_of_vocabulary_and_model_is_the_window(short_bundle: Bundle, make_cell: MakeCell) -> None:
    short = Embedder.load(short_bundle, device="cpu")
    full = make_cell(short.vocabulary, [10, 11, 12, 13, 14, 15])
    (answer,) = perturb_cell(short, full, [overexpression(short, 40)])
    assert (answer.n_cut, answer.n_compared) == (1, 5)
    assert answer.shift is not None


def test_refill_lets_the_next_gene_in(bare: Embedder, make_cell: MakeCell) -> None:
    everything = make_cell(bare.vocabulary, list(range(8, 8 + bare.window + 3)))
    shown = everything[: bare.window]
    gene = int(shown[2])
    (stays,) = perturb_cell(bare, shown, [EditRequest(kind="delete", genes=(gene,))], uncropped=everything)
    (refilled,) = perturb_cell(
        bare, shown, [EditRequest(kind="delete", genes=(gene,), refill=True)], uncropped=everything
    )
    (original,), (edited,) = bare.embed_genes([shown]), bare.embed_genes([np.delete(everything, 2)[: bare.window]])
    rest = np.delete(np.arange(bare.window), 2)
    assert refilled.cosine == pytest.approx(cosine(edited[: bare.window - 1], original[rest]).mean(), abs=1e-7)
    assert refilled.n_refilled == 1
    assert refilled.cosine != stays.cosine
    with pytest.raises(InputError, match="needs the genes beyond the window"):
        perturb_cell(bare, shown, [EditRequest(kind="delete", genes=(gene,), refill=True)])
    with pytest.raises(InputError, match="only a deletion can refill"):
        EditRequest(kind="overexpress", genes=(gene,), refill=True)


@pytest.mark.parametrize("tokens_per_chunk", [1, 40, 1_000_000])
def test_answers_do_not_depend_on_what_is_asked_beside_them(
    framed: Embedder, make_cell: MakeCell, tokens_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(5)
    cells = [make_cell(framed.vocabulary, generator.permutation(60)[:n].tolist()) for n in (3, 14, 1, 9, 14)]
    requests = [
        [*(deletion(framed, gene) for gene in range(0, 60, 7)), *(overexpression(framed, gene) for gene in (1, 2))],
        [overexpression(framed, 3, 4), deletion(framed, 5)],
        [],
        [deletion(framed, gene) for gene in range(60)],
        [overexpression(framed, gene) for gene in range(60)],
    ]
    how = Readouts(states=toward(np.ones(framed.width)), gene_shifts_of="all")
    singles = [
        [perturb_cell(framed, cell, [request], readouts=how)[0] for request in wanted]
        for cell, wanted in zip(cells, requests, strict=True)
    ]
    monkeypatch.setattr(perturb, "TOKENS_PER_CHUNK", tokens_per_chunk)
    together = perturb_cells(framed, cells, requests, readouts=how)
    assert [len(answers) for answers in together] == [len(wanted) for wanted in requests]
    for of_cell, ones in zip(together, singles, strict=True):
        for answer, one in zip(of_cell, ones, strict=True):
            assert same_bits(answer, one)


def test_cls_alone_and_with_gene_shifts_agree(framed: Embedder, make_cell: MakeCell) -> None:
    cell, request = make_cell(framed.vocabulary, [5, 6, 7]), deletion(framed, 5)
    (alone,) = perturb_cell(framed, cell, [request], readouts=Readouts(measure="cls"))
    (beside,) = perturb_cell(framed, cell, [request], readouts=Readouts(measure="cls", gene_shifts_of="all"))
    assert alone.cosine == beside.cosine


def test_what_cannot_be_compared_is_refused(bare: Embedder, make_cell: MakeCell) -> None:
    cell, request = make_cell(bare.vocabulary, [5, 6]), deletion(bare, 5)
    with pytest.raises(InputError, match="cells begin with <cls>"):
        perturb_cell(bare, cell, [request], readouts=Readouts(measure="cls"))
    with pytest.raises(InputError, match="Did you mean 'mean_pooled'"):
        Readouts(measure="mean_poled")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="embeddings have 32"):
        perturb_cell(bare, cell, [request], readouts=Readouts(states=toward(np.ones(3))))
