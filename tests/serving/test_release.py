"""Which model is served: an alias is resolved once, and the bytes cannot change afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genescale.platform.errors import IntegrityError, NotFoundError, TrackingError
from genescale.platform.settings import Settings
from genescale.serving.release import resolve

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle
    from genescale.platform.tracking import MlflowTracker, ModelVersion

WriteBundle = Callable[..., "Bundle"]


def register(tracker: MlflowTracker, bundle: Bundle, *aliases: str) -> ModelVersion:
    with tracker.run("train") as run:
        run.log_folder(bundle.folder, "bundle")
        return tracker.register(run, "bundle", "encoder", aliases=aliases)


@pytest.fixture
def settings(settings_for: Callable[[Path], Settings], tmp_path: Path) -> Settings:
    return settings_for(tmp_path)


def test_an_alias_is_resolved_once_to_a_version_and_its_digest(
    settings: Settings, write_bundle_at: WriteBundle, tmp_path: Path
) -> None:
    from genescale.platform.tracking import open_tracker

    tracker = open_tracker(settings)
    first, second = (write_bundle_at(tmp_path / f"b{seed}", seed) for seed in (1, 2))
    register(tracker, first, "production")
    release = resolve("models:/encoder@production", settings, tmp_path / "cache")
    assert (release.name, release.version, release.digest) == ("encoder", "1", first.digest)
    register(tracker, second, "production")
    # The alias moved; a replica that starts now, here or on a node without the local copy, gets what was deployed.
    assert release.open(settings, tmp_path / "cache").digest == first.digest
    elsewhere = replace(release, folder=str(tmp_path / "not-on-this-node"))
    assert elsewhere.open(settings, tmp_path / "cache-of-another-node").digest == first.digest
    assert resolve("models:/encoder@production", settings, tmp_path / "cache").version == "2"
    assert resolve("models:/encoder/1", settings, tmp_path / "cache").digest == first.digest


def test_an_unknown_alias_is_a_tracking_error(settings: Settings, write_bundle_at: WriteBundle, tmp_path: Path) -> None:
    from genescale.platform.tracking import open_tracker

    register(open_tracker(settings), write_bundle_at(tmp_path / "b", 1), "production")
    with pytest.raises(TrackingError, match="production"):
        resolve("models:/encoder@staging", settings, tmp_path / "cache")


def test_a_folder_is_served_as_it_is(settings: Settings, bundle: Bundle, tmp_path: Path) -> None:
    for model in (bundle, bundle.folder, str(bundle.folder)):
        release = resolve(model, settings, tmp_path)
        assert (release.name, release.version, release.digest) == ("tiny-encoder", "unregistered", bundle.digest)
        assert release.open(settings, tmp_path).vocabulary == bundle.vocabulary
    with pytest.raises(NotFoundError):
        resolve(str(tmp_path / "nothing"), settings, tmp_path)


def test_a_folder_that_changed_after_the_deploy_is_refused(
    settings: Settings, write_bundle_at: WriteBundle, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    write_bundle_at(folder, 1)
    release = resolve(folder, settings, tmp_path)
    shutil.rmtree(folder)
    write_bundle_at(folder, 2)
    with pytest.raises(IntegrityError, match="was deployed"):
        release.open(settings, tmp_path)
