"""One cell's tokens, checked and split into the genes and the special tokens around them.

Legend: `t` tokens of a cell, `g` its genes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genescale.platform.errors import InputError
from genescale.platform.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Cell:
    """Tokens `(t,)` of one cell; the genes stand from position `first` to before `end`."""

    tokens: np.ndarray
    first: int
    end: int

    @classmethod
    def of(cls, tokens_t: np.ndarray, vocabulary: Vocabulary) -> Cell:
        """Check the tokens of a cell; InputError when they are no cell of this vocabulary.

        Make it once for all edits of a cell: the check costs as much as a deletion.
        """
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
        """Tokens of its genes `(g,)`, highest rank first."""
        return self.tokens[self.first : self.end]

    @property
    def n_genes(self) -> int:
        """How many genes it has."""
        return self.end - self.first

    @property
    def n_special(self) -> int:
        """Special tokens around the genes."""
        return len(self.tokens) - self.n_genes

    def with_genes(self, genes_g: np.ndarray) -> np.ndarray:
        """Tokens of a cell of these genes within the same special tokens."""
        return np.concatenate([self.tokens[: self.first], genes_g, self.tokens[self.end :]])

    def ranks(self, genes: tuple[int, ...]) -> tuple[int | None, ...]:
        """Rank of each gene (0 = first); None where the cell lacks it."""
        return tuple(int(at[0]) if len(at := np.flatnonzero(self.genes == gene)) else None for gene in genes)

    def all_but(self, ranks: tuple[int | None, ...]) -> np.ndarray:
        """The other ranks of the cell, rising (int64)."""
        other_g = np.ones(self.n_genes, dtype=bool)
        other_g[[rank for rank in ranks if rank is not None]] = False
        return np.flatnonzero(other_g)


def gene_span(tokens_t: np.ndarray, vocabulary: Vocabulary) -> slice:
    """The part of a cell's tokens that holds genes: all but `<cls>` and `<eos>`."""
    cell = Cell.of(tokens_t, vocabulary)
    return slice(cell.first, cell.end)
