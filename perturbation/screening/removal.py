"""What a layer computes for every token once any other token of the cell is gone: what an attribution is made of.

Legend: `t` tokens of the cell, as those that are looked at (rows, k) or those deleted (columns, i); `d` width, `h`
heads, `w` width of one head, `c` streams, see `Attribution.near`.

Deleting token i moves all tokens behind it up one rank. To a token before i, those behind i come one rank closer; to a
token behind i, those before i do. Where ranks turn queries and keys (rotary ranks), a distance that is shorter by one
is the same as a query turned by one rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from genescale.training.ranks import RankNeighbours, turned

# A token that has nearly all of a head's weight: what the rest would get without it is not divided by less than this.
LEAST_REST = 1e-2
Turns = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine (1, 1, w / 2) of the angles by which one rank turns queries and keys."""


class HeadScores:
    """Exponentiated attention scores of one head, as they are and with each pair of tokens one rank closer."""

    def __init__(self, query_tw: torch.Tensor, key_tw: torch.Tensor, turns: Turns | None) -> None:
        """Scores of queries and keys (t, w), both turned by their ranks already where ranks turn them."""
        scale = 1.0 / math.sqrt(query_tw.shape[1])
        now_tt = query_tw @ key_tw.T * scale
        if turns is None:
            self.shares_tt, self._nearer_tt = torch.softmax(now_tt, dim=1), None
            return
        cosine, sine = turns
        back_tt, on_tt = (
            turned(query_tw[:, None], (cosine, way * sine))[:, 0] @ key_tw.T * scale for way in (-1.0, 1.0)
        )
        self._behind_tt = torch.ones_like(now_tt, dtype=torch.bool).triu(1)
        closer_tt = torch.where(self._behind_tt, on_tt, back_tt)
        highest_t1 = torch.maximum(now_tt, closer_tt).amax(1, keepdim=True)
        now_tt, closer_tt = (now_tt - highest_t1).exp_(), (closer_tt - highest_t1).exp_()
        # In shares of what the whole row has now; a token is at no distance from itself.
        all_t1 = now_tt.sum(1, keepdim=True)
        self.shares_tt = now_tt / all_t1
        self._nearer_tt = (closer_tt / all_t1 - self.shares_tt).fill_diagonal_(0.0)
        self._left_tt = self._without_each(None).clamp_min_(LEAST_REST)

    def changed_means(self, content_tt: torch.Tensor) -> torch.Tensor:
        """(t, t): the attention-weighted mean of `content_tt` (row k, column j) once i is gone, less what it is now.

        Exact for one head and one layer. With rotary ranks, what is on the other side of i than k comes closer: sums
        over what is before i, or behind i, which are running sums along the row.
        """
        mean_t1 = (self.shares_tt * content_tt).sum(1, keepdim=True)
        if self._nearer_tt is None:
            return self.shares_tt * (mean_t1 - content_tt) / (1.0 - self.shares_tt).clamp_min(LEAST_REST)
        return self._without_each(content_tt) / self._left_tt - mean_t1

    def _without_each(self, content_tt: torch.Tensor | None) -> torch.Tensor:
        """Sum over j but i of the shares that there are without i, times a content (None: times one)."""
        assert self._nearer_tt is not None
        now_tt, nearer_tt = (x if content_tt is None else x * content_tt for x in (self.shares_tt, self._nearer_tt))
        up_to_tt = nearer_tt.cumsum(1)
        other_side_tt = torch.where(self._behind_tt, up_to_tt[:, -1:] - up_to_tt, up_to_tt - nearer_tt)
        return other_side_tt.add_(now_tt.sum(1, keepdim=True)).sub_(now_tt)


def changed_neighbours(module: RankNeighbours, hidden_td: torch.Tensor, above_td: torch.Tensor) -> torch.Tensor:
    """(t, t): cotangent `above_td` times the change of what neighbours add to token k once i is gone.

    Where i is the neighbour at some offset, or stands between, the neighbour becomes the next one beyond.
    """
    n, reach = len(hidden_td), module.reach
    moves_tt = hidden_td.new_zeros(n, n)
    place_t = torch.arange(n, device=hidden_td.device)
    padded_td = functional.pad(hidden_td, (0, 0, reach + 1, reach + 1))
    for weight_d, offset in zip(module.weight, module.offsets, strict=True):
        step = 1 if offset > 0 else -1
        old_td, new_td = (padded_td[place_t + reach + 1 + to] for to in (offset, offset + step))
        change_t = (above_td * weight_d * (new_td - old_td)).sum(1)
        for between in range(step, offset + step, step):
            rows_t = place_t[(place_t + between >= 0) & (place_t + between < n)]
            moves_tt[rows_t, rows_t + between] += change_t[rows_t]
    return moves_tt


def neighbours_without(module: RankNeighbours, hidden_ctd: torch.Tensor, deltas: Sequence[int]) -> torch.Tensor:
    """(c, t, d): what neighbours add in each stream; the last one of both is the unedited cell, which has no delta.

    The neighbour of k at k + o has itself lost the token at k + delta = (k + o) + (delta - o): it is read from the
    stream of delta - o where there is one, else from the unedited cell.
    """
    numbers = {delta: number for number, delta in enumerate(deltas)}
    added_ctd = torch.zeros_like(hidden_ctd)
    for number, delta in enumerate((*deltas, None)):
        for weight_d, offset in zip(module.weight, module.offsets, strict=True):
            source, to = -1, offset
            if delta is not None:
                passed = 0 < delta <= offset or offset <= delta < 0
                to = offset + (0 if not passed else 1 if offset > 0 else -1)
                source = numbers.get(delta - to, -1)
            added_ctd[number] += _moved(hidden_ctd[source], to) * weight_d
    return added_ctd


def _moved(hidden_td: torch.Tensor, to: int) -> torch.Tensor:
    """Row k holds what stood at k + to; zero where there is no such row."""
    if to > 0:
        return functional.pad(hidden_td[to:], (0, 0, 0, min(to, len(hidden_td))))
    return functional.pad(hidden_td[:to], (0, 0, min(-to, len(hidden_td)), 0))
