"""A tracker that keeps everything in memory, for tests of this product and of applications built on it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genescale.platform.address import join
from genescale.platform.disk import whole_file
from genescale.platform.errors import ForbiddenPathError, TrackingError
from genescale.platform.runs import (
    DIGEST_TAG,
    MetricRow,
    ModelSummary,
    ModelVersion,
    Run,
    bundle_tags,
    ended_as,
    flat,
    moves_forward,
    no_bundle,
    parse_reference,
    same_digest,
    unknown_model,
    unknown_version,
)

SCHEME = "memory:/"


@dataclasses.dataclass
class MemoryRun:
    """A run whose records can be looked at. `metrics` holds (step, value) by name; `files` bytes by relative name."""

    id: str
    name: str
    parent: str | None = None
    status: str = "RUNNING"
    params: dict[str, str] = dataclasses.field(default_factory=dict)
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    metrics: dict[str, list[tuple[int, float]]] = dataclasses.field(default_factory=dict)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Record measurements of one step."""
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append((step, float(value)))

    def log_metric_rows(self, rows: Sequence[MetricRow], *, time_ms: int | None = None) -> None:
        """Record measurements of many steps."""
        for step, metrics in rows:
            self.log_metrics(metrics, step=step)

    def newest_steps(self) -> dict[str, int]:
        """The newest recorded step of each measurement."""
        return {name: max(step for step, _ in values) for name, values in self.metrics.items()}

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings; as in MLflow, a parameter that is set cannot get another value."""
        for name, value in flat(params).items():
            if self.params.setdefault(name, value) != value:
                raise TrackingError(f"the parameter '{name}' is already {self.params[name]}.", where=self.name)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a file."""
        self._keep(_named(folder, path.name), path.read_bytes())

    def log_folder(self, path: Path, folder: str = "") -> None:
        """Keep a copy of everything in a folder."""
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            self._keep(_named(folder, file.relative_to(path).as_posix()), file.read_bytes())

    def log_text(self, text: str, name: str) -> None:
        """Keep a text under this relative name."""
        self._keep(name, text.encode())

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set labels."""
        self.tags |= {key: str(value) for key, value in tags.items()}

    def _keep(self, name: str, data: bytes) -> None:
        join(SCHEME, name)
        self.files[name] = data


class MemoryTracker:
    """Tracks like MLflow, with the same errors, and forgets everything at the end of the process."""

    def __init__(self) -> None:
        self.runs: dict[str, MemoryRun] = {}
        self.models: dict[str, list[ModelVersion]] = {}
        self.aliases: dict[str, dict[str, str]] = {}
        self._numbers = itertools.count(1)

    @contextmanager
    def run(
        self,
        name: str,
        *,
        params: Mapping[str, Any] = {},
        tags: Mapping[str, Any] = {},
        parent: str | None = None,
        resume: str = "",
    ) -> Iterator[MemoryRun]:
        """A run for the length of the block."""
        run = self.runs.get(resume) or MemoryRun(f"run{next(self._numbers)}", name, parent)
        self.runs[run.id], run.status = run, "RUNNING"
        run.log_params(params)
        run.set_tags(tags)
        try:
            yield run
        except BaseException as error:
            run.status = ended_as(error)
            raise
        run.status = "FINISHED"

    def register(
        self,
        run: Run,
        folder: str,
        model_name: str,
        *,
        aliases: Sequence[str] = (),
        tags: Mapping[str, Any] = {},
        description: str = "",
    ) -> ModelVersion:
        """Register the bundle that was logged into `folder`, unless the model has a version of its digest."""
        source = _outside_refused(run.id, folder)
        manifest = self.runs[run.id].files.get(f"{folder}/bundle.json")
        if manifest is None:
            raise no_bundle(source, folder)
        all_tags = bundle_tags(manifest, tags, where=source)
        versions = self.models.setdefault(model_name, [])
        digest = all_tags[DIGEST_TAG]
        version = same_digest(versions, digest)
        if version is None:
            number = str(len(versions) + 1)
            version = ModelVersion(model_name, number, source, run.id, all_tags, digest, description)
            versions.append(version)
        for alias in aliases:
            if moves_forward(alias, version.version, self.aliases.get(model_name, {})):
                self.set_alias(model_name, alias, version.version)
        return version

    def list_models(self) -> list[ModelSummary]:
        """Every registered model, by name."""
        return [
            ModelSummary(name, dict(self.aliases.get(name, {})), versions[-1].version)
            for name, versions in sorted(self.models.items())
        ]

    def list_versions(self, model_name: str) -> list[ModelVersion]:
        """All versions of a registered model, oldest first."""
        if model_name not in self.models:
            raise unknown_model(model_name, self.models)
        return list(self.models[model_name])

    def set_alias(self, model_name: str, alias: str, version: str) -> None:
        """Let an alias point at a version."""
        self.resolve(f"models:/{model_name}/{version}")
        self.aliases.setdefault(model_name, {})[alias] = version

    def resolve(self, reference: str) -> ModelVersion:
        """The version behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
        wanted = parse_reference(reference)
        if wanted.name not in self.models:
            raise unknown_model(wanted.name, self.models)
        aliases, versions = self.aliases.get(wanted.name, {}), {v.version: v for v in self.models[wanted.name]}
        number = aliases.get(wanted.alias, "") if wanted.alias else wanted.version
        if number not in versions:
            raise unknown_version(wanted, aliases, versions, where=reference)
        return versions[str(number)]

    def download(self, version: ModelVersion, to: Path) -> Path:
        """Write the version's files below the local folder `to`."""
        folder = version.source.removeprefix(f"{SCHEME}{version.run_id}/") + "/"
        for name, data in self.runs[version.run_id].files.items():
            if name.startswith(folder):
                with whole_file(Path(join(str(to), name.removeprefix(folder)))) as file:
                    file.write(data)
        return to

    def children(self, run_id: str) -> dict[str, str]:
        """Ids of the runs below this one, by name; of several with one name the oldest."""
        below = [run for run in self.runs.values() if run.parent == run_id]
        return {run.name: run.id for run in reversed(below)}

    def left_open(self, tag: str, value: str) -> str:
        """Nothing outlives its process here."""
        return ""

    def close_dangling(self, experiment: str | None = None) -> int:
        """Nothing outlives its process here, so there is nothing to close."""
        return 0


def _named(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _outside_refused(run_id: str, folder: str) -> str:
    try:
        return join(f"{SCHEME}{run_id}", folder)
    except ForbiddenPathError as error:
        raise TrackingError(f"{folder!r} lies outside the run's artefacts.", where=run_id) from error
