"""Both clients against a transport that answers as the service, its proxy or a broken network would."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from genescale.client import AsyncGenescaleClient, GenescaleClient
from genescale.platform import errors
from genescale.platform.settings import Secret
from genescale.serving.problems import problem_of

INFO = {"service": "genescale"}
Answer = httpx.Response | Exception


class Line:
    """A transport that gives prepared answers in turn and remembers what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers: Iterator[Answer] = iter(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        # A new one each time: a response is read once.
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


def client_on(line: Line, waits: list[float] | None = None, **more: Any) -> GenescaleClient:
    sleep: Callable[[float], None] = (waits if waits is not None else []).append
    return GenescaleClient("http://service", transport=httpx.MockTransport(line), sleep=sleep, **more)


def info_of(kind: str, line: Line, waits: list[float] | None = None, **more: Any) -> dict[str, Any]:
    """What the client of this kind answers to `info()`; its waits are noted and not waited."""
    noted = waits if waits is not None else []
    if kind == "sync":
        return client_on(line, noted, **more).info()

    async def sleep(seconds: float) -> None:
        noted.append(seconds)

    async def ask() -> dict[str, Any]:
        transport = httpx.MockTransport(line)
        async with AsyncGenescaleClient("http://service", transport=transport, sleep=sleep, **more) as client:
            return await client.info()

    return asyncio.run(ask())


BOTH = pytest.mark.parametrize("kind", ["sync", "async"])


def problem(error: BaseException, *, retry_after_s: float = 0) -> httpx.Response:
    answer = problem_of(error, retry_after_s=retry_after_s)
    return httpx.Response(answer.status, content=answer.body("id-1"), headers=dict(answer.headers))


def test_the_client_needs_no_heavy_library() -> None:
    heavy = ("torch", "ray", "fastapi", "pydantic", "starlette", "pyarrow", "mlflow")
    probe = f"import sys, genescale.client; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@BOTH
@pytest.mark.parametrize("key", ["a-key-0123456789abcdef", Secret("a-key-0123456789abcdef")])
def test_the_key_is_sent_and_not_shown(kind: str, key: str | Secret) -> None:
    line = Line(httpx.Response(200, json=INFO))
    assert info_of(kind, line, api_key=key) == INFO
    assert line.requests[0].headers["authorization"] == "Bearer a-key-0123456789abcdef"
    assert "a-key" not in repr(client_on(line, api_key=key)) + repr(vars(client_on(line, api_key=key)))


@BOTH
def test_the_service_is_told_when_nobody_waits_any_more(kind: str) -> None:
    line = Line(httpx.Response(200, json=INFO))
    info_of(kind, line, timeout_s=1.5)
    assert line.requests[0].headers["x-genescale-deadline-ms"] == "1500"


@BOTH
@pytest.mark.parametrize(
    "busy",
    [
        problem(errors.OverloadedError("full.")),
        problem(errors.ServiceError("restarting.")),
        httpx.Response(503, text="Ray's own words"),
        httpx.Response(429, text="slow down"),
        httpx.Response(502, text="bad gateway"),
        httpx.Response(500, text="Internal Server Error"),
        httpx.ConnectError("refused"),
        httpx.RemoteProtocolError("cut off"),
        httpx.ConnectTimeout("nobody there"),
        problem(errors.DrainingError("stopping.")),
        problem(errors.RateLimitedError("too fast.")),
    ],
    ids=lambda busy: type(busy).__name__ if isinstance(busy, Exception) else str(busy.status_code),
)
def test_a_busy_or_restarting_service_is_asked_again(kind: str, busy: Answer) -> None:
    line = Line(busy, busy, httpx.Response(200, json=INFO))
    waits: list[float] = []
    assert info_of(kind, line, waits) == INFO
    assert 0.125 <= waits[0] <= 0.25 <= waits[1] <= 0.5


@pytest.mark.parametrize(
    "error",
    [
        errors.InputError("wrong.", where="cells[0]"),
        errors.UnknownGeneError(
            "the gene 'GATA44' is not in the vocabulary.", where="edits[0]", fix="Did you mean 'GATA4'?"
        ),
        errors.LimitError("too many."),
        errors.UnauthorizedError("no key."),
        errors.DeadlineError("too slow."),
        errors.GenescaleError("a fault."),
        errors.IntegrityError("broken."),
    ],
    ids=lambda error: error.code,
)
def test_other_errors_are_raised_at_once_as_the_class_their_code_names(error: errors.GenescaleError) -> None:
    line = Line(problem(error))
    with pytest.raises(errors.GenescaleError) as caught:
        client_on(line).info()
    assert type(caught.value) is type(error)
    assert "id-1" in str(caught.value)
    if isinstance(error, errors.InputError):
        assert error.what in str(caught.value)
        assert error.fix in str(caught.value)
        assert caught.value.where == error.where


def refused(**headers: str) -> httpx.Response:
    return httpx.Response(503, headers={name.replace("_", "-"): value for name, value in headers.items()})


@BOTH
@pytest.mark.parametrize(
    ("headers", "asked_s"),
    [
        ({"retry_after": "3"}, 3.0),
        ({"retry_after": "1", "retry_after_ms": "40"}, 0.04),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry_after": "60"}, 60.0),
        ({"retry_after_ms": "-5"}, 0.0),
    ],
)
def test_a_wait_that_is_asked_for_is_kept_and_spread(kind: str, headers: dict[str, str], asked_s: float) -> None:
    waits: list[float] = []
    for _ in range(4):
        info_of(kind, Line(refused(**headers), httpx.Response(200, json=INFO)), waits)
    assert all(asked_s + 0.125 <= wait <= asked_s + 0.25 for wait in waits)
    assert len(set(waits)) > 1


def test_an_hour_is_not_waited_for() -> None:
    waits: list[float] = []
    with pytest.raises(errors.RateLimitedError, match=r"too fast.*asks to wait 3,600 s"):
        info_of("sync", Line(problem(errors.RateLimitedError("too fast."), retry_after_s=3600)), waits)
    assert waits == []


@BOTH
def test_attempts_are_bounded_and_the_last_error_is_raised(kind: str) -> None:
    line = Line(*[problem(errors.OverloadedError("full."))] * 3, httpx.Response(200, json=INFO))
    with pytest.raises(errors.OverloadedError, match=r"full\."):
        info_of(kind, line, attempts=3)
    assert len(line.requests) == 3


@BOTH
def test_the_waits_outlast_a_restart_and_end(kind: str) -> None:
    waits: list[float] = []
    with pytest.raises(errors.ServiceError, match=r"http://service/v1/info: the service cannot be reached: refused\."):
        info_of(kind, Line(*[httpx.ConnectError("refused")] * 8), waits)
    assert 11 < sum(waits) < 24
    assert max(waits) <= 8


@BOTH
def test_a_late_answer_is_not_asked_for_again(kind: str) -> None:
    line = Line(httpx.ReadTimeout("slow"), httpx.Response(200, json=INFO))
    with pytest.raises(errors.DeadlineError):
        info_of(kind, line)
    assert len(line.requests) == 1


def test_settings_of_the_client_are_checked() -> None:
    for wrong in ({"attempts": 0}, {"timeout_s": 0.0}, {"bodies": "xml"}):
        with pytest.raises(errors.SettingsError, match=next(iter(wrong))):
            GenescaleClient("http://service", **wrong)
    with pytest.raises(errors.InputError, match="base_url"):
        GenescaleClient("localhost:8000").info()


@BOTH
def test_an_answer_of_another_contract_is_a_service_error(kind: str) -> None:
    async def ask() -> None:
        async with AsyncGenescaleClient("http://service", transport=httpx.MockTransport(line)) as client:
            await client.embeddings([{"A": 1}])

    line = Line(httpx.Response(200, json={"cells": [{"vector": [1]}]}))
    with pytest.raises(errors.ServiceError, match="not what this client knows"):
        client_on(line).embeddings([{"A": 1}]) if kind == "sync" else asyncio.run(ask())


def test_numbers_that_json_has_no_word_for_are_refused_before_they_are_sent() -> None:
    line = Line()
    with pytest.raises(errors.InputError, match="JSON"):
        client_on(line).embeddings([{"A": float("nan")}])
    assert line.requests == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, errors.UnauthorizedError), (413, errors.LimitError), (404, errors.InputError), (504, errors.DeadlineError)],
)
def test_answers_of_a_proxy_become_our_errors_too(status: int, kind: type[errors.GenescaleError]) -> None:
    with pytest.raises(kind):
        client_on(Line(httpx.Response(status, text="<html>nginx</html>"))).info()


