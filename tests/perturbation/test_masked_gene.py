"""The change of masked-gene log-probability: its definition, its groups, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from genescale.perturbation.editing.edits import delete, overexpress
from genescale.perturbation.readouts.masked_gene import MaskedGeneReadout, masked_gene_changes
from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError, SettingsError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.model import MaskedGeneModel, pack
from genescale.training.weights import load_model

MakeCell = Callable[[Vocabulary, list[int]], np.ndarray]
ALONE = MaskedGeneReadout(hidden_share=0.0)


@pytest.fixture(scope="module")
def model(framed_bundle: Bundle) -> MaskedGeneModel:
    return load_model(framed_bundle)


@pytest.fixture
def cell(framed_bundle: Bundle, make_cell: MakeCell) -> np.ndarray:
    return make_cell(framed_bundle.vocabulary, list(range(5, 35)))


def log_probability(model: MaskedGeneModel, tokens_t: np.ndarray, gene: int, mask: int, edited: int) -> float:
    """Of `gene` where it stands in a cell, hidden alone, given that it is not the edited one; written out plainly."""
    at = int(np.flatnonzero(tokens_t == gene)[0])
    hidden = tokens_t.astype(np.int64)
    hidden[at] = mask
    with torch.inference_mode():
        logits_v = model(pack([hidden]), torch.tensor([at]))[0].double().clone()
        logits_v[edited] = -torch.inf
        return float(torch.log_softmax(logits_v, -1)[gene])


def test_one_gene_hidden_alone_is_the_change_of_its_log_probability(
    model: MaskedGeneModel, framed_bundle: Bundle, cell: np.ndarray
) -> None:
    vocabulary, edited, gene = framed_bundle.vocabulary, int(cell[4]), int(cell[20])
    edit = delete(cell, [edited], vocabulary)
    (change,) = masked_gene_changes(model, [edit], vocabulary, genes=[gene], readout=ALONE)
    before = log_probability(model, cell, gene, vocabulary.mask, edited)
    after = log_probability(model, edit.tokens, gene, vocabulary.mask, edited)
    assert change.genes_k.tolist() == [gene]
    assert change.before_k[0] == pytest.approx(before, abs=1e-6)
    assert change.change_k[0] == pytest.approx(after - before, abs=1e-6)
    assert abs(after - before) > 1e-4


def test_all_genes_but_the_edited_ones_are_answered_in_the_order_of_the_edited_cell(
    model: MaskedGeneModel, framed_bundle: Bundle, cell: np.ndarray
) -> None:
    vocabulary = framed_bundle.vocabulary
    edits = [delete(cell, [int(cell[4]), int(cell[9])], vocabulary), overexpress(cell, [int(cell[30])], vocabulary)]
    changes = masked_gene_changes(model, edits, vocabulary)
    for edit, change in zip(edits, changes, strict=True):
        np.testing.assert_array_equal(change.genes_k, edit.tokens[edit.kept])
        assert np.isfinite(change.change_k).all()
        assert (change.before_k < 0).all()


def test_edits_answered_together_are_those_answered_alone(
    model: MaskedGeneModel, framed_bundle: Bundle, cell: np.ndarray
) -> None:
    vocabulary = framed_bundle.vocabulary
    edits = [delete(cell, [int(gene)], vocabulary) for gene in cell[1:8]]
    together = masked_gene_changes(model, edits, vocabulary, readout=MaskedGeneReadout(tokens_per_batch=100))
    for edit, both in zip(edits, together, strict=True):
        (alone,) = masked_gene_changes(model, [edit], vocabulary)
        np.testing.assert_allclose(both.change_k, alone.change_k, atol=1e-5)


def test_a_gene_is_hidden_with_the_same_others_whatever_is_edited(
    model: MaskedGeneModel, framed_bundle: Bundle, cell: np.ndarray
) -> None:
    """Without the edited genes the unedited side is the same, so what differs is what the edit did."""
    vocabulary = framed_bundle.vocabulary
    absent = vocabulary.token("GENE50")
    unchanged = masked_gene_changes(model, [delete(cell, [absent], vocabulary)], vocabulary)[0]
    np.testing.assert_allclose(unchanged.change_k, 0.0, atol=1e-6)
    other = MaskedGeneReadout(seed=1)
    regrouped = masked_gene_changes(model, [delete(cell, [absent], vocabulary)], vocabulary, readout=other)[0]
    assert np.abs(regrouped.before_k - unchanged.before_k).max() > 1e-3


def test_genes_that_the_cell_lacks_have_no_entry(
    model: MaskedGeneModel, framed_bundle: Bundle, cell: np.ndarray
) -> None:
    vocabulary = framed_bundle.vocabulary
    genes = [vocabulary.token("GENE50"), int(cell[3]), int(cell[4])]
    (change,) = masked_gene_changes(model, [delete(cell, [int(cell[4])], vocabulary)], vocabulary, genes=genes)
    assert change.genes_k.tolist() == [int(cell[3])]


def test_what_cannot_be_read_out_is_refused(model: MaskedGeneModel, framed_bundle: Bundle, cell: np.ndarray) -> None:
    vocabulary = framed_bundle.vocabulary
    edit = delete(cell, [int(cell[4])], vocabulary)
    for token in (vocabulary.mask, vocabulary.size):
        with pytest.raises(InputError, match="no gene"):
            masked_gene_changes(model, [edit], vocabulary, genes=[token])
    for share in (-0.1, 1.0):
        with pytest.raises(SettingsError, match="hidden_share"):
            MaskedGeneReadout(hidden_share=share)
    with pytest.raises(SettingsError, match="tokens_per_batch"):
        MaskedGeneReadout(tokens_per_batch=0)
