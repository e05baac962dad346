"""Masks: pure functions of (seed, epoch, cell), 15 % of the genes, never a special token."""

from __future__ import annotations

import numpy as np
import pytest

from genescale.platform.errors import CorpusError, SettingsError
from genescale.platform.vocabulary import MASK, PAD, Vocabulary
from genescale.training.masking import Masking

GENES = 1_000


def vocabulary(*, framed: bool = True) -> Vocabulary:
    names = [f"ENSG{i:011d}" for i in range(GENES)]
    special = {} if framed else {"special": (PAD, MASK)}
    return Vocabulary.build(names, np.ones(GENES), window=512, name="test", **special)  # type: ignore[arg-type]


def cell(n_genes: int, *, framed: bool = True, seed: int = 0) -> np.ndarray:
    first = 4 if framed else 2
    genes = np.random.default_rng(seed).permutation(GENES)[:n_genes] + first
    return np.concatenate([[2], genes, [3]] if framed else [genes]).astype(np.uint16)


@pytest.mark.parametrize("framed", [True, False])
@pytest.mark.parametrize("n_genes", [1, 2, 6, 7, 33, 400])
def test_fifteen_percent_of_the_genes_and_at_least_one(framed: bool, n_genes: int) -> None:
    masking = Masking(vocabulary=vocabulary(framed=framed), seed=1)
    tokens = cell(n_genes, framed=framed)
    masked = masking.mask(tokens, epoch=0, cell=5)
    expected = max(1, round(0.15 * n_genes + 1e-9))
    assert len(masked.positions) == expected == masking.counts(np.array([len(tokens)]))[0]
    assert (np.diff(masked.positions) > 0).all()
    np.testing.assert_array_equal(masked.labels, tokens[masked.positions])
    untouched = np.setdiff1d(np.arange(len(tokens)), masked.positions)
    np.testing.assert_array_equal(masked.tokens[untouched], tokens[untouched])


def test_special_tokens_are_neither_hidden_nor_used_as_replacements() -> None:
    masking = Masking(vocabulary=vocabulary(), seed=1)
    for number in range(200):
        masked = masking.mask(cell(50, seed=number), epoch=0, cell=number)
        assert masked.labels.min() >= 4
        assert masked.tokens[0] == 2
        assert masked.tokens[-1] == 3
        assert set(masked.tokens[masked.positions][masked.tokens[masked.positions] < 4]) <= {1}


@pytest.mark.parametrize(
    ("shares", "same_share"), [({}, 0.1), ({"mask_token_share": 0.8, "random_gene_share": 0.2}, 0)]
)
def test_shares_of_masks_random_genes_and_genes_that_stay(shares: dict[str, float], same_share: float) -> None:
    masking = Masking(vocabulary=vocabulary(), seed=1, **shares)
    hidden = same = total = 0
    for number in range(400):
        masked = masking.mask(cell(400, seed=number), epoch=0, cell=number)
        now = masked.tokens[masked.positions]
        hidden, same = hidden + (now == 1).sum(), same + (now == masked.labels).sum()
        total += len(now)
    assert abs(hidden / total - 0.8) < 0.01
    # A random gene is now and then the one that stood there.
    assert abs(same / total - same_share) < 0.01


@pytest.mark.parametrize("shares", [(0.9, 0.2), (-0.1, 0.1)])
def test_shares_that_cannot_be_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(SettingsError, match="mask_token_share"):
        Masking(vocabulary=vocabulary(), seed=1, mask_token_share=shares[0], random_gene_share=shares[1])


def test_every_gene_of_a_cell_is_hidden_equally_often() -> None:
    masking = Masking(vocabulary=vocabulary(), seed=1)
    tokens = cell(20)
    times = np.zeros(len(tokens))
    for epoch in range(4_000):
        times[masking.mask(tokens, epoch=epoch, cell=3).positions] += 1
    assert times[0] == times[-1] == 0
    # Three of twenty, 4,000 times: binomial with a standard deviation of 23.
    assert np.abs(times[1:-1] - 600).max() < 5 * 23


def test_a_mask_depends_on_seed_epoch_and_cell_alone() -> None:
    tokens = cell(300)

    def positions(seed: int, epoch: int, number: int) -> list[int]:
        masking = Masking(vocabulary=vocabulary(), seed=seed)
        masking.mask(cell(10), epoch=9, cell=9)  # an earlier draw must not matter
        return masking.mask(tokens, epoch=epoch, cell=number).positions.tolist()

    first = positions(1, 2, 3)
    assert positions(1, 2, 3) == first
    assert positions(0, 2, 3) != first
    assert positions(1, 3, 3) != first
    assert positions(1, 2, 4) != first


PINNED_POSITIONS = [3, 8, 25, 32, 39, 40]
PINNED_TOKENS = [1, 1, 1, 1, 1, 1]


def test_masks_stay_what_they_are() -> None:
    """A resumed run must draw the masks of the first one, also under another NumPy."""
    tokens = np.concatenate([[2], np.arange(4, 44), [3]])
    masked = Masking(vocabulary=vocabulary(), seed=42).mask(tokens, epoch=1, cell=7)
    assert masked.positions.tolist() == PINNED_POSITIONS
    assert masked.tokens[masked.positions].tolist() == PINNED_TOKENS


def test_the_given_cell_is_not_changed() -> None:
    tokens = cell(100)
    tokens.setflags(write=False)
    Masking(vocabulary=vocabulary(), seed=1).mask(tokens, epoch=0, cell=0)


@pytest.mark.parametrize("tokens", [[2, 3], [10, 11, 12], [2, 10, 5_000, 3]])
def test_cells_of_another_vocabulary_are_refused(tokens: list[int]) -> None:
    with pytest.raises(CorpusError, match="cell 17"):
        Masking(vocabulary=vocabulary(), seed=1).mask(np.array(tokens, dtype=np.uint16), epoch=0, cell=17)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2])
def test_fractions_out_of_range_are_refused(fraction: float) -> None:
    with pytest.raises(SettingsError, match="mask_fraction"):
        Masking(vocabulary=vocabulary(), seed=1, fraction=fraction)
