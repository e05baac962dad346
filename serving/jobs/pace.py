"""How far a running job is, written by the thread that works and read by others; and the word that it shall end."""

from __future__ import annotations

import threading

from genescale.serving.jobs import records


class JobStoppedError(Exception):
    """The job was asked to end; raised in the thread that works, where it next reports progress."""


class Pace:
    """A Progress (`platform.progress`) that remembers instead of showing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = records.Progress()
        self._stop = threading.Event()

    def start(self, total: int | None, unit: str) -> None:
        """A new phase of so many units begins."""
        self.check()
        with self._lock:
            self._now = records.Progress(done=0, total=total, unit=unit)

    def advance(self, done: int = 1, note: str = "") -> None:
        """So many more units are done."""
        with self._lock:
            now = self._now
            self._now = records.Progress(done=now.done + done, total=now.total, unit=now.unit, note=note or now.note)
        self.check()

    def check(self) -> None:
        """Raise JobStoppedError when the job shall end."""
        if self._stop.is_set():
            raise JobStoppedError

    def stop(self) -> None:
        """Let the job end where it next reports progress."""
        self._stop.set()

    @property
    def now(self) -> records.Progress:
        """How far it is."""
        with self._lock:
            return self._now
