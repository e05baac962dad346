"""A real service that is stopped, and whose callers leave: nothing begun is lost, nothing abandoned is worked on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from genescale.platform.settings import Settings
from genescale.serving.access.keys import ApiKey, digest_of, new_key, write_keys
from genescale.serving.config import ServingConfig

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle
    from genescale.serving.app import RunningService

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]
DrawCell = Callable[[int, int], dict[str, float]]
N_RUNNING = 3


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


@pytest.fixture
def key(keys_file: Path) -> str:
    key = new_key()
    write_keys(keys_file, [ApiKey(id="web", sha256=digest_of(key.encode()).hex(), scopes=("perturb",))])
    return key


@pytest.fixture
def running(
    bundle: Bundle, key: str, keys_file: Path, settings_for: Callable[[Path], Settings], tmp_path: Path
) -> Iterator[RunningService]:
    from genescale.serving.app import service

    # A small budget makes one request many passes.
    config = ServingConfig(
        port=0, keys_file=str(keys_file), max_ongoing=4, max_queued=4, tokens_per_batch=100, tracking_interval_s=0
    )
    with service(bundle, config, settings_for(tmp_path / "service")) as up:
        yield up


@pytest.fixture
def ask(running: RunningService, key: str, draw_cell: DrawCell) -> Callable[..., httpx.Response]:
    """Ask for the shifts of cells after some thousand edits: a request of seconds."""
    cells = [{"counts": draw_cell(seed, 90)} for seed in range(16)]
    edits = [{"kind": "delete", "genes": [f"GENE{i}"]} for i in range(100)]

    def send(*, n_cells: int = 16, timeout_s: float = 90.0) -> httpx.Response:
        asked = {"cells": cells[:n_cells], "edits": edits}
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{running.url}/v1/perturbations", json=asked, headers=headers, timeout=timeout_s)

    return send


def took_s(call: Callable[[], Any]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def test_a_stop_refuses_what_is_new_and_finishes_what_was_begun(
    running: RunningService, ask: Callable[..., httpx.Response]
) -> None:
    assert ask(n_cells=1).status_code == 200
    with ThreadPoolExecutor(N_RUNNING + 1) as threads:
        begun = [threads.submit(ask) for _ in range(N_RUNNING)]
        time.sleep(1.0)
        assert not any(one.done() for one in begun), "the requests are too small for this test"
        stopping = threads.submit(running.stop)
        began, ready = time.monotonic(), httpx.get(f"{running.url}/readyz")
        while ready.status_code == 200 and time.monotonic() < began + 3:
            ready = httpx.get(f"{running.url}/readyz")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "draining")
        late = ask(n_cells=1)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert not all(one.done() for one in begun)
        assert [one.result().status_code for one in begun] == [200] * N_RUNNING
        stopping.result()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{running.url}/healthz")


def test_requests_whose_callers_left_are_not_worked_on(
    running: RunningService, ask: Callable[..., httpx.Response]
) -> None:
    ask(n_cells=1)
    alone_s = took_s(ask)

    def leave() -> None:
        with pytest.raises(httpx.TimeoutException):
            ask(timeout_s=alone_s / 4)

    leavers = [threading.Thread(target=leave) for _ in range(4)]
    for one in leavers:
        one.start()
    for one in leavers:
        one.join()
    # Four that went on to their end would make this one wait about four times as long.
    assert took_s(ask) < 2 * alone_s
