"""Recipes: shipped ones build, changes apply, mistakes are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from genescale.platform.errors import SettingsError
from genescale.platform.vocabulary import SPECIAL_TOKENS, Vocabulary
from genescale.training.model import EncoderConfig, MaskedGeneModel
from genescale.training.recipe import PretrainConfig, read_recipe, shipped_recipes

# What the published config.json files say: vocabulary, window, layers, width, heads, feed-forward, dropout, and the
# parameters counted in the checkpoints.
PUBLISHED = {
    "geneformer-v1-10m": (25_426, 2_048, 6, 256, 4, 512, 0.02, 10_288_722),
    "geneformer-v1-40m": (25_426, 2_048, 12, 512, 8, 1_024, 0.02, 39_591_250),
    "gf-12l-95m-i4096": (20_275, 4_096, 12, 512, 8, 1_024, 0.02, 37_997_363),
    "gf-20l-95m-i4096": (20_275, 4_096, 20, 896, 14, 1_792, 0.02, 151_313_459),
    "geneformer-v2-104m": (20_275, 4_096, 12, 768, 12, 3_072, 0.1, 104_386_867),
    "geneformer-v2-316m": (20_275, 4_096, 18, 1_152, 18, 4_608, 0.1, 316_354_867),
}
# Published training arguments: peak rate, schedule, warm-up steps, warm-up share, epochs.
PUBLISHED_TRAINING = {
    "geneformer-v1-10m": (1e-3, "linear", 10_000, 0.0, 3),
    "geneformer-v1-40m": (5e-4, "linear", 10_000, 0.0, 3),
    "gf-12l-95m-i4096": (5e-4, "cosine", 5_000, 0.0, 3),
    "geneformer-v2-104m": (2e-4, "cosine", 0, 0.007, 3),
}


def test_every_shipped_recipe_builds() -> None:
    assert set(PUBLISHED) | {"tiny", "small"} <= set(shipped_recipes())
    for name in shipped_recipes():
        read_recipe(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_give_the_published_sizes(name: str) -> None:
    vocabulary_size, window, layers, width, heads, feed_forward, dropout, parameters = PUBLISHED[name]
    first = 4 if window == 4_096 else 2
    genes = [f"ENSG{i:011d}" for i in range(vocabulary_size - first)]
    special = SPECIAL_TOKENS[:first]
    vocabulary = Vocabulary.build(genes, np.ones(len(genes)), window=window, name=name, special=special)
    config: EncoderConfig = read_recipe(name).encoder.for_vocabulary(vocabulary)
    assert (config.layers, config.width, config.heads, config.feed_forward) == (layers, width, heads, feed_forward)
    assert (config.hidden_dropout, config.attention_dropout) == (dropout, dropout)
    assert (config.positions, config.layer_norm_eps, config.initializer_range) == (window, 1e-12, 0.02)
    with torch.device("meta"):
        model = MaskedGeneModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_train_as_published(name: str) -> None:
    recipe = read_recipe(name)
    assert (recipe.mask_fraction, recipe.mask_token_share, recipe.random_gene_share) == (0.15, 0.8, 0.1)
    # The batch plan has to fit the longest cell of the window.
    assert recipe.token_budget >= PUBLISHED[name][1]
    if name in PUBLISHED_TRAINING:
        rate = recipe.optimizer
        found = (rate.learning_rate, rate.schedule, rate.warmup_steps, rate.warmup_fraction, recipe.epochs)
        assert found == PUBLISHED_TRAINING[name]


def test_changes_apply_to_values_and_sections() -> None:
    config = read_recipe("tiny", ["encoder.width=64", "lanes = 4", "optimizer.schedule=cosine"])
    assert (config.encoder.width, config.lanes, config.optimizer.schedule) == (64, 4, "cosine")
    assert config.encoder.layers == read_recipe("tiny").encoder.layers


def test_a_file_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 9\n[encoder]\nlayers = 3\n")
    assert read_recipe(str(path)) == read_recipe(str(path), ["seed=9"])
    assert read_recipe(str(path)).encoder.layers == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("encoder.widht=4", "Did you mean 'width'"),
        ("encoder.width=33", "not a multiple"),
        ("lanes=0", "lanes"),
        ("lanes", "KEY=VALUE"),
        ("lanes.x=1", "not a section"),
        ("mask_fraction=1.5", "mask_fraction"),
        ("attention=flash", "segments"),
        ("optimizer.zero_stage=9", "zero_stage"),
        ("steps=many", "whole number"),
    ],
)
def test_mistakes_are_named(change: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_recipe("tiny", [change])


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match="Did you mean 'tiny'"):
        read_recipe("tinny")


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        read_recipe(str(tmp_path / "gone.toml"))


def test_the_digest_changes_with_any_value() -> None:
    digests = {PretrainConfig().digest, read_recipe("tiny").digest, read_recipe("tiny", ["optimizer.clip=0.5"]).digest}
    assert len(digests) == 3
    assert read_recipe("tiny").digest == read_recipe("tiny").digest
