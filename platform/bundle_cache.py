"""Bundles fetched from elsewhere, verified and kept on local disk."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import shutil
from pathlib import Path

from genescale.platform.address import is_remote, join, parse
from genescale.platform.artefacts import Artefacts, StoredArtefacts
from genescale.platform.bundle import MANIFEST, Bundle, open_bundle
from genescale.platform.disk import disk_errors, take_away
from genescale.platform.errors import IntegrityError, NotFoundError
from genescale.platform.log import get_logger
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store


def cached_bundle(artefacts: Artefacts, cache: Path, *, digest: str = "") -> Bundle:
    """The bundle that `artefacts` are, from `cache` when it is there, else fetched, verified and put there.

    A cached copy that is damaged is fetched again. Raises IntegrityError when the bundle does not fit its own manifest,
    or is not the one with this `digest`.
    """
    # By the manifest and not by the bundle's digest: two bundles of one content may differ in lineage.
    key = hashlib.sha256(artefacts.read(MANIFEST)).hexdigest()
    bundle = _kept(cache / key) or _fetched(artefacts, cache.absolute(), key)
    if digest and bundle.digest != digest:
        raise IntegrityError(
            f"holds the bundle {bundle.digest[:12]}, but {digest[:12]} was registered.",
            where=str(bundle.folder),
            fix="Register the model again, or find out who changed its files.",
        )
    return bundle


def stored_bundle(uri: str, storage: StorageSettings, cache: Path) -> Bundle:
    """The bundle in an `s3://` folder, through the cache, or in a local folder, where it is."""
    if is_remote(uri):
        return cached_bundle(StoredArtefacts(storage, uri), cache)
    folder = parse(uri)
    # The Store holds local folders to the allowed roots as well.
    Store(storage).exists(join(folder.uri, MANIFEST))
    return open_bundle(folder.path)


def _kept(folder: Path) -> Bundle | None:
    if not folder.is_dir():
        return None
    try:
        return open_bundle(folder)
    except (IntegrityError, NotFoundError, FileNotFoundError) as error:
        get_logger(__name__).warning("a cached bundle is damaged and will be fetched again: %s", error)
        take_away(folder)
        return None


def _fetched(artefacts: Artefacts, cache: Path, key: str) -> Bundle:
    part = cache / f".{secrets.token_hex(8)}.part"
    with disk_errors(str(cache)):
        cache.mkdir(parents=True, exist_ok=True)
    try:
        artefacts.fetch(part)
        bundle = open_bundle(part)
        if hashlib.sha256((part / MANIFEST).read_bytes()).hexdigest() != key:
            raise IntegrityError("was replaced while it was fetched.", where=str(part), fix="Fetch it again.")
        _take_place(part, cache / key)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return dataclasses.replace(bundle, folder=cache / key)


def _take_place(part: Path, final: Path) -> None:
    try:
        with disk_errors(str(final)):
            part.rename(final)
    except Exception:
        # Another process may have fetched the same bundle and come first.
        if not final.is_dir():
            raise
