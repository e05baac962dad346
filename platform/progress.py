"""Progress of long steps: one line with a bar, the elapsed time and counts.

On a terminal the line moves (drawn by `rich`); in a log file it is printed when the step starts, at most every ten
seconds while it runs, and when it ends. Long functions take a `Progress` and know nothing of how it is shown.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

QUIET_INTERVAL_S = 10.0


class Progress(Protocol):
    """What a long function reports: how much there is to do, and what was done."""

    def start(self, total: int | None, unit: str) -> None:
        """Say how many `unit`s there are; None when nobody knows yet. May be called again for a new phase."""

    def advance(self, done: int = 1, note: str = "") -> None:
        """Say that `done` more units are finished; `note` is a short remark such as the current loss."""


class Silent:
    """A Progress that shows nothing."""

    def start(self, total: int | None, unit: str) -> None:
        """Ignore the total."""

    def advance(self, done: int = 1, note: str = "") -> None:
        """Ignore the step."""


SILENT: Progress = Silent()


def clock(seconds: float) -> str:
    """Elapsed time as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Line:
    """State shared by both ways of drawing a stage."""

    def __init__(self, label: str, console: Console) -> None:
        self.label, self.console = label, console
        self.total: int | None = None
        self.unit, self.note = "", ""
        self.done = 0
        self.began = time.monotonic()

    def start(self, total: int | None, unit: str) -> None:
        self.total, self.unit, self.done, self.note = total, unit, 0, ""
        self.draw()

    def advance(self, done: int = 1, note: str = "") -> None:
        self.done += done
        self.note = note or self.note
        self.draw()

    def draw(self) -> None:
        raise NotImplementedError

    def count(self) -> str:
        if not self.unit:
            return ""
        return f"{self.done:,}/{self.total:,} {self.unit}" if self.total is not None else f"{self.done:,} {self.unit}"

    def summary(self, outcome: str) -> str:
        parts = [clock(time.monotonic() - self.began), self.count(), self.note]
        return f"{outcome} {self.label:<28} {'  '.join(part for part in parts if part)}"


class _Printed(_Line):
    """For logs and pipes: a plain line now and then."""

    last = 0.0

    def draw(self) -> None:
        if time.monotonic() - self.last >= QUIET_INTERVAL_S:
            self.last = time.monotonic()
            self.console.print(self.summary("...  "), highlight=False, markup=False, soft_wrap=True)


class _Drawn(_Line):
    """For terminals: a moving bar, drawn by rich."""

    def __init__(self, label: str, console: Console) -> None:
        super().__init__(label, console)
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("     {task.description:<28}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.bar = RichProgress(*columns, console=console, transient=True)
        self.task = self.bar.add_task(label, total=None, text="")
        self.bar.start()

    def draw(self) -> None:
        text = "  ".join(part for part in (self.count(), self.note) if part)
        self.bar.update(self.task, completed=self.done, total=self.total, text=text)


@contextlib.contextmanager
def stage(label: str, *, console: Console | None = None) -> Iterator[Progress]:
    """Show one step as a line; it ends with `ok` or `FAILED`, the elapsed time and the counts."""
    from rich.console import Console

    console = console or Console(stderr=True)
    line: _Line = _Drawn(label, console) if console.is_terminal else _Printed(label, console)
    outcome = "FAILED"
    try:
        line.draw()
        yield line
        outcome = "ok    "
    finally:
        if isinstance(line, _Drawn):
            line.bar.stop()
        console.print(line.summary(outcome), highlight=False, markup=False, soft_wrap=True)
