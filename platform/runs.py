"""What a tracker is to the rest of the code: runs that record, and registered versions of models.

`tracking.py` implements this on MLflow and `memory_tracker.py` in memory, for tests.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from genescale.platform.address import shown
from genescale.platform.errors import TrackingError, did_you_mean

# Recorded on every registered version: what the model is, independent of where it is stored.
DIGEST_TAG, VOCABULARY_TAG = "bundle_digest", "vocabulary_digest"
MODEL_SCHEME = "models:/"
_REFERENCE = re.compile(r"models:/(?P<name>[^/@:'\"]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>[0-9]+))")
MetricRow = tuple[int, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class ModelVersion:
    """One immutable version of a registered model; `digest` is that of its bundle, empty when none was recorded."""

    name: str
    version: str
    source: str
    run_id: str
    tags: dict[str, str]
    digest: str
    description: str = ""

    @property
    def reference(self) -> str:
        """The address of exactly this version, whatever an alias points at later."""
        return f"{MODEL_SCHEME}{self.name}/{self.version}"


@dataclasses.dataclass(frozen=True)
class ModelSummary:
    """A registered model: its aliases with the version each points at, and its newest version."""

    name: str
    aliases: dict[str, str]
    newest: str


def same_digest(versions: Iterable[ModelVersion], digest: str) -> ModelVersion | None:
    """The newest of these versions that is this bundle already."""
    same = [version for version in versions if digest and version.digest == digest]
    return max(same, key=lambda version: int(version.version), default=None)


def moves_forward(alias: str, version: str, aliases: Mapping[str, str]) -> bool:
    """Whether `alias` may move to `version` by a registration: only if it is new or points at an older one."""
    return int(aliases.get(alias, 0)) < int(version)


class Run(Protocol):
    """One recorded run."""

    @property
    def id(self) -> str:
        """The tracker's name for this run."""

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Record measurements of one step."""

    def log_metric_rows(self, rows: Sequence[MetricRow], *, time_ms: int | None = None) -> None:
        """Record measurements of many steps, (step, {name: value}) each, in few requests.

        time_ms: when they were made, in Unix milliseconds; None means now.
        """

    def newest_steps(self) -> dict[str, int]:
        """The newest recorded step of each measurement."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings; nested mappings and dataclasses become dotted names."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a file among the run's artefacts."""

    def log_folder(self, path: Path, folder: str = "") -> None:
        """Keep a copy of everything in a folder among the run's artefacts."""

    def log_text(self, text: str, name: str) -> None:
        """Keep a text among the run's artefacts, under this relative name."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set labels, which may change later, unlike parameters."""


class Tracker(Protocol):
    """Records runs and registers models."""

    def run(
        self,
        name: str,
        *,
        params: Mapping[str, Any] = ...,
        tags: Mapping[str, Any] = ...,
        parent: str | None = None,
        resume: str = "",
    ) -> AbstractContextManager[Run]:
        """A run for the length of the block: FINISHED, KILLED by an interrupt, or FAILED by any other exception.

        resume: id of a run to go on with; when it is gone, a new one is made.
        """

    def register(
        self,
        run: Run,
        folder: str,
        model_name: str,
        *,
        aliases: Sequence[str] = (),
        tags: Mapping[str, Any] = ...,
        description: str = "",
    ) -> ModelVersion:
        """Register the bundle in the run's artefact folder `folder` as a version, with its digest as a tag.

        A bundle whose digest the model already has as a version is not registered again: that version is returned. An
        alias moves to a newer version, never back to an older one.
        """

    def list_models(self) -> list[ModelSummary]:
        """Every registered model, by name."""

    def list_versions(self, model_name: str) -> list[ModelVersion]:
        """All versions of a registered model, oldest first; TrackingError when there is no such model."""

    def set_alias(self, model_name: str, alias: str, version: str) -> None:
        """Let an alias point at a version."""

    def resolve(self, reference: str) -> ModelVersion:
        """The version behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""

    def download(self, version: ModelVersion, to: Path) -> Path:
        """Copy the version's bundle to the local folder `to`; returns `to`."""

    def children(self, run_id: str) -> dict[str, str]:
        """Ids of the runs below this one, by name; of several with one name the oldest."""

    def left_open(self, tag: str, value: str) -> str:
        """Id of the newest run with this tag that is open although its process is gone; empty when there is none."""

    def close_dangling(self, experiment: str | None = None) -> int:
        """Mark runs whose process is gone as KILLED; returns how many there were."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A parsed address of a registered model: an alias or a version, never both."""

    name: str
    alias: str | None
    version: str | None


