"""A screen in two passes: score every gene of a cell cheaply, then delete only the genes that seem to matter.

Legend: `g` genes of one cell, highest rank first; `p` pairs of a cell and a gene.

The first pass (`first_pass.py`) estimates the shift of every single deletion of a cell from one forward pass and a few
backward passes. The second deletes, exactly, the fraction of genes with the highest estimates, and a random fraction of
all others. Those were drawn with a known chance, so they say without bias what was missed: each stands for
1 / chance genes like it. Which fractions are worth what was measured: docs/two-pass-screen.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from genescale.platform.errors import InputError, SettingsError, did_you_mean

FirstPassName = Literal["cotangents", "rank"]
RankBy = Literal["all", "shift", "states", "classes"]
ChosenAs = Literal["top", "random"]
TOP, RANDOM = "top", "random"


@dataclass(frozen=True, kw_only=True)
class TwoPassConfig:
    """Which genes of each cell are deleted for certain, and which by chance."""

    first_pass: FirstPassName = "cotangents"
    """`cotangents`: estimated by backward passes. `rank`: the highest ranks first, which costs nothing and serves to
    compare with."""
    probes: int = 2
    """Random directions, one backward pass each, that squared movements are estimated with."""
    top_fraction: float = 0.07
    """Share of a cell's genes, those with the highest estimates, that are deleted for certain."""
    control_fraction: float = 0.005
    """Share of a cell's other genes that are deleted too, drawn at random."""
    rank_by: RankBy = "all"
    """The read-out whose estimates decide. `all`: a gene that ranks high on any of the screen's read-outs."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("first_pass", self.first_pass, get_args(FirstPassName)),
            ("rank_by", self.rank_by, get_args(RankBy)),
        ):
            if value not in choices:
                fix = did_you_mean(value, choices) or f"Use one of {', '.join(choices)}."
                raise SettingsError(f"{name} is '{value}'.", where="two_pass", fix=fix)
        if self.probes < 1:
            raise SettingsError(f"probes is {self.probes}.", where="two_pass", fix="Use 1 or more.")
        for name, least in (("top_fraction", 0.0), ("control_fraction", 0.0)):
            if not least <= getattr(self, name) <= 1.0:
                raise SettingsError(f"{name} is {getattr(self, name)}.", where="two_pass", fix="Use 0 to 1.")
        if self.top_fraction + self.control_fraction == 0.0:
            raise SettingsError(
                "no gene would be deleted.", where="two_pass", fix="Give top_fraction, for example 0.07."
            )
        if self.seed < 0:
            raise SettingsError(f"seed is {self.seed}.", where="two_pass", fix="Use 0 or more.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """The genes of one cell that the second pass deletes."""

    positions: np.ndarray
    """Rising positions (c) int64 among the genes of the cell: 0 is the gene of the highest rank."""
    roles: np.ndarray
    """(c) `top` or `random`."""
    chances: np.ndarray
    """(c) float64: how probable it was that this gene is deleted; 1 for `top`."""


def cell_rng(config: TwoPassConfig, cell: int) -> np.random.Generator:
    """The random numbers of one cell, by its number in the corpus: the same whatever worker takes it."""
    return np.random.default_rng([config.seed, cell])


def choose(scores_g: np.ndarray, config: TwoPassConfig, rng: np.random.Generator) -> Chosen:
    """The genes with the highest scores, and a random sample of the others.

    At least one gene is taken where its fraction is above 0 and one is left. Ties go to the higher rank. Raises
    InputError for scores that are not finite.
    """
    scores_g = np.asarray(scores_g, dtype=np.float64)
    if scores_g.ndim != 1 or not np.isfinite(scores_g).all():
        raise InputError("a first-pass score is not finite.", fix="Check the model's weights for NaN.")
    order = np.argsort(-scores_g, kind="stable")
    n_top = how_many(config.top_fraction, len(order))
    top, others = order[:n_top], order[n_top:]
    n_random = how_many(config.control_fraction, len(others))
    drawn = rng.choice(others, size=n_random, replace=False) if n_random else others[:0]
    positions = np.concatenate([top, drawn]).astype(np.int64)
    roles = np.repeat(np.array([TOP, RANDOM]), [n_top, n_random])
    chances = np.repeat([1.0, n_random / max(1, len(others))], [n_top, n_random])
    rising = np.argsort(positions)
    return Chosen(positions=positions[rising], roles=roles[rising], chances=chances[rising])


def how_many(fraction: float, n: int) -> int:
    """So many of `n` as the fraction says, rounded up."""
    return min(n, int(np.ceil(fraction * n - 1e-9)))
