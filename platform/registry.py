"""The registered models of one MLflow: versions, aliases, and where their files are.

`MlflowTracker` in `tracking.py` is one; nothing here imports MLflow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from genescale.platform.address import Place, join, parse
from genescale.platform.artefacts import Artefacts
from genescale.platform.bundle import MANIFEST
from genescale.platform.errors import ForbiddenPathError, NotFoundError, StorageError
from genescale.platform.runs import (
    DIGEST_TAG,
    MODEL_SCHEME,
    ModelSummary,
    ModelVersion,
    Run,
    bundle_tags,
    foreign_source,
    moves_forward,
    no_bundle,
    parse_reference,
    same_digest,
    unknown_model,
    unknown_version,
)

# The scheme of artefacts that a server hands out itself.
SERVED = "mlflow-artifacts:"


class Registry:
    """Registered models; what it needs of its tracker is declared here."""

    client: Any
    """An MlflowClient."""

    def errors(self) -> AbstractContextManager[None]:
        """Turn the client's exceptions within the block into TrackingError."""
        raise NotImplementedError

    def run_info(self, run_id: str) -> Any:
        """What MLflow knows of a run."""
        raise NotImplementedError

    def run_artefacts(self, info: Any, folder: str = "") -> Artefacts:
        """The files of a run, or of one of its folders."""
        raise NotImplementedError

    def checked_root(self, root: Place) -> Place:
        """The place of a run's artefacts, if it is where they may be."""
        raise NotImplementedError

    def ensure_model(self, name: str) -> None:
        """Make the registered model, unless it is there."""
        raise NotImplementedError

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
        """Register the bundle in the run's artefact folder `folder`, unless the model has a version of its digest."""
        parse_reference(f"{MODEL_SCHEME}{model_name}/1")
        info = self.run_info(run.id)
        source = self._source(info, folder)
        try:
            manifest = self.run_artefacts(info, folder).read(MANIFEST)
        except NotFoundError as error:
            raise no_bundle(source, folder) from error
        all_tags = bundle_tags(manifest, tags, where=source)
        with self.errors():
            self.ensure_model(model_name)
            version = same_digest(self._versions(model_name), all_tags[DIGEST_TAG])
            if version is None:
                made = self.client.create_model_version(
                    model_name,
                    source=source,
                    run_id=run.id,
                    tags=all_tags,
                    description=description or None,
                    await_creation_for=None,
                )
                version = self._version(made)
            known = self._aliases(model_name)
            for alias in aliases:
                if moves_forward(alias, version.version, known):
                    self.client.set_registered_model_alias(model_name, alias, version.version)
        return version

    def list_models(self) -> list[ModelSummary]:
        """Every registered model, by name."""
        with self.errors():
            names = sorted(model.name for model in self._pages(self.client.search_registered_models))
            return [
                ModelSummary(
                    name, self._aliases(name), max((v.version for v in self._versions(name)), key=int, default="")
                )
                for name in names
            ]

    def list_versions(self, model_name: str) -> list[ModelVersion]:
        """All versions of a registered model, oldest first."""
        parse_reference(f"{MODEL_SCHEME}{model_name}/1")
        with self.errors():
            found = self._versions(model_name)
            known = [model.name for model in self._pages(self.client.search_registered_models)]
        if model_name not in known:
            raise unknown_model(model_name, known)
        return found

    def set_alias(self, model_name: str, alias: str, version: str) -> None:
        """Let an alias point at a version."""
        self.resolve(f"{MODEL_SCHEME}{model_name}/{version}")
        with self.errors():
            self.client.set_registered_model_alias(model_name, alias, version)

    def resolve(self, reference: str) -> ModelVersion:
        """The version behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

        The error says which names, aliases and versions there are; a source outside its run's artefacts is refused.
        """
        wanted = parse_reference(reference)
        with self.errors():
            found = {version.version: version for version in self._versions(wanted.name)}
            known = [] if found else [model.name for model in self._pages(self.client.search_registered_models)]
            if not found and wanted.name not in known:
                raise unknown_model(wanted.name, known)
            aliases = self._aliases(wanted.name)
        number = aliases.get(wanted.alias, "") if wanted.alias else str(int(wanted.version or 0))
        if wanted.alias and number and number not in found:
            # The alias moved meanwhile, to a version that was just made.
            return self.resolve(f"{MODEL_SCHEME}{wanted.name}/{number}")
        if number not in found:
            raise unknown_version(wanted, aliases, found, where=reference)
        version = found[number]
        self._folder_of(version)
        return version

    def download(self, version: ModelVersion, to: Path) -> Path:
        """Copy the version's files to the local folder `to`; returns `to`."""
        self.artefacts_of(version).fetch(to)
        return to

    def artefacts_of(self, version: ModelVersion) -> Artefacts:
        """The version's files; TrackingError when they do not lie among its run's artefacts."""
        return self.run_artefacts(self.run_info(version.run_id), self._folder_of(version))

    def _versions(self, model_name: str) -> list[ModelVersion]:
        found = self._pages(self.client.search_model_versions, f"name = '{model_name}'")
        return sorted((self._version(version) for version in found), key=lambda version: int(version.version))

    def _aliases(self, model_name: str) -> dict[str, str]:
        model = self.client.get_registered_model(model_name)
        return {alias: str(number) for alias, number in model.aliases.items()}

    def _pages(self, search: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Everything that a search finds; MLflow answers in pages."""
        found = search(*arguments)
        items = list(found)
        while found.token:
            found = search(*arguments, page_token=found.token)
            items += found
        return items

    def _version(self, made: Any) -> ModelVersion:
        tags = {str(key): str(value) for key, value in made.tags.items()}
        return ModelVersion(
            name=made.name,
            version=str(made.version),
            source=str(made.source),
            run_id=str(made.run_id or ""),
            tags=tags,
            digest=tags.get(DIGEST_TAG, ""),
            description=str(made.description or ""),
        )

    def _source(self, info: Any, folder: str) -> str:
        try:
            join("artefacts", folder)
        except ForbiddenPathError as error:
            raise foreign_source(folder, info.artifact_uri) from error
        return f"{info.artifact_uri.rstrip('/')}/{quote(folder) if info.artifact_uri.startswith('file:') else folder}"

    def _folder_of(self, version: ModelVersion) -> str:
        """The artefact folder of a version, relative to its run's artefacts; TrackingError when not below them."""
        if not version.run_id:
            raise foreign_source(version.source, "any run")
        root = self.run_info(version.run_id).artifact_uri.rstrip("/")
        try:
            if root.startswith(SERVED):
                base, source = root, version.source
            else:
                base, source = self.checked_root(parse(root)).uri, parse(version.source).uri
            folder = source.removeprefix(f"{base}/")
            join(base, folder)
        except StorageError as error:
            raise foreign_source(version.source, root) from error
        if folder == source:
            raise foreign_source(version.source, root)
        return folder