def parse_reference(reference: str) -> Reference:
    """Read `models:/NAME@ALIAS` or `models:/NAME/VERSION`; TrackingError for anything else."""
    found = _REFERENCE.fullmatch(reference)
    if not found:
        raise TrackingError(
            "does not name a registered model.",
            where=reference,
            fix="Write models:/NAME@ALIAS or models:/NAME/VERSION.",
        )
    return Reference(**found.groupdict())


def unknown_model(name: str, known: Iterable[str]) -> TrackingError:
    """The error of a name under which nothing is registered."""
    names = sorted(known)
    listed = f"Registered are: {', '.join(names)}." if names else "Nothing is registered yet: train a model first."
    hint = f"{did_you_mean(name, names)} {listed}".strip()
    return TrackingError(f"no model is registered as '{name}'.", where=f"{MODEL_SCHEME}{name}", fix=hint)


def unknown_version(
    reference: Reference, aliases: Mapping[str, str], versions: Iterable[str], *, where: str
) -> TrackingError:
    """The error of an alias or version that a registered model does not have; says which it has."""
    wanted = f"alias '{reference.alias}'" if reference.alias else f"version {reference.version}"
    has = ", ".join(f"@{alias} (version {version})" for alias, version in sorted(aliases.items())) or "no alias"
    numbers = ", ".join(sorted(versions, key=int)) or "none"
    return TrackingError(
        f"the model '{reference.name}' has no {wanted}.", where=where, fix=f"It has {has}; versions: {numbers}."
    )


def bundle_tags(manifest: bytes, tags: Mapping[str, Any], *, where: str) -> dict[str, str]:
    """The tags of a version: those given, and the digests its bundle.json states. TrackingError when they differ."""
    try:
        stated = json.loads(manifest)
        found = {DIGEST_TAG: str(stated["digest"]), VOCABULARY_TAG: str(stated["vocabulary_digest"])}
    except (ValueError, KeyError, TypeError) as error:
        raise TrackingError("is not the bundle.json of a bundle.", where=where, fix="Log a bundle's folder.") from error
    given = {key: str(value) for key, value in tags.items()}
    for key, value in found.items():
        if given.get(key, value) != value:
            raise TrackingError(
                f"the tag {key} says {given[key]}, but the bundle that was logged has {value}.",
                where=where,
                fix="Leave the tag out, or log the bundle that is meant.",
            )
    return {**given, **found}


def no_bundle(where: str, folder: str) -> TrackingError:
    """The error of registering a folder in which no bundle was logged."""
    return TrackingError(
        f"the run has no bundle in its artefact folder '{folder}'.",
        where=where,
        fix=f"Log it first: run.log_folder(bundle.folder, '{folder}').",
    )


def foreign_source(source: str, root: str) -> TrackingError:
    """The error of a model whose files are not among its run's artefacts."""
    return TrackingError(
        f"'{shown(source)}' lies outside the run's artefacts.",
        where=shown(root),
        fix="Log the bundle in a run and register it from there.",
    )


def refused(message: str, *, where: str) -> TrackingError:
    """What a tracking server or database that refused, or did not answer, means; `where` is its address."""
    text = shown(" ".join(message.split())).rstrip(".")
    if "Max retries exceeded" in text or "Connection refused" in text:
        return TrackingError("cannot connect to MLflow.", where=where, fix="Check tracking.uri and that it is running.")
    if any(word in text for word in ("error code 401", "error code 403", "UNAUTHENTICATED", "PERMISSION_DENIED")):
        return TrackingError(
            "MLflow refused these credentials.",
            where=where,
            fix="Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
        )
    return TrackingError(f"MLflow refused: {text}.", where=where)


def ended_as(error: BaseException) -> str:
    """The status of a run that this exception ended."""
    return "KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED"


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings and dataclasses as dotted names with texts; secrets show as `***`."""
    found: dict[str, str] = {}
    for key, value in params.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found
