"""The folder of one run of training: what it is, how it was last started, and what came of it.

run.json          what this run computes: recipe, corpus version, vocabulary; written once, never changed
launch.json       how it was last started: MLflow run, number of workers
checkpoints/      see `checkpoints.py`
bundle/           the trained model
finished.json     what the finished run measured; with it and the bundle nothing is left to train
model_card.md     the same for people
ray/              Ray Train's own state
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from genescale.ingestion.corpus import Corpus
from genescale.platform.address import parse
from genescale.platform.errors import AlreadyExistsError, IntegrityError, NotFoundError, SettingsError
from genescale.platform.patience import PATIENT, Patience, patiently
from genescale.platform.settings import build
from genescale.platform.storage import Store, is_remote, join
from genescale.training.recipe import PretrainConfig, flatten

RUN_FILE, LAUNCH_FILE, FINISHED_FILE = "run.json", "launch.json", "finished.json"
CHECKPOINTS, BUNDLE, CARD, RAY = "checkpoints", "bundle", "model_card.md", "ray"
# What may differ when a run is gone on with: it changes where and how often, never the loss curve.
FREE = {"optimizer.zero_stage", "optimizer.offload", "checkpoint_every", "keep", "log_every", "alias", "max_failures"}
FREE |= {"workers", "device", "zero_stage"}


class Claim(Protocol):
    """What a run computes, whatever it trains."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; settings stand under `recipe`."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a pretraining run computes."""

    recipe: PretrainConfig
    corpus_uri: str
    corpus_version: int
    vocabulary: str
    """Its digest."""

    @classmethod
    def of(cls, config: PretrainConfig, corpus: Corpus) -> Identity:
        """The identity of a run of this recipe on this corpus."""
        return cls(
            recipe=config,
            corpus_uri=corpus.uri,
            corpus_version=corpus.version,
            vocabulary=corpus.vocabulary.digest,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "recipe": self.recipe.to_dict(),
            "corpus_uri": self.corpus_uri,
            "corpus_version": self.corpus_version,
            "vocabulary": self.vocabulary,
        }

    def fixed(self) -> dict[str, Any]:
        """What must stay the same when the run is gone on with, under flat names."""
        return _fixed(self.to_dict())


class RunFolder:
    """The folder of one run; it need not be there yet."""

    def __init__(self, store: Store, uri: str, *, patience: Patience = PATIENT) -> None:
        # Absolute: workers have another working folder.
        self.uri, self._store, self._patience = parse(uri).uri, store, patience

    @classmethod
    def find(cls, store: Store, run: str, output: str) -> RunFolder:
        """The folder of a run that was started before: `run` is its name below `output`, or its address."""
        for uri in (join(parse(output).uri, run) if "/" not in run and "\\" not in run else "", run):
            if uri and store.exists(join(uri, RUN_FILE)):
                return cls(store, uri)
        raise NotFoundError(
            f"no run '{run}' was started here.",
            where=output if not is_remote(run) else run,
            fix=f"Give its name below --output, or the address of the folder that holds its {RUN_FILE}.",
        )

    @property
    def name(self) -> str:
        """The run's name."""
        return self.uri.rsplit("/", 1)[1]

    def place(self, name: str) -> str:
        """Address of something in the folder."""
        return join(self.uri, name)

    def claim(self, identity: Claim) -> None:
        """Take the folder for this run, or make sure that it is its; SettingsError when it is another's."""
        data = json.dumps(identity.to_dict(), indent=1, sort_keys=True).encode()
        try:
            self._patiently(lambda: self._store.write(self.place(RUN_FILE), data, if_absent=True), "claiming the run")
            return
        except AlreadyExistsError:
            stored = self._json(RUN_FILE)
        wanted, known = _fixed(identity.to_dict()), _fixed(stored)
        different = sorted(key for key in wanted.keys() | known.keys() if wanted.get(key) != known.get(key))
        if different:
            changes = ", ".join(f"{key} {known.get(key)!r} -> {wanted.get(key)!r}" for key in different[:5])
            raise SettingsError(
                f"this run was started differently ({changes}).",
                where=self.uri,
                fix="Give the same options to go on with it, or another --name to start a new one.",
            )

    def identity(self) -> Identity:
        """What the run computes, as it was started."""
        stored = self._json(RUN_FILE)
        try:
            return Identity(
                recipe=build(PretrainConfig, stored["recipe"], where=self.place(RUN_FILE)),
                corpus_uri=str(stored["corpus_uri"]),
                corpus_version=int(stored["corpus_version"]),
                vocabulary=str(stored["vocabulary"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"does not say what the run computes: {error}.",
                where=self.place(RUN_FILE),
                fix="Restore the file, or give the recipe and the corpus again instead of --resume.",
            ) from error

    def launch(self) -> dict[str, Any]:
        """How the run was last started; empty when it never was."""
        return self._optional(LAUNCH_FILE)

    def launched(self, values: Mapping[str, Any]) -> None:
        """Remember how the run is started."""
        self.write(LAUNCH_FILE, json.dumps(dict(values)).encode())

    def finished(self) -> dict[str, Any]:
        """What the finished run measured; empty while it is not finished."""
        return self._optional(FINISHED_FILE)

    def write(self, name: str, data: bytes) -> None:
        """Put a small file into the folder."""
        self._patiently(lambda: self._store.write(self.place(name), data), f"writing {name}")

    def _optional(self, name: str) -> dict[str, Any]:
        try:
            return self._json(name)
        except NotFoundError:
            return {}

    def _json(self, name: str) -> dict[str, Any]:
        data = self._patiently(lambda: self._store.read(self.place(name)), f"reading {name}")
        try:
            found = json.loads(data)
        except ValueError as error:
            raise IntegrityError(f"is not JSON: {error}.", where=self.place(name), fix="Restore the file.") from error
        return dict(found)

    def _patiently(self, operation: Any, what: str) -> Any:
        return patiently(operation, patience=self._patience, what=what)


def _fixed(identity: Mapping[str, Any]) -> dict[str, Any]:
    recipe = identity.get("recipe")
    rest = {key: value for key, value in identity.items() if key != "recipe"}
    flat = {**rest, **flatten(recipe if isinstance(recipe, Mapping) else {})}
    return {key: value for key, value in flat.items() if key not in FREE}
