"""A job's run in the experiment tracker, which never holds the job up: a thread of its own talks to the tracker.

A tracker that is away, or that hangs, costs what was to be recorded there (counted, and logged once) and nothing else.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from genescale.platform.log import get_logger
from genescale.platform.runs import MetricRow, Run

# A screen says something every few seconds; a tracker that is behind by so much is as good as away.
MOST_WAITING = 1_000
LAST_WAIT_S = 5.0
Call = Callable[[Run], None]
log = get_logger(__name__)


class JobRun:
    """A `platform.runs.Run` whose calls return at once; `open_run` makes the real one, on the thread."""

    def __init__(self, open_run: Callable[[], AbstractContextManager[Run]]) -> None:
        self.id = ""
        self.dropped = 0
        self._calls: queue.Queue[Call | None] = queue.Queue(MOST_WAITING)
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._keep, args=(open_run,), name="job-run", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Record measurements of one step."""
        self.log_metric_rows([(step, dict(metrics))])

    def log_metric_rows(self, rows: Sequence[MetricRow], *, time_ms: int | None = None) -> None:
        """Record measurements of many steps."""
        self._call(lambda run: run.log_metric_rows(rows, time_ms=time_ms))

    def newest_steps(self) -> dict[str, int]:
        """Nothing: who asks the tracker waits for it."""
        return {}

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings."""
        self._call(lambda run: run.log_params(params))

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a file, as it is now, among the run's artefacts."""
        self.log_text(path.read_text(encoding="utf-8"), f"{folder}/{path.name}".lstrip("/"))

    def log_folder(self, path: Path, folder: str = "") -> None:
        """Keep a copy of every text in a folder among the run's artefacts."""
        for one in sorted(path.rglob("*")):
            if one.is_file():
                self.log_file(one, f"{folder}/{one.parent.relative_to(path).as_posix()}".strip("/."))

    def log_text(self, text: str, name: str) -> None:
        """Keep a text among the run's artefacts."""
        self._call(lambda run: run.log_text(text, name))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set labels."""
        self._call(lambda run: run.set_tags(tags))

    def close(self, error: BaseException | None = None) -> None:
        """End the run, as failed or killed after an `error`; waits shortly for what was not sent yet."""
        self._ended = error
        while not self._put(None):
            # Without the word that it ended, the thread would wait for ever and the run stay open.
            with contextlib.suppress(queue.Empty):
                self._calls.get_nowait()
                self.dropped += 1
        self._thread.join(LAST_WAIT_S)
        if self.dropped or self._thread.is_alive():
            log.warning("the tracker did not take %d records of this job", self.dropped + self._calls.qsize())

    def _call(self, call: Call) -> None:
        if not self._put(call):
            self.dropped += 1

    def _put(self, call: Call | None) -> bool:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            return False
        return True

    def _keep(self, open_run: Callable[[], AbstractContextManager[Run]]) -> None:
        try:
            with open_run() as run:
                self.id = run.id
                while (call := self._calls.get()) is not None:
                    self._made(call, run)
                if self._ended is not None:
                    raise self._ended
        # Whatever the tracker raises, the job goes on; its own end is told to the tracker by raising it here.
        except BaseException as error:
            if error is not self._ended:
                log.warning("the tracker is away; this job is not tracked", exc_info=error)
                self._throw_away()

    def _made(self, call: Call, run: Run) -> None:
        try:
            call(run)
        # One record that the tracker refuses must not cost those behind it.
        except Exception as error:
            if not self.dropped:
                log.warning("the tracker did not take a record of this job", exc_info=error)
            self.dropped += 1

    def _throw_away(self) -> None:
        while self._calls.get() is not None:
            self.dropped += 1


class OneRun:
    """A Tracker for code that opens a run of its own: it gets the job's."""

    def __init__(self, run: JobRun) -> None:
        self._run = run

    @contextlib.contextmanager
    def run(
        self,
        name: str,
        *,
        params: Mapping[str, Any] = {},
        tags: Mapping[str, Any] = {},
        parent: str | None = None,
        resume: str = "",
    ) -> Iterator[JobRun]:
        """The job's run; it stays open behind the block."""
        self._run.log_params(params)
        self._run.set_tags(tags)
        yield self._run
