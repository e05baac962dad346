"""What a sweep tries: read from a TOML file and checked before anything runs.

[search]                                                    # which settings of the head, over which values
learning_rate = { low = 1e-4, high = 1e-1, log = true }
hidden = { choices = [0, 64] }

[finetune]                                                  # settings that all trials share (FinetuneConfig)
label = "cell_type"

[sweep]                                                     # how many trials, and how they are chosen
trials = 16
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ray import tune

from genescale.platform.errors import SettingsError, did_you_mean
from genescale.platform.settings import build, read_toml
from genescale.training.fitting.finetune import FinetuneConfig

SEARCHABLE = (
    "learning_rate",
    "weight_decay",
    "dropout",
    "hidden",
    "schedule",
    "warmup_fraction",
    "class_weights",
    "cells_per_batch",
    "gradient_clip",
)
_WHOLE = ("hidden", "cells_per_batch")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How many trials are run, and how their settings are chosen."""

    trials: int = 16
    at_once: int = 0
    """Trials that run at the same time; 0 means one for each processor of the cluster."""
    sampler: Literal["optuna", "random"] = "optuna"
    """`optuna` learns from finished trials (TPE); with several at once its choices depend on which ends first."""
    grace_epochs: int = 3
    """No trial is stopped by the scheduler (ASHA) before so many epochs."""
    reduction_factor: int = 3
    """At each halving the best 1/reduction_factor of the trials go on."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("at_once", 0), ("grace_epochs", 1), ("reduction_factor", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"{getattr(self, name)} is too small.", where=name, fix=f"Use {least} or more.")


@dataclass(frozen=True, kw_only=True)
class Values:
    """The values one setting may take: a range, or a list of choices."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    """Draw evenly on the logarithmic scale."""
    choices: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        is_range = self.low is not None and self.high is not None
        if is_range == bool(self.choices) or (self.low is None) != (self.high is None):
            raise SettingsError("give either low and high, or choices.", fix="For example { low = 0.0, high = 0.5 }.")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise SettingsError(f"low {self.low} is not below high {self.high}.")
        if self.log and not (self.low or 0) > 0:
            raise SettingsError("a logarithmic range needs a low above 0.")

    def ends(self) -> tuple[Any, ...]:
        """Values that must all be valid for every drawn value to be so."""
        return self.choices or (self.low, self.high)

    def domain(self, name: str) -> Any:
        """Ray Tune's form of it."""
        if self.choices:
            return tune.choice(list(self.choices))
        low, high = self.low or 0.0, self.high or 0.0
        if name in _WHOLE:
            return (tune.lograndint if self.log else tune.randint)(int(low), int(high) + 1)
        return (tune.loguniform if self.log else tune.uniform)(low, high)


@dataclass(frozen=True, kw_only=True)
class TuneSpec:
    """A whole sweep."""

    search: Mapping[str, Values]
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        if not self.search:
            raise SettingsError("nothing to search.", where="search", fix=f"Name one of {', '.join(SEARCHABLE)}.")
        if self.finetune.encoder != "frozen":
            raise SettingsError(
                "a sweep works on the vectors of a frozen encoder.",
                where="finetune.encoder",
                fix="Sweep with encoder = 'frozen', then train the encoder with the winner (genescale finetune).",
            )
        for name, values in self.search.items():
            if name not in SEARCHABLE:
                hint = did_you_mean(name, SEARCHABLE) or f"Known: {', '.join(SEARCHABLE)}."
                raise SettingsError(f"'{name}' cannot be searched.", where="search", fix=hint)
            for value in values.ends():
                self.trial_config({name: value}, where=f"search.{name}")

    def trial_config(self, sample: Mapping[str, Any], *, where: str = "trial") -> FinetuneConfig:
        """The settings of a trial that drew `sample`; SettingsError for values out of range."""
        shared = {f.name: getattr(self.finetune, f.name) for f in dataclasses.fields(FinetuneConfig)}
        return build(FinetuneConfig, {**shared, **sample}, where=where)

    def space(self) -> dict[str, Any]:
        """Ray Tune's search space."""
        return {name: values.domain(name) for name, values in sorted(self.search.items())}


def read_spec(path: str | Path) -> TuneSpec:
    """Read a sweep file; SettingsError names the file and the key that is wrong."""
    return spec_of(read_toml(path), where=str(path))


def spec_of(content: Mapping[str, Any], *, where: str = "sweep") -> TuneSpec:
    """A sweep from nested mappings, as a TOML file holds them."""
    sections = {"search", "finetune", "sweep"}
    for name in content:
        if name not in sections:
            hint = did_you_mean(name, sections) or "Sections: search, finetune, sweep."
            raise SettingsError(f"unknown section '{name}'.", where=where, fix=hint)
    search = {
        name: _values(values, where=f"{where}: search.{name}") for name, values in content.get("search", {}).items()
    }
    return TuneSpec(
        search=search,
        finetune=build(FinetuneConfig, content.get("finetune", {}), where=f"{where}: finetune"),
        sweep=build(SweepConfig, content.get("sweep", {}), where=f"{where}: sweep"),
    )


def _values(content: Any, *, where: str) -> Values:
    if not isinstance(content, Mapping):
        raise SettingsError(
            "is neither a range nor choices.", where=where, fix="For example { low = 0.0, high = 0.5 }."
        )
    if "choices" not in content:
        return build(Values, content, where=where)
    choices = content["choices"]
    if len(content) > 1 or not isinstance(choices, list) or not choices:
        raise SettingsError(
            "choices are one list, and stand alone.", where=where, fix="For example { choices = [0, 64] }."
        )
    return Values(choices=tuple(choices))
