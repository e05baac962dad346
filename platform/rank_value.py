"""Rank value: the counts of one cell become tokens, the most characteristic gene first.

value = count / library size × 10,000 / median of the gene; genes stand in falling order of value, ties go to the
smaller token id (Theodoris et al., Nature 2023, "rank value encoding"; the tie rule is ours, the published sort has
none). Library size and 10,000 are the same for every gene of a cell and cannot change the order, so it is computed from
count / median. Ingestion and serving call this one function, so a cell gets the same tokens on both ways.

Axis suffixes: `g` genes of one cell, `t` tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.platform.errors import InputError, LimitError
from genescale.platform.vocabulary import Vocabulary

TARGET_SUM = 10_000.0
_POSITION_BITS = 16
_POSITIONS = np.arange(1 << _POSITION_BITS, dtype=np.uint64)
_LOW = np.uint64((1 << _POSITION_BITS) - 1)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RankedCell:
    """Tokens of one cell, and what became of its genes.

    input_ids: the vocabulary's token_dtype, `<cls>` and `<eos>` included where the vocabulary has them;
    n_genes: genes given; n_unranked: of these, genes without a median; cropped: whether genes fell out of the window.
    """

    input_ids: npt.NDArray[Any]
    n_genes: int
    cropped: bool
    n_unranked: int = 0


def normalised(counts: npt.ArrayLike, library_size: float | npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Counts per 10,000: count / library size × 10,000 (float64). Medians are medians of these."""
    return np.asarray(counts, dtype=np.float64) / np.asarray(library_size, dtype=np.float64) * TARGET_SUM


def rank_value_tokens(
    token_ids: npt.ArrayLike, counts: npt.ArrayLike, vocabulary: Vocabulary, *, window: int | None = None
) -> RankedCell:
    """Tokens of one cell from its detected vocabulary genes.

    token_ids: unique gene tokens of the cell (any order); counts: positive, aligned with them; window: tokens to keep,
    special tokens included (default: the vocabulary's). Genes without a median are not ranked; they are counted in
    `n_unranked`. Raises InputError for repeated or special tokens and counts that are not positive numbers.
    """
    tokens_g, counts_g = np.asarray(token_ids, dtype=np.int64), np.asarray(counts, dtype=np.float64)
    tokens_g, counts_g = _in_token_order(tokens_g, counts_g)
    _check(tokens_g, counts_g, vocabulary)
    medians_g = vocabulary.medians_t[tokens_g]
    n_genes, n_unranked = tokens_g.size, 0
    if np.isnan(medians_g).any():
        _check_no_special(tokens_g, vocabulary)
        ranked_g = ~np.isnan(medians_g)
        tokens_g, counts_g, medians_g = tokens_g[ranked_g], counts_g[ranked_g], medians_g[ranked_g]
        n_unranked = n_genes - tokens_g.size
    ordered_g = tokens_g[falling_order(counts_g / medians_g)]
    capacity = _capacity(vocabulary, window)
    input_ids = _framed(ordered_g[:capacity], vocabulary)
    return RankedCell(input_ids, n_genes=n_genes, cropped=ordered_g.size > capacity, n_unranked=n_unranked)


def falling_order(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Order that sorts positive numbers falling, equal numbers staying in place: exact, on every processor.

    Sorting one integer per gene (the upper bits of the number, then the position) is several times faster than a stable
    argsort, because NumPy sorts plain integers with vector instructions. Numbers that differ only below those bits may
    come out swapped; that is seen in one comparison, and such a cell is sorted the slow way.
    """
    if values.size > _POSITIONS.size:
        return np.argsort(-values, kind="stable")
    # The bits of positive doubles rise with their value; complementing them makes them fall.
    keys = (~values.view(np.uint64) & ~_LOW) | _POSITIONS[: values.size]
    keys.sort()
    order = (keys & _LOW).astype(np.int64)
    sorted_values = values[order]
    if (sorted_values[1:] > sorted_values[:-1]).any():
        return np.argsort(-values, kind="stable")
    return order


def _in_token_order(
    tokens_g: npt.NDArray[np.int64], counts_g: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    if tokens_g.ndim != 1 or tokens_g.shape != counts_g.shape:
        raise InputError(f"{tokens_g.size} genes but {counts_g.size} counts: one count belongs to each gene.")
    if (tokens_g[1:] > tokens_g[:-1]).all():
        return tokens_g, counts_g
    order = np.argsort(tokens_g, kind="stable")
    return tokens_g[order], counts_g[order]


def _check(tokens_g: npt.NDArray[np.int64], counts_g: npt.NDArray[np.float64], vocabulary: Vocabulary) -> None:
    if not tokens_g.size:
        return
    if tokens_g[0] < 0 or tokens_g[-1] >= vocabulary.size:
        raise InputError(f"token ids outside 0 … {vocabulary.size - 1}.", fix="Map the genes with the same vocabulary.")
    if (tokens_g[1:] == tokens_g[:-1]).any():
        raise InputError("a gene stands in the cell twice.", fix="Sum the counts of repeated genes first.")
    if not ((counts_g > 0) & (counts_g < np.inf)).all():
        raise InputError("a count is zero, negative or not a number.", fix="Give the counts of detected genes only.")


def _check_no_special(tokens_g: npt.NDArray[np.int64], vocabulary: Vocabulary) -> None:
    # Special tokens have no median, so only a cell with a missing median needs this look.
    if np.isin(list(vocabulary.special.values()), tokens_g).any():
        raise InputError("a special token stands among the genes.", fix="Give gene tokens only.")


def _capacity(vocabulary: Vocabulary, window: int | None) -> int:
    frame = 0 if vocabulary.cls is None else 2
    capacity = (vocabulary.window if window is None else window) - frame
    if capacity < 1:
        raise LimitError(f"a window of {window} tokens holds no gene.", fix=f"Use at least {frame + 1}.")
    return capacity


def _framed(tokens_g: npt.NDArray[np.int64], vocabulary: Vocabulary) -> npt.NDArray[Any]:
    if vocabulary.cls is None or vocabulary.eos is None:
        return tokens_g.astype(vocabulary.token_dtype)
    input_ids = np.empty(tokens_g.size + 2, dtype=vocabulary.token_dtype)
    input_ids[0], input_ids[-1] = vocabulary.cls, vocabulary.eos
    input_ids[1:-1] = tokens_g
    return input_ids
