"""The gate and the work behind it: draining, deadlines, callers who leave, room, and hints when to ask again."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from genescale.platform.errors import SettingsError
from genescale.serving.access.presence import Presence
from genescale.serving.config import Limits, ServingConfig
from genescale.serving.gate import Gate
from genescale.serving.in_process import InProcessModel

if TYPE_CHECKING:
    from genescale.training.embedder import Embedder

Ask = Callable[..., httpx.Response]
ASK = {"type": "http", "method": "POST", "path": "/x", "headers": []}


class Work:
    """An application that waits until it is released, and remembers what became of it."""

    def __init__(self) -> None:
        self.entered, self.release = asyncio.Semaphore(0), asyncio.Event()
        self.cancelled = self.finished = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if scope["method"] == "POST":
            self.entered.release()
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        self.finished += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


def client_of(app: Gate) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service")


def gate(app: Any, *, limits: dict[str, Any] | None = None, **more: Any) -> Gate:
    return Gate(app, ServingConfig(limits=Limits(**(limits or {})), **more))


def code_of(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


def test_while_draining_what_runs_is_finished_and_what_is_new_is_refused() -> None:
    async def talk() -> None:
        work = Work()
        app = gate(work)
        async with client_of(app) as client:
            assert (await client.get("/readyz")).status_code == 200
            running = asyncio.create_task(client.post("/x"))
            await work.entered.acquire()
            assert app.drain() == 1
            ready, alive, late = [await client.get("/readyz"), await client.get("/healthz"), await client.post("/x")]
            assert (ready.status_code, alive.status_code, late.status_code) == (503, 200, 503)
            assert code_of(ready) == code_of(late) == "draining"
            assert {"retry-after", "retry-after-ms"} <= set(late.headers)
            assert (await client.get("/v1/info")).status_code == 200
            work.release.set()
            assert (await running).text == "done"
            assert app.drain() == 0

    asyncio.run(talk())


def test_a_caller_who_leaves_cancels_the_work_and_gives_its_place_back() -> None:
    async def talk() -> None:
        work, left, sent = Work(), asyncio.Event(), []
        app = gate(work, max_ongoing=1, max_queued=0)
        messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

        async def receive() -> Any:
            for message in messages:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        running = asyncio.create_task(app(dict(ASK), receive, send))
        await work.entered.acquire()
        async with client_of(app) as client:
            assert (await client.post("/x")).status_code == 429
            left.set()
            await running
            assert (work.cancelled, work.finished, sent) == (1, 0, [])
            assert running.cancelling() == 0
            work.release.set()
            assert (await client.post("/x")).status_code == 200

    asyncio.run(talk())


def test_a_server_that_stops_cancels_the_request_and_is_not_mistaken_for_the_caller() -> None:
    async def talk() -> None:
        work = Work()
        async with client_of(gate(work)) as client:
            running = asyncio.create_task(client.post("/x"))
            await work.entered.acquire()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert work.cancelled == 1

    asyncio.run(talk())


def test_a_stop_that_meets_a_leaving_caller_stays_a_stop() -> None:
    async def talk() -> None:
        entered, left = asyncio.Event(), asyncio.Event()

        async def receive() -> Any:
            await left.wait()
            return {"type": "http.disconnect"}

        async def answer() -> None:
            async with Presence(b"", receive).watched():
                entered.set()
                await asyncio.Event().wait()

        running = asyncio.create_task(answer())
        await entered.wait()
        await asyncio.sleep(0)
        left.set()
        await asyncio.sleep(0)
        assert running.cancelling() == 1, "the caller left, and the task has not heard of it yet"
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(talk())


# The caller's own counts from the arrival: long enough for the work to begin on a busy machine.
@pytest.mark.parametrize(("asked_ms", "limit_s"), [("400", 60.0), ("60000", 0.4), ("999999999", 0.4)])
def test_the_shorter_of_the_callers_deadline_and_the_limit_ends_the_work(
    ask: Ask, asked_ms: str, limit_s: float
) -> None:
    work = Work()
    app = gate(work, limits={"deadline_s": limit_s})
    response = ask(app, "POST", "/x", headers={"X-Genescale-Deadline-Ms": asked_ms})
    assert (response.status_code, code_of(response)) == (504, "deadline")
    assert "0.4 s" in response.json()["error"]["message"]
    assert (work.cancelled, work.finished) == (1, 0)


def test_a_deadline_that_passed_while_the_body_arrived_costs_no_work(ask: Ask) -> None:
    async def slow_body() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(0.03)
        yield b"b"

    work = Work()
    response = ask(gate(work), "POST", "/x", content=slow_body(), headers={"X-Genescale-Deadline-Ms": "10"})
    assert (response.status_code, code_of(response)) == (504, "deadline")
    assert (work.cancelled, work.finished) == (0, 0)


@pytest.mark.parametrize("given", ["0", "-5", "1.5", "soon", "1e3", "0x10", "99999999999", "١٢"])
def test_a_deadline_that_is_no_number_of_milliseconds_is_refused(ask: Ask, given: str) -> None:
    response = ask(gate(Work()), "POST", "/x", headers={"X-Genescale-Deadline-Ms": given.encode()})
    assert response.status_code == 422
    assert response.json()["error"]["details"] == {"where": "X-Genescale-Deadline-Ms"}


def test_a_full_service_refuses_before_it_reads_the_body() -> None:
    async def talk() -> None:
        work, sent = Work(), 0
        app = gate(work, max_ongoing=1, max_queued=0)

        async def body() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 1
                yield b"x" * 1000

        async with client_of(app) as client:
            running = asyncio.create_task(client.post("/x"))
            await work.entered.acquire()
            assert (await client.post("/x", content=body())).status_code == 429
            assert sent <= 1
            work.release.set()
            assert (await running).status_code == 200

    asyncio.run(talk())


def test_bodies_together_never_exceed_their_bytes_and_give_them_back() -> None:
    async def talk() -> None:
        work = Work()
        app = gate(work, limits={"max_body_bytes": 60, "max_held_bytes": 100})
        async with client_of(app) as client:
            running = asyncio.create_task(client.post("/x", content=b"x" * 60))
            await work.entered.acquire()
            refused = await client.post("/x", content=b"x" * 41)
            assert (refused.status_code, code_of(refused)) == (429, "overloaded")
            fits = asyncio.create_task(client.post("/x", content=b"x" * 40))
            await work.entered.acquire()
            work.release.set()
            assert {(await running).status_code, (await fits).status_code} == {200}
            assert (await client.post("/x", content=b"x" * 60)).status_code == 200

    asyncio.run(talk())


def test_the_largest_body_must_fit_what_is_held() -> None:
    with pytest.raises(SettingsError, match="max_held_bytes"):
        Limits(max_body_bytes=100, max_held_bytes=99)


def test_a_refusal_hints_at_how_long_requests_take_and_never_at_longer_than_the_setting() -> None:
    async def talk(pause_s: float) -> int:
        work = Work()
        app = gate(work, max_ongoing=1, max_queued=0, retry_after_s=1)
        async with client_of(app) as client:
            first = asyncio.create_task(client.post("/x"))
            await work.entered.acquire()
            await asyncio.sleep(pause_s)
            work.release.set()
            await first
            work.release.clear()
            second = asyncio.create_task(client.post("/x"))
            await work.entered.acquire()
            refused = await client.post("/x")
            work.release.set()
            await second
            assert refused.headers["retry-after"] == "1"
            return int(refused.headers["retry-after-ms"])

    assert 50 <= asyncio.run(talk(0.0)) < 1000
    assert 150 <= asyncio.run(talk(0.15)) <= 1000


def test_what_waits_for_the_model_is_dropped_when_its_caller_leaves(
    build: Callable[..., Gate], embedder: Embedder
) -> None:
    free, working, passes = threading.Event(), threading.Event(), []

    class Slow:
        """Embeds nothing until it is let."""

        vocabulary, width = embedder.vocabulary, embedder.width

        def embed_cells(self, cells: Sequence[Any], **_: Any) -> np.ndarray:
            passes.append(len(cells))
            working.set()
            assert free.wait(10)
            return np.ones((len(cells), self.width), dtype=np.float32)

    app = build(model=InProcessModel(Slow(), tokens_per_batch=10))  # type: ignore[arg-type]

    def asked(n_cells: int) -> dict[str, Any]:
        return {"cells": [{"counts": {f"GENE{i}": 1 + i for i in range(8)}}] * n_cells}

    async def talk() -> tuple[int, int]:
        async with client_of(app) as client:
            first = asyncio.create_task(client.post("/v1/embeddings", json=asked(1)))
            await asyncio.to_thread(working.wait, 10)
            # Three cells in three passes wait behind the first when their caller goes.
            with pytest.raises(CallerGone):
                await leave_after(app, asked(3), 0.1)
            free.set()
            status = (await first).status_code
            await asyncio.sleep(0.05)
            return status, (await client.post("/v1/embeddings", json=asked(1))).status_code

    assert asyncio.run(talk()) == (200, 200)
    assert passes == [1, 1]


class CallerGone(Exception):
    """The caller of `leave_after` got no answer."""


async def leave_after(app: Gate, asked: dict[str, Any], after_s: float) -> None:
    """Ask and break the connection after a while; raises CallerGone when nothing was answered."""
    messages = iter([{"type": "http.request", "body": json.dumps(asked).encode(), "more_body": False}])
    sent: list[Any] = []

    async def receive() -> Any:
        for message in messages:
            return message
        await asyncio.sleep(after_s)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    await app({"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": headers,
               "query_string": b""}, receive, send)  # fmt: skip
    if not sent:
        raise CallerGone
