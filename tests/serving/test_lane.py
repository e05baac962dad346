"""The lane: what waits goes together, within the budget, in order, and only for callers who are still there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genescale.serving.lane import Lane

BUDGET = 10


class Worker:
    """Carries out batches, remembers them, and holds the first one back until it is told to go on."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.began, self.go_on = threading.Event(), threading.Event()

    def a(self, batch: Sequence[str]) -> list[str]:
        """One function."""
        return self._carry_out(batch)

    def b(self, batch: Sequence[str]) -> list[str]:
        """Another one."""
        return self._carry_out(batch)

    def _carry_out(self, batch: Sequence[str]) -> list[str]:
        self.batches.append(list(batch))
        self.began.set()
        assert self.go_on.wait(5)
        if "bad" in batch:
            raise ValueError("a bad batch")
        return [text.upper() for text in batch]


async def while_busy(lane: Lane[str, str], worker: Worker, waiting: Sequence[tuple[str, str, int]]) -> list[object]:
    """Answers (or exceptions) of work that all came while the lane was busy with the work 'first'."""
    first = asyncio.create_task(lane.run(worker.a, "first", 1))
    while not worker.began.is_set():
        await asyncio.sleep(0)
    tasks = [asyncio.create_task(lane.run(getattr(worker, kind), text, cost)) for kind, text, cost in waiting]
    await asyncio.sleep(0)
    worker.go_on.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert await first == "FIRST"
    return list(found)


def test_what_waits_while_the_model_works_goes_together() -> None:
    worker = Worker()
    found = asyncio.run(while_busy(Lane(BUDGET), worker, [("a", "x", 4), ("a", "y", 4), ("a", "z", 2)]))
    assert found == ["X", "Y", "Z"]
    assert worker.batches == [["first"], ["x", "y", "z"]]


def test_what_does_not_fit_is_first_in_the_next_batch_and_what_fits_goes_ahead() -> None:
    worker = Worker()
    asyncio.run(
        while_busy(Lane(BUDGET), worker, [("a", "x", 6), ("a", "long", 6), ("a", "short", 4), ("a", "late", 1)])
    )
    assert worker.batches == [["first"], ["x", "short"], ["long", "late"]]


def test_work_of_two_models_is_never_in_one_batch() -> None:
    worker = Worker()
    asyncio.run(while_busy(Lane(BUDGET), worker, [("a", "x", 1), ("b", "y", 1), ("a", "z", 1), ("b", "w", 1)]))
    assert worker.batches == [["first"], ["x", "z"], ["y", "w"]]


def test_work_above_the_budget_goes_by_itself() -> None:
    worker = Worker()
    asyncio.run(while_busy(Lane(BUDGET), worker, [("a", "huge", 50), ("a", "x", 1)]))
    assert worker.batches == [["first"], ["huge"], ["x"]]


def test_a_batch_that_fails_fails_for_its_callers_only() -> None:
    worker = Worker()
    found = asyncio.run(while_busy(Lane(BUDGET), worker, [("a", "bad", 6), ("a", "its companion", 4), ("a", "x", 9)]))
    assert [type(one) for one in found] == [ValueError, ValueError, str]


def test_who_left_before_its_batch_began_costs_nothing() -> None:
    async def leave() -> list[list[str]]:
        lane, worker = Lane[str, str](BUDGET), Worker()
        first = asyncio.create_task(lane.run(worker.a, "first", 1))
        while not worker.began.is_set():
            await asyncio.sleep(0)
        gone, stays = (asyncio.create_task(lane.run(worker.a, text, 1)) for text in ("gone", "stays"))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        worker.go_on.set()
        assert await asyncio.gather(first, stays) == ["FIRST", "STAYS"]
        return worker.batches

    assert asyncio.run(leave()) == [["first"], ["stays"]]


def test_it_rests_and_starts_again() -> None:
    async def twice() -> list[str]:
        lane, worker = Lane[str, str](BUDGET), Worker()
        worker.go_on.set()
        found = [await lane.run(worker.a, text, 1) for text in ("x", "y")]
        assert await lane.call(lambda: "between") == "between"
        return found

    assert asyncio.run(twice()) == ["X", "Y"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 15)), max_size=12))
def test_everything_is_done_once_and_no_batch_is_too_large(asked: list[tuple[str, int]]) -> None:
    worker = Worker()
    waiting = [(kind, f"{at}", cost) for at, (kind, cost) in enumerate(asked)]
    assert asyncio.run(while_busy(Lane(BUDGET), worker, waiting)) == [text for _, text, _ in waiting]
    carried_out = [text for batch in worker.batches[1:] for text in batch]
    assert sorted(carried_out) == sorted(text for _, text, _ in waiting)
    for batch in worker.batches[1:]:
        works = [asked[int(text)] for text in batch]
        assert len(batch) == 1 or sum(cost for _, cost in works) <= BUDGET
        assert len({kind for kind, _ in works}) == 1
