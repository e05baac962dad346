"""A run's requests, a few at a time: on threads, or on an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from genescale.client.questions import Question
from genescale.client.records import EmbeddingsAnswer
from genescale.client.runs import EmbeddingRun
from genescale.client.sources import Whole
from genescale.platform.errors import GenescaleError, SettingsError

AT_ONCE = 4
"""Requests under way: one is computed while others are written, sent and read."""
Outcome = EmbeddingsAnswer | GenescaleError


def run_on_threads(
    run: EmbeddingRun, ask: Callable[[Question[EmbeddingsAnswer], threading.Event], EmbeddingsAnswer], at_once: int
) -> None:
    """Send all of a run, `at_once` requests at a time; raises what the run raises, and sends nothing after it.

    `ask` is also given an event that is set when nobody waits for the answer any more.
    """
    over = threading.Event()

    def outcome(question: Question[EmbeddingsAnswer]) -> Outcome:
        try:
            return ask(question, over)
        except GenescaleError as error:
            return error

    _check_at_once(at_once)
    running: dict[Future[Outcome], Whole] = {}
    pool = ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="genescale-client")
    try:
        while run.waits or running:
            while run.waits and len(running) < at_once:
                batch = run.next_batch()
                running[pool.submit(outcome, run.question(batch))] = batch
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run.settle(running.pop(future), future.result())
    finally:
        # After an error nobody waits for the others.
        over.set()
        pool.shutdown(wait=False, cancel_futures=True)


async def run_on_loop(
    run: EmbeddingRun, ask: Callable[[Question[EmbeddingsAnswer]], Awaitable[EmbeddingsAnswer]], at_once: int
) -> None:
    """Send all of a run, `at_once` requests at a time; raises what the run raises, and ends the others then."""

    async def outcome(question: Question[EmbeddingsAnswer]) -> Outcome:
        try:
            return await ask(question)
        except GenescaleError as error:
            return error

    _check_at_once(at_once)
    running: dict[asyncio.Task[Outcome], Whole] = {}
    try:
        while run.waits or running:
            while run.waits and len(running) < at_once:
                batch = run.next_batch()
                question = await asyncio.to_thread(run.question, batch)
                running[asyncio.create_task(outcome(question))] = batch
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                run.settle(running.pop(task), task.result())
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _check_at_once(at_once: int) -> None:
    if at_once < 1:
        raise SettingsError(f"at_once is {at_once}.", where="client", fix="Use 1 or more.")
