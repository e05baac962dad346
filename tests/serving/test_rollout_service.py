"""A real service with two models: rolled out, tried on a share, taken back and broken, under load and through kills."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from genescale.client import GenescaleClient
from genescale.platform.errors import ServiceError
from genescale.platform.settings import Settings
from genescale.serving.config import ServingConfig
from genescale.serving.models.rollout_command import rollout
from tests.serving.conftest import write_tiny_bundle
from tests.serving.load import Load
from tests.serving.test_models_http import vocabulary

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle
    from genescale.serving.app import RunningService

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(600)]
CELL = {"GENE1": 3, "GENE40": 4}
CELLS = {"cells": [{"counts": CELL}]}
N_CALLERS = 3
Register = Callable[..., None]


@pytest.fixture(scope="module")
def settings(settings_for: Callable[[Path], Settings], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_for(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "1": write_tiny_bundle(folder / "one", vocabulary(120), seed=1),
        "2": write_tiny_bundle(folder / "two", vocabulary(140), seed=2),
        "small": write_tiny_bundle(folder / "small", vocabulary(60), seed=3),
    }


@pytest.fixture(scope="module")
def register(settings: Settings) -> Register:
    from genescale.platform.tracking import open_tracker

    tracker = open_tracker(settings)

    def add(bundle: Bundle, *aliases: str) -> None:
        with tracker.run("train") as run:
            run.log_folder(bundle.folder, "bundle")
            tracker.register(run, "bundle", "encoder", aliases=aliases)

    return add


@pytest.fixture(scope="module")
def running(bundles: dict[str, Bundle], register: Register, settings: Settings) -> Iterator[RunningService]:
    from genescale.serving.app import service
    from genescale.serving.replicas import model_bytes

    register(bundles["1"], "production")
    models = {"encoder": "models:/encoder@production", "small": str(bundles["small"].folder)}
    sizes = {name: model_bytes(bundle) for name, bundle in bundles.items()}
    # Two versions of the encoder have room beside each other, but not with the other model as well.
    room = sizes["1"] + sizes["2"] + sizes["small"] // 2
    with service(models, ServingConfig(port=0, num_cpus=0.5, max_model_bytes=room), settings) as up:
        register(bundles["2"], "production")
        yield up


def roll(url: str, *arguments: str) -> None:
    assert rollout([*arguments, "--url", url]) == 0


def encoder(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/v1/models/encoder", timeout=30).json()
    return found


def loaded_on(url: str) -> list[int]:
    models = httpx.get(f"{url}/v1/models", timeout=30).json()["models"]
    return [one["loaded_on"] for one in models]


def test_versions_change_under_load_without_a_failed_request(running: RunningService) -> None:
    url = running.url
    assert (encoder(url)["version"], encoder(url)["alias"], loaded_on(url)) == ("1", "production", [1, 1])
    with Load(url=url, cell=CELL, callers=N_CALLERS) as load:
        load.wait_for(20)
        roll(url, "encoder@production")
        promoted = time.monotonic()
        load.wait_for(20)
        assert (encoder(url)["version"], encoder(url)["before"]) == ("2", ["1"])
        # The other model made room for two versions at a time; now that the old one has left, it comes when asked.
        assert loaded_on(url) == [1, 0]
        assert httpx.post(f"{url}/v1/embeddings?model=small", json=CELLS, timeout=30).status_code == 200
        assert loaded_on(url) == [1, 1]
        roll(url, "encoder", "--back")
        back = time.monotonic()
        load.wait_for(20)
        roll(url, "encoder/2", "--canary", "0.5")
        tried = time.monotonic()
        load.wait_for(60)
        roll(url, "encoder", "--back")
        load.wait_for(20)
    assert load.failures == []
    # Requests that were begun before a switch end a moment after it.
    after = load.versions
    assert {said for at, said in after if promoted + 1 < at < promoted + 1.5} <= {"2"}
    assert {said for at, said in after if back + 1 < at < back + 1.5} <= {"1"}
    shares = Counter(said for at, said in after if tried < at < tried + 3)
    assert 0.2 < shares["2"] / sum(shares.values()) < 0.8
    assert encoder(url)["candidate"] is None


def test_a_version_that_cannot_be_had_changes_nothing_and_says_why(
    running: RunningService, register: Register, settings: Settings, tmp_path: Path
) -> None:
    root = Path(settings.tracking.artifact_root)
    there = set(root.rglob("model.safetensors"))
    register(write_tiny_bundle(tmp_path / "broken", vocabulary(120), seed=9), "broken")
    (weights,) = set(root.rglob("model.safetensors")) - there
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    url, before = running.url, encoder(running.url)
    with Load(url=url, cell=CELL, callers=N_CALLERS) as load:
        for target, said in (("encoder@nowhere", "nowhere"), ("encoder/99", "99"), ("encoder@broken", "digest")):
            with pytest.raises(ServiceError, match=said) as caught:
                roll(url, target)
            assert "nothing changed" in str(caught.value)
            assert str(root) not in str(caught.value)
        load.wait_for(10)
    assert load.failures == []
    assert {**encoder(url), "rollout": None} == {**before, "rollout": None}


@pytest.mark.parametrize("what", ["ModelReplica", "Ingress", "SERVE_CONTROLLER"])
def test_what_was_rolled_out_survives_who_dies(running: RunningService, what: str) -> None:
    import ray
    from ray.util import list_named_actors

    url = running.url
    if encoder(url)["version"] != "2":
        roll(url, "encoder@production")
    names = [one["name"] for one in list_named_actors(all_namespaces=True) if one["namespace"] == "serve"]
    (killed,) = (name for name in names if what in name)
    ray.kill(ray.get_actor(killed, namespace="serve"), no_restart=False)
    versions = set()
    with GenescaleClient(url, attempts=30, timeout_s=120) as client:
        began = time.monotonic()
        while time.monotonic() < began + 15:
            versions.add(client.embeddings([{"GENE1": 3}]).model.version)
        assert versions == {"2"}
        assert client.info()["models"]["encoder"]["version"] == "2"
    with GenescaleClient(url, model="small", attempts=30, timeout_s=120) as other:
        assert other.embeddings([{"GENE1": 3}]).model.name == "small"
