"""The encoder in plain torch, over packed cells: the published Geneformer architecture, or one with other options.

Published: post-norm BERT, learned rank positions, token type 0 added everywhere, ReLU, LayerNorm with epsilon 1e-12,
the masked-gene decoder tied to the token embedding (Theodoris et al. 2023; layout of Hugging Face's `BertForMaskedLM`).
`EncoderOptions` names where an encoder may differ. What is unusual here:
- a batch is one stream of tokens with segment offsets (`PackedBatch`): nothing is padded, no token sees another cell;
- queries, keys and values are one matrix product;
- `layers=` stops early, so that an embedding of the second to last layer does not pay for the last;
- the masked-gene head computes logits at masked positions only: with 25,426 genes the decoder would otherwise cost as
  much as the encoder.

Axes: t tokens of the whole batch, d width, h heads, k width of one head, m masked positions, v vocabulary, b cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from genescale.platform.errors import LimitError
from genescale.training.attention import Backend, Segments, attend, attention_weights, check_backend, drop_values
from genescale.training.encoder_config import EncoderConfig as EncoderConfig
from genescale.training.ranks import RankKnots, RankNeighbours, Ranks, turned

# Where the amount begins that `seen_genes` subtracts from a logit: a gene that was seen is the hidden one only where a
# random gene was put, which is about one time in two hundred.
SEEN_AMOUNT = 5.0


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Cells as one stream: tokens, their rank within their cell, and where each cell begins."""

    tokens_t: torch.Tensor
    """(t) int64."""
    positions_t: torch.Tensor
    """(t) int64 ranks; every cell has 0, 1, 2 and so on, with gaps where genes were left out to train on the rest."""
    segments: Segments

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each cell."""
        return self.segments.lengths

    @property
    def offsets(self) -> torch.Tensor:
        """(b + 1) int32: cell i is tokens_t[offsets[i]:offsets[i + 1]]."""
        return self.segments.offsets

    @property
    def max_length(self) -> int:
        """Tokens of the longest cell."""
        return self.segments.max_length

    def cells_t(self) -> torch.Tensor:
        """(t) int64: the number of the cell each token belongs to, for pooling."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=self.tokens_t.device)
        cells = torch.arange(len(self.lengths), device=self.tokens_t.device)
        return torch.repeat_interleave(cells, lengths, output_size=len(self.tokens_t))

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on `device`."""
        tokens, positions = (x.to(device, non_blocking=True) for x in (self.tokens_t, self.positions_t))
        return PackedBatch(tokens, positions, self.segments.to(device))


def pack(cells: Sequence[np.ndarray], ranks: Sequence[np.ndarray] | None = None) -> PackedBatch:
    """One stream of the cells' tokens, in the given order, on the CPU.

    ranks: of each cell's tokens, rising; left out, they are 0, 1, 2 and so on. Raises LimitError for a cell without
    tokens: it has no embedding.
    """
    lengths = tuple(len(cell) for cell in cells)
    if 0 in lengths:
        raise LimitError("a cell without tokens cannot be encoded.", where=f"cell {lengths.index(0)} of the batch")
    tokens = np.concatenate([np.zeros(0, np.int64), *cells]).astype(np.int64)
    ranks = [np.arange(length) for length in lengths] if ranks is None else ranks
    positions = np.concatenate([np.zeros(0, np.int64), *ranks])
    return PackedBatch(torch.from_numpy(tokens), torch.from_numpy(positions), Segments.of(lengths))


def _norm(config: EncoderConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.width, eps=config.layer_norm_eps, bias=config.biases)


class Embeddings(nn.Module):
    """Token + rank, normalised; the published architecture adds token type 0."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary_size, config.width)
        self.positions = RankKnots(config) if config.rank_knots else nn.Embedding(config.positions, config.width)
        # Added to every token, so it is worth nothing beside the norm: only what is published has it.
        self.types = nn.Embedding(config.type_vocabulary_size, config.width) if config.is_published else None
        self.norm = _norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """(t, d)."""
        hidden_td = self.tokens(batch.tokens_t)
        if self.types is not None:
            hidden_td = hidden_td + self.types.weight[0]
        return self.dropout(self.norm(hidden_td + self.positions(batch.positions_t)))


