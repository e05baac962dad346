"""The shape of an encoder: the published Geneformer architecture, and the options in which another may differ from it.

Every option has the published value as its default, so a config that names none is the published architecture and is
written as Hugging Face's `BertForMaskedLM` has it. A config with any option is an architecture of its own: its
`config.json` has the model type `genescale_encoder`, the same keys for the sizes, and the options beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from genescale.platform.errors import SettingsError

PUBLISHED_TYPE, OWN_TYPE = "bert", "genescale_encoder"
OWN_ARCHITECTURE = "GenescaleMaskedGeneModel"
MOST_NEIGHBOURS = 16


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Where an encoder may differ from the published one; the defaults are the published one.

    What each of them is worth was measured: `docs/modern-encoder.md`.
    """

    norm: Literal["post", "pre"] = "post"
    """Whether sums are normalised after each block (BERT), or blocks read a normalised copy and one norm closes the
    encoder (Xiong et al. 2020, "On layer normalization in the transformer architecture")."""
    activation: Literal["relu", "geglu"] = "relu"
    """`geglu` multiplies one half of a doubled first matrix with the GELU of the other (Shazeer 2020, "GLU variants
    improve transformer"); with two thirds of the inner width it costs what `relu` costs."""
    biases: bool = True
    """False: no bias in projections and norms inside the encoder, as ModernBERT (Warner et al. 2024)."""
    rank_knots: int = 0
    """0: a vector is learned for each rank. Else: for so many ranks, evenly spaced in the logarithm of the rank, and
    interpolated between them, so that every cell teaches every knot."""
    rotary_base: float = 0.0
    """0: none. Else queries and keys are turned by their rank (Su et al. 2021, "RoFormer", with base 10,000), so that
    attention sees how far apart two genes rank, in addition to where they rank."""
    rank_neighbours: int = 0
    """Genes on each side in the ranking that every layer adds to a gene, channel by channel, before it attends: a
    short convolution (Allen-Zhu 2025, "Physics of language models 4.1: Canon layers"), here in both directions."""
    query_key_norm: bool = False
    """Queries and keys are normalised per head (Henry et al. 2020, "Query-key normalization for transformers")."""
    attention_width: int = 0
    """Width of all heads together; 0 is that of the encoder. Scores and mixing cost this much per pair of genes."""
    seen_genes: bool = False
    """A gene stands once in a ranking: the masked-gene head subtracts a learned amount from the logit of every gene
    that is seen elsewhere in the cell."""

    def check_options(self, *, width: int, heads: int) -> None:
        """SettingsError for an option out of range for an encoder of this width and these heads."""
        for name, choices in (("norm", ("post", "pre")), ("activation", ("relu", "geglu"))):
            if getattr(self, name) not in choices:
                raise SettingsError(f"encoder.{name} is {getattr(self, name)!r}.", fix=f"Use {' or '.join(choices)}.")
        checks = {
            "rank_knots": (self.rank_knots == 0 or self.rank_knots >= 2, "Use 0, or 2 or more."),
            "rotary_base": (self.rotary_base == 0.0 or self.rotary_base > 1.0, "Use 0 for none, or 10000."),
            "rank_neighbours": (0 <= self.rank_neighbours <= MOST_NEIGHBOURS, f"Use 0 to {MOST_NEIGHBOURS}."),
            "attention_width": (self.attention_width >= 0 and self.attention_width % heads == 0,
                                f"Use 0 for the encoder's width, or a multiple of its {heads} heads."),
        }  # fmt: skip
        for name, (holds, fix) in checks.items():
            if not holds:
                raise SettingsError(f"encoder.{name} is {getattr(self, name)}.", fix=fix)
        if self.rotary_base and (self.attention_width or width) // heads % 2:
            raise SettingsError("encoder.rotary_base turns pairs of channels, and heads have an odd width.")

    def chosen(self) -> dict[str, Any]:
        """The options that are not the published ones."""
        values = {field.name: getattr(self, field.name) for field in fields(EncoderOptions)}
        return {name: value for name, value in values.items() if value != getattr(PUBLISHED, name)}


PUBLISHED = EncoderOptions()
OPTION_NAMES = tuple(field.name for field in fields(EncoderOptions))


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(EncoderOptions):
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
        for name in (*_SIZES, "type_vocabulary_size"):
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
        self.check_options(width=self.width, heads=self.heads)

    @property
    def is_published(self) -> bool:
        """True for the published architecture, which is the one that `transformers` can compute as well."""
        return not self.chosen()

    @property
    def heads_width(self) -> int:
        """Width of all heads together."""
        return self.attention_width or self.width

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json`: one that `BertForMaskedLM` reads, or one that it must not read."""
        named = {hf_name: getattr(self, name) for name, hf_name in _HF_NAMES.items()}
        if self.is_published:
            fixed = {key: values[0] for key, values in _HF_FIXED.items()}
            return {"architectures": ["BertForMaskedLM"], **fixed, **named}
        options = {name: getattr(self, name) for name in OPTION_NAMES}
        return {"architectures": [OWN_ARCHITECTURE], "model_type": OWN_TYPE, **named, "encoder_options": options}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> EncoderConfig:
        """The shape in a `config.json` of either kind; SettingsError for an architecture that is neither."""
        options: Mapping[str, Any] = {}
        if config.get("model_type") == OWN_TYPE:
            options = _read_options(config)
        else:
            _check_published(config)
        missing = [hf_name for hf_name in _HF_NAMES.values() if hf_name not in config and hf_name in _HF_REQUIRED]
        if missing:
            raise SettingsError(f"missing {', '.join(missing)}.", where="config.json")
        sizes = {name: config[hf_name] for name, hf_name in _HF_NAMES.items() if hf_name in config}
        return cls(**sizes, **options)


def _check_published(config: Mapping[str, Any]) -> None:
    for key, accepted in _HF_FIXED.items():
        if config.get(key, accepted[0]) not in accepted:
            raise SettingsError(
                f"{key} is {config[key]!r}; this encoder knows {accepted[0]!r} only.",
                where="config.json",
                fix="Give a checkpoint of the Geneformer architecture (BertForMaskedLM with ReLU).",
            )


def _read_options(config: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(config.get("encoder_options") or {})
    if unknown := sorted(set(options) - set(OPTION_NAMES)):
        raise SettingsError(
            f"the encoder has an option that this release does not know: {unknown[0]}.",
            where="config.json: encoder_options",
            fix="Load it with the release that wrote it, or a later one.",
        )
    return options


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
# What the published architecture leaves no choice in: the first value is written, the others are also read.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": (PUBLISHED_TYPE,),
    "hidden_act": ("relu",),
    "position_embedding_type": ("absolute", None),
    "tie_word_embeddings": (True,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}