@pytest.mark.parametrize("content", ["<html>", "[]", "3"])
def test_an_answer_that_is_not_an_answer_is_a_service_error(content: str) -> None:
    with pytest.raises(errors.ServiceError):
        client_on(Line(httpx.Response(200, text=content))).info()


def test_ready_asks_once_and_never_raises() -> None:
    assert client_on(Line(httpx.Response(200, json={"status": "ready"}))).ready()
    assert not client_on(Line(problem(errors.ServiceError("loading.")))).ready()
    assert not client_on(Line(httpx.ConnectError("refused"))).ready()


def test_cells_are_sent_as_plain_json() -> None:
    line = Line(problem(errors.InputError("enough.")))
    cells = [
        {"GATA4": np.int64(3), "TTN": np.float32(0.5)},
        {"id": "b", "counts": {"GATA4": np.float64(1)}},
        {"tokens": np.array([5, 6], dtype=np.uint16)},
    ]
    with pytest.raises(errors.InputError):
        client_on(line).embeddings(cells, layer="last", pooling="cls")
    assert json.loads(line.requests[0].content) == {
        "cells": [{"counts": {"GATA4": 3, "TTN": 0.5}}, {"id": "b", "counts": {"GATA4": 1.0}}, {"tokens": [5, 6]}],
        "layer": "last",
        "pooling": "cls",
    }
