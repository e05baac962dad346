"""Models in the memory of one replica: within a number of bytes, and never taken from under a request."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from genescale.platform.errors import IntegrityError, LimitError, ServiceError
from genescale.serving.models.held import HeldModels, why
from genescale.serving.release import Release

SIZES = {"a": 40, "b": 40, "c": 40, "small": 10, "large": 90, "huge": 101}


class Loaded:
    def __init__(self, name: str) -> None:
        self.name = name


class Shelf:
    """Held models of 100 bytes; loads can be counted, stopped half way, and made to fail."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.failing: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.held: HeldModels[str, Loaded] = HeldModels(self._open, SIZES.__getitem__, self._load, max_bytes=100)

    def _open(self, release: Release) -> str:
        return release.digest

    def _load(self, digest: str) -> Loaded:
        assert self.gate.wait(10)
        if digest in self.failing:
            raise IntegrityError("the bytes are wrong.", where="/private/cache/model", fix="Register it again.")
        self.loads.append(digest)
        return Loaded(digest)

    @property
    def names(self) -> list[str]:
        return [one.digest for one in self.held.facts]


def release(digest: str) -> Release:
    return Release(name="model", version=digest, digest=digest, address="", folder="")


def within(test: Callable[[Shelf], Awaitable[None]]) -> Shelf:
    shelf = Shelf()

    async def limited() -> None:
        async with asyncio.timeout(20):
            await test(shelf)

    asyncio.run(limited())
    return shelf


async def use(shelf: Shelf, digest: str) -> str:
    async with shelf.held.borrowed(release(digest)) as model:
        return model.name


async def eventually(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_the_model_used_longest_ago_leaves_and_comes_back_when_asked() -> None:
    async def test(shelf: Shelf) -> None:
        for name in ("a", "b", "a", "c"):
            assert await use(shelf, name) == name
        assert shelf.names == ["a", "c"]
        assert await use(shelf, "b") == "b"
        assert shelf.names == ["c", "b"]

    assert within(test).loads == ["a", "b", "c", "b"]


def test_a_model_that_works_stays_and_the_new_one_waits_for_room() -> None:
    async def test(shelf: Shelf) -> None:
        async with shelf.held.borrowed(release("a")), shelf.held.borrowed(release("b")):
            waiting = asyncio.create_task(use(shelf, "c"))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            assert shelf.names == ["a", "b"]
        assert await waiting == "c"
        # Both were free by then; the one used longest ago made room.
        assert shelf.names == ["b", "c"]

    within(test)


def test_many_requests_for_a_missing_model_load_it_once_and_others_answer_meanwhile() -> None:
    async def test(shelf: Shelf) -> None:
        await use(shelf, "a")
        shelf.gate.clear()
        waiting = [asyncio.create_task(use(shelf, "b")) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert await use(shelf, "a") == "a"
        assert not any(one.done() for one in waiting)
        shelf.gate.set()
        assert await asyncio.gather(*waiting) == ["b"] * 5

    assert within(test).loads == ["a", "b"]


def test_a_load_goes_on_when_the_request_that_began_it_leaves() -> None:
    async def test(shelf: Shelf) -> None:
        shelf.gate.clear()
        first = asyncio.create_task(use(shelf, "a"))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(use(shelf, "a"))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        shelf.gate.set()
        assert await second == "a"

    assert within(test).loads == ["a"]


def test_a_load_that_fails_is_told_without_a_path_and_may_be_tried_again() -> None:
    async def test(shelf: Shelf) -> None:
        await use(shelf, "a")
        shelf.failing.add("b")
        with pytest.raises(ServiceError, match="could not be loaded") as caught:
            await use(shelf, "b")
        assert "private" not in str(caught.value)
        with pytest.raises(IntegrityError) as held:
            await shelf.held.hold(release("b"), beside=["a"])
        assert why(held.value) == "the bytes are wrong. Register it again."
        assert shelf.names == ["a"]
        shelf.failing.clear()
        assert await use(shelf, "b") == "b"

    within(test)


def test_a_model_is_held_beside_what_stays_or_refused_and_nothing_changes() -> None:
    async def test(shelf: Shelf) -> None:
        for name in ("small", "a"):
            await use(shelf, name)
        assert await shelf.held.hold(release("b"), beside=["a"]) == 40
        assert shelf.names == ["small", "a", "b"]
        with pytest.raises(LimitError, match="beside 40 that stay"):
            await shelf.held.hold(release("large"), beside=["a"])
        with pytest.raises(LimitError, match="takes 101 bytes"):
            await shelf.held.hold(release("huge"), beside=[])
        assert shelf.names == ["small", "a", "b"]

    within(test)


def test_a_retired_model_leaves_when_it_has_no_work_and_its_memory_comes_free() -> None:
    async def test(shelf: Shelf) -> None:
        await use(shelf, "b")
        async with shelf.held.borrowed(release("a")) as model:
            shelf.held.retire("a")
            shelf.held.retire("b")
            shelf.held.retire("unknown")
            assert shelf.names == ["a"]
            gone = weakref.ref(model)
        del model
        assert shelf.names == []
        gc.collect()
        assert gone() is None
        # Wanted again after all, as when a rollout goes back.
        await shelf.held.hold(release("a"), beside=[])
        assert await use(shelf, "a") == "a"
        assert shelf.names == ["a"]

    within(test)


def test_a_replica_begins_with_what_has_room_and_refuses_a_first_model_that_is_too_large() -> None:
    shelf = Shelf()
    shelf.held.start_with([release(name) for name in ("a", "b", "c", "small", "a")])
    assert shelf.names == ["a", "b", "small"]
    with pytest.raises(LimitError, match="max_model_bytes"):
        Shelf().held.start_with([release("huge")])


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no answer from https://tracker.internal:5000/api/2.0.", "no answer from …"),
        ("sqlite:////srv/mlflow.db cannot be opened.", "… cannot be opened."),
        ("no file '/srv/models/a b'.", "no file '… b'."),
        ("s3://bucket/model is not there.", "… is not there."),
        ("models:/encoder/7 is not registered, 1/2 are.", "models:/encoder/7 is not registered, 1/2 are."),
    ],
)
def test_what_went_wrong_is_told_without_places(what: str, said: str) -> None:
    assert why(IntegrityError(what)) == said
