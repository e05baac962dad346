"""A deployment as a run of the tracker, written by a thread of its own that nobody waits for.

While the tracker is away or hangs, measurements wait here, up to a limit; beyond it the oldest go, and are counted. The
run is opened by the same thread, so a service starts, answers and stops in the same time with a dead tracker.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

from prometheus_client import CollectorRegistry, Gauge

from genescale.platform.log import get_logger
from genescale.platform.patience import Patience
from genescale.platform.runs import Run

PAUSES = Patience(total_s=10**9, first_pause_s=1.0, longest_pause_s=60.0)
# A day of minutes.
MOST_WAITING = 1_440
# From then on a tracker that says nothing is as good as away.
SILENT_S = 30.0
log = get_logger(__name__)


class DeploymentRun:
    """Takes measurements and labels at once and sends them when the tracker answers.

    open_run: makes or reopens the run; it may fail or hang, and is tried again.
    """

    def __init__(
        self,
        open_run: Callable[[], AbstractContextManager[Run]],
        *,
        most_waiting: int = MOST_WAITING,
        pauses: Patience = PAUSES,
    ) -> None:
        self._open_run, self._most_waiting, self._pauses = open_run, most_waiting, pauses
        self._changed = threading.Condition()
        self._rows: deque[tuple[int, int, dict[str, float]]] = deque()
        self._tags: dict[str, str] = {}
        self._run: Run | None = None
        self._reachable, self._dropped = True, 0
        self._asked_s: float | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="genescale-tracking", daemon=True)
        self._thread.start()

    @property
    def id(self) -> str:
        """The tracker's name for the run; empty until it was opened."""
        return self._run.id if self._run is not None else ""

    @property
    def waiting(self) -> int:
        """Rows that the tracker does not have yet."""
        return len(self._rows)

    @property
    def dropped(self) -> int:
        """Rows that were given up."""
        return self._dropped

    @property
    def reachable(self) -> bool:
        """Whether the tracker took what it was last given, and is not silent about something for long."""
        asked_s = self._asked_s
        return self._reachable and (asked_s is None or time.monotonic() - asked_s < SILENT_S)

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Take measurements of one step; returns at once."""
        with self._changed:
            self._rows.append((int(time.time() * 1000), step, dict(metrics)))
            while len(self._rows) > self._most_waiting:
                self._rows.popleft()
                self._dropped += 1
            self._changed.notify()

    def label(self, tags: Mapping[str, str]) -> None:
        """Take labels, which replace earlier ones of the same name; returns at once."""
        with self._changed:
            self._tags.update(tags)
            self._changed.notify()

    def end(self, *, timeout_s: float) -> int:
        """Send what waits and end the run, for at most `timeout_s`; returns how many rows were given up in its life."""
        with self._changed:
            self._ending.set()
            self._changed.notify()
        self._thread.join(timeout=timeout_s)
        with self._changed:
            lost = self._dropped + len(self._rows)
        if lost:
            log.warning("%d intervals of measurements did not reach the tracker", lost)
        if self._thread.is_alive():
            log.warning("the tracker did not answer within %g s: the deployment's run stays open there", timeout_s)
        return lost

    def _send_all(self) -> None:
        with ExitStack() as stack:
            pauses = self._pauses.pauses_s()
            while True:
                try:
                    if self._run is None:
                        with self._asking():
                            self._run = stack.enter_context(self._open_run())
                    while self._send_next(self._run):
                        pauses = self._pauses.pauses_s()
                    break
                # Whatever is wrong with a tracker, or with what stands before it, is no reason to stop watching.
                except Exception as error:  # noqa: BLE001
                    self._away(error, pause_s := next(pauses))
                    if self._ending.is_set():
                        break
                    # Woken by the end it tries once more: the tracker may be back.
                    self._ending.wait(pause_s)
            self._close(stack)

    def _send_next(self, run: Run) -> bool:
        """Wait for something to send, and send it; False when there is nothing left and the end was asked for."""
        with self._changed:
            while not self._rows and not self._tags and not self._ending.is_set():
                self._changed.wait()
            row, tags = self._rows[0] if self._rows else None, dict(self._tags)
        if row is None and not tags:
            return False
        with self._asking():
            if tags:
                run.set_tags(tags)
            if row is not None:
                time_ms, step, metrics = row
                run.log_metric_rows([(step, metrics)], time_ms=time_ms)
        with self._changed:
            self._reachable = True
            self._tags = {name: value for name, value in self._tags.items() if tags.get(name) != value}
            # Unless it was dropped while it was on its way.
            if self._rows and self._rows[0] is row:
                self._rows.popleft()
        return True

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """The tracker is asked inside the block."""
        self._asked_s = time.monotonic()
        try:
            yield
        finally:
            self._asked_s = None

    def _away(self, error: Exception, pause_s: float) -> None:
        if self._reachable:
            # Its class and not its text, which may name a host, a path or a bucket.
            log.warning("the tracker is away (%s); tried again in %g s", type(error).__name__, pause_s)
        self._reachable = False

    def _close(self, stack: ExitStack) -> None:
        try:
            stack.close()
        except Exception as error:  # noqa: BLE001
            log.warning("the deployment's run could not be ended in the tracker (%s)", type(error).__name__)


def watch_tracking(registry: CollectorRegistry, run: DeploymentRun | None) -> None:
    """Let a registry say how the tracker does; None is a deployment that is not recorded."""

    def gauge(name: str, about: str, read: Callable[[], float]) -> None:
        Gauge(f"genescale_tracking_{name}", about, registry=registry).set_function(read)

    gauge("enabled", "1 when the deployment is recorded in the tracker.", lambda: run is not None)
    gauge("up", "1 when the tracker took what it was last given.", lambda: run is None or run.reachable)
    gauge("waiting", "Intervals that the tracker does not have yet.", lambda: run.waiting if run else 0)
    gauge("dropped", "Intervals that were given up.", lambda: run.dropped if run else 0)
