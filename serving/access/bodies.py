"""A request's body, counted while it arrives: never more of it in memory than is allowed, and never for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from genescale.platform.errors import DeadlineError, LimitError
from genescale.serving.access.callers import Scope, header
from genescale.serving.config import Limits
from genescale.serving.problems import Problem, RefusedError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
LONGEST_LENGTH_DIGITS = 18


async def read_whole(scope: Scope, receive: Receive, limits: Limits, hold: Callable[[int], None]) -> bytes | None:
    """The whole body, or None when the caller left; `hold` is told of each piece before the next is asked for.

    Raises LimitError as soon as it is too long, RefusedError with the status 408 when it takes too long to arrive.
    """
    declared = header(scope, b"content-length")
    if declared.isdigit() and (len(declared) > LONGEST_LENGTH_DIGITS or int(declared) > limits.max_body_bytes):
        raise _too_long(limits.max_body_bytes)
    try:
        async with asyncio.timeout(limits.body_timeout_s) as patience:
            return await _pieces(receive, limits.max_body_bytes, hold)
    except TimeoutError:
        if not patience.expired():
            raise
        message = "the request's body took too long to arrive."
        raise RefusedError(Problem(status=408, code=DeadlineError.code, message=message)) from None


async def _pieces(receive: Receive, max_bytes: int, hold: Callable[[int], None]) -> bytes | None:
    parts: list[bytes] = []
    size_bytes, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size_bytes += len(parts[-1])
        if size_bytes > max_bytes:
            raise _too_long(max_bytes)
        hold(len(parts[-1]))
        more = message.get("more_body", False)
    return b"".join(parts)


def _too_long(limit_bytes: int) -> LimitError:
    return LimitError(f"the body is longer than {limit_bytes:,} bytes.", fix="Send fewer cells at a time.")
