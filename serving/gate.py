"""The gate: what every request passes before the application sees it, as plain ASGI.

In this order: request id, key, body (counted while it arrives), admission, deadline. Each refusal is answered here, in
the shape of `problems.py`, and costs no work behind the gate. What leaves carries security headers.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from genescale.platform.errors import DeadlineError, LimitError, OverloadedError, UnauthorizedError
from genescale.platform.log import bind, get_logger
from genescale.platform.settings import Secret
from genescale.serving.config import ServingConfig
from genescale.serving.problems import JSON_TYPE, Problem, problem_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

# Probes of an orchestrator carry no key; they say nothing but "alive" and "ready".
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
SECURITY_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
log = get_logger(__name__)


class Gate:
    """An ASGI application around another one.

    `echo_request_id` is off behind Ray Serve, whose proxy sets `X-Request-ID` on every response itself.
    """

    def __init__(self, app: Application, config: ServingConfig, *, echo_request_id: bool = True) -> None:
        self.app, self.config, self.echo_request_id = app, config, echo_request_id
        self.keys = _digests(config.api_keys)
        self.admitted = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection; only HTTP is spoken here."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = _request_id(scope)
        scope["request_id"] = request_id
        answer = _Answer(send, request_id if self.echo_request_id else "")
        began = time.monotonic()
        with bind(request_id=request_id):
            try:
                await self._pass(scope, receive, answer)
            # Whatever ended the request, the caller gets one shape of answer and the log gets the trace.
            except Exception as error:  # noqa: BLE001
                await self._refuse(error, answer, request_id)
            finally:
                milliseconds = 1000 * (time.monotonic() - began)
                log.info("%s %r %s in %.1f ms", scope["method"], scope["path"], answer.status or "gone", milliseconds)

    async def _pass(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        if scope["path"] not in OPEN_PATHS:
            self._check_key(scope)
        body = await self._body(scope, receive)
        if body is None:
            return
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._within_deadline(scope, _Replay(body, receive), answer)
            return
        if self.admitted >= self.config.max_admitted:
            raise OverloadedError(
                "all places for requests are taken.", fix=f"Try again in {self.config.retry_after_s} s or later."
            )
        self.admitted += 1
        try:
            await self._within_deadline(scope, _Replay(body, receive), answer)
        finally:
            self.admitted -= 1

    def _check_key(self, scope: Scope) -> None:
        if not self.keys:
            return
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Every key is compared, in constant time: neither the match nor its place can be timed.
        matches = [hmac.compare_digest(digest, known) for known in self.keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise UnauthorizedError(
                "a key is needed, and this request has none that is accepted.",
                fix="Send the header `Authorization: Bearer <key>`.",
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None when the caller left; LimitError as soon as it is too long."""
        limits = self.config.limits
        declared = _header(scope, b"content-length")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > limits.max_body_bytes):
            raise _too_long(limits.max_body_bytes)
        parts: list[bytes] = []
        size_bytes, more = 0, True
        try:
            async with asyncio.timeout(limits.body_timeout_s) as patience:
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size_bytes += len(parts[-1])
                    if size_bytes > limits.max_body_bytes:
                        raise _too_long(limits.max_body_bytes)
                    more = message.get("more_body", False)
        except TimeoutError:
            if patience.expired():
                raise _SlowBodyError from None
            raise
        return b"".join(parts)

    async def _within_deadline(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        deadline_s = self.config.limits.deadline_s
        try:
            async with asyncio.timeout(deadline_s) as patience:
                await self.app(scope, receive, answer.send)
        except TimeoutError:
            if not patience.expired():
                raise
            raise DeadlineError(
                f"the answer took longer than {deadline_s:g} s.", fix="Ask for fewer cells or edits at a time."
            ) from None

    async def _refuse(self, error: Exception, answer: _Answer, request_id: str) -> None:
        problem = self._problem(error)
        if problem.status >= 500 and not isinstance(error, (OverloadedError, DeadlineError)):
            log.error("request failed", exc_info=error)
        if not answer.status:
            await answer.problem(problem, request_id)

    def _problem(self, error: Exception) -> Problem:
        if isinstance(error, _SlowBodyError):
            return Problem(status=408, code=DeadlineError.code, message="the request's body took too long to arrive.")
        return problem_of(error, retry_after_s=self.config.retry_after_s)


class _SlowBodyError(Exception):
    """The body did not arrive in time."""


class _Answer:
    """Sends one response, with our headers on it, and remembers its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = self._headers(message.get("headers", ()))
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


class _Replay:
    """`receive` for the application: the body at once, then what the connection says (that the caller left)."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def _digests(keys: Iterable[Secret]) -> list[bytes]:
    return [hashlib.sha256(key.reveal().strip().encode()).digest() for key in keys]


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key.lower() == name), b"")


def _request_id(scope: Scope) -> str:
    """The caller's id when it is harmless in a log line, else a new one."""
    given = _header(scope, b"x-request-id").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _too_long(limit_bytes: int) -> LimitError:
    return LimitError(f"the body is longer than {limit_bytes:,} bytes.", fix="Send fewer cells at a time.")
