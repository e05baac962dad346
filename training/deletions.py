"""A cell without one of its tokens, for many of them: the first encoder layer is computed once for all.

Axes: v the two versions of a token, t tokens of the cell, h heads, k width of one head, d width of the encoder.

Without token i, the tokens before it keep their rank and those behind it move up by one. So what enters the first layer
has two versions only: each token at its own rank (0) and at the rank before (1), and so have its queries, keys and
values. What the first layer's attention gives a token j is, with the weights w = exp(query of j . key - maximum of j),

    (sum over m < i of w0[j, m] value0[m]  +  sum over m > i of w1[j, m] value1[m])  /  (the same sums of w)

with the query of version 0 for j < i and 1 for j > i. Both sums are kept for every `BLOCK`-th i; what lies between is
added for each deletion. It is the same function as the layer itself, in another order of summation, at about a tenth
of the price of its attention, and no queries, keys and values are computed for each deletion. The sums belong to the
cell alone, so that a deletion has the same bits whichever others are asked for.

An encoder whose first layer mixes neighbouring ranks has more than two versions of a token: it has no such short cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from genescale.training.attention import Segments
from genescale.training.model import Encoder, EncoderLayer, PackedBatch, pack
from genescale.training.ranks import Ranks

BLOCK = 64
# Weights are at most 1; where all that remain are below this, the deleted token had all attention, and sums of so
# small numbers are not to be trusted.
SMALLEST_TOTAL = 1e-25


def has_short_cut(encoder: Encoder, counts: Sequence[int]) -> bool:
    """Whether states after so many layers can be had by `Deletions`."""
    usual = encoder.attention in ("auto", "segments")
    return usual and not encoder.config.rank_neighbours and not encoder.training and min(counts) > 0


class Deletions:
    """One cell, ready to be encoded without one of its tokens, up to so many layers (`counts`); on the CPU, in float32.

    Holds 16 x heads x t^2 bytes of weights: 270 MB for four heads and a window of 2,048.
    """

    def __init__(self, encoder: Encoder, cell: np.ndarray, counts: Sequence[int]) -> None:
        self._encoder, self._cell, self._length, self._counts = encoder, cell, len(cell), tuple(counts)
        first: EncoderLayer = encoder.layers[0]
        self._first = first
        length = self._length
        ranks_t = torch.arange(length)
        positions = torch.cat([ranks_t, (ranks_t - 1).clamp_min(0)])
        tokens = torch.from_numpy(np.tile(np.asarray(cell).astype(np.int64), 2))
        batch = PackedBatch(tokens, positions, Segments.of((length, length)))
        hidden = encoder.embeddings(batch)
        ranks = Ranks.of(positions, batch.segments, encoder.config)
        query, key, value = (x.unflatten(0, (2, length)).transpose(1, 2) for x in first.projected(hidden, ranks))
        self._hidden_vtd = hidden.unflatten(0, (2, length))
        # A column of ones: the sum of the weights comes out beside the weighted values.
        self._values_vhtk = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1).contiguous()
        self._weights = _weights(query, key)
        self._sums = [_sums(weights_vhtt, self._values_vhtk) for weights_vhtt in self._weights]

    @torch.inference_mode()
    def without(self, at: int) -> tuple[PackedBatch, list[torch.Tensor]]:
        """The cell without token `at`, and its hidden states (t, d), one for each of `counts`."""
        counts = self._counts
        batch = pack([np.delete(self._cell, at)])
        mixed_htk = torch.cat([self._mixed(0, at, slice(0, at)), self._mixed(1, at, slice(at + 1, None))], dim=1)
        totals_ht1 = mixed_htk[..., -1:]
        if float(totals_ht1.min()) < SMALLEST_TOTAL:
            return batch, self._encoder.states_from(self._encoder.embeddings(batch), batch, first=0, counts=counts)
        attended = self._first.attention.output((mixed_htk[..., :-1] / totals_ht1).transpose(0, 1).flatten(1))
        hidden_td = torch.cat([self._hidden_vtd[0, :at], self._hidden_vtd[1, at + 1 :]])
        hidden_td = self._first.after_attention(hidden_td, attended)
        return batch, self._encoder.states_from(hidden_td, batch, first=1, counts=counts)

    def _mixed(self, version: int, at: int, rows: slice) -> torch.Tensor:
        """(h, rows, k + 1): weighted sum of the values that remain without token `at`, and of the weights."""
        weights, values = self._weights[version], self._values_vhtk
        start = at // BLOCK * BLOCK
        stop = min(start + BLOCK, self._length)
        mixed = self._sums[version][at // BLOCK][:, rows]
        mixed = torch.baddbmm(mixed, weights[0][:, rows, start:at], values[0][:, start:at])
        return torch.baddbmm(mixed, weights[1][:, rows, at + 1 : stop], values[1][:, at + 1 : stop])


def _weights(query_vhtk: torch.Tensor, key_vhtk: torch.Tensor) -> list[torch.Tensor]:
    """For each version of the query (v, h, t, t): weights of the two versions of each key, at most 1."""
    scale = query_vhtk.shape[-1] ** -0.5
    found = []
    for query_htk in query_vhtk * scale:
        scores_vhtt = query_htk @ key_vhtk.transpose(-1, -2)
        found.append(scores_vhtt.sub_(scores_vhtt.amax(dim=(0, -1), keepdim=True)).exp_())
    return found


def _sums(weights_vhtt: torch.Tensor, values_vhtk: torch.Tensor) -> list[torch.Tensor]:
    """(h, t, k + 1) for each block of keys: the sum of version 0 before it and of version 1 behind it."""
    parts = [slice(start, start + BLOCK) for start in range(0, weights_vhtt.shape[-1], BLOCK)]
    of_blocks = [weights_vhtt[..., part] @ values_vhtk[:, :, part] for part in parts]
    nothing = torch.zeros_like(of_blocks[0][0])
    before = itertools.accumulate((block[0] for block in of_blocks[:-1]), initial=nothing)
    behind = list(itertools.accumulate((block[1] for block in of_blocks[:0:-1]), initial=nothing))
    return [one + other for one, other in zip(before, reversed(behind), strict=True)]
