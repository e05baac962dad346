"""The one place at which a model works: what waits while it does goes into its next batch together.

Ray Serve's own batching closes a batch a fixed time after its first request, whether or not the model is free; so a
batch holds what came within that time, all the others queue as batches of one, and a request that comes alone waits for
nobody. Here a batch is closed when the model is free to take it: nobody waits for company, and under load batches are
as full as the budget allows.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Work = TypeVar("Work")
Done = TypeVar("Done")
Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[Work, Done]):
    carry_out: Callable[[Sequence[Work]], Sequence[Done]]
    work: Work
    cost: int
    done: asyncio.Future[Done]


class Lane(Generic[Work, Done]):
    """One thread that carries out batches of at most `budget` tokens, each by one function (of one model), in order.

    The oldest waiting work is always in the next batch, and what fits beside it of the same function, the oldest first:
    so nothing is overtaken for ever, and what is short can go ahead of what does not fit.
    """

    def __init__(
        self,
        budget: int,
        *,
        wait_s: float = 0.0,
        ran: Callable[[Sequence[Work], Sequence[Done]], None] = lambda works, outcomes: None,
    ) -> None:
        """`wait_s` is waited before each batch; `ran` is told of each batch and its outcomes, on the event loop."""
        self.budget, self._wait_s, self._ran = budget, wait_s, ran
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="genescale-model")
        self._waiting: deque[_Waiting[Work, Done]] = deque()
        self._runner: asyncio.Task[None] | None = None

    async def run(self, carry_out: Callable[[Sequence[Work]], Sequence[Done]], work: Work, cost: int) -> Done:
        """What `carry_out` gives for `work`, beside others that it is to carry out; raises what it raises.

        It runs on the thread, once for a batch. Work whose caller was cancelled before its batch began is left out.
        """
        done: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(carry_out, work, cost, done))
        if self._runner is None:
            # What it logs belongs to no single request.
            self._runner = asyncio.create_task(self._work_off(), context=contextvars.Context())
        return await done

    async def call(self, function: Callable[[], Found]) -> Found:
        """What `function` gives on the thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _work_off(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                if self._wait_s:
                    await asyncio.sleep(self._wait_s)
                if batch := self._next_batch():
                    await self._carry_out(loop, batch)
        finally:
            self._runner = None

    async def _carry_out(self, loop: asyncio.AbstractEventLoop, batch: Sequence[_Waiting[Work, Done]]) -> None:
        works = [one.work for one in batch]
        try:
            found = await loop.run_in_executor(self._thread, batch[0].carry_out, works)
            self._ran(works, found)
        # Whoever asked gets it, whatever it was.
        except Exception as error:  # noqa: BLE001
            for one in batch:
                if not one.done.done():
                    one.done.set_exception(error)
            return
        for one, outcome in zip(batch, found, strict=True):
            if not one.done.done():
                one.done.set_result(outcome)

    def _next_batch(self) -> list[_Waiting[Work, Done]]:
        """The oldest work and what fits beside it; the rest stays, in its order. Empty when all callers have left."""
        waiting = [one for one in self._waiting if not one.done.done()]
        batch: list[_Waiting[Work, Done]] = []
        left, total = deque[_Waiting[Work, Done]](), 0
        for one in waiting:
            if not batch or (one.carry_out == batch[0].carry_out and total + one.cost <= self.budget):
                batch.append(one)
                total += one.cost
            else:
                left.append(one)
        self._waiting = left
        return batch
