"""Attention of one cell in slices: every layer computed once, a few query rows of the weights in memory at a time.

Axis suffixes: `s` tokens of a cell, `g` genes of it in rank order, `q` genes that look (query rows of a slice),
`h` heads, `l` layers, `k` width of one head.

A cell of 4,096 tokens has 18 layers x 18 heads x 4,096 x 4,096 weights in the largest published model: 22 GB. Nobody
needs them at once; what is asked for are sums over them.

Genes look and are looked at. A row of weights adds up to one: its parts are the attention to other genes, to the gene
itself, and to the special tokens, which have no rank and are nobody's regulators. Special tokens do not look here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from genescale.platform.vocabulary import Vocabulary
from genescale.training.model import Encoder, pack
from genescale.training.ranks import Ranks

MOST_WEIGHTS = 16_777_216
"""Weights of one slice: 64 MiB in float32, and as much again while they are worked on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CellGenes:
    """Where the genes of a cell stand among its tokens."""

    tokens_s: np.ndarray
    places_g: np.ndarray
    """(g) int64: place of each gene among the tokens; rank order."""

    @classmethod
    def of(cls, tokens_s: np.ndarray, vocabulary: Vocabulary) -> CellGenes:
        """Genes are the tokens that are not special."""
        specials = np.fromiter(vocabulary.special.values(), dtype=np.int64)
        return cls(tokens_s=tokens_s, places_g=np.flatnonzero(~np.isin(tokens_s, specials)))

    @property
    def genes_g(self) -> np.ndarray:
        """(g) int64 tokens of the genes, the highest rank first."""
        return self.tokens_s[self.places_g].astype(np.int64)

    @property
    def uniform(self) -> float:
        """The weight that every token of this cell would get from a head that looks at all alike."""
        return 1.0 / len(self.tokens_s)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What some genes of a cell look at in one layer; float32 on the encoder's device."""

    layer: int
    """0 is the first."""
    first: int
    """Rank (from 0) of the first gene that looks; the others follow it."""
    to_others_hqg: torch.Tensor
    """To each gene of the cell; 0 at the gene itself."""
    to_self_hq: torch.Tensor
    to_special_hq: torch.Tensor
    entropy_hq: torch.Tensor
    """Of the whole row, in nats: its exponential is the number of tokens that a gene looks at, were it alike."""

    @property
    def stop(self) -> int:
        """Rank after the last gene that looks."""
        return self.first + self.to_self_hq.shape[1]


@torch.inference_mode()
def attention_rows(encoder: Encoder, cell: CellGenes, *, most_weights: int = MOST_WEIGHTS) -> Iterator[Rows]:
    """The attention of a cell's genes, layer by layer and rank by rank; at least one row at a time.

    The encoder is in evaluation mode, and the cell fits its window. Memory is that of one slice of `most_weights`.
    """
    device = encoder.embeddings.tokens.weight.device
    batch = pack([cell.tokens_s]).to(device)
    places_g = torch.from_numpy(cell.places_g).to(device)
    ranks = Ranks.of(batch.positions_t, batch.segments, encoder.config)
    # Not `encoder(batch, layers=0)`: that has been through the closing norm, and the first layer takes what has not.
    hidden_sd = encoder.embeddings(batch)
    rows_at_once = max(1, most_weights // (encoder.config.heads * len(cell.tokens_s)))
    for number, layer in enumerate(encoder.layers):
        query_shk, key_shk = layer.queries_keys(hidden_sd, ranks)
        query_hgk = query_shk[places_g].transpose(0, 1).float() / math.sqrt(query_shk.shape[-1])
        key_hks = key_shk.permute(1, 2, 0).float()
        for first in range(0, len(places_g), rows_at_once):
            weights_hqs = torch.softmax(query_hgk[:, first : first + rows_at_once] @ key_hks, dim=-1)
            yield _split(number, first, weights_hqs, places_g)
        if number + 1 < len(encoder.layers):
            hidden_sd = layer(hidden_sd, ranks, encoder.attention)


def _split(layer: int, first: int, weights_hqs: torch.Tensor, places_g: torch.Tensor) -> Rows:
    entropy_hq = torch.special.entr(weights_hqs).sum(dim=-1)
    to_others_hqg = weights_hqs[:, :, places_g]
    own_hq = to_others_hqg.diagonal(offset=first, dim1=1, dim2=2)
    to_self_hq = own_hq.clone()
    to_special_hq = (weights_hqs.sum(dim=-1) - to_others_hqg.sum(dim=-1)).clamp_(min=0.0)
    own_hq.zero_()
    return Rows(
        layer=layer,
        first=first,
        to_others_hqg=to_others_hqg,
        to_self_hq=to_self_hq,
        to_special_hq=to_special_hq,
        entropy_hq=entropy_hq,
    )
