"""What each single deletion of a cell would change, from one forward pass and a backward pass for each question.

Legend: `t` tokens of the cell, as those whose states change (rows, k) or those deleted (columns, i); `d` width of the
encoder, `h` heads, `w` width of one head, `c` streams, see `Attribution.near`.

Deleting gene i changes three things in a layer, for a token k: it no longer attends to i; tokens behind i move up one
rank, which changes the rank vectors and, with rotary ranks, the attention between tokens on different sides of i; and
where the encoder mixes neighbours in the ranking, others become neighbours. Given what stands below a layer, each of
these is computed exactly (`removal.py`). A backward pass from a scalar f of the encoder's output gives at each of these
places the cotangent w_k: the change of f per change there. Product and sum over the places are z_ki, the change of f by
way of token k when i is deleted. So one backward pass answers for all deletions of the cell:

    f linear in what moves (toward a state, a class)   change of f = sum over k of z_ki
    f = v . u, v random, u unit vectors of the genes   squared movement of k = mean over v of z_ki^2

The second is what a cosine needs: 1 - cos is half the squared distance of unit vectors, so its own gradient at the
unedited cell is zero. What is first order here is the way from a layer to the output; what is left out of the square
are movements that a token gets by way of other tokens that moved.

Where neighbours are mixed, the few tokens beside the gap move much more than first order can follow. Their states with
the gap are computed by a forward pass for each distance, for all tokens of the cell at once: `Attribution.near`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from genescale.perturbation.screening.removal import (
    HeadScores,
    Turns,
    changed_neighbours,
    neighbours_without,
)
from genescale.training.attention import Segments
from genescale.training.model import Encoder, PackedBatch
from genescale.training.ranks import RankNeighbours

# Scores of one layer, in numbers: below this they are kept from one backward pass to the next (about 64 MiB each of
# three matrices).
SCORES_KEPT = 2**24


@dataclass(eq=False)
class _Ledger:
    """Where a backward pass adds up z."""

    turns: Turns | None
    moves_tt: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))


class _WatchedAttention(torch.autograd.Function):
    """Attention within one cell; its backward pass also writes into the ledger what each deletion changes here."""

    @staticmethod
    def forward(
        ctx: Any, query_thw: torch.Tensor, key_thw: torch.Tensor, value_thw: torch.Tensor, ledger: _Ledger
    ) -> torch.Tensor:
        ctx.save_for_backward(query_thw, key_thw, value_thw)
        ctx.ledger = ledger
        heads_first = (x.transpose(0, 1)[None] for x in (query_thw, key_thw, value_thw))
        return functional.scaled_dot_product_attention(*heads_first)[0].transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        per_head = [x.unbind(1) for x in (*ctx.saved_tensors, gradients[0])]
        # One head at a time, so that few matrices (t, t) are held. Where all are small, the next probe finds them here.
        kept = ctx.__dict__.setdefault("kept", {})
        found = []
        for head, (query_tw, key_tw, value_tw, above_tw) in enumerate(zip(*per_head, strict=True)):
            scores = kept.get(head) or HeadScores(query_tw, key_tw, ctx.ledger.turns)
            if len(query_tw) ** 2 * len(per_head[0]) <= SCORES_KEPT:
                kept[head] = scores
            found.append(_head_backward(scores, query_tw, key_tw, value_tw, above_tw, ctx.ledger))
        return *(torch.stack(parts, dim=1) for parts in zip(*found, strict=True)), None


def _head_backward(
    scores: HeadScores,
    query_tw: torch.Tensor,
    key_tw: torch.Tensor,
    value_tw: torch.Tensor,
    above_tw: torch.Tensor,
    ledger: _Ledger,
) -> tuple[torch.Tensor, ...]:
    content_tt = above_tw @ value_tw.T
    ledger.moves_tt += scores.changed_means(content_tt)
    slope_tt = scores.shares_tt * content_tt
    slope_tt = slope_tt.addcmul_(scores.shares_tt, slope_tt.sum(1, keepdim=True), value=-1.0)
    slope_tt *= query_tw.shape[1] ** -0.5
    return slope_tt @ key_tw, slope_tt.T @ query_tw, scores.shares_tt.T @ above_tw


class Attribution:
    """The modules of an encoder on the same weights, watched so that a backward pass tells what each deletion changes.

    It holds the graph of one cell at a time: call `states` before `moves`, and not from several threads.
    """

    def __init__(self, encoder: Encoder) -> None:
        """Watch a copy of `encoder` that shares its parameters; the encoder itself stays as it is."""
        shared = {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())}
        self._encoder: Encoder = copy.deepcopy(encoder, shared).eval()
        self._ledger = _Ledger(_one_rank(encoder))
        self._positions_t, self._leaf_td = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0)
        self._deltas: tuple[int, ...] = ()
        self._encoder.embeddings.positions.register_forward_hook(self._on_positions)
        for layer in self._encoder.layers:
            layer.attention.attend = self._attend
            if layer.neighbours is not None:
                layer.neighbours.register_forward_hook(self._on_neighbours)

    @property
    def reach(self) -> int:
        """How far from a gap one layer's neighbours are mixed differently; 0 where neighbours are not mixed."""
        return self._encoder.config.rank_neighbours

    def states(self, tokens_t: torch.Tensor, *, layers: int) -> torch.Tensor:
        """Hidden states (t, d) float32 of one cell after `layers` layers, with the graph that `moves` goes back on."""
        n = len(tokens_t)
        self._positions_t = torch.arange(n, device=tokens_t.device)
        with torch.enable_grad():
            batch = PackedBatch(tokens_t, self._positions_t, Segments.of((n,), tokens_t.device))
            return self._encoder(batch, layers=layers)

    def moves(self, scalar: torch.Tensor) -> torch.Tensor:
        """z (t, t) of a scalar of the last `states`: row = the token that moves, column = the token deleted.

        The diagonal is zero: a deleted token has no state. It may be called again for another scalar.
        """
        n = len(self._positions_t)
        self._ledger.moves_tt = torch.zeros(n, n, device=scalar.device)
        torch.autograd.grad(scalar, self._leaf_td, retain_graph=True)
        return self._ledger.moves_tt.fill_diagonal_(0.0)

    @torch.no_grad()
    def near(self, tokens_t: torch.Tensor, deltas: Sequence[int], *, layers: int) -> torch.Tensor:
        """States (c + 1, t, d): in stream c of token k when the token at k + deltas[c] is gone; last, unedited.

        Keys and values are those of the unedited cell, and the deleted token is still attended to: beside a gap, both
        are small against the change of neighbours. Where k + delta is outside of the cell, the state means nothing.
        """
        n, copies = len(tokens_t), len(deltas) + 1
        place_t = torch.arange(n, device=tokens_t.device)
        positions = [(place_t - int(delta < 0)).clamp_min(0) for delta in (*deltas, 0)]
        segments = Segments.of((n,) * copies, tokens_t.device)
        self._deltas = tuple(deltas)
        try:
            batch = PackedBatch(tokens_t.repeat(copies), torch.cat(positions), segments)
            return self._encoder(batch, layers=layers).unflatten(0, (copies, n))
        finally:
            self._deltas = ()

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, backend: str
    ) -> torch.Tensor:
        if not self._deltas:
            return _WatchedAttention.apply(query, key, value, self._ledger)
        unedited = slice(-len(query) // (len(self._deltas) + 1), None)
        heads_first = (x.transpose(0, 1)[None] for x in (query, key[unedited], value[unedited]))
        return functional.scaled_dot_product_attention(*heads_first)[0].transpose(0, 1)

    def _on_positions(self, module: torch.nn.Module, _: Any, output_td: torch.Tensor) -> torch.Tensor | None:
        """Make the graph begin here, and note what one rank up does to each token."""
        if self._deltas:
            return None
        with torch.no_grad():
            # `forward` and not a call: a call would come here again.
            change_td = module.forward((self._positions_t - 1).clamp_min(0)) - output_td
        watched_td = output_td.detach().requires_grad_()

        def note(above_td: torch.Tensor) -> None:
            change_t1 = (above_td * change_td).sum(1, keepdim=True)
            self._ledger.moves_tt += change_t1.expand_as(self._ledger.moves_tt).tril(-1)

        watched_td.register_hook(note)
        self._leaf_td = watched_td
        return watched_td

    def _on_neighbours(self, module: RankNeighbours, inputs: Any, output_td: torch.Tensor) -> torch.Tensor | None:
        if self._deltas:
            hidden_ctd = inputs[0].unflatten(0, (len(self._deltas) + 1, -1))
            return neighbours_without(module, hidden_ctd, self._deltas).flatten(0, 1)
        hidden_td = inputs[0].detach()

        def note(above_td: torch.Tensor) -> None:
            self._ledger.moves_tt += changed_neighbours(module, hidden_td, above_td)

        output_td.register_hook(note)
        return None


def _one_rank(encoder: Encoder) -> Turns | None:
    """The angles of one rank, as `training.ranks` has them."""
    config = encoder.config
    if not config.rotary_base:
        return None
    width = config.heads_width // config.heads
    device = next(encoder.parameters()).device
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    angles = (config.rotary_base**-exponents)[None, None, :]
    return torch.cos(angles), torch.sin(angles)
