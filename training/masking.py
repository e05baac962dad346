"""Which genes of a cell are hidden, and by what: a pure function of (seed, epoch, cell).

15 % of the gene tokens of each cell are chosen, at least one; of those 80 % become `<mask>`, 10 % a random gene, 10 %
stay (the BERT recipe the published models were trained with; a recipe may set other shares). Two deliberate
differences from the published collator: special tokens are neither chosen nor drawn as replacements (it masks `<cls>`
and `<eos>` and draws replacements from all ids), and exactly 15 % are chosen instead of each token with probability
0.15. So the number of masked tokens follows from the length alone, and every worker knows the global number of a step
without communication.

Draws come from Philox, a counter-based generator: the counter is (epoch, cell), so a mask depends neither on the order
in which cells are read nor on the number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from genescale.platform.errors import CorpusError, SettingsError
from genescale.platform.vocabulary import Vocabulary

# Apart from the keys of other streams drawn from the same seed.
_MASK_STREAM = 1


class MaskedCell(NamedTuple):
    """A cell as the encoder sees it, and what it has to find."""

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    """Rising positions of the chosen genes within the cell."""
    labels: npt.NDArray[np.int64]
    """The tokens that stood there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Masking:
    """Masks for the cells of one vocabulary under one seed."""

    vocabulary: Vocabulary
    seed: int
    fraction: float = 0.15
    """Share of a cell's genes that are chosen."""
    mask_token_share: float = 0.8
    """Share of the chosen genes that become `<mask>`."""
    random_gene_share: float = 0.1
    """Share of the chosen genes that become a random gene; the rest stay as they are."""

    def __post_init__(self) -> None:
        shares = (self.mask_token_share, self.random_gene_share)
        if min(shares) < 0.0 or sum(shares) > 1.0:
            raise SettingsError(
                f"mask_token_share and random_gene_share are {shares[0]} and {shares[1]}.",
                fix="Use shares of the chosen genes that make at most 1 together, such as 0.8 and 0.1.",
            )
        if not 0.0 < self.fraction < 1.0:
            raise SettingsError(
                f"mask_fraction is {self.fraction}.", fix="Use a fraction between 0 and 1, such as 0.15."
            )

    def counts(self, lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Masked genes of cells with these lengths in tokens (special tokens included)."""
        genes = lengths.astype(np.int64) - self._framing
        return np.maximum(1, np.floor(genes * self.fraction + 0.5).astype(np.int64))

    def mask(self, cell_tokens: npt.NDArray[np.integer], *, epoch: int, cell: int) -> MaskedCell:
        """Hide genes of cell number `cell`; raises CorpusError when its tokens do not fit the vocabulary."""
        tokens = cell_tokens.astype(np.int64)  # a copy: the caller's array may be shared
        genes = np.flatnonzero(self._is_gene_t[np.minimum(tokens, len(self._is_gene_t) - 1)])
        if len(genes) == 0 or len(genes) != len(tokens) - self._framing:
            raise CorpusError(
                f"cell {cell} has {len(genes)} gene tokens among {len(tokens)}; its vocabulary adds {self._framing}.",
                where=f"vocabulary {self.vocabulary.name or self.vocabulary.digest[:12]}",
                fix="Train on a corpus that was ingested with this vocabulary.",
            )
        count = int(self.counts(np.array([len(tokens)]))[0])
        draws = self._generator(epoch, cell)
        # The smallest of uniform keys: a choice without replacement whose result rests on the raw stream alone.
        positions = genes[np.sort(np.argpartition(draws.random(len(genes)), count - 1)[:count])]
        action, replacement = draws.random(count), draws.random(count)
        labels = tokens[positions]
        tokens[positions] = self._hidden(labels, action, replacement)
        return MaskedCell(tokens, positions, labels)

    def _hidden(
        self, labels: npt.NDArray[np.int64], action: npt.NDArray[np.float64], draw: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.int64]:
        genes_t = self.vocabulary.token_ids.astype(np.int64)
        random_genes = genes_t[(draw * len(genes_t)).astype(np.int64)]
        masked = action < self.mask_token_share
        replaced = action < self.mask_token_share + self.random_gene_share
        return np.select([masked, replaced], [self.vocabulary.mask, random_genes], labels)

    def _generator(self, epoch: int, cell: int) -> np.random.Generator:
        key = np.array([self.seed, _MASK_STREAM], dtype=np.uint64)
        counter = np.array([0, 0, epoch, cell], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    @cached_property
    def _framing(self) -> int:
        """Special tokens in every cell."""
        return sum(token is not None for token in (self.vocabulary.cls, self.vocabulary.eos))

    @cached_property
    def _is_gene_t(self) -> npt.NDArray[np.bool_]:
        # One row more than there are tokens: where ids that the vocabulary does not have end up.
        is_gene = np.zeros(self.vocabulary.size + 1, dtype=bool)
        is_gene[self.vocabulary.token_ids] = True
        return is_gene
