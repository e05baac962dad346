"""Measurements on their way from the first worker to the driver, which alone writes them to the tracker.

Workers may die and start again, and MLflow wants one writer for a run: so rows go to a small Ray actor, and a thread of
the driver takes them from there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from genescale.training.loop import Row

POLL_INTERVAL_S = 0.5


class Board:
    """Rows that wait for the driver; runs as a Ray actor."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def add(self, rows: list[Row]) -> None:
        """Put rows down."""
        self._rows += rows

    def take(self) -> list[Row]:
        """Everything put down since the last call."""
        rows, self._rows = self._rows, []
        return rows


@contextlib.contextmanager
def following(on_rows: Callable[[list[Row]], None]) -> Iterator[Any]:
    """A board whose rows are handed to `on_rows` in a thread; at the end of the block all have been.

    An error of `on_rows` is raised at the end of the block: training itself does not stop for a tracker that is away.
    """
    import ray

    board = ray.remote(num_cpus=0)(Board).remote()
    finished = threading.Event()
    errors: list[BaseException] = []

    def follow() -> None:
        try:
            while not finished.wait(POLL_INTERVAL_S):
                on_rows(ray.get(board.take.remote()))
            on_rows(ray.get(board.take.remote()))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=follow, name="metrics", daemon=True)
    thread.start()
    try:
        yield board
    finally:
        finished.set()
        thread.join()
        ray.kill(board)
    if errors:
        raise errors[0]
