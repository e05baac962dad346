"""Progress of many cells as one line on standard error, without a library."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from genescale.platform.progress import clock

WIDTH, LEAST_S = 30, 0.1
# In a log file a line now and then is enough.
LEAST_S_IN_FILES = 10.0


class ProgressBar:
    """Called with the cells that are done and all cells; moves on a terminal, and prints now and then elsewhere."""

    def __init__(self, label: str = "cells", *, file: TextIO | None = None) -> None:
        self._label, self._file = label, file or sys.stderr
        self._began_s = time.monotonic()
        self._shown_s = -LEAST_S_IN_FILES

    def __call__(self, done: int, total: int) -> None:
        """Show it, unless it was shown just now."""
        now_s, moves = time.monotonic(), self._file.isatty()
        ended = done >= total
        if not ended and now_s - self._shown_s < (LEAST_S if moves else LEAST_S_IN_FILES):
            return
        self._shown_s = now_s
        filled = WIDTH * done // max(1, total)
        bar = "#" * filled + "-" * (WIDTH - filled)
        line = f"{self._label} [{bar}] {done:,}/{total:,} {self._times(done, total, now_s - self._began_s)}"
        self._file.write(f"\r{line}\x1b[K" + ("\n" if ended else "") if moves else f"{line}\n")
        self._file.flush()

    @staticmethod
    def _times(done: int, total: int, took_s: float) -> str:
        if not 0 < done < total:
            return clock(took_s)
        return f"{clock(took_s)}, {clock(took_s * (total - done) / done)} left"
