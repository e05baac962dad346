"""Bundles are fetched once, whole, and from wherever they are."""

from __future__ import annotations

import dataclasses
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from genescale.platform import bundle as bundles
from genescale.platform.artefacts import StoredArtefacts
from genescale.platform.bundle import Bundle
from genescale.platform.bundle_cache import cached_bundle
from genescale.platform.errors import (
    IntegrityError,
    NotFoundError,
    StorageError,
)
from genescale.platform.settings import Settings, StorageSettings
from genescale.platform.storage import Store, join
from genescale.platform.tracking import (
    fetch_bundle,
    open_tracker,
)
from genescale.platform.vocabulary import Vocabulary
from tests.platform.tracking.tracked_bundles import make_bundle, registered


def test_a_registered_bundle_is_fetched_once(settings: Settings, bundle: Bundle, model: str, tmp_path: Path) -> None:
    version = registered(open_tracker(settings), bundle, model, aliases=["best"])
    fetched = fetch_bundle(f"models:/{model}@best", settings, tmp_path / "cache")
    assert fetched == bundle
    assert fetched.lineage == bundle.lineage
    assert np.array_equal(fetched.weights()["w"], bundle.weights()["w"])
    stamps = {path: path.stat().st_mtime_ns for path in fetched.folder.rglob("*")}
    again = fetch_bundle(version.reference, settings, tmp_path / "cache")
    assert again.folder == fetched.folder
    assert {path: path.stat().st_mtime_ns for path in again.folder.rglob("*")} == stamps
    assert os.listdir(tmp_path / "cache") == [fetched.folder.name]


def test_a_damaged_cache_is_fetched_again(on_s3: Settings, bundle: Bundle, model: str, tmp_path: Path) -> None:
    version = registered(open_tracker(on_s3), bundle, model)
    fetched = fetch_bundle(version.reference, on_s3, tmp_path)
    (fetched.folder / "model.safetensors").write_bytes(b"garbage")
    assert fetch_bundle(version.reference, on_s3, tmp_path).weights().keys() == bundle.weights().keys()


def test_a_cached_bundle_that_was_half_removed_is_fetched_again(bundle: Bundle, tmp_path: Path) -> None:
    """A kill in the middle of a removal may leave anything but the manifest."""
    artefacts = StoredArtefacts(StorageSettings(), str(bundle.folder))
    (cached_bundle(artefacts, tmp_path).folder / "bundle.json").unlink()
    assert cached_bundle(artefacts, tmp_path).weights().keys() == bundle.weights().keys()
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("step", ["_check_file", "_damaged"])
def test_another_process_may_remove_the_same_damaged_bundle(
    step: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefacts, check = StoredArtefacts(StorageSettings(), str(bundle.folder)), getattr(bundles, step)
    folder = cached_bundle(artefacts, tmp_path).folder
    (folder / "bundle.json").write_text('{"schema_version": 1}') if step == "_damaged" else None

    def raced(*arguments: object) -> object:
        if arguments[0] in (folder, folder / "config.json"):
            shutil.rmtree(folder, ignore_errors=True)
        return check(*arguments)

    monkeypatch.setattr(bundles, step, raced)
    assert cached_bundle(artefacts, tmp_path).folder == folder
    monkeypatch.undo()
    assert bundles.open_bundle(folder) == bundle


def test_a_bundle_that_was_exchanged_is_refused(
    on_s3: Settings, bundle: Bundle, vocabulary: Vocabulary, model: str, tmp_path: Path
) -> None:
    tracker, store = open_tracker(on_s3), Store(on_s3.storage)
    version = registered(tracker, bundle, model)
    store.write(join(version.source, "model.safetensors"), b"garbage")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        fetch_bundle(version.reference, on_s3, tmp_path / "cache")
    # Even a bundle that is whole in itself is not the one that was registered.
    store.upload_folder(make_bundle(tmp_path / "other", vocabulary, value=2.0).folder, version.source)
    with pytest.raises(IntegrityError, match="was registered"):
        fetch_bundle(version.reference, on_s3, tmp_path / "cache")
    store.delete_folder(version.source)
    with pytest.raises(NotFoundError):
        fetch_bundle(version.reference, on_s3, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob(".*"))


def test_bundles_are_fetched_from_folders(on_s3: Settings, bundle: Bundle, tmp_path: Path) -> None:
    Store(on_s3.storage).upload_folder(bundle.folder, "s3://tracked/by hand")
    fetched = fetch_bundle("s3://tracked/by hand", on_s3, tmp_path / "cache")
    assert fetched == bundle
    assert fetched.folder.is_relative_to(tmp_path / "cache")
    local = fetch_bundle(str(bundle.folder), on_s3, tmp_path / "cache")
    assert local.folder == bundle.folder
    kept = dataclasses.replace(on_s3, storage=dataclasses.replace(on_s3.storage, allowed_roots=("s3://other",)))
    for reference in ("s3://tracked/by hand", str(bundle.folder)):
        with pytest.raises(StorageError, match="allowed roots"):
            fetch_bundle(reference, kept, tmp_path / "cache")


def test_several_processes_may_fetch_at_once(on_s3: Settings, bundle: Bundle, tmp_path: Path) -> None:
    Store(on_s3.storage).upload_folder(bundle.folder, "s3://tracked/shared")

    def fetch(_: int) -> Bundle:
        return fetch_bundle("s3://tracked/shared", on_s3, tmp_path)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(fetch, range(6)))
    assert {each.folder for each in found} == {found[0].folder}
    assert all(each.weights().keys() == bundle.weights().keys() for each in found)
