"""Measurements and remarks on their way from the first worker to the driver, which alone writes them to the tracker.

Workers may die and start again, and MLflow wants one writer for a run: so rows go to a small Ray actor on the driver's
own node, and a thread of the driver takes them from there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from genescale.training.meter import Row

POLL_INTERVAL_S = 0.5


class Board:
    """Rows and remarks that wait for the driver; runs as a Ray actor."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._remarks: list[str] = []

    def add(self, rows: list[Row]) -> None:
        """Put rows down."""
        self._rows += rows

    def say(self, remark: str) -> None:
        """Put down a sentence for the person who started the run."""
        self._remarks.append(remark)

    def take(self) -> tuple[list[Row], list[str]]:
        """Everything put down since the last call."""
        taken = self._rows, self._remarks
        self._rows, self._remarks = [], []
        return taken


@contextlib.contextmanager
def following(
    on_rows: Callable[[list[Row]], None], on_remark: Callable[[str], None] = lambda remark: None
) -> Iterator[Any]:
    """A board whose rows and remarks are handed over in a thread; at the end of the block all have been.

    An error of `on_rows` is raised at the end of the block: training itself does not stop for it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Where the driver is: a node that is lost must not take the board with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    finished = threading.Event()
    errors: list[BaseException] = []

    def hand_over() -> None:
        rows, remarks = ray.get(board.take.remote())
        for remark in remarks:
            on_remark(remark)
        on_rows(rows)

    def follow() -> None:
        try:
            while not finished.wait(POLL_INTERVAL_S):
                hand_over()
            hand_over()
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
