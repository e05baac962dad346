"""The encoder: the published Geneformer architecture in plain torch, over packed cells.

Post-norm BERT: learned rank positions, token type 0 added everywhere, ReLU, LayerNorm with epsilon 1e-12, weights of
the masked-gene decoder tied to the token embedding (Theodoris et al. 2023; layout of Hugging Face's `BertForMaskedLM`).
What is unusual here:
- a batch is one stream of tokens with segment offsets (`PackedBatch`): nothing is padded, no token sees another cell;
- queries, keys and values are one matrix product;
- `layers=` stops early, so that an embedding of the second to last layer does not pay for the last;
- the masked-gene head computes logits at masked positions only: with 25,426 genes the decoder would otherwise cost as
  much as the encoder.

Axes: t tokens of the whole batch, d width, h heads, k width of one head, m masked positions, v vocabulary, b cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from genescale.platform.errors import LimitError, SettingsError
from genescale.training.attention import Backend, Segments, attend, attention_weights, check_backend, drop_values


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of an encoder. Defaults are those of the published 10M model where one exists."""

    vocabulary_size: int
    """Rows of the token embedding: genes and special tokens."""
    width: int
    layers: int
    heads: int
    feed_forward: int
    positions: int
    """Longest cell in tokens, special tokens included."""
    hidden_dropout: float = 0.02
    attention_dropout: float = 0.02
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    layer_norm_eps: float = 1e-12
    type_vocabulary_size: int = 2
    """Rows of the token type embedding; only row 0 is ever used."""
    pad_token: int = 0

    def __post_init__(self) -> None:
        for name in (
            "vocabulary_size",
            "width",
            "layers",
            "heads",
            "feed_forward",
            "positions",
            "type_vocabulary_size",
        ):
            if getattr(self, name) < 1:
                raise SettingsError(
                    f"encoder.{name} is {getattr(self, name)}.", fix="Use a whole number of at least 1."
                )
        if self.width % self.heads:
            raise SettingsError(
                f"encoder.width {self.width} is not a multiple of encoder.heads {self.heads}.",
                fix="The published models use heads of width 64.",
            )
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise SettingsError(f"encoder.{name} is {getattr(self, name)}.", fix="Use a probability below 1.")
        if not 0 <= self.pad_token < self.vocabulary_size:
            raise SettingsError(f"encoder.pad_token {self.pad_token} is not a token.", fix="Use 0.")

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that Hugging Face's `BertForMaskedLM` reads."""
        fixed = {key: values[0] for key, values in _HF_FIXED.items()}
        named = {hf_name: getattr(self, name) for name, hf_name in _HF_NAMES.items()}
        return {"architectures": ["BertForMaskedLM"], **fixed, **named}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> EncoderConfig:
        """The shape in a Hugging Face `config.json`; SettingsError for an architecture that is not this one."""
        for key, accepted in _HF_FIXED.items():
            if config.get(key, accepted[0]) not in accepted:
                raise SettingsError(
                    f"{key} is {config[key]!r}; this encoder knows {accepted[0]!r} only.",
                    where="config.json",
                    fix="Give a checkpoint of the Geneformer architecture (BertForMaskedLM with ReLU).",
                )
        missing = [hf_name for hf_name in _HF_NAMES.values() if hf_name not in config and hf_name in _HF_REQUIRED]
        if missing:
            raise SettingsError(f"missing {', '.join(missing)}.", where="config.json")
        return cls(**{name: config[hf_name] for name, hf_name in _HF_NAMES.items() if hf_name in config})


