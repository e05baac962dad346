"""The settings that won, as a file, and the command that fits them again without a sweep and without Ray."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genescale.ingestion.corpus import Corpus
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.sweeps.sweep_spec import TuneSpec
from genescale.training.sweeps.trial_records import Trial

WINNER_TOML = "winner.toml"


def winner_config(spec: TuneSpec, best: Trial) -> FinetuneConfig:
    """The settings of the best trial, fitted again on train and validation once its best epoch is known.

    A trained encoder is fitted on the train part alone: without a validation part nothing would choose its epoch.
    """
    config = spec.trial_config(best.sample)
    return dataclasses.replace(config, refit=config.encoder == "frozen")


def write_winner(folder: Path, config: FinetuneConfig, best: Trial, *, command: str) -> Path:
    """Write `winner.toml`: every setting, so that later defaults change nothing."""
    score = "no score" if best.score is None else f"validation score {best.score:.6f} at epoch {best.best_epoch}"
    lines = [f"# The winner of a sweep: {best.name}, {score}.", "# Fit it again:", f"#   {command}", ""]
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    lines += [f"{name} = {toml_value(value)}" for name, value in values.items() if value is not None]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WINNER_TOML
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def reproducing_command(path: Path, corpus: Corpus, model: str) -> str:
    """The command that fits the settings in `path` again; `model` is how the pretrained model is named."""
    corpus_at = f"{corpus.uri}@{corpus.version}"
    words = ["genescale", "finetune", model, "--corpus", corpus_at, "--config", str(path)]
    return shlex.join([*words, "--output", str(path.parent / "again")])


def toml_value(value: Any) -> str:
    """A value as TOML writes it; raises TypeError for what a setting never is."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return toml_value({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{name} = {toml_value(item)}' for name, item in value.items())} }}"
    raise TypeError(f"{type(value).__name__} is no TOML value")
