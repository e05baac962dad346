"""Recipes: shipped ones build, changes apply, mistakes are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from genescale.platform.errors import SettingsError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.model import EncoderConfig, MaskedGeneModel
from genescale.training.recipe import PretrainConfig, read_recipe, shipped_recipes

# Parameters of the published checkpoints, with the vocabulary size and window they were trained with.
PUBLISHED = {
    "geneformer-v1-10m": (25_426, 2_048, 10_288_722),
    "geneformer-v1-40m": (25_426, 2_048, 39_591_250),
    "geneformer-v2-104m": (20_275, 4_096, 104_386_867),
}


def test_every_shipped_recipe_builds() -> None:
    assert set(PUBLISHED) | {"tiny", "small"} <= set(shipped_recipes())
    for name in shipped_recipes():
        read_recipe(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_give_the_published_sizes(name: str) -> None:
    vocabulary_size, window, parameters = PUBLISHED[name]
    first = 4 if window == 4_096 else 2
    special = ("<pad>", "<mask>", "<cls>", "<eos>")[:first]
    genes = [f"ENSG{i:011d}" for i in range(vocabulary_size - first)]
    vocabulary = Vocabulary.build(genes, np.ones(len(genes)), window=window, name=name, special=special)
    config: EncoderConfig = read_recipe(name).encoder.for_vocabulary(vocabulary)
    with torch.device("meta"):
        model = MaskedGeneModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


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
