"""What is noted about one request while it is answered, wherever in the process that happens.

The gate opens a note for each request; whoever learns something (its size, its times, which model answered, why it was
refused) writes it down in one line, and outside of a request such a line does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field

PHASES = ("body", "parse", "queue", "forward", "search")
STAGES = ("arriving", "reading", "waiting", "working", "writing")


@dataclass(kw_only=True, eq=False)
class Noted:
    """What is known of a request so far."""

    stage: str = STAGES[0]
    """Where it is: its body arrives, is read, waits for a replica, is worked on there, or its answer is written."""
    model: str = ""
    """Name of the model that answered, empty while none did."""
    version: str = ""
    problem: str = ""
    """Stable code of the error that it ended in."""
    tokens: int = 0
    """Tokens through the model that it was let in for."""
    cells: int = 0
    phases_s: dict[str, float] = field(default_factory=dict)
    """Seconds of the PHASES that it went through."""
    bytes_in: int = 0
    bytes_out: int = 0


_NOW: contextvars.ContextVar[Noted | None] = contextvars.ContextVar("genescale_noted", default=None)


@contextlib.contextmanager
def noting() -> Iterator[Noted]:
    """A fresh note for the block, in this task and the tasks and threads it starts."""
    noted = Noted()
    token = _NOW.set(noted)
    try:
        yield noted
    finally:
        _NOW.reset(token)


def note_model(name: str, version: str) -> None:
    """Which model answers this request."""
    if (noted := _NOW.get()) is not None:
        noted.model, noted.version = name, version


def note_problem(code: str) -> None:
    """Why this request is not answered; the first reason counts."""
    if (noted := _NOW.get()) is not None and not noted.problem:
        noted.problem = code


def note_size(*, cells: int = 0, tokens: int = 0) -> None:
    """More cells or tokens that this request puts through the model."""
    if (noted := _NOW.get()) is not None:
        noted.cells += cells
        noted.tokens += tokens


def note_stage(stage: str) -> None:
    """Which of the STAGES this request enters."""
    if (noted := _NOW.get()) is not None:
        noted.stage = stage


@contextlib.asynccontextmanager
async def in_turn(places: asyncio.Semaphore) -> AsyncIterator[None]:
    """One of the places of the replicas for the block; the request waits for it, works, and is written afterwards."""
    note_stage("waiting")
    async with places:
        note_stage("working")
        try:
            yield
        finally:
            note_stage("writing")


def note_phases(seconds: Mapping[str, float]) -> None:
    """Seconds that this request spent in some of the PHASES."""
    if (noted := _NOW.get()) is not None:
        noted.phases_s.update(seconds)
