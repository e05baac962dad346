"""`GET /metrics`: the numbers of every process of the service, whoever of them is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response

from genescale.platform.errors import GenescaleError
from genescale.platform.log import get_logger
from genescale.serving.routing import FACTS, OF_DEADLINES, REFUSALS
from genescale.serving.schemas import ErrorAnswered
from genescale.serving.services import Services
from genescale.serving.watching.http_numbers import HttpNumbers
from genescale.serving.watching.reports import Report, page

METRICS = "/metrics"
# A scraper waits ten seconds in all; a model that does not answer in one is not ready.
PROBE_TIMEOUT_S = 1.0
OPEN_METRICS = "application/openmetrics-text"
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What an HTTP process knows for its metrics: its own numbers, and how to ask for those of the others."""

    numbers: HttpNumbers
    services: Services

    async def report(self) -> Report:
        """The numbers of this process now, and whether its model answers."""
        ready = await _is_ready(self.services)
        self.numbers.ready.set(ready and not self.numbers.room.draining)
        return await asyncio.to_thread(self.numbers.report)

    async def others(self) -> Sequence[Report]:
        """Those of the other processes; none where there are none."""
        return await self.services.other_reports() if self.services.other_reports else ()

    async def jobs(self) -> Sequence[Report]:
        """Those of the supervisor of jobs, which is no part of the service and stays when it ends."""
        if self.services.jobs is None:
            return ()
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                return (await self.services.jobs.desk.numbers(),)
        # Whatever is wrong with jobs, the rest can still be told.
        except Exception as error:  # noqa: BLE001
            log.warning("the supervisor of jobs could not be asked for its numbers (%s)", type(error).__name__)
            return ()


def add_metrics(app: FastAPI, numbers: HttpNumbers, services: Services) -> None:
    """Let the route of an application answer with these numbers, and those of the other processes."""
    numbers.shares = lambda: served_shares(services)
    app.state.watch = Watch(numbers=numbers, services=services)


def watch_of(app: Any) -> Watch:
    """The watch of an application that `add_metrics` was called with."""
    watch: Watch = app.state.watch
    return watch


def add_metrics_route(app: FastAPI) -> None:
    """Make the application answer at METRICS."""
    text = {"schema": {"type": "string"}}
    responses: dict[int | str, dict[str, object]] = {
        200: {"content": {"text/plain": text, OPEN_METRICS: text}, "description": "Text for Prometheus."}
    }
    for status in sorted({*FACTS, *OF_DEADLINES}):
        responses[status] = {"model": ErrorAnswered, "description": REFUSALS[status]}
    app.add_api_route(
        METRICS,
        _metrics,
        methods=["GET"],
        response_class=Response,
        responses=responses,
        operation_id="metrics",
        summary="Numbers of every process of the service, for Prometheus",
    )


def served_shares(services: Services) -> Mapping[tuple[str, str], float]:
    """The share of requests that each version of each model answers, by name and version."""
    if services.models is None:
        model = services.answers.info.provenance.model
        return {(model.name, model.version): 1.0}
    shares: dict[tuple[str, str], float] = {}
    for one in services.models.versions.state.names:
        shares[one.name, one.current.version] = 1.0 - one.share
        if one.candidate is not None:
            shares[one.name, one.candidate.version] = one.share
    return shares


async def _metrics(request: Request) -> Response:
    watch = watch_of(request.app)
    own, others, jobs = await asyncio.gather(watch.report(), watch.others(), watch.jobs())
    text, content_type = await asyncio.to_thread(page, [own, *others, *jobs], request.headers.get("accept", ""))
    return Response(text, headers={"content-type": content_type})


async def _is_ready(services: Services) -> bool:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            await services.answers.ready()
    except (TimeoutError, GenescaleError):
        return False
    return True
