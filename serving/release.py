"""Which model is served: resolved once, at deploy, to bytes that cannot change under a running service.

An alias may move at any time; a service that asked again would change its answers without a deploy. So the alias is
looked up here, once, and replicas get the version and the digest it stood for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from genescale.platform.address import is_remote
from genescale.platform.bundle import Bundle, open_bundle
from genescale.platform.errors import IntegrityError
from genescale.platform.settings import Settings

REGISTRY = "models:/"
UNREGISTERED = "unregistered"


@dataclass(frozen=True, kw_only=True)
class Release:
    """An immutable model: its name and version, the digest of its bundle, and where the bytes are."""

    name: str
    version: str
    digest: str
    address: str
    """`models:/NAME/VERSION`, or the folder or `s3://…` address that was given."""
    folder: str
    """Verified local copy on the machine that resolved it."""
    alias: str = ""
    """The alias it was found under; empty for a version, a folder or an address."""

    @property
    def key(self) -> str:
        """Tells releases apart: the same bytes registered twice are two."""
        return f"{self.name}/{self.version}/{self.digest}"

    @property
    def is_registered(self) -> bool:
        """Whether it came from the registry, which knows more versions of it."""
        return self.address.startswith(REGISTRY)

    def open(self, settings: Settings, cache: Path) -> Bundle:
        """The bundle on this machine: the local copy where it is, else fetched into `cache`.

        Raises IntegrityError when the bytes are not those of this release.
        """
        here = Path(self.folder)
        bundle = open_bundle(here) if here.is_dir() else _fetch(self.address, settings, cache)
        if bundle.digest != self.digest:
            raise IntegrityError(
                f"the bundle has digest {bundle.digest[:12]}, {self.digest[:12]} was deployed.",
                where=f"{self.name} version {self.version}",
                fix="Bundles are immutable: register changed files as a new version and deploy again.",
            )
        return bundle


def resolve(model: str | Path | Bundle, settings: Settings, cache: Path) -> Release:
    """The release that `model` stands for now.

    `model` is a bundle, a folder, `s3://…`, `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises TrackingError, StorageError or IntegrityError when it cannot be had.
    """
    if isinstance(model, Bundle):
        return _unregistered(model, str(model.folder))
    address = str(model)
    if not address.startswith(REGISTRY):
        return _unregistered(_fetch(address, settings, cache), address)
    from genescale.platform.tracking import open_tracker

    registered = open_tracker(settings).resolve(address)
    bundle = _fetch(registered.reference, settings, cache)
    return Release(
        name=registered.name,
        version=registered.version,
        digest=registered.digest,
        address=registered.reference,
        folder=str(bundle.folder),
        alias=address.removeprefix(REGISTRY).partition("@")[2],
    )


def _unregistered(bundle: Bundle, address: str) -> Release:
    return Release(
        # What is fetched lies in the cache under a digest, which is no name.
        name=address.rstrip("/").rpartition("/")[2] if is_remote(address) else bundle.folder.resolve().name,
        version=UNREGISTERED,
        digest=bundle.digest,
        address=address,
        folder=str(bundle.folder.resolve()),
    )


def _fetch(address: str, settings: Settings, cache: Path) -> Bundle:
    # MLflow takes seconds to import, and a replica beside the resolved copy does not need it.
    from genescale.platform.tracking import fetch_bundle

    return fetch_bundle(address, settings, cache)
