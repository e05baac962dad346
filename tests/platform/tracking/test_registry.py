"""Registered bundles come back whole: versions, aliases, and what is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genescale.platform.bundle import Bundle
from genescale.platform.errors import (
    TrackingError,
)
from genescale.platform.settings import Settings
from genescale.platform.tracking import (
    MemoryTracker,
    Run,
    Tracker,
    open_tracker,
)
from tests.platform.tracking.tracked_bundles import FOLDER, contents, registered


def test_a_registered_bundle_comes_back(tracker: Tracker, bundle: Bundle, model: str, tmp_path: Path) -> None:
    version = registered(tracker, bundle, model, aliases=["best", "newest"], tags={"corpus_version": 3})
    assert version.digest == bundle.digest
    assert version.tags == {
        "corpus_version": "3",
        "bundle_digest": bundle.digest,
        "vocabulary_digest": bundle.vocabulary.digest,
    }
    for reference in (f"models:/{model}@best", f"models:/{model}@newest", f"models:/{model}/1", version.reference):
        assert tracker.resolve(reference) == version
    assert contents(tracker.download(version, tmp_path / "to")) == contents(bundle.folder)


def test_the_same_bundle_is_registered_once(tracker: Tracker, bundle: Bundle, other_bundle: Bundle, model: str) -> None:
    first = registered(tracker, bundle, model, aliases=["newest"], description="What it is.")
    assert first.description == "What it is."
    assert registered(tracker, bundle, model, aliases=["newest", "also"]) == first
    second = registered(tracker, other_bundle, model, aliases=["newest"])
    # The alias has moved on: registering the older bundle once more does not take it back.
    assert registered(tracker, bundle, model, aliases=["newest"]) == first
    assert tracker.list_versions(model) == [first, second]
    summary = next(found for found in tracker.list_models() if found.name == model)
    assert (summary.aliases, summary.newest) == ({"newest": "2", "also": "1"}, "2")
    with pytest.raises(TrackingError, match="no model is registered"):
        tracker.list_versions(f"{model}-other")


def test_an_alias_moves_and_versions_stay(tracker: Tracker, bundle: Bundle, other_bundle: Bundle, model: str) -> None:
    first = registered(tracker, bundle, model, aliases=["best"])
    second = registered(tracker, other_bundle, model)
    assert (first.version, second.version) == ("1", "2")
    assert tracker.resolve(f"models:/{model}@best") == first
    tracker.set_alias(model, "best", second.version)
    assert tracker.resolve(f"models:/{model}@best") == second
    assert tracker.resolve(first.reference) == first
    with pytest.raises(TrackingError, match="no version 9"):
        tracker.set_alias(model, "best", "9")


def test_an_alias_that_moves_while_it_is_resolved_is_found(
    on_disk: Settings, bundle: Bundle, other_bundle: Bundle, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = open_tracker(on_disk)
    first, search = registered(tracker, bundle, model, aliases=["newest"]), tracker.client.search_model_versions

    def raced(*arguments: Any, **options: Any) -> Any:
        found = search(*arguments, **options)
        monkeypatch.undo()
        registered(tracker, other_bundle, model, aliases=["newest"])
        return found

    monkeypatch.setattr(tracker.client, "search_model_versions", raced)
    assert tracker.resolve(f"models:/{model}@newest") in (first, *tracker.list_versions(model)[1:])


def test_what_is_not_registered_is_explained(tracker: Tracker, bundle: Bundle, model: str) -> None:
    registered(tracker, bundle, model, aliases=["best"])
    with pytest.raises(TrackingError, match=r"no alias 'bst'.*@best \(version 1\); versions: 1"):
        tracker.resolve(f"models:/{model}@bst")
    with pytest.raises(TrackingError, match=r"no version 7.*versions: 1"):
        tracker.resolve(f"models:/{model}/7")
    with pytest.raises(TrackingError, match=f"no model is registered as 'x{model}'.*Did you mean '{model}'"):
        tracker.resolve(f"models:/x{model}@best")
    for wrong in ("models:/M", "M@best", "models:/M@", "models:/M/latest", "models:/a/b/1", "models:/M'--@x", ""):
        with pytest.raises(TrackingError, match="models:/NAME@ALIAS"):
            tracker.resolve(wrong)


def test_only_logged_bundles_areregistered(tracker: Tracker, bundle: Bundle, model: str, tmp_path: Path) -> None:
    with tracker.run("train") as run:
        with pytest.raises(TrackingError, match=r"no bundle in its artefact folder 'bundle'.*log_folder"):
            tracker.register(run, FOLDER, model)
        run.log_folder(bundle.folder, FOLDER)
        for folder in ("../bundle", "/etc", "bundle/../../..", "%2e%2e"):
            with pytest.raises(TrackingError, match="outside the run's artefacts"):
                tracker.register(run, folder, model)
        with pytest.raises(TrackingError, match="the tag bundle_digest says other"):
            tracker.register(run, FOLDER, model, tags={"bundle_digest": "other"})
        run.log_text("{}", "odd/bundle.json")
        with pytest.raises(TrackingError, match=r"not the bundle\.json of a bundle"):
            tracker.register(run, "odd", model)
    with pytest.raises(TrackingError, match="no model is registered"):
        tracker.resolve(f"models:/{model}/1")


def test_the_fake_shows_what_was_recorded(bundle: Bundle) -> None:
    tracker = MemoryTracker()
    with tracker.run("train", params={"a": {"b": 1}}, tags={"t": 1}) as run:
        run.log_metric_rows([(0, {"loss": 1.0}), (1, {"loss": 0.5})])
        run.log_file(bundle.folder / "config.json", "sub")
        run.log_text("x", "a.txt")
    kept = tracker.runs[run.id]
    assert (kept.params, kept.tags, kept.metrics) == ({"a.b": "1"}, {"t": "1"}, {"loss": [(0, 1.0), (1, 0.5)]})
    assert kept.files == {"sub/config.json": (bundle.folder / "config.json").read_bytes(), "a.txt": b"x"}


def test_both_trackers_fit_the_protocol(on_disk: Settings) -> None:
    def use(tracker: Tracker, check: Callable[[Run], object]) -> object:
        with tracker.run("r") as run:
            return check(run)

    assert use(MemoryTracker(), lambda run: run.id)
    assert use(open_tracker(on_disk), lambda run: run.id)
