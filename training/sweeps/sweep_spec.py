"""What a sweep tries: read from a TOML file and checked before anything runs.

[search]                                                    # which settings, over which values
learning_rate = { low = 1e-4, high = 1e-1, log = true }
layer = { choices = ["last", "second_to_last"] }
hidden = { choices = [0, 64] }
depth = { low = 1, high = 3, when = { hidden = [64] } }     # drawn only in trials that have a hidden layer

[finetune]                                                  # settings that all trials share (FinetuneConfig)
label = "cell_type"

[sweep]                                                     # how many trials, how they are chosen, what each may use
trials = 16
resources = { cpu = 0.5 }
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from genescale.platform.errors import SettingsError, did_you_mean
from genescale.platform.settings import build, read_toml
from genescale.training.fitting.config import FinetuneConfig

SEARCHABLE = (
    "learning_rate",
    "encoder_learning_rate",
    "schedule",
    "warmup_fraction",
    "weight_decay",
    "gradient_clip",
    "weight_average",
    "cells_per_batch",
    "class_weights",
    "label_smoothing",
    "gene_dropout",
    "head",
    "neighbours",
    "hidden",
    "depth",
    "activation",
    "dropout",
    "layer",
    "pooling",
    "encoder",
    "frozen_layers",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "seed",
)
"""Settings of a fit. What decides which cells are compared cannot be searched: scores would not be comparable."""
CHECKED_AT_MOST = 4096
"""Combinations of values that are checked before a sweep starts; of more, each setting by itself."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one trial reserves; fractions share a processor or a GPU among trials."""

    cpu: float = 1.0
    gpu: float = 0.0
    memory_gb: float = 0.0
    """Memory that Ray sets aside for a trial when it decides how many run at once; 0 sets none aside."""

    def __post_init__(self) -> None:
        for name in ("cpu", "gpu", "memory_gb"):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (name == "cpu" and value == 0):
                raise SettingsError(f"{value} is out of range.", where=f"resources: {name}", fix="For example 0.5.")
            if name != "memory_gb" and value > 1 and value != int(value):
                raise SettingsError(
                    f"{value} is more than one and not whole.", where=f"resources: {name}", fix="Use 0.5, 1 or 2."
                )


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How many trials are run, how their settings are chosen, and what each may use."""

    trials: int = 16
    at_once: int = 0
    """Trials that run at the same time; 0 means as many as the resources of the cluster allow."""
    sampler: Literal["optuna", "random"] = "optuna"
    """`optuna` learns from finished trials (TPE); with several at once its choices depend on which ends first."""
    scheduler: Literal["asha", "none"] = "asha"
    """`asha` stops poor trials early; `none` lets every trial run to its end."""
    grace_epochs: int = 3
    """No trial is stopped by the scheduler before so many epochs."""
    reduction_factor: int = 3
    """At each halving the best 1/reduction_factor of the trials go on."""
    retries: int = 0
    """How often a trial that failed is tried again, from its start."""
    resources: Resources = Resources()
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"trials": 1, "at_once": 0, "grace_epochs": 1, "reduction_factor": 2, "retries": 0, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise SettingsError(f"{getattr(self, name)} is too small.", where=name, fix=f"Use {bound} or more.")


@dataclass(frozen=True, kw_only=True)
class Values:
    """The values one setting may take: a range with both ends, or a list of choices."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    """Draw evenly on the logarithmic scale."""
    choices: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Drawn only in trials in which these other settings have one of these values."""

    def __post_init__(self) -> None:
        is_range = self.low is not None and self.high is not None
        if is_range == bool(self.choices) or (self.low is None) != (self.high is None):
            raise SettingsError("give either low and high, or choices.", fix="For example { low = 0.0, high = 0.5 }.")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise SettingsError(
                f"the range is empty: low {self.low} is not below high {self.high}.", fix="Exchange or widen them."
            )
        if self.log and not (self.low or 0) > 0:
            raise SettingsError("a logarithmic range needs a low above 0.", fix="For example { low = 1e-4, high = 1 }.")
        if len(set(self.choices)) != len(self.choices):
            raise SettingsError("a choice stands there twice.", fix="Name each value once.")

    def active(self, sample: Mapping[str, Any]) -> bool:
        """Whether the setting is drawn in a trial with these values of the others."""
        return all(sample.get(name) in wanted for name, wanted in self.when.items())


