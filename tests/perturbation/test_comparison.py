"""Read-outs beside the shift: states, classes of a head, and batches that hold several variants as on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from genescale.perturbation.perturb import EditAnswer, EditRequest, Readouts, perturb_cell, perturb_cells
from genescale.perturbation.readouts.states import States
from genescale.platform.bundle import Bundle
from genescale.platform.errors import GenescaleError, InputError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.embedder import Embedder, HeadPooling, HiddenBatch, Layer, layers_to_run, plan_batches
from genescale.training.heads.head import LinearHead
from genescale.training.heads.predict import HeadModel
from genescale.training.heads.spec import HeadSpec
from genescale.training.model import pack

MakeCell = Callable[[Vocabulary, list[int]], np.ndarray]
CLASSES = ("b_cell", "monocyte", "other")


def deletion(embedder: Embedder, *genes: int) -> EditRequest:
    return EditRequest(kind="delete", genes=tuple(embedder.vocabulary.token(f"GENE{gene}") for gene in genes))


def overexpression(embedder: Embedder, *genes: int) -> EditRequest:
    return EditRequest(kind="overexpress", genes=deletion(embedder, *genes).genes)


def head_on(
    embedder: Embedder, *, layer: Layer = "second_to_last", pooling: HeadPooling = "mean_genes", **changes: Any
) -> HeadModel:
    """A head with drawn weights: its probabilities differ between cells."""
    spec = HeadSpec(
        **{"label": "t", "width": embedder.width, "layer": layer, "pooling": pooling, "classes": CLASSES, **changes}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        head = LinearHead(spec).eval()
        if spec.genes:
            head.gene_weights_vc.normal_()
        return HeadModel(embedder=embedder, heads=(head,))


def probabilities(head: HeadModel, cell: np.ndarray) -> np.ndarray:
    return head.predict_cells([cell])[0].probabilities_nc[0].astype(np.float64)


class Packing:
    """The same model with several cells to a batch, as on a GPU."""

    def __init__(self, embedder: Embedder, tokens_per_batch: int = 200) -> None:
        self.inner, self.tokens_per_batch = embedder, tokens_per_batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def hidden(self, cells: Sequence[np.ndarray], *, layer: Layer) -> Iterator[HiddenBatch]:
        return (found[0] for found in self.hidden_of_layers(cells, (layer,)))

    def hidden_of_layers(
        self, cells: Sequence[np.ndarray], layers: Sequence[Layer]
    ) -> Iterator[tuple[HiddenBatch, ...]]:
        counts = [layers_to_run(layer, self.inner._encoder.config.layers) for layer in layers]
        for at_n in plan_batches(np.array([len(cell) for cell in cells]), self.tokens_per_batch):
            batch = pack([cells[at] for at in at_n])
            states = self.inner._run(batch, counts)
            yield tuple(HiddenBatch(cells=at_n, batch=batch, hidden_td=hidden_td) for hidden_td in states)


def states_of(embedder: Embedder, pooling: Any = "mean_genes") -> States:
    vectors = np.random.default_rng(4).normal(size=(3, embedder.width))
    return States(names=("a", "b", "c"), vectors_sd=vectors, start="a", goal="b", pooling=pooling)


def test_every_state_has_its_own_shift_and_the_goal_is_one_of_them(framed: Embedder, make_cell: MakeCell) -> None:
    cell, states = make_cell(framed.vocabulary, [5, 6, 7, 8, 9]), states_of(framed)
    (answer,) = perturb_cell(framed, cell, [deletion(framed, 6)], readouts=Readouts(states=states))
    before, after = framed.embed_cells([cell, make_cell(framed.vocabulary, [5, 7, 8, 9])])
    unit = states.vectors_sd / np.linalg.norm(states.vectors_sd, axis=1, keepdims=True)
    cosines = [unit @ (v / np.linalg.norm(v)) for v in (before.astype(np.float64), after.astype(np.float64))]
    assert answer.state_shifts == pytest.approx(cosines[1] - cosines[0], abs=1e-6)
    assert answer.goal_shift == answer.state_shifts[1] != 0
    (absent, gone) = perturb_cell(
        framed, cell, [deletion(framed, 40), deletion(framed, 5, 6, 7, 8, 9)], readouts=Readouts(states=states)
    )
    assert absent.state_shifts == (0.0, 0.0, 0.0)
    assert gone.state_shifts == (None, None, None)


@pytest.mark.parametrize("genes", [False, True], ids=["", "with weights of genes"])
@pytest.mark.parametrize("pooling", ["mean_genes", "cls"])
@pytest.mark.parametrize("layer", ["last", "second_to_last"])
def test_class_changes_are_differences_of_what_the_head_predicts(
    framed: Embedder, make_cell: MakeCell, layer: Layer, pooling: HeadPooling, genes: bool
) -> None:
    """Whatever layer the shift is read from: both come from one run of the encoder."""
    head = head_on(framed, layer=layer, pooling=pooling, genes=framed.vocabulary.size if genes else 0)
    cell = make_cell(framed.vocabulary, [5, 6, 7, 8])
    readouts = Readouts(head=head)
    answers = perturb_cell(framed, cell, [deletion(framed, 6), deletion(framed, 30)], readouts=readouts)
    before, after = probabilities(head, cell), probabilities(head, make_cell(framed.vocabulary, [5, 7, 8]))
    assert answers[0].class_changes == tuple(after - before)
    assert sum(answers[0].class_changes or ()) == pytest.approx(0, abs=1e-6)
    assert max(map(abs, answers[0].class_changes or ())) > 1e-4
    assert answers[1].class_changes == (0.0, 0.0, 0.0)
    assert readouts.class_names == CLASSES
    (alone,) = perturb_cell(framed, cell, [deletion(framed, 6)])
    assert alone.cosine == answers[0].cosine
    assert alone.class_changes is None


def test_a_head_on_another_encoder_reads_its_own(
    framed: Embedder, short_bundle: Bundle, framed_bundle: Bundle, make_cell: MakeCell
) -> None:
    other = Embedder.load(short_bundle, device="cpu")
    head = head_on(other, layer="last", genes=other.vocabulary.size)
    cell = make_cell(framed.vocabulary, [5, 6, 7, 8])
    (answer,) = perturb_cell(framed, cell, [deletion(framed, 6)], readouts=Readouts(head=head))
    before, after = probabilities(head, cell), probabilities(head, make_cell(framed.vocabulary, [5, 7, 8]))
    assert answer.class_changes == tuple(after - before)
    again = head_on(Embedder.load(framed_bundle, device="cpu"))
    (same,) = perturb_cell(framed, cell, [deletion(framed, 6)], readouts=Readouts(head=again))
    assert same.cosine == answer.cosine


@pytest.mark.parametrize("measure", ["remaining_genes", "cls", "mean_pooled"])
def test_batches_of_several_variants_give_the_same_answers(framed: Embedder, make_cell: MakeCell, measure: Any) -> None:
    """Cells of several lengths, with baselines that a full window cut, in batches that mix them."""
    generator = np.random.default_rng(6)
    cells = [make_cell(framed.vocabulary, generator.permutation(60)[:n].tolist()) for n in (46, 9, 30)]
    requests = [
        [*(deletion(framed, gene) for gene in range(0, 60, 5)), *(overexpression(framed, g) for g in range(0, 60, 9))]
        for _ in cells
    ]
    readouts = Readouts(
        measure=measure,
        states=states_of(framed, Readouts(measure=measure).pooling),
        head=head_on(framed, layer="last"),
        gene_shifts_of="all",
    )
    singly = perturb_cells(framed, cells, requests, readouts=readouts)
    packed = perturb_cells(Packing(framed), cells, requests, readouts=readouts)  # type: ignore[arg-type]
    for one, other in zip(chain.from_iterable(singly), chain.from_iterable(packed), strict=True):
        assert numbers(other) == pytest.approx(numbers(one), abs=2e-6)
        assert other.gene_tokens.tolist() == one.gene_tokens.tolist()
        assert other.reason == one.reason


def numbers(answer: EditAnswer) -> list[float]:
    return [answer.cosine or -1, *answer.state_shifts, *(answer.class_changes or ()), *answer.gene_cosine_values]  # type: ignore[list-item]


def test_a_model_without_finite_numbers_is_an_error(framed_bundle: Bundle, make_cell: MakeCell) -> None:
    broken = Embedder.load(framed_bundle, device="cpu")
    broken._encoder.layers[0].narrow.weight.fill_(torch.nan)
    cell = make_cell(broken.vocabulary, [5, 6, 7])
    with pytest.raises(GenescaleError, match="not finite"):
        perturb_cell(broken, cell, [deletion(broken, 5)])


def test_read_outs_that_do_not_fit_the_model_are_refused(framed: Embedder, bare: Embedder, make_cell: MakeCell) -> None:
    cell = make_cell(bare.vocabulary, [5, 6])
    with pytest.raises(InputError, match="no head of cell classes"):
        Readouts(head=head_on(framed, kind="number", classes=()))
    with pytest.raises(InputError, match="one vocabulary"):
        perturb_cell(bare, cell, [deletion(bare, 5)], readouts=Readouts(head=head_on(framed)))
    with pytest.raises(InputError, match="layer 'second_to_last', but 'last'"):
        perturb_cell(bare, cell, [deletion(bare, 5)], readouts=Readouts(layer="last", states=states_of(bare)))
    unframed = make_cell(framed.vocabulary, [5, 6])[1:]
    with pytest.raises(InputError, match="does not begin with <cls>"):
        perturb_cell(framed, unframed, [deletion(framed, 5)], readouts=Readouts(measure="cls"))


@pytest.mark.parametrize("layer", ["last", "second_to_last"])
def test_sharing_the_first_layer_changes_last_bits_only(framed: Embedder, make_cell: MakeCell, layer: Layer) -> None:
    """And an answer does not depend on what is asked beside it: neither cells nor other edits."""
    generator = np.random.default_rng(7)
    cells = [make_cell(framed.vocabulary, generator.permutation(60)[:n].tolist()) for n in (46, 12, 2)]
    requests = [
        [*(deletion(framed, gene) for gene in range(60)), deletion(framed, 1, 2), overexpression(framed, 3)]
        for _ in cells
    ]
    how = {"layer": layer, "gene_shifts_of": "all", "head": head_on(framed, layer="last")}
    plain = perturb_cells(framed, cells, requests, readouts=Readouts(**how))
    shared = perturb_cells(framed, cells, requests, readouts=Readouts(**how, share_first_layer=True))
    some = [of_cell[::7] for of_cell in requests]
    alone = perturb_cells(framed, cells, some, readouts=Readouts(**how, share_first_layer=True))
    for of_plain, of_shared, of_alone in zip(plain, shared, alone, strict=True):
        for one, other in zip(of_plain, of_shared, strict=True):
            assert numbers_or_none(other) == pytest.approx(numbers_or_none(one), abs=2e-6)
            assert (other.reason, other.found) == (one.reason, one.found)
        assert [numbers_or_none(a) for a in of_alone] == [numbers_or_none(a) for a in of_shared[::7]]
    differing = [a.cosine != b.cosine for a, b in zip(chain(*plain), chain(*shared), strict=True)]
    assert any(differing), "the short cut was not taken"


def numbers_or_none(answer: EditAnswer) -> list[float]:
    return [] if answer.cosine is None else numbers(answer)
