"""A process of the service is killed while it is asked: the client's own retries outlast what Ray Serve needs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from genescale.client import GenescaleClient
from genescale.platform.settings import Settings
from genescale.serving.config import ServingConfig

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle
    from genescale.serving.app import RunningService

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
DrawCell = Callable[[int, int], dict[str, float]]
# By the titles that Ray gives its processes.
TITLES = {
    "model": "ServeReplica:genescale:ModelReplica",
    "http": "ServeReplica:genescale:Ingress",
    "proxy": "ProxyActor",
    "controller": "ServeController",
}


@pytest.fixture(scope="module")
def running(
    ray_local: None, bundle: Bundle, settings_for: Callable[[Path], Settings], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    from genescale.serving.app import service

    config = ServingConfig(port=0, num_cpus=0.5)
    with service(bundle, config, settings_for(tmp_path_factory.mktemp("kills"))) as up:
        yield up


def process(title: str) -> int:
    """The one process with this title below this one: another Ray on the machine is left alone."""
    parent_of = {int(one.name): parent(one) for one in Path("/proc").iterdir() if one.name.isdigit()}

    def ours(pid: int) -> bool:
        while pid := parent_of.get(pid, 0):
            if pid == os.getpid():
                return True
        return False

    (found,) = [pid for pid in parent_of if title in title_of(pid) and ours(pid)]
    return found


def parent(folder: Path) -> int:
    try:
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize("victim", list(TITLES))
def test_no_question_of_a_patient_client_fails(running: RunningService, draw_cell: DrawCell, victim: str) -> None:
    cells = [draw_cell(seed, 30) for seed in range(4)]
    with GenescaleClient(running.url) as client:
        right = client.embeddings(cells).embeddings
        before, killed, answers = process(TITLES[victim]), threading.Event(), 0
        killer = threading.Timer(0.5, lambda: (os.kill(before, signal.SIGKILL), killed.set()))
        killer.start()
        after = 0
        # Until the one that was killed has been replaced, and answers came after that.
        while after < 5:
            assert np.array_equal(client.embeddings(cells).embeddings, right)
            answers += 1
            after += killed.is_set() and replaced(before, TITLES[victim])
        killer.join()
    assert answers > after


def replaced(before: int, title: str) -> bool:
    try:
        return process(title) != before
    except ValueError:
        return False