@dataclass(frozen=True, kw_only=True)
class TuneSpec:
    """A whole sweep."""

    search: Mapping[str, Values]
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        if not self.search:
            raise SettingsError("nothing to search.", where="search", fix=f"Name one of {', '.join(SEARCHABLE)}.")
        for name, values in self.search.items():
            _check_name(name)
            self._check_when(name, values)
        if self.finetune.refit:
            raise SettingsError(
                "the winner is fitted again in any case, the trials are not.",
                where="finetune: refit",
                fix="Leave it out.",
            )
        self._check_values()

    @property
    def order(self) -> tuple[str, ...]:
        """The searched settings, those that depend on others last; each group by name."""
        return tuple(sorted(self.search, key=lambda name: (bool(self.search[name].when), name)))

    def trial_config(self, sample: Mapping[str, Any], *, where: str = "trial") -> FinetuneConfig:
        """The settings of a trial that drew `sample`; SettingsError for values out of range."""
        shared = {f.name: getattr(self.finetune, f.name) for f in dataclasses.fields(FinetuneConfig)}
        # A sweep over seeds asks how much a fit depends on chance, on the same cells and the same split.
        if "seed" in sample and shared["data_seed"] is None:
            shared["data_seed"] = self.finetune.seed
        return build(FinetuneConfig, {**shared, **sample}, where=where)

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Samples that together hold every choice and every end of a range; each respects `when`."""
        names = self.order
        ends = [_ends(name, self.search[name]) for name in names]
        if math.prod(map(len, ends)) <= CHECKED_AT_MOST:
            products: Iterator[tuple[Any, ...]] = itertools.product(*ends)
        else:
            longest = max(map(len, ends))
            products = (tuple(values[i % len(values)] for values in ends) for i in range(longest))
        for values in products:
            sample: dict[str, Any] = {}
            for name, value in zip(names, values, strict=True):
                if self.search[name].active({**self._shared(self.search[name].when), **sample}):
                    sample[name] = value
            yield sample

    def active(self, name: str, sample: Mapping[str, Any]) -> bool:
        """Whether a trial that drew `sample` up to now draws this setting too."""
        values = self.search[name]
        return values.active({**self._shared(values.when), **sample})

    def possible(self, name: str) -> tuple[Any, ...]:
        """The values that trials may have of a setting that is searched over choices, or not searched."""
        if name not in self.search:
            return (getattr(self.finetune, name),)
        values = self.search[name]
        return tuple(dict.fromkeys((*values.choices, *([getattr(self.finetune, name)] if values.when else []))))

    def _shared(self, names: Mapping[str, Any]) -> dict[str, Any]:
        return {name: getattr(self.finetune, name) for name in names}

    def _check_when(self, name: str, values: Values) -> None:
        where = f"search: {name}: when"
        for other in values.when:
            _check_name(other, where=where)
            if other == name or (other in self.search and self.search[other].when):
                raise SettingsError(
                    f"'{other}' depends on another setting itself.", where=where, fix="Name one that is always drawn."
                )

    def _check_values(self) -> None:
        for name, values in self.search.items():
            whole = is_whole(name)
            if whole and not values.choices and any(end != int(end) for end in (values.low or 0, values.high or 0)):
                raise SettingsError("takes whole numbers only.", where=f"search: {name}", fix="Use whole ends.")
            for value in _ends(name, values):
                self._check_alone(name, value)
        for sample in self.combinations():
            self._check_together(sample)

    def _check_alone(self, name: str, value: Any) -> None:
        """A value that no trial could use: wrong by itself, whatever the other settings are."""
        try:
            build(FinetuneConfig, {name: value}, where=f"search: {name}")
        except SettingsError as error:
            # Rules between settings are judged in whole combinations; here only the setting's own.
            if error.where.startswith(f"search: {name}") or error.what.endswith(("out of range.", "too small.")):
                raise SettingsError(error.what, where=f"search: {name}", fix=error.fix) from error

    def _check_together(self, sample: Mapping[str, Any]) -> None:
        try:
            self.trial_config(sample)
        except SettingsError as error:
            drawn = ", ".join(f"{name} = {value!r}" for name, value in sample.items())
            raise SettingsError(
                f"some trials could not run: with {drawn}: {error.where}: {error.what}",
                where="search",
                fix="Change the values, or draw a setting only where it applies: "
                "frozen_layers = { choices = [0, 1], when = { encoder = ['trained'] } }.",
            ) from error


def _ends(name: str, values: Values) -> tuple[Any, ...]:
    """Values of a setting that must all be valid for every drawn value to be so."""
    if values.choices:
        return values.choices
    low, high = values.low or 0.0, values.high or 0.0
    return (int(low), int(high)) if is_whole(name) else (low, high)


def is_whole(name: str) -> bool:
    """Whether a setting is a whole number."""
    return typing.get_type_hints(FinetuneConfig)[name] is int


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
    search = {}
    for name, values in content.get("search", {}).items():
        _check_name(name, where=f"{where}: search")
        search[name] = _values(values, where=f"{where}: search: {name}")
    return TuneSpec(
        search=search,
        finetune=build(FinetuneConfig, content.get("finetune", {}), where=f"{where}: finetune"),
        sweep=build(SweepConfig, content.get("sweep", {}), where=f"{where}: sweep"),
    )


def _check_name(name: str, *, where: str = "search") -> None:
    if name in SEARCHABLE:
        return
    known = [field.name for field in dataclasses.fields(FinetuneConfig)]
    if name in known:
        raise SettingsError(
            f"'{name}' cannot be searched: trials would not be comparable, or the scheduler decides it.",
            where=where,
            fix=f"Set it under [finetune]. Searchable: {', '.join(SEARCHABLE)}.",
        )
    hint = did_you_mean(name, SEARCHABLE) or f"Known: {', '.join(SEARCHABLE)}."
    raise SettingsError(f"unknown setting '{name}'.", where=where, fix=hint)


def _values(content: Any, *, where: str) -> Values:
    if not isinstance(content, Mapping):
        raise SettingsError(
            "is neither a range nor choices.", where=where, fix="For example { low = 0.0, high = 0.5 }."
        )
    when = _when(content.get("when", {}), where=f"{where}: when")
    given = {key: value for key, value in content.items() if key != "when"}
    try:
        if "choices" not in given:
            return dataclasses.replace(build(Values, given), when=when)
        if len(given) > 1:
            raise SettingsError(
                "has a range and choices: choices are one list, and stand alone.", fix="Leave one of them out."
            )
        choices = given["choices"]
        if not isinstance(choices, list) or not choices:
            raise SettingsError("has no choices.", fix="Give a list: { choices = [0, 64] }.")
        if not all(isinstance(choice, (str, int, float)) for choice in choices):
            raise SettingsError("a choice is neither a number nor a text.", fix="For example { choices = [0, 64] }.")
        return Values(choices=tuple(choices), when=when)
    except SettingsError as error:
        raise SettingsError(error.what, where=": ".join(filter(None, (where, error.where))), fix=error.fix) from error


def _when(content: Any, *, where: str) -> dict[str, tuple[Any, ...]]:
    if not isinstance(content, Mapping):
        raise SettingsError(
            "is no table of settings and values.", where=where, fix="For example when = { hidden = [64] }."
        )
    return {name: tuple(v) if isinstance(v, list) else (v,) for name, v in content.items()}
