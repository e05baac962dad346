"""A question whose replica dies is put once more: it is a pure function, and another replica can answer it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from genescale.platform.errors import InputError, OverloadedError, ServiceError
from genescale.serving.answering.passes import Outcome
from genescale.serving.release import Release

CELL = np.array([3, 4], dtype=np.uint16)
RELEASE = Release(name="tiny", version="1", digest="0" * 64, address="models:/tiny/1", folder="")


@pytest.fixture
def embed_through() -> Callable[..., tuple[list[object], Any]]:
    """Ask a replica that does in turn what it is given: fails with an error, or answers; what it got, and the end."""
    from genescale.serving.replicas import ServedModel

    def ask(*turns: object) -> tuple[list[object], Any]:
        left, calls = list(turns), list[object]()

        async def turn() -> object:
            now = left.pop(0)
            if isinstance(now, BaseException):
                raise now
            return now

        def remote(*arguments: object) -> Awaitable[object]:
            calls.append(arguments)
            return turn()

        async def question() -> object:
            model = ServedModel(SimpleNamespace(embed=SimpleNamespace(remote=remote)), RELEASE, asyncio.Semaphore(1))
            return await model.embed([CELL], "last", "mean_genes")

        try:
            return calls, asyncio.run(question())
        except Exception as error:  # noqa: BLE001
            return calls, error

    return ask


def died() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def test_another_replica_answers(embed_through: Callable[..., Any]) -> None:
    outcome = Outcome(value=np.ones((1, 4)), forward_s=0.1)
    calls, found = embed_through(died(), outcome)
    assert found is outcome
    assert len(calls) == 2
    assert calls[0] == calls[1]


def test_two_deaths_are_told(embed_through: Callable[..., Any]) -> None:
    calls, found = embed_through(died(), died(), "never asked")
    assert type(found) is ServiceError
    assert "went away" in found.what
    assert len(calls) == 2


def test_a_refusal_is_an_answer(embed_through: Callable[..., Any]) -> None:
    from ray.exceptions import RayTaskError
    from ray.serve.exceptions import BackPressureError

    wrong = RayTaskError("embed", "", InputError("no such gene."))
    for error, kind in (
        (wrong, InputError),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), OverloadedError),
    ):
        calls, found = embed_through(error, "never asked")
        assert type(found) is kind
        assert len(calls) == 1
