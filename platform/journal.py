"""A journal of measurements between a run and its tracker, so that a training never waits for the tracker.

Measurements go into a local file at once and are sent by a thread, in order and with the time they were made. While the
tracker is away they stay, and the thread tries again with growing pauses. What could not be sent at the end stays in
the file, and the next journal of the same file sends it first. The journal is bounded: beyond its limit the oldest
measurements go, and are counted.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from genescale.platform.disk import disk_errors, whole_file
from genescale.platform.errors import SettingsError, TrackingError
from genescale.platform.log import get_logger
from genescale.platform.patience import Patience
from genescale.platform.runs import MetricRow, Run

PAUSES = Patience(total_s=10**9, first_pause_s=0.5, longest_pause_s=30.0)
LIMIT_ROWS = 200_000
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Unsent:
    """What a journal could not send."""

    rows: int
    path: Path
    """The file that still holds them."""
    dropped: int
    """Rows that were given up because the journal was full."""


@dataclass
class _Batch:
    """Rows that came together."""

    time_ms: int
    rows: list[Any]


class Journal:
    """Takes measurements for `run` and sends them in the background; usable from several threads.

    path: the local file. limit_rows: rows it holds at most. known: newest step of each measurement that the tracker
    has; what is left over in the file from before is sent only beyond that. Only TrackingErrors are waited for.
    """

    def __init__(
        self,
        run: Run,
        path: Path,
        *,
        limit_rows: int = LIMIT_ROWS,
        known: Mapping[str, int] = MappingProxyType({}),
        pauses: Patience = PAUSES,
    ) -> None:
        if limit_rows < 1:
            raise SettingsError(f"limit_rows is {limit_rows}.", fix="Use 1 or more.")
        self._run, self._path, self._limit, self._pauses = run, path, limit_rows, pauses
        self._changed = threading.Condition()
        self._batches = _left_over(path, known)
        self._closing = threading.Event()
        self._dropped, self._closed = 0, False
        with disk_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            self._rewrite()
        self._thread = threading.Thread(target=self._send_all, name="journal", daemon=True)
        self._thread.start()

    def log_metric_rows(self, rows: Sequence[MetricRow]) -> None:
        """Take rows; returns at once, whatever the tracker does."""
        batch = _Batch(int(time.time() * 1000), [[step, dict(values)] for step, values in rows])
        with self._changed:
            self._batches.append(batch)
            self._file.write(_line(batch))
            self._file.flush()
            self._lines += 1
            self._drop_beyond_the_limit()
            self._changed.notify()

    def close(self, *, timeout_s: float) -> Unsent | None:
        """Wait up to `timeout_s` for everything to be sent; what was not, or None. The file is removed when empty."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._batches and time.monotonic() < deadline:
                self._changed.wait(min(0.2, max(0.0, deadline - time.monotonic())))
            self._closing.set()
            self._changed.notify()
        self._thread.join(timeout=max(0.1, deadline - time.monotonic()))
        with self._changed:
            self._rewrite()
            self._file.close()
            self._closed = True
            rows = sum(len(batch.rows) for batch in self._batches)
            if not rows:
                self._path.unlink(missing_ok=True)
            return Unsent(rows=rows, path=self._path, dropped=self._dropped) if rows or self._dropped else None

    def _send_all(self) -> None:
        pauses = self._pauses.pauses_s()
        while True:
            with self._changed:
                while not self._batches and not self._closing.is_set():
                    self._changed.wait()
                if self._closing.is_set():
                    return
                batch = self._batches[0]
            try:
                self._run.log_metric_rows([(step, values) for step, values in batch.rows], time_ms=batch.time_ms)
            except TrackingError as error:
                pause_s = next(pauses)
                log.warning("measurements wait in %s and are sent again in %.0f s: %s", self._path, pause_s, error)
                self._closing.wait(pause_s)
                continue
            pauses = self._pauses.pauses_s()
            self._sent(batch)

    def _sent(self, batch: _Batch) -> None:
        with self._changed:
            if self._closed:  # its answer came too late: the file says that it was not sent
                return
            # Unless it was dropped while it was on its way.
            if self._batches and self._batches[0] is batch:
                self._batches.popleft()
            if not self._batches:
                self._rewrite()
            self._changed.notify()

    def _drop_beyond_the_limit(self) -> None:
        held = sum(len(batch.rows) for batch in self._batches)
        while held > self._limit and len(self._batches) > 1:
            gone = len(self._batches.popleft().rows)
            held, self._dropped = held - gone, self._dropped + gone
        # The file holds lines that were sent or dropped: it is written anew before it grows to twice what is needed.
        if self._lines > 2 * len(self._batches) + 1_000:
            self._rewrite()

    def _rewrite(self) -> None:
        if self._batches:
            # Whole or not at all: a kill must not take what waits.
            with whole_file(self._path) as file:
                file.writelines(_line(batch).encode() for batch in self._batches)
            self._file.close()
            self._file = self._path.open("a", encoding="utf-8")
        else:
            self._file.truncate(0)
        self._lines = len(self._batches)


def _line(batch: _Batch) -> str:
    return json.dumps([batch.time_ms, batch.rows]) + "\n"


def _left_over(path: Path, known: Mapping[str, int]) -> deque[_Batch]:
    """What an earlier journal of this file did not send; a line that was cut off by a kill is passed over."""
    found: deque[_Batch] = deque()
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            time_ms, rows = json.loads(line)
        except ValueError:
            log.warning("a line of %s was cut off and is not sent", path)
            continue
        new = [[step, {k: v for k, v in values.items() if step > known.get(k, -1)}] for step, values in rows]
        if rows_left := [row for row in new if row[1]]:
            found.append(_Batch(time_ms, rows_left))
    return found
