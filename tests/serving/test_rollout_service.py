"""A real service with two models: rolled out, tried on a share, taken back and broken, under load and through kills."""

from __future__ import annotations

import threading
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
from tests.serving.test_models_http import vocabulary

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle
    from genescale.serving.app import RunningService

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(600)]
CELLS = {"cells": [{"counts": {"GENE1": 3, "GENE40": 4}}]}
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


class Load:
    """Callers who ask without pause and without a second try, and what they were answered."""

    def __init__(self, url: str) -> None:
        self.url, self.seen, self._stop = url, [], threading.Event()
        self.seen: list[tuple[float, int, str]] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(N_CALLERS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while not self._stop.is_set():
                try:
                    response = http.post("/v1/embeddings", json=CELLS)
                except httpx.HTTPError as error:
                    self.seen.append((time.monotonic(), 0, type(error).__name__))
                    continue
                found = response.json()
                said = found["provenance"]["model"]["version"] if response.is_success else str(found)
                self.seen.append((time.monotonic(), response.status_code, said))

    def wait_for(self, n: int) -> None:
        until = len(self.seen) + n
        while len(self.seen) < until:
            time.sleep(0.05)


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
    with Load(url) as load:
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
    assert Counter(status for _, status, _ in load.seen) == {200: len(load.seen)}
    # Requests that were begun before a switch end a moment after it.
    after = [(at, said) for at, _, said in load.seen]
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
    with Load(url) as load:
        for target, said in (("encoder@nowhere", "nowhere"), ("encoder/99", "99"), ("encoder@broken", "digest")):
            with pytest.raises(ServiceError, match=said) as caught:
                roll(url, target)
            assert "nothing changed" in str(caught.value)
            assert str(root) not in str(caught.value)
        load.wait_for(10)
    assert {status for _, status, _ in load.seen} == {200}
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
