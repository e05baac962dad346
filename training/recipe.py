"""Recipes: everything that decides what a pretraining run computes, in one frozen config.

A recipe is a TOML file; those shipped in `training/recipes/` have names. What depends on the corpus (size of the
vocabulary, window) comes from the corpus, and what depends on the machine (workers, storage) from the command.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genescale.platform.errors import SettingsError, did_you_mean
from genescale.platform.settings import build, read_toml
from genescale.platform.vocabulary import Vocabulary
from genescale.training.attention import check_backend
from genescale.training.encoder_config import EncoderConfig, EncoderOptions
from genescale.training.engine import OptimizerConfig

# Beside this file, in the wheel as in the repository. `importlib.resources` cannot list a folder without `__init__.py`
# in an editable install.
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class EncoderShape(EncoderOptions):
    """An encoder before it is known which vocabulary it reads."""

    width: int = 256
    layers: int = 6
    heads: int = 4
    feed_forward: int = 512
    hidden_dropout: float = 0.02
    attention_dropout: float = 0.02
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        # The ranges are those of EncoderConfig; any vocabulary will do to check them.
        EncoderConfig(vocabulary_size=1, positions=1, **dataclasses.asdict(self))

    def for_vocabulary(self, vocabulary: Vocabulary) -> EncoderConfig:
        """The encoder for the genes and the window of this vocabulary."""
        return EncoderConfig(
            vocabulary_size=vocabulary.size,
            positions=vocabulary.window,
            pad_token=vocabulary.pad,
            **dataclasses.asdict(self),
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pretraining run. The same config on the same corpus version gives the same loss curve."""

    encoder: EncoderShape = EncoderShape()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    """Of initial weights, order of cells, masks and dropout."""
    epochs: int = 3
    steps: int = 0
    """Optimiser steps; 0 means as many as `epochs` have."""
    token_budget: int = 16_384
    """Tokens of one micro-batch at most; at least the window of the vocabulary."""
    lanes: int = 8
    """Micro-batches of one optimiser step, shared by the workers: their number must divide it."""
    mask_fraction: float = 0.15
    """Share of a cell's genes that are chosen to be found."""
    mask_token_share: float = 0.8
    """Share of the chosen genes that become `<mask>`."""
    random_gene_share: float = 0.1
    """Share of the chosen genes that become a random gene; the rest stay as they are."""
    held_out_cells: int = 512
    """Cells kept from training to measure the loss on; never more than a tenth of the corpus."""
    evaluate_every: int = 0
    """Steps between measurements on the held-out cells; 0 measures before and after training only."""
    checkpoint_every: int = 500
    keep: int = 2
    """Newest checkpoints that stay in storage; the one with the lowest held-out loss stays as well."""
    log_every: int = 10
    attention: str = "auto"
    compile: bool = False
    """Compile the encoder's layers with torch.compile; on CUDA only, and at ZeRO stage 2 at most."""
    model_name: str = "masked-gene-model"
    """Registered model that a new version is added to."""
    alias: str = "newest"
    """Alias that moves to the new version; empty moves none. Which version is the champion, a person decides."""
    max_failures: int = 3
    """Times that workers may be lost before the run gives up; each time it goes on from its last checkpoint."""

    def __post_init__(self) -> None:
        check_backend(self.attention)
        least = {"seed": 0, "epochs": 1, "steps": 0, "token_budget": 1, "lanes": 1, "held_out_cells": 0}
        least |= {"evaluate_every": 0, "checkpoint_every": 1, "keep": 1, "log_every": 1, "max_failures": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise SettingsError(f"{name} is {getattr(self, name)}.", fix=f"Use {bound} or more.")
        if not 0.0 < self.mask_fraction < 1.0:
            raise SettingsError(f"mask_fraction is {self.mask_fraction}.", fix="Use a fraction such as 0.15.")
        if not self.model_name:
            raise SettingsError("model_name is empty.", fix="Name the registered model.")

    def to_dict(self) -> dict[str, Any]:
        """Nested mappings of plain values, for JSON and for lineage."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """The same with keys such as `encoder.width`, for tracking."""
        return flatten(self.to_dict())

    @property
    def digest(self) -> str:
        """Hex digest of every value."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with Genescale."""
    return sorted(file.stem for file in RECIPES.glob("*.toml"))


def read_recipe(name_or_path: str, changes: Sequence[str] = ()) -> PretrainConfig:
    """A shipped recipe by name, or a TOML file, with changes such as `encoder.width=128`.

    Raises SettingsError for a recipe that is not there, an unknown key or a value out of range.
    """
    return _build(_recipe_values(name_or_path), changes, where=name_or_path)


def changed_recipe(recipe: PretrainConfig, changes: Sequence[str]) -> PretrainConfig:
    """A recipe with changes such as `encoder.width=128`; SettingsError for an unknown key or a value out of range."""
    return _build(recipe.to_dict(), changes, where="--set")


def _build(values: dict[str, Any], changes: Sequence[str], *, where: str) -> PretrainConfig:
    for change in changes:
        key, separator, text = change.partition("=")
        if not separator:
            raise SettingsError(f"'{change}' is not a change.", where="--set", fix="Write KEY=VALUE.")
        values = _changed(values, key.strip().split("."), text.strip())
    return build(PretrainConfig, values, where=where)


def _recipe_values(name_or_path: str) -> dict[str, Any]:
    if name_or_path in shipped_recipes():
        return read_toml(RECIPES / f"{name_or_path}.toml")
    if name_or_path.endswith(".toml") or Path(name_or_path).is_file():
        return read_toml(name_or_path)
    hint = did_you_mean(name_or_path, shipped_recipes()) or f"Shipped: {', '.join(shipped_recipes())}."
    raise SettingsError(f"no recipe '{name_or_path}'.", fix=f"{hint} A file must end with .toml.")


def _changed(values: Mapping[str, Any], path: Sequence[str], text: str) -> dict[str, Any]:
    name, *rest = path
    if not rest:
        return {**values, name: text}
    section = values.get(name, {})
    if not isinstance(section, Mapping):
        raise SettingsError(f"'{name}' is a value, not a section.", where="--set")
    return {**values, name: _changed(section, rest, text)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with keys such as `encoder.width`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
