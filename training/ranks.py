"""What a rank is to an encoder: where a gene stands, how far two genes are apart, and which genes stand beside it.

In a rank-value encoding the position of a token is its expression: genes are sorted by count over median. So the place
in the ranking says how high a gene is in this cell, and the two genes next to a hidden one say between which two values
its own lies, which among genes of equal small counts leaves few candidates.

Axes: t tokens of the stream, d width, h heads, k width of one head, o neighbours on both sides, q knots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from genescale.training.attention import Segments
from genescale.training.encoder_config import EncoderConfig


@dataclass(frozen=True, eq=False)
class Ranks:
    """What all layers need to know about the cells of a batch; made once per forward pass."""

    segments: Segments
    turns: tuple[torch.Tensor, torch.Tensor] | None = None
    """Cosine and sine of the rotary angles, each (t, 1, k / 2) float32; None without rotary ranks."""
    inside_to1: torch.Tensor | None = None
    """(t, o, 1): 1 where the neighbour at that offset belongs to the same cell, else 0; None without neighbours."""

    @classmethod
    def of(cls, positions_t: torch.Tensor, segments: Segments, config: EncoderConfig) -> Ranks:
        """Ranks of a packed batch."""
        turns = inside = None
        if config.rotary_base:
            turns = _turns(positions_t, config.heads_width // config.heads, config.rotary_base)
        if config.rank_neighbours:
            inside = _inside(segments, config.rank_neighbours)
        return cls(segments, turns, inside)


def turned(vectors_thk: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Queries or keys turned by their rank, pairs of channels half a head apart (Su et al. 2021, section 3.4.2)."""
    cosine, sine = (turn.to(vectors_thk.dtype) for turn in turns)
    first, second = vectors_thk.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class RankKnots(nn.Module):
    """A vector for each rank, interpolated between learned ones that are evenly spaced in log(1 + rank)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.knots = nn.Embedding(config.rank_knots, config.width)
        # Rank `positions` - 1 is the last knot.
        self._per_log = (config.rank_knots - 1) / math.log(max(2, config.positions))

    def forward(self, positions_t: torch.Tensor) -> torch.Tensor:
        """(t, d)."""
        place_t = torch.log1p(positions_t.float()) * self._per_log
        below_t = place_t.long().clamp_(max=self.knots.num_embeddings - 2)
        share_t1 = (place_t - below_t)[:, None].to(self.knots.weight.dtype)
        return torch.lerp(self.knots(below_t), self.knots(below_t + 1), share_t1)


class RankNeighbours(nn.Module):
    """What the genes before and after a gene in the ranking of its cell add to it, channel by channel.

    The weights begin at zero: an untrained encoder computes what it would without them.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * config.rank_neighbours, config.width))
        self.reach = config.rank_neighbours
        self.offsets = _offsets(config.rank_neighbours)

    def forward(self, hidden_td: torch.Tensor, inside_to1: torch.Tensor) -> torch.Tensor:
        """(t, d): the sum over neighbours, without the gene itself."""
        added = torch.zeros_like(hidden_td)
        for number, offset in enumerate(self.offsets):
            # Rolled in from the other end of the stream, or from another cell, is what `inside` sets to zero.
            added = added + hidden_td.roll(-offset, 0) * inside_to1[:, number] * self.weight[number]
        return added


def _turns(positions_t: torch.Tensor, head_width: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    exponents = torch.arange(0, head_width, 2, device=positions_t.device, dtype=torch.float32) / head_width
    angles = positions_t.float()[:, None, None] * base**-exponents
    return torch.cos(angles), torch.sin(angles)


def _inside(segments: Segments, neighbours: int) -> torch.Tensor:
    # By places in the stream: ranks have gaps where genes were left out.
    tokens, device = sum(segments.lengths), segments.offsets.device
    lengths = segments.offsets.diff().long()
    length_t, first_t = (
        torch.repeat_interleave(values, lengths, output_size=tokens)
        for values in (lengths, segments.offsets[:-1].long())
    )
    place_t = torch.arange(tokens, device=device) - first_t
    place_to = place_t[:, None] + torch.tensor(_offsets(neighbours), device=device)
    return ((place_to >= 0) & (place_to < length_t[:, None])).float()[..., None]


def _offsets(neighbours: int) -> tuple[int, ...]:
    return tuple(offset for offset in range(-neighbours, neighbours + 1) if offset)
