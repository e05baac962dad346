"""Edits of one cell's tokens: delete genes, or overexpress them.

Legend: `t` tokens of a cell, `k` genes that stand in both cells and were not edited.

An edit is a pure function of a token array. It returns the edited tokens, the tokens to compare them with, where each
gene was found, and which positions of the two arrays hold the same gene. The rules are those of the published code:

- *delete* takes the genes out; the cell becomes shorter. A cell that was cropped to the window is not refilled, unless
  its uncropped tokens are given.
- *overexpress* puts the genes at the front, after `<cls>`, in the order given. A gene that the cell lacks is inserted;
  when the window is full, the lowest-ranked other genes are cut, and cut from the cell to compare with as well.
- A gene that is not there is an answer, not an error: deleting it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from genescale.platform.errors import InputError, did_you_mean
from genescale.platform.vocabulary import Vocabulary

Kind = Literal["delete", "overexpress"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """What one edit did to one cell."""

    kind: Kind
    genes: tuple[int, ...]
    """Gene tokens that were to be edited, in the order given."""
    ranks: tuple[int | None, ...]
    """Rank of each of `genes` in the cell (0 = its first gene), None where the cell lacks the gene."""
    tokens: np.ndarray
    """Edited cell `(t,)`."""
    baseline: np.ndarray
    """Cell `(t,)` to compare with: the given one, except where a full window forced a cut."""
    kept: np.ndarray
    """Positions `(k,)` in `tokens` of the genes that stand in both cells and were not edited."""
    kept_baseline: np.ndarray
    """Positions `(k,)` in `baseline` of the same genes, in the same order."""
    n_cut: int = 0
    """Lowest-ranked genes that had to leave a full window (overexpress)."""
    n_refilled: int = 0
    """Genes that moved up into the window (delete with the uncropped cell)."""

    @property
    def absent(self) -> tuple[int, ...]:
        """The genes that the cell lacks."""
        return tuple(gene for gene, rank in zip(self.genes, self.ranks, strict=True) if rank is None)

    @property
    def found(self) -> bool:
        """Whether the cell has every gene of the edit."""
        return None not in self.ranks

    @property
    def changed(self) -> bool:
        """Whether the edit altered the cell at all."""
        return not np.array_equal(self.tokens, self.baseline)


def parse_kind(text: str) -> Kind:
    """The kind of edit that `text` names.

    Raises InputError for anything but the kinds that are implemented.
    """
    for kind in KINDS:
        if text == kind:
            return kind
    choices = " or ".join(f"'{kind}'" for kind in KINDS)
    if text in ("inhibit", "activate"):
        raise InputError(f"the edit '{text}' is not available yet.", fix=f"Use {choices}.")
    raise InputError(f"'{text}' is no kind of edit.", fix=did_you_mean(text, KINDS) or f"Use {choices}.")


def delete(
    tokens_t: np.ndarray, genes: Sequence[int], vocabulary: Vocabulary, *, uncropped_t: np.ndarray | None = None
) -> Edit:
    """Take `genes` out of a cell; with `uncropped_t`, let the next genes of the uncropped cell move up.

    `uncropped_t` holds all genes of the same cell in rank order, with or without special tokens. It must begin with the
    genes of `tokens_t`. Raises InputError when it does not, or when `genes` or `tokens_t` cannot be used.
    """
    cell = _Cell.of(tokens_t, vocabulary)
    genes = _checked_genes(genes, vocabulary)
    keep = ~np.isin(cell.genes, genes)
    remaining = cell.genes[keep]
    refill = remaining[:0] if uncropped_t is None else _refill(cell, uncropped_t, genes, vocabulary)
    kept_baseline = np.flatnonzero(keep) + cell.first
    return Edit(
        kind="delete",
        genes=genes,
        ranks=cell.ranks(genes),
        tokens=cell.with_genes(np.concatenate([remaining, refill])),
        baseline=cell.tokens,
        kept=np.arange(len(remaining)) + cell.first,
        kept_baseline=kept_baseline,
        n_refilled=len(refill),
    )


def overexpress(tokens_t: np.ndarray, genes: Sequence[int], vocabulary: Vocabulary, *, window: int = 0) -> Edit:
    """Put `genes` first, in the order given; insert those that the cell lacks.

    `window` is the longest cell the model takes, special tokens included (0 = the vocabulary's). Raises InputError when
    `genes` or `tokens_t` cannot be used, or more genes are given than the window holds.
    """
    cell = _Cell.of(tokens_t, vocabulary)
    genes = _checked_genes(genes, vocabulary)
    others_at = np.flatnonzero(~np.isin(cell.genes, genes))
    room = (window or vocabulary.window) - cell.n_special - len(genes)
    if room < 0:
        raise InputError(f"{len(genes)} genes do not fit into a window of {window or vocabulary.window} tokens.")
    n_cut = max(0, len(others_at) - room)
    cut_at, others_at = others_at[len(others_at) - n_cut :], others_at[: len(others_at) - n_cut]
    # Cut by gene, not by position: an edited gene that itself ranks last must not shield another one from the cut.
    return Edit(
        kind="overexpress",
        genes=genes,
        ranks=cell.ranks(genes),
        tokens=cell.with_genes(np.concatenate([np.asarray(genes, dtype=cell.tokens.dtype), cell.genes[others_at]])),
        baseline=cell.with_genes(np.delete(cell.genes, cut_at)),
        kept=np.arange(len(others_at)) + cell.first + len(genes),
        # What was cut ranks below every other gene that stays, so those keep their positions.
        kept_baseline=others_at + cell.first,
        n_cut=n_cut,
    )


@dataclass(frozen=True)
class _Cell:
    """Tokens of one cell, split into leading special tokens, genes and trailing special tokens."""

    tokens: np.ndarray
    first: int
    end: int

    @classmethod
    def of(cls, tokens_t: np.ndarray, vocabulary: Vocabulary) -> _Cell:
        tokens = np.asarray(tokens_t)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"a cell is one row of token ids, not shape {tokens.shape} of {tokens.dtype}.")
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocabulary.size):
            raise InputError(
                f"token ids {tokens.min()} to {tokens.max()} do not fit a vocabulary of {vocabulary.size}.",
                fix="Use the vocabulary that the cells were tokenised with.",
            )
        first = int(len(tokens) > 0 and vocabulary.cls is not None and tokens[0] == vocabulary.cls)
        end = len(tokens) - int(len(tokens) > first and vocabulary.eos is not None and tokens[-1] == vocabulary.eos)
        if np.isin(tokens[first:end], list(vocabulary.special.values())).any():
            raise InputError(
                "a special token stands among the genes of a cell.", fix="Give cells without padding or masks."
            )
        return cls(tokens, first, end)

    @property
    def genes(self) -> np.ndarray:
        return self.tokens[self.first : self.end]

    @property
    def n_special(self) -> int:
        return len(self.tokens) - (self.end - self.first)

    def with_genes(self, genes: np.ndarray) -> np.ndarray:
        return np.concatenate([self.tokens[: self.first], genes, self.tokens[self.end :]])

    def ranks(self, genes: tuple[int, ...]) -> tuple[int | None, ...]:
        return tuple(int(at[0]) if len(at := np.flatnonzero(self.genes == gene)) else None for gene in genes)


def gene_span(tokens_t: np.ndarray, vocabulary: Vocabulary) -> slice:
    """The part of a cell's tokens that holds genes: all but `<cls>` and `<eos>`."""
    cell = _Cell.of(tokens_t, vocabulary)
    return slice(cell.first, cell.end)


def _checked_genes(genes: Sequence[int], vocabulary: Vocabulary) -> tuple[int, ...]:
    tokens = tuple(int(gene) for gene in genes)
    if not tokens:
        raise InputError("an edit needs at least one gene.")
    if len(set(tokens)) < len(tokens):
        raise InputError("a gene stands twice in one edit.", fix="Name each gene once.")
    for token in tokens:
        if not 0 <= token < vocabulary.size or token in vocabulary.special.values():
            raise InputError(f"token {token} is no gene of the vocabulary.", where=vocabulary.name)
    return tokens


def _refill(cell: _Cell, uncropped_t: np.ndarray, genes: tuple[int, ...], vocabulary: Vocabulary) -> np.ndarray:
    uncropped = _Cell.of(uncropped_t, vocabulary).genes
    n_shown = len(cell.genes)
    if not np.array_equal(uncropped[:n_shown], cell.genes):
        raise InputError(
            "the uncropped cell does not begin with the genes of the cell.",
            fix="Give both from the same counts and vocabulary.",
        )
    hidden = uncropped[n_shown:]
    n_removed = int(np.isin(cell.genes, genes).sum())
    return hidden[~np.isin(hidden, genes)][:n_removed].astype(cell.tokens.dtype)
