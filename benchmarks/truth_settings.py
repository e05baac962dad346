"""What `truth.py` trains and screens: the main setting, and one factor at a time around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from genescale.ingestion.simulate_network import SimulateConfig
from genescale.training.recipe import PretrainConfig, changed_recipe

# Four cell types with ten markers each; regulators that belong to one type, so that its markers come and go with them.
CONFOUNDED: dict[str, Any] = {
    "cell_types": 4, "regulators": 8, "direct_targets": 4, "mediators": 1, "indirect_targets": 3, "pairs": 2,
    "pair_targets": 3, "markers": 10, "housekeeping": 4, "background": 30, "activity": 0.03, "home_activity": 0.5,
    "type_bias": 0.0, "penetrance": 0.7, "leak": 0.03, "elsewhere_types": 3, "files": 1,
}  # fmt: skip
SMALL_ENCODER = (
    "encoder.width=64", "encoder.layers=2", "encoder.heads=4", "encoder.feed_forward=128", "token_budget=1024",
    "lanes=1", "optimizer.learning_rate=3e-3", "optimizer.schedule=linear", "optimizer.warmup_fraction=0.05",
    "held_out_cells=256", "checkpoint_every=1000000000", "log_every=1000000000",
)  # fmt: skip
# Of the recipes that are shipped: the architecture of `modern`, the masks of `demo`.
MODERN = (
    "encoder.hidden_dropout=0", "encoder.attention_dropout=0", "encoder.seen_genes=true", "encoder.rank_neighbours=2",
    "encoder.rotary_base=10000", "encoder.rank_knots=32",
)  # fmt: skip
DOUBTING = ("mask_fraction=0.3", "mask_token_share=0.5", "random_gene_share=0.25")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One network, one encoder, one length of training."""

    name: str
    simulation: Mapping[str, Any] = field(default_factory=lambda: dict(CONFOUNDED))
    recipe: tuple[str, ...] = (*SMALL_ENCODER, *DOUBTING, *MODERN)
    steps: int = 3_000
    cells: int = 20_000
    """Cells to train on."""
    screened_cells: int = 160
    """Other cells, in which regulators and their controls are deleted."""
    drawn_cells: int = 400
    """Cells that those are the first of; pairs of regulators are looked for in all."""
    effector_cells: int = 50
    """Of those, cells in which every gene is deleted."""
    whole: bool = False
    """Whether pairs and effectors are asked for as well."""
    window: int = 96
    seed: int = 0

    def simulate(self) -> SimulateConfig:
        """The network; the first file holds the cells to train on, the second those to screen."""
        return SimulateConfig(**{**self.simulation, "seed": self.seed, "files": 1})

    def trained_by(self) -> dict[str, Any]:
        """All that the weights depend on."""
        names = ("simulation", "recipe", "steps", "cells", "window", "seed")
        return {name: getattr(self, name) for name in names}

    def pretrain(self) -> PretrainConfig:
        """How the encoder is trained."""
        return replace(changed_recipe(PretrainConfig(), self.recipe), seed=self.seed, steps=self.steps)


def _varied(name: str, **changes: Any) -> Setting:
    """The main setting with other values; those of the network by their own names."""
    own = {key: value for key, value in changes.items() if key in Setting.__dataclass_fields__}
    network = {key: value for key, value in changes.items() if key not in own}
    return Setting(**{"name": name, "simulation": {**CONFOUNDED, **network}, **own})


def _encoder(*changes: str) -> tuple[str, ...]:
    return (*SMALL_ENCODER, *DOUBTING, *MODERN, *changes)


MAIN = ("main", "main-seed-1", "main-seed-2")
# The map: the values of each factor, by the setting that has them.
MAP: dict[str, tuple[tuple[str, str], ...]] = {
    "training (million tokens)": (("steps-750", "0.8"), ("main", "3"), ("steps-6000", "6")),
    "targets of a regulator": (("targets-2", "2"), ("main", "4"), ("targets-12", "12")),
    "genes that echo the regulator": (("main", "0"), ("echoes-1", "1"), ("echoes-3", "3")),
    "chance that a target responds": (("penetrance-0.4", "0.4"), ("main", "0.7"), ("penetrance-0.95", "0.95")),
    "other types with the targets on": (("elsewhere-0", "0 of 3"), ("main", "3 of 3")),
    "genes that nothing drives": (
        ("main", "30"),
        ("background-300", "300"),
        ("background-300-steps-6000", "300,\n6 M tokens"),
    ),
    "layers": (("layers-1", "1"), ("main", "2"), ("layers-4", "4")),
    "width": (("width-32", "32"), ("main", "64"), ("width-128", "128")),
    "recipe": (("published", "published"), ("published-masks", "15 %\nhidden"), ("main", "modern")),
}
# In the order in which they are worth their time.
SETTINGS = [
    Setting(name="main", whole=True),
    *(Setting(name=f"main-seed-{seed}", whole=True, seed=seed) for seed in (1, 2)),
    _varied("echoes-3", echoes=3),
    _varied("steps-750", steps=750),
    _varied("elsewhere-0", elsewhere_types=0),
    _varied("penetrance-0.4", penetrance=0.4),
    _varied("layers-1", recipe=_encoder("encoder.layers=1")),
    _varied("targets-12", direct_targets=12, window=160),
    _varied("background-300", background=300, window=192),
    _varied("background-300-steps-6000", background=300, window=192, steps=6_000),
    _varied("published-masks", recipe=(*SMALL_ENCODER, *MODERN)),
    _varied("width-32", recipe=_encoder("encoder.width=32", "encoder.feed_forward=64")),
    _varied("steps-6000", steps=6_000),
    _varied("published", recipe=(*SMALL_ENCODER, *DOUBTING)),
    _varied("targets-2", direct_targets=2),
    _varied("penetrance-0.95", penetrance=0.95),
    _varied("echoes-1", echoes=1),
    _varied("layers-4", recipe=_encoder("encoder.layers=4")),
    _varied("width-128", recipe=_encoder("encoder.width=128", "encoder.feed_forward=256")),
]
QUICK = Setting(
    name="quick", steps=60, cells=800, screened_cells=12, drawn_cells=60, effector_cells=6, whole=True,
    simulation={**CONFOUNDED, "background": 10},
)  # fmt: skip
