"""How a process of the service tells the watcher its numbers, and learns what the others said.

A task of the process's own event loop, so a process whose loop stands still is one that is not heard of any more. While
the watcher cannot be reached nothing waits for it: the next report holds everything, because counters only grow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from genescale.platform.log import get_logger
from genescale.serving.watching.board import REPORT_EVERY_S
from genescale.serving.watching.reports import Report

WATCHER = "Watcher"
# A scraper waits ten seconds for everything.
CALL_TIMEOUT_S = 2.0
Collect = Callable[[], Awaitable[Report]]
log = get_logger(__name__)


class Reporter:
    """Reports every `every_s`, once it was started; `find_watcher` may take its time, and fail."""

    def __init__(self, find_watcher: Callable[[], Any], *, every_s: float = REPORT_EVERY_S) -> None:
        self._find_watcher, self._every_s = find_watcher, every_s
        self._watcher: Any = None
        self._collect: Collect | None = None
        self._task: asyncio.Task[None] | None = None
        self._own = ""
        self._run_id = ""
        self.reachable = False
        """Whether the watcher answered when it was last asked."""

    def start(self, collect: Collect) -> None:
        """Begin to report what `collect` says, in the running event loop."""
        self._collect = collect
        self._task = asyncio.get_running_loop().create_task(self._report_for_ever())

    def run_id(self) -> str:
        """The deployment's run in the tracker, as the watcher knows it; empty while there is none."""
        return self._run_id

    async def tell(self) -> None:
        """Report now; returns after CALL_TIMEOUT_S at the latest, whether it was heard or not."""
        if self._collect is None:
            return
        report = await self._collect()
        self._own = report.process
        heard = await self._asked("report", report)
        self._run_id = heard or self._run_id

    async def others(self) -> list[Report]:
        """The newest reports of the other processes and of the watcher itself; none while it cannot be reached."""
        return [report for report in await self._asked("reports") or () if report.process != self._own]

    async def _report_for_ever(self) -> None:
        while True:
            try:
                await self.tell()
            # A fault in our numbers must not end them for ever.
            except Exception as error:
                log.error("the numbers of this process could not be read", exc_info=error)
            await asyncio.sleep(self._every_s)

    async def _asked(self, method: str, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                if self._watcher is None:
                    self._watcher = await asyncio.to_thread(self._find_watcher)
                answer = await getattr(self._watcher, method).remote(*arguments)
        # Serve and Ray have a dozen errors for "not there"; none of them may end the reports.
        except Exception as error:  # noqa: BLE001
            if self.reachable:
                log.warning("the watcher cannot be reached (%s)", type(error).__name__)
            self.reachable = False
            return None
        self.reachable = True
        return answer


def reporter_in(application: str) -> Reporter:
    """A reporter to the watcher of a Serve application."""

    def find() -> Any:
        from ray import serve

        return serve.get_deployment_handle(WATCHER, app_name=application)

    return Reporter(find)