_HF_NAMES = {
    "vocabulary_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
    "positions": "max_position_embeddings",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "initializer_range": "initializer_range",
    "layer_norm_eps": "layer_norm_eps",
    "type_vocabulary_size": "type_vocab_size",
    "pad_token": "pad_token_id",
}
_SIZES = ("vocabulary_size", "width", "layers", "heads", "feed_forward", "positions")
_HF_REQUIRED = {_HF_NAMES[name] for name in _SIZES}
# What the architecture leaves no choice in: the first value is written, the others are also read.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "hidden_act": ("relu",),
    "position_embedding_type": ("absolute", None),
    "tie_word_embeddings": (True,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Cells as one stream: tokens, their rank within their cell, and where each cell begins."""

    tokens_t: torch.Tensor
    """(t) int64."""
    positions_t: torch.Tensor
    """(t) int64; starts at 0 in every cell."""
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


def pack(cells: Sequence[np.ndarray]) -> PackedBatch:
    """One stream of the cells' tokens, in the given order, on the CPU.

    Raises LimitError for a cell without tokens: it has no embedding.
    """
    lengths = tuple(len(cell) for cell in cells)
    if 0 in lengths:
        raise LimitError("a cell without tokens cannot be encoded.", where=f"cell {lengths.index(0)} of the batch")
    tokens = np.concatenate([np.zeros(0, np.int64), *cells]).astype(np.int64)
    positions = np.concatenate([np.zeros(0, np.int64), *(np.arange(length) for length in lengths)])
    return PackedBatch(torch.from_numpy(tokens), torch.from_numpy(positions), Segments.of(lengths))


class Embeddings(nn.Module):
    """Token + rank position + token type 0, normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary_size, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.types = nn.Embedding(config.type_vocabulary_size, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """(t, d)."""
        hidden_td = self.tokens(batch.tokens_t) + self.types.weight[0] + self.positions(batch.positions_t)
        return self.dropout(self.norm(hidden_td))


class SelfAttention(nn.Module):
    """Multi-head attention within each cell, with its output projection."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)

    def forward(self, hidden_td: torch.Tensor, segments: Segments, backend: Backend) -> torch.Tensor:
        """(t, d)."""
        query, key, value = self._project(hidden_td)
        value = drop_values(value, self.attention_dropout, self.training)
        return self.output(attend(query, key, value, segments, backend).flatten(1))

    def weights(self, hidden_td: torch.Tensor, segments: Segments) -> list[torch.Tensor]:
        """The attention weights of each cell, (h, s, s)."""
        query, key, _ = self._project(hidden_td)
        return attention_weights(query, key, segments)

    def _project(self, hidden_td: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv(hidden_td).unflatten(-1, (3, self.heads, -1)).unbind(1)


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input and then normalised (post-norm)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.widen = nn.Linear(config.width, config.feed_forward)
        self.narrow = nn.Linear(config.feed_forward, config.width)
        self.output_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_td: torch.Tensor, segments: Segments, backend: Backend) -> torch.Tensor:
        """(t, d)."""
        attended = self.dropout(self.attention(hidden_td, segments, backend))
        hidden_td = self.attention_norm(hidden_td + attended)
        fed = self.dropout(self.narrow(functional.relu(self.widen(hidden_td))))
        return self.output_norm(hidden_td + fed)


class Encoder(nn.Module):
    """Packed cells to one vector per token."""

    def __init__(self, config: EncoderConfig, *, attention: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.attention: Backend = check_backend(attention)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, batch: PackedBatch, *, layers: int | None = None) -> torch.Tensor:
        """Hidden states after the first `layers` layers (None = all, 0 = the embeddings): (t, d).

        Raises LimitError when a cell is longer than the positions the encoder has learned.
        """
        hidden_td = self._embed(batch)
        for layer in self._first(layers):
            hidden_td = layer(hidden_td, batch.segments, self.attention)
        return hidden_td

    def hidden_states(self, batch: PackedBatch, *, layers: int | None = None) -> list[torch.Tensor]:
        """The embedding output and the hidden states after each of the first `layers` layers, each (t, d)."""
        states = [self._embed(batch)]
        for layer in self._first(layers):
            states.append(layer(states[-1], batch.segments, self.attention))
        return states

    def attention_weights(self, batch: PackedBatch, *, layer: int) -> list[torch.Tensor]:
        """Attention weights of layer `layer` (0 = the first), one (h, s, s) per cell; use it in evaluation mode."""
        if not 0 <= layer < len(self.layers):
            raise LimitError(f"there is no layer {layer}.", fix=f"The encoder has layers 0 to {len(self.layers) - 1}.")
        attention = self.layers[layer].attention
        return attention.weights(self(batch, layers=layer), batch.segments)

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

    def forward(self, batch: PackedBatch, masked_positions: torch.Tensor) -> torch.Tensor:
        """Logits (m, v) at `masked_positions`, indices (m) int64 into the stream."""
        hidden_td = self.encoder(batch)
        return self.head(hidden_td[masked_positions], self.encoder.embeddings.tokens.weight)


def new_model(config: EncoderConfig, *, seed: int, attention: str = "auto") -> MaskedGeneModel:
    """A freshly initialised model on the CPU, fp32; the same seed gives the same weights.

    Weights and embeddings are normal with `initializer_range`, the padding row and biases are zero, norms are one
    (the initialisation of `BertForMaskedLM`). The global random state is not touched.
    """
    with torch.device("meta"):
        model = MaskedGeneModel(config, attention=attention)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        _initialise(module, config, generator)
    with torch.no_grad():
        model.encoder.embeddings.tokens.weight[config.pad_token].zero_()
    return model


@torch.no_grad()
def _initialise(module: nn.Module, config: EncoderConfig, generator: torch.Generator) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        module.weight.normal_(0.0, config.initializer_range, generator=generator)
    if isinstance(module, nn.LayerNorm):
        module.weight.fill_(1.0)
    if isinstance(getattr(module, "bias", None), nn.Parameter):
        module.bias.zero_()
