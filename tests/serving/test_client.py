"""The client against a transport that answers as the service, its proxy or a broken network would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from genescale.platform import errors
from genescale.platform.settings import Secret
from genescale.serving.client import GenescaleClient
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
        return answer


def client_on(line: Line, waits: list[float] | None = None, **more: Any) -> GenescaleClient:
    sleep: Callable[[float], None] = (waits if waits is not None else []).append
    return GenescaleClient("http://service", transport=httpx.MockTransport(line), sleep=sleep, **more)


def problem(error: BaseException, *, retry_after_s: int = 1) -> httpx.Response:
    answer = problem_of(error, retry_after_s=retry_after_s)
    return httpx.Response(answer.status, content=answer.body("id-1"), headers=dict(answer.headers))


def test_the_client_needs_no_heavy_library() -> None:
    heavy = ("torch", "ray", "fastapi", "pydantic", "starlette", "pyarrow", "mlflow")
    probe = f"import sys, genescale.serving.client; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("key", ["a-key-0123456789abcdef", Secret("a-key-0123456789abcdef")])
def test_the_key_is_sent_and_not_shown(key: str | Secret) -> None:
    line = Line(httpx.Response(200, json=INFO))
    client = client_on(line, api_key=key)
    assert client.info() == INFO
    assert line.requests[0].headers["authorization"] == "Bearer a-key-0123456789abcdef"
    assert "a-key" not in repr(client)


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
    ],
    ids=["overloaded", "service", "503", "429", "502", "dead-replica", "refused", "cut"],
)
def test_a_busy_or_restarting_service_is_asked_again(busy: Answer) -> None:
    line = Line(busy, busy, httpx.Response(200, json=INFO))
    waits: list[float] = []
    assert client_on(line, waits).info() == INFO
    assert len(waits) == 2
    assert all(0 < wait <= 1.0 for wait in waits)


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


def test_retry_after_is_obeyed_and_bounded() -> None:
    waits: list[float] = []
    line = Line(
        problem(errors.OverloadedError("full."), retry_after_s=3),
        problem(errors.OverloadedError("full."), retry_after_s=9999),
        httpx.Response(503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        httpx.Response(200, json=INFO),
    )
    client_on(line, waits).info()
    assert waits[0] == 3
    assert 3 < waits[1] <= 10
    assert 0 < waits[2] <= 1


def test_attempts_are_bounded_and_the_last_error_is_raised() -> None:
    line = Line(*[problem(errors.OverloadedError("full."))] * 3, httpx.Response(200, json=INFO))
    with pytest.raises(errors.OverloadedError, match=r"full\."):
        client_on(line, attempts=3).info()
    assert len(line.requests) == 3


def test_a_service_that_is_not_there_is_a_service_error() -> None:
    with pytest.raises(errors.ServiceError, match="cannot be reached"):
        client_on(Line(*[httpx.ConnectError("refused")] * 4)).info()


def test_a_timeout_is_not_repeated() -> None:
    line = Line(httpx.ReadTimeout("slow"), httpx.Response(200, json=INFO))
    with pytest.raises(errors.DeadlineError):
        client_on(line).info()


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
