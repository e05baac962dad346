"""Hidden genes: the same masks in any batch, floors worked out by hand, and intervals that resample donors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from genescale.platform.bundle import Bundle
from genescale.platform.vocabulary import Vocabulary
from genescale.training.cells import MemoryCells
from genescale.training.evaluation.masked_genes import (
    RANK_EDGES,
    SCORES,
    HiddenGenes,
    bin_name,
    hidden_genes,
    mean_scores,
    rank_bin,
    score_rows,
)
from genescale.training.masking import Masking
from genescale.training.weights import load_model


def framed(vocabulary: Vocabulary, genes: Sequence[int]) -> np.ndarray:
    """Tokens of a cell with these genes, between <cls> and <eos>."""
    assert vocabulary.cls is not None
    assert vocabulary.eos is not None
    return np.array([vocabulary.cls, *vocabulary.token_ids[list(genes)].tolist(), vocabulary.eos])


CPU = torch.device("cpu")


def measured(bundle: Bundle, cells: list[np.ndarray], index: np.ndarray, *, budget: int) -> HiddenGenes:
    source = MemoryCells(cells, bundle.vocabulary)
    masking = Masking(vocabulary=bundle.vocabulary, seed=3)
    return hidden_genes(load_model(bundle), source, index, masking, token_budget=budget, device=CPU)


def test_a_cell_has_the_same_hidden_genes_and_loss_whatever_is_measured_with_it(
    tiny_bundle: Bundle, tiny_cells: list[np.ndarray]
) -> None:
    everything = np.arange(len(tiny_cells))
    whole = measured(tiny_bundle, tiny_cells, everything, budget=10_000)
    small = measured(tiny_bundle, tiny_cells, everything, budget=130)
    np.testing.assert_array_equal(whole.cell_m, small.cell_m)
    np.testing.assert_array_equal(whole.rank_m, small.rank_m)
    np.testing.assert_allclose(whole.loss_qm, small.loss_qm, rtol=1e-5)
    few = np.array([1, 5, 7])
    part = measured(tiny_bundle, tiny_cells, few, budget=300)
    theirs = np.isin(whole.cell_m, few)
    np.testing.assert_array_equal(whole.rank_m[theirs], part.rank_m)
    np.testing.assert_allclose(whole.loss_qm[0, theirs], part.loss_qm[0], rtol=1e-5)
    assert (part.cell_m == np.searchsorted(few, whole.cell_m[theirs])).all()


def test_model_scores_are_those_of_its_own_logits(tiny_bundle: Bundle, tiny_cells: list[np.ndarray]) -> None:
    from genescale.training.batches import micro_batch

    hidden = measured(tiny_bundle, tiny_cells, np.arange(len(tiny_cells)), budget=500)
    masking = Masking(vocabulary=tiny_bundle.vocabulary, seed=3)
    batch = micro_batch([tiny_cells[7]], [7], masking, epoch=0)
    with torch.no_grad():
        logits = load_model(tiny_bundle)(batch.packed, batch.masked_positions)
    expected = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none").numpy()
    mine = hidden.cell_m == 7
    np.testing.assert_allclose(hidden.loss_qm[0, mine], expected, rtol=1e-4)
    np.testing.assert_array_equal(hidden.hit_qm[0, mine], (logits.argmax(-1) == batch.labels).numpy())
    # <cls> stands before the first gene, so position 1 is rank 0.
    np.testing.assert_array_equal(hidden.rank_m[mine], batch.masked_positions.numpy() - 1)


def test_floors_are_smoothed_frequencies_in_the_other_cells(tiny_bundle: Bundle, tiny_vocabulary: Vocabulary) -> None:
    # Two genes a cell and one of them hidden: everything can be counted by hand.
    cells = [framed(tiny_vocabulary, genes) for genes in ([0, 1], [0, 1], [0, 2], [1, 0])]
    hidden = measured(tiny_bundle, cells, np.arange(4), budget=100)
    n_genes = len(tiny_vocabulary.gene_ids)
    for place in range(len(hidden.cell_m)):
        cell, rank = int(hidden.cell_m[place]), int(hidden.rank_m[place])
        others = [c for i, c in enumerate(cells) if i != cell]
        genes = [int(t) for c in others for t in c[1:-1]]
        label, shown = int(cells[cell][1 + rank]), int(cells[cell][2 - rank])
        different = len(set(genes))

        def overall(token: int) -> float:
            return (genes.count(token) + different / n_genes) / (len(genes) + different)  # noqa: B023

        def at_rank(token: int) -> float:
            # All ranks of such short cells are in the first bin.
            return (genes.count(token) + different * overall(token)) / (len(genes) + different)  # noqa: B023

        losses = dict(zip(SCORES, hidden.loss_qm[:, place], strict=True))
        assert losses["overall"] == pytest.approx(-np.log(overall(label)))
        assert losses["rank_bin"] == pytest.approx(-np.log(at_rank(label)))
        assert losses["rank_bin_unseen"] == pytest.approx(-np.log(at_rank(label) / (1 - at_rank(shown))))


def test_the_floor_by_rank_knows_where_a_gene_stands(tiny_bundle: Bundle, tiny_vocabulary: Vocabulary) -> None:
    # Genes 0 … 9 always come first, 10 … 39 after them: the rank says which of the two.
    draws = np.random.default_rng(0)
    cells = [framed(tiny_vocabulary, [*draws.permutation(10), *(10 + draws.permutation(30))]) for _ in range(40)]
    hidden = measured(tiny_bundle, cells, np.arange(40), budget=2_000)
    mean = dict(zip(SCORES, hidden.loss_qm.mean(axis=1), strict=True))
    assert mean["rank_bin"] < mean["overall"] - 0.2
    assert mean["rank_bin_unseen"] < mean["rank_bin"] - 0.5


def test_rank_bins_are_named_as_they_are_cut() -> None:
    assert rank_bin(np.array([0, 9, 10, 29, 30, 5_000])).tolist() == [0, 0, 1, 1, 2, len(RANK_EDGES) - 1]
    assert [bin_name(0), bin_name(1), bin_name(6)] == ["1 to 10", "11 to 30", "3,001 and more"]


def test_intervals_resample_whole_donors() -> None:
    draws = np.random.default_rng(0)
    donor_m = np.repeat(np.arange(8), 500)
    # All that varies is the donor: an interval over single genes would be far too narrow.
    values = (np.repeat(draws.normal(size=8), 500) + draws.normal(scale=0.01, size=4_000))[None]
    (by_donor,) = mean_scores(values, donor_m, bootstrap=400, seed=1)
    (by_gene,) = mean_scores(values, np.arange(4_000), bootstrap=400, seed=1)
    assert by_donor.low is not None
    assert by_donor.high is not None
    assert by_gene.low is not None
    assert by_gene.high is not None
    assert by_donor.low < by_donor.mean < by_donor.high
    assert by_donor.high - by_donor.low > 8 * (by_gene.high - by_gene.low)
    (alone,) = mean_scores(values, np.zeros(4_000, dtype=int), bootstrap=400, seed=1)
    assert (alone.low, alone.high) == (None, None)


def test_gain_is_taken_over_the_best_floor_and_strata_add_up() -> None:
    loss = np.array([[2.0, 2.0, 4.0, 4.0], [3.0, 3.0, 9.0, 9.0], [5.0, 5.0, 5.0, 5.0], [8.0, 8.0, 8.0, 8.0]])
    hidden = HiddenGenes(
        cell_m=np.array([0, 1, 2, 3]),
        rank_m=np.array([0, 1, 40, 41]),
        loss_qm=loss,
        hit_qm=np.array([[True, True, False, True]] * 4),
    )
    rows = score_rows(hidden, np.array([0, 0, 1, 1]), ["a", "b"], np.arange(4), bootstrap=50, seed=0)
    assert [row.best_floor for row in rows] == ["rank_bin_unseen", "rank_bin"]
    assert [row.gain.mean for row in rows] == [1.0, 1.0]
    assert [row.accuracy["model"].mean for row in rows] == [1.0, 0.5]
    assert sum(row.genes for row in rows) == 4