class SelfAttention(nn.Module):
    """Multi-head attention within each cell, with its output projection."""

    # Seam for `compiling.py`, which takes it out of what is compiled.
    attend = staticmethod(attend)

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(config.width, 3 * config.heads_width, bias=config.biases)
        self.output = nn.Linear(config.heads_width, config.width, bias=config.biases)
        head_width = config.heads_width // config.heads
        self.query_norm = nn.LayerNorm(head_width, bias=False) if config.query_key_norm else None
        self.key_norm = nn.LayerNorm(head_width, bias=False) if config.query_key_norm else None

    def forward(self, hidden_td: torch.Tensor, ranks: Ranks, backend: Backend) -> torch.Tensor:
        """(t, d)."""
        query, key, value = self.project(hidden_td, ranks)
        value = drop_values(value, self.attention_dropout, self.training)
        return self.output(self.attend(query, key, value, ranks.segments, backend).flatten(1))

    def project(self, hidden_td: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, (t, h, k) each."""
        query, key, value = self.qkv(hidden_td).unflatten(-1, (3, self.heads, -1)).unbind(1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)
        if ranks.turns is not None:
            query, key = turned(query, ranks.turns), turned(key, ranks.turns)
        return query, key, value


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input, and a norm after each sum or before each block."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self._before, self._gated = config.norm == "pre", config.activation == "geglu"
        self.neighbours = RankNeighbours(config) if config.rank_neighbours else None
        self.attention = SelfAttention(config)
        self.attention_norm = _norm(config)
        self.widen = nn.Linear(config.width, config.feed_forward * (1 + self._gated), bias=config.biases)
        self.narrow = nn.Linear(config.feed_forward, config.width, bias=config.biases)
        self.output_norm = _norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_td: torch.Tensor, ranks: Ranks, backend: Backend) -> torch.Tensor:
        """(t, d)."""
        hidden_td = self._with_neighbours(hidden_td, ranks)
        attended = self.attention(self._read(hidden_td), ranks, backend)
        return self.after_attention(hidden_td, attended)

    def after_attention(self, hidden_td: torch.Tensor, attended_td: torch.Tensor) -> torch.Tensor:
        """(t, d): what the layer gives for its input (neighbours added) and what attention made of it."""
        attended_td = self.dropout(attended_td)
        if self._before:
            hidden_td = hidden_td + attended_td
            return hidden_td + self.dropout(self._feed(self.output_norm(hidden_td)))
        hidden_td = self.attention_norm(hidden_td + attended_td)
        return self.output_norm(hidden_td + self.dropout(self._feed(hidden_td)))

    def projected(self, hidden_td: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of the input of this layer, (t, h, k) each."""
        return self.attention.project(self._read(self._with_neighbours(hidden_td, ranks)), ranks)

    def queries_keys(self, hidden_td: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of the input of this layer, (t, h, k) each: whoever wants weights in slices makes them."""
        query, key, _ = self.projected(hidden_td, ranks)
        return query, key

    def _read(self, hidden_td: torch.Tensor) -> torch.Tensor:
        """What attention reads of the layer's input."""
        return self.attention_norm(hidden_td) if self._before else hidden_td

    def _with_neighbours(self, hidden_td: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        if self.neighbours is None or ranks.inside_to1 is None:
            return hidden_td
        return hidden_td + self.neighbours(hidden_td, ranks.inside_to1)

    def _feed(self, hidden_td: torch.Tensor) -> torch.Tensor:
        wide = self.widen(hidden_td)
        if not self._gated:
            return self.narrow(functional.relu(wide))
        gate, value = wide.chunk(2, dim=-1)
        return self.narrow(functional.gelu(gate) * value)


class Encoder(nn.Module):
    """Packed cells to one vector per token.

    With norms before the blocks, sums are never normalised inside the encoder. What leaves it after any number of
    layers has then gone through one closing norm, so that states of all depths are of one scale.
    """

    def __init__(self, config: EncoderConfig, *, attention: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.attention: Backend = check_backend(attention)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.norm = _norm(config) if config.norm == "pre" else nn.Identity()

    def forward(self, batch: PackedBatch, *, layers: int | None = None) -> torch.Tensor:
        """Hidden states after the first `layers` layers (None = all, 0 = the embeddings): (t, d).

        Raises LimitError when a cell is longer than the positions the encoder has learned.
        """
        return self.norm(self._sums(batch, self._ranks(batch), self._first(layers)))

    def hidden_states(self, batch: PackedBatch, *, layers: int | None = None) -> list[torch.Tensor]:
        """The embedding output and the hidden states after each of the first `layers` layers, each (t, d)."""
        ranks, sums = self._ranks(batch), [self._embed(batch)]
        for layer in self._first(layers):
            sums.append(layer(sums[-1], ranks, self.attention))
        return [self.norm(hidden_td) for hidden_td in sums]

    def states_from(
        self, hidden_td: torch.Tensor, batch: PackedBatch, *, first: int, counts: Sequence[int]
    ) -> list[torch.Tensor]:
        """Hidden states (t, d) after so many layers each, from the state `hidden_td` after the first `first` ones."""
        ranks, states = self._ranks(batch), {}
        for done in range(first, max(counts) + 1):
            if done > first:
                hidden_td = self.layers[done - 1](hidden_td, ranks, self.attention)
            if done in counts:
                states[done] = self.norm(hidden_td)
        return [states[count] for count in counts]

    def attention_weights(self, batch: PackedBatch, *, layer: int) -> list[torch.Tensor]:
        """Attention weights of layer `layer` (0 = the first), one (h, s, s) per cell; use it in evaluation mode."""
        if not 0 <= layer < len(self.layers):
            raise LimitError(f"there is no layer {layer}.", fix=f"The encoder has layers 0 to {len(self.layers) - 1}.")
        ranks = self._ranks(batch)
        chosen: EncoderLayer = self.layers[layer]
        query, key = chosen.queries_keys(self._sums(batch, ranks, self._first(layer)), ranks)
        return attention_weights(query, key, batch.segments)

    def _sums(self, batch: PackedBatch, ranks: Ranks, layers: Sequence[nn.Module]) -> torch.Tensor:
        hidden_td = self._embed(batch)
        for layer in layers:
            hidden_td = layer(hidden_td, ranks, self.attention)
        return hidden_td

    def _ranks(self, batch: PackedBatch) -> Ranks:
        return Ranks.of(batch.positions_t, batch.segments, self.config)

    def _embed(self, batch: PackedBatch) -> torch.Tensor:
        if batch.max_length > self.config.positions:
            raise LimitError(
                f"a cell has {batch.max_length} tokens, the encoder's window is {self.config.positions}.",
                fix="Rank cells with the vocabulary of this model: it crops them to the window.",
            )
        return self.embeddings(batch)

    def _first(self, layers: int | None) -> Sequence[nn.Module]:
        count = len(self.layers) if layers is None else layers
        if not 0 <= count <= len(self.layers):
            raise LimitError(f"cannot run {count} layers.", fix=f"The encoder has {len(self.layers)}.")
        return list(self.layers)[:count]


class MaskedGeneHead(nn.Module):
    """Hidden states to gene logits: dense, ReLU, LayerNorm, then the tied decoder."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocabulary_size))

    def forward(self, hidden_md: torch.Tensor, tokens_vd: torch.Tensor) -> torch.Tensor:
        """Logits (m, v); `tokens_vd` is the token embedding, which is also the decoder."""
        return functional.linear(self.norm(functional.relu(self.dense(hidden_md))), tokens_vd, self.bias)


class MaskedGeneModel(nn.Module):
    """The encoder with the head it is pretrained with."""

    def __init__(self, config: EncoderConfig, *, attention: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, attention=attention)
        self.head = MaskedGeneHead(config)
        # One number, but with an axis: optimisers that are divided among workers cut flat vectors.
        self.seen_amount = nn.Parameter(torch.full((1,), SEEN_AMOUNT)) if config.seen_genes else None

    def forward(self, batch: PackedBatch, masked_positions: torch.Tensor) -> torch.Tensor:
        """Logits (m, v) at `masked_positions`, indices (m) int64 into the stream."""
        hidden_td = self.encoder(batch)
        logits_mv = self.head(hidden_td[masked_positions], self.encoder.embeddings.tokens.weight)
        if self.seen_amount is None:
            return logits_mv
        return logits_mv - self.seen_amount * seen_elsewhere(batch, masked_positions, self.config.vocabulary_size)


def seen_elsewhere(batch: PackedBatch, masked_positions: torch.Tensor, vocabulary_size: int) -> torch.Tensor:
    """(m, v) bool: whether a token stands in the cell of a masked position, at another position than that one."""
    cells = len(batch.lengths)
    flat_t = batch.cells_t() * vocabulary_size + batch.tokens_t
    counts = torch.zeros(cells * vocabulary_size, dtype=torch.int16, device=flat_t.device)
    counts.index_add_(0, flat_t, counts.new_ones(len(flat_t)))
    cell_m = torch.searchsorted(batch.offsets, masked_positions, right=True, out_int32=True) - 1
    seen_mv = counts.view(cells, vocabulary_size).bool()[cell_m]
    own_m = batch.tokens_t[masked_positions, None]
    again_m = counts[cell_m[:, None] * vocabulary_size + own_m] > 1
    return seen_mv.scatter_(1, own_m, again_m)


def new_model(config: EncoderConfig, *, seed: int, attention: str = "auto") -> MaskedGeneModel:
    """A freshly initialised model on the CPU, fp32; the same seed gives the same weights.

    Weights and embeddings are normal with `initializer_range`, the padding row and biases are zero, norms are one
    (the initialisation of `BertForMaskedLM`). With norms before the blocks, matrices that write to the sum of all
    blocks begin smaller by the root of their number (Radford et al. 2019, GPT-2, section 2.3). The global random state
    is not touched.
    """
    with torch.device("meta"):
        model = MaskedGeneModel(config, attention=attention)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        _initialise(module, config, generator)
    with torch.no_grad():
        model.encoder.embeddings.tokens.weight[config.pad_token].zero_()
        if config.norm == "pre":
            for layer in model.encoder.layers:
                for last in (layer.attention.output, layer.narrow):
                    last.weight.div_(math.sqrt(2 * config.layers))
    return model


@torch.no_grad()
def _initialise(module: nn.Module, config: EncoderConfig, generator: torch.Generator) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        module.weight.normal_(0.0, config.initializer_range, generator=generator)
    if isinstance(module, nn.LayerNorm):
        module.weight.fill_(1.0)
    if isinstance(module, RankNeighbours):
        module.weight.zero_()
    if isinstance(module, MaskedGeneModel) and module.seen_amount is not None:
        module.seen_amount.fill_(SEEN_AMOUNT)
    if isinstance(getattr(module, "bias", None), nn.Parameter):
        module.bias.zero_()
