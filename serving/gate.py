"""The gate: what every request passes before the application sees it, as plain ASGI.

In this order: request id, key and scope, room, rate, body (counted while it arrives), a place, deadline. Each refusal
is answered here, in the shape of `problems.py`, and costs no work behind the gate. A caller who leaves ends its request
wherever it is. What leaves carries security headers.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from genescale.platform.errors import DeadlineError, DrainingError, OverloadedError
from genescale.platform.log import bind, get_logger
from genescale.serving.access.bodies import read_whole
from genescale.serving.access.callers import caller_of, header
from genescale.serving.access.keys import ApiKey
from genescale.serving.access.presence import CallerLeftError, Presence
from genescale.serving.access.rates import Rates, paid_by
from genescale.serving.access.ring import KeyRing
from genescale.serving.access.room import Room
from genescale.serving.access.scopes import ADMIN, OPEN_PATHS, READY, is_open
from genescale.serving.config import ServingConfig
from genescale.serving.problems import JSON_TYPE, Problem, RefusedError, problem_of, refused
from genescale.serving.watching.http_numbers import HttpNumbers
from genescale.serving.watching.noted import Noted, note_phases, note_problem, noting

__all__ = ["OPEN_PATHS", "Gate"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

# Questions that cost the model nothing take no place: facts and probes are answered when all places are taken.
FREE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
DEADLINE_HEADER = "X-Genescale-Deadline-Ms"
SECURITY_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
MILLISECONDS = re.compile(rb"[1-9][0-9]{0,8}")
log = get_logger(__name__)


class Gate:
    """An ASGI application around another one.

    `echo_request_id` is off behind Ray Serve, whose proxy sets `X-Request-ID` on every response itself. Raises
    SettingsError when the file of keys cannot be used.
    """

    def __init__(self, app: Application, config: ServingConfig, *, echo_request_id: bool = True) -> None:
        self.app, self.config, self.echo_request_id = app, config, echo_request_id
        self.ring = KeyRing(config.api_keys, config.keys_file)
        self.rates = Rates(config.ingress_replicas)
        self.room = Room(config.max_admitted, config.limits.max_held_bytes, retry_after_s=config.retry_after_s)
        expected = {"http": config.ingress_replicas, "model": config.replicas}
        self.numbers = HttpNumbers(app, self.room, expected)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection; only HTTP is spoken here."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            await self._http(scope, receive, send)

    def drain(self) -> int:
        """Take no new work and say so to probes; returns how many requests are still being answered."""
        self.room.draining = True
        return self.room.admitted

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = _request_id(scope)
        scope["request_id"] = request_id
        answer = _Answer(send, request_id if self.echo_request_id else "")
        began = time.monotonic()
        with bind(request_id=request_id), noting() as noted:
            self.numbers.began(noted)
            try:
                await self._pass(scope, receive, answer, began, noted)
            except CallerLeftError:
                # Nobody is there to be answered; the line below says that the caller is gone.
                pass
            # Whatever ended the request, the caller gets one shape of answer and the log gets the trace.
            except Exception as error:  # noqa: BLE001
                await self._refuse(error, answer, request_id)
            finally:
                seconds = time.monotonic() - began
                noted.bytes_out = answer.size_bytes
                self.numbers.ended(scope, noted, answer.status, seconds, question=_works(scope))
                _log_line(scope, answer.status, 1000 * seconds)

    async def _pass(self, scope: Scope, receive: Receive, answer: _Answer, began: float, noted: Noted) -> None:
        key = self._admit_caller(scope)
        deadline_s = self._deadline_s(scope)
        works = _works(scope)
        if works:
            # Refused before the body is read: what there is no room for must not fill the memory.
            self.room.check()
        if key is not None:
            self.rates.take_request(key)
        with self.room.bytes_held() as hold:
            asked = time.monotonic()
            body = await read_whole(scope, receive, self.config.limits, hold)
            if body is None:
                return
            noted.bytes_in, noted.stage = len(body), "reading"
            note_phases({"body": time.monotonic() - asked})
            with self.room.place() if works else contextlib.nullcontext(), paid_by(self.rates, key):
                await self._within(deadline_s, began, scope, Presence(body, receive), answer)

    def _admit_caller(self, scope: Scope) -> ApiKey | None:
        if is_open(scope["path"]):
            if scope["path"] == READY:
                self.room.check_open()
            return None
        key = caller_of(scope, self.ring)
        scope["key_id"] = key.id if key else ""
        scope["key_scopes"] = key.scopes if key else (ADMIN,)
        return key

    def _deadline_s(self, scope: Scope) -> float | None:
        """The caller's own deadline in seconds from its arrival, None when it names none."""
        given = header(scope, DEADLINE_HEADER.lower().encode())
        if not given:
            return None
        if not MILLISECONDS.fullmatch(given):
            raise refused(422, "the deadline is no whole number of milliseconds above 0.", where=DEADLINE_HEADER)
        return int(given) / 1000

    async def _within(
        self, deadline_s: float | None, began: float, scope: Scope, presence: Presence, answer: _Answer
    ) -> None:
        """Let the application answer, until the deadline or until the caller leaves."""
        limit_s = self.config.limits.deadline_s
        # The service's limit counts from here; the caller's own from its arrival, because it waits since then.
        left_s = limit_s if deadline_s is None else min(limit_s, deadline_s - (time.monotonic() - began))
        allowed_s = limit_s if deadline_s is None else min(limit_s, deadline_s)
        late = DeadlineError(
            f"the answer took longer than {allowed_s:g} s.", fix="Ask for fewer cells or edits at a time."
        )
        if left_s <= 0:
            raise late
        try:
            async with asyncio.timeout(left_s) as patience, presence.watched():
                await self.app(scope, presence, answer.send)
        except TimeoutError:
            if not patience.expired():
                raise
            raise late from None

    async def _refuse(self, error: Exception, answer: _Answer, request_id: str) -> None:
        problem = problem_of(error, retry_after_s=self.config.retry_after_s)
        note_problem(problem.code)
        expected = isinstance(error, (OverloadedError, DeadlineError, DrainingError, RefusedError))
        if problem.status >= 500 and not expected:
            log.error("request failed", exc_info=error)
        if not answer.status:
            await answer.problem(problem, request_id)


class _Answer:
    """Sends one response, with our headers on it, and remembers its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self.status, self.size_bytes = 0, 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = self._headers(message.get("headers", ()))
        else:
            self.size_bytes += len(message.get("body", b""))
        await self._send(message)

    async def problem(self, problem: Problem, request_id: str) -> None:
        body = problem.body(request_id)
        headers = {"content-type": JSON_TYPE, "content-length": str(len(body)), **problem.headers}
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body})

    def _headers(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        given = list(headers)
        present = {name.lower() for name, _ in given}
        ours = {**SECURITY_HEADERS, **({"x-request-id": self._request_id} if self._request_id else {})}
        return given + [(k.encode(), v.encode()) for k, v in ours.items() if k.encode() not in present]


def _works(scope: Scope) -> bool:
    """Whether a request asks for work, rather than for a fact."""
    return scope["method"] not in FREE_METHODS


def _log_line(scope: Scope, status: int, milliseconds: float) -> None:
    key_id = scope.get("key_id", "")
    with bind(key_id=key_id) if key_id else contextlib.nullcontext():
        log.info("%s %r %s in %.1f ms", scope["method"], scope["path"], status or "gone", milliseconds)


def _request_id(scope: Scope) -> str:
    """The caller's id when it is harmless in a log line, else a new one."""
    given = header(scope, b"x-request-id").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
