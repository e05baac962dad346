"""The gate alone, in front of a few lines of ASGI."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from genescale.platform.log import configure
from genescale.platform.settings import LogSettings, Secret
from genescale.serving.config import Limits, ServingConfig
from genescale.serving.gate import OPEN_PATHS, Gate

KEYS = ("first-key-0123456789abcdef", "second-key-0123456789abcdef")
Ask = Callable[..., httpx.Response]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body it got."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": message["body"]})


def gate(app: Any = echo, *, keys: tuple[str, ...] = (), **more: Any) -> Gate:
    limits = {name: more.pop(name) for name in list(more) if name in Limits.__dataclass_fields__}
    return Gate(app, ServingConfig(api_keys=tuple(Secret(key) for key in keys), limits=Limits(**limits), **more))


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) <= {"code", "message", "request_id", "details"}
    assert error["request_id"] == response.headers["x-request-id"]
    return error


def test_a_body_arrives_whole(ask: Ask) -> None:
    assert ask(gate(), "POST", "/x", content=b"0123456789" * 1000).content == b"0123456789" * 1000


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Bearer wrong-key-0123456789", f"Basic {KEYS[0]}", KEYS[0]]
)
def test_without_an_accepted_key_the_answer_is_401(ask: Ask, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    response = ask(gate(keys=KEYS), "POST", "/x", headers=headers)
    assert response.status_code == 401
    assert error_of(response)["code"] == "unauthorized"
    assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_each_accepted_key_opens(ask: Ask, key: str, scheme: str) -> None:
    assert ask(gate(keys=KEYS), "POST", "/x", headers={"Authorization": f"{scheme} {key}"}).status_code == 200


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_probes_need_no_key(ask: Ask, path: str) -> None:
    assert ask(gate(keys=KEYS), "GET", path).status_code == 200


@pytest.mark.parametrize("path", ["/healthz/", "/%2Fhealthz", "/healthz/x", "/HEALTHZ", "/x/../healthz/y", "/readyz;x"])
def test_addresses_that_only_resemble_a_probe_need_a_key(ask: Ask, path: str) -> None:
    assert ask(gate(keys=KEYS), "GET", path).status_code == 401


def test_a_body_is_refused_by_its_declared_length_before_it_is_read(ask: Ask) -> None:
    response = ask(gate(max_body_bytes=100), "POST", "/x", content=b"x" * 101)
    assert response.status_code == 413
    assert error_of(response)["code"] == "limit"
    assert ask(gate(max_body_bytes=100), "POST", "/x", content=b"x" * 100).status_code == 200


def test_an_undeclared_body_is_counted_while_it_arrives(ask: Ask) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 10
            yield b"x" * 10

    assert ask(gate(max_body_bytes=100), "POST", "/x", content=endless()).status_code == 413
    assert sent <= 120


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async def talk() -> list[Any]:
        answers: list[Any] = []

        async def never() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            answers.append(message)

        scope = {"type": "http", "method": "POST", "path": "/x", "headers": []}
        await gate(body_timeout_s=0.05)(scope, never, send)
        return answers

    start, body = asyncio.run(talk())
    assert start["status"] == 408
    assert json.loads(body["body"])["error"]["code"] == "deadline"


def test_a_caller_who_left_costs_no_work() -> None:
    worked = False

    async def work(scope: Any, receive: Any, send: Any) -> None:
        nonlocal worked
        worked = True

    async def talk() -> list[Any]:
        answers: list[Any] = []

        async def gone() -> Any:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            answers.append(message)

        await gate(work)({"type": "http", "method": "POST", "path": "/x", "headers": []}, gone, send)
        return answers

    assert asyncio.run(talk()) == []
    assert not worked


def test_a_late_answer_is_a_504_and_its_work_is_cancelled(ask: Ask) -> None:
    cancelled = False

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        nonlocal cancelled
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled = True
            raise

    response = ask(gate(slow, deadline_s=0.05), "POST", "/x")
    assert response.status_code == 504
    assert error_of(response)["code"] == "deadline"
    assert cancelled


def test_beyond_all_places_requests_are_refused_at_once_and_probes_are_not() -> None:
    async def talk() -> tuple[list[httpx.Response], httpx.Response, httpx.Response]:
        release, entered = asyncio.Event(), asyncio.Semaphore(0)

        async def waits(scope: Any, receive: Any, send: Any) -> None:
            entered.release()
            if scope["path"] == "/work":
                await release.wait()
            await echo(scope, receive, send)

        transport = httpx.ASGITransport(app=gate(waits, max_ongoing=2, max_queued=1, retry_after_s=7))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            inside = [asyncio.create_task(client.post("/work", content=b"in")) for _ in range(3)]
            for _ in inside:
                await entered.acquire()
            refused = await client.post("/work", content=b"out")
            probe = await client.get("/healthz")
            release.set()
            return await asyncio.gather(*inside), refused, probe

    answered, refused, probe = asyncio.run(talk())
    assert [one.status_code for one in answered] == [200, 200, 200]
    assert probe.status_code == 200
    assert refused.status_code == 429
    assert error_of(refused)["code"] == "overloaded"
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("7", "7000")


def test_a_fault_of_ours_shows_no_trace_and_frees_its_place(ask: Ask) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("secret path /home/someone/model.bin")  # a made-up path

    app = gate(broken, max_ongoing=1, max_queued=0)
    for _ in range(3):
        response = ask(app, "POST", "/x")
        assert response.status_code == 500
        assert error_of(response)["code"] == "internal"
        assert "secret" not in response.text
        assert "RuntimeError" not in response.text


def test_a_harmless_request_id_comes_back_and_another_is_replaced(ask: Ask) -> None:
    assert (
        ask(gate(), "POST", "/x", headers={"X-Request-ID": "trace-1.a:b_2"}).headers["x-request-id"] == "trace-1.a:b_2"
    )
    for bad in ("two words", "x" * 129, "a\tb", '{"level": "forged"}'):
        assert ask(gate(), "POST", "/x", headers={"X-Request-ID": bad}).headers["x-request-id"] != bad
    first, second = (ask(gate(), "POST", "/x").headers["x-request-id"] for _ in range(2))
    assert first != second


def test_answers_carry_security_headers_and_keep_those_of_the_application(ask: Ask) -> None:
    async def with_policy(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"Content-Security-Policy", b"default-src 'self'")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    plain, own = ask(gate(), "POST", "/x").headers, ask(gate(with_policy), "GET", "/x").headers
    assert plain["x-content-type-options"] == "nosniff"
    assert plain["cache-control"] == "no-store"
    assert "default-src 'none'" in plain["content-security-policy"]
    assert own["content-security-policy"] == "default-src 'self'"


def test_websockets_are_closed() -> None:
    async def talk() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await gate()({"type": "websocket", "path": "/v1/embeddings", "headers": []}, receive, send)
        return sent

    assert [message["type"] for message in asyncio.run(talk())] == ["websocket.close"]


def test_every_request_is_one_log_line_with_its_id_and_no_key(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = io.StringIO()
    monkeypatch.setattr("sys.stderr", lines)
    logger = logging.getLogger("genescale")
    before = (logger.handlers, logger.propagate, logger.level)
    configure(LogSettings(format="json"), secrets=[Secret(key) for key in KEYS])
    try:
        headers = {"Authorization": f"Bearer {KEYS[0]}", "X-Request-ID": "trace-7"}
        ask(gate(keys=KEYS), "POST", "/x%0Aforged", headers=headers)
        ask(gate(keys=KEYS), "POST", "/y", headers={"Authorization": "Bearer a-wrong-key-9876543210"})
    finally:
        logger.handlers, logger.propagate, logger.level = before
    first, second = (json.loads(line) for line in lines.getvalue().splitlines())
    assert first["request_id"] == "trace-7"
    assert "200" in first["message"]
    assert "401" in second["message"]
    assert not any(key in lines.getvalue() for key in (*KEYS, "a-wrong-key-9876543210"))
