"""A caller who leaves ends its request: what it asked is cancelled where it waits, and costs no pass of the model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class CallerLeftError(Exception):
    """The connection ended before the answer did."""


class Presence:
    """`receive` for the application: the body at once, then nothing until the caller leaves."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive
        self._left = asyncio.Event()

    async def __call__(self) -> Message:
        """The next message of the connection."""
        if self._body is None:
            # Only `watched` listens to the connection: two listeners would take each other's messages.
            await self._left.wait()
            return {"type": "http.disconnect"}
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Cancel what runs inside the block when the caller leaves; CallerLeftError says so outside."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a request is answered in a task.")
        before, watch = task.cancelling(), asyncio.create_task(self._watch(task))
        try:
            yield
        except asyncio.CancelledError:
            # Cancelled by somebody else as well (the server stops): that goes on.
            if self._left.is_set() and task.cancelling() == before + 1:
                raise CallerLeftError from None
            raise
        finally:
            watch.cancel()
            if self._left.is_set():
                task.uncancel()

    async def _watch(self, task: asyncio.Task[Any]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left.set()
        task.cancel()
