"""Addresses of what there is to see of a reference."""

from __future__ import annotations

import asyncio
import re

from fastapi import Request, Response

from genescale.platform.errors import InputError
from genescale.serving.described import parameter
from genescale.serving.neighbours.answering import NeighborAnswers
from genescale.serving.neighbours.contract import ExamplesAnswered, MapAnswered
from genescale.serving.routing import Route, json_answer
from genescale.serving.services import services_of

MOST_SHOWN = 20_000
"""Cells of one map: beyond it a page holds megabytes, and a picture of its size shows nothing more."""
SHOWN = 10_000
LIMIT = re.compile(r"[1-9][0-9]{0,8}")


async def _reference_map(request: Request) -> Response:
    """Cells of the reference in two dimensions."""
    return json_answer(await asyncio.to_thread(neighbors_of(request).view.map, _limit(request)))


async def _reference_examples(request: Request) -> Response:
    """A few cells of the reference to ask about."""
    return json_answer(await asyncio.to_thread(neighbors_of(request).view.examples))


def neighbors_of(request: Request) -> NeighborAnswers:
    """Who finds neighbours for the model that is asked; InputError where it has no reference."""
    neighbors = services_of(request).neighbors
    if neighbors is None:
        raise InputError("this service has no reference.", fix="Ask a service that was started with --index.")
    return neighbors


def _limit(request: Request) -> int:
    given = request.query_params.getlist("limit") or [str(SHOWN)]
    if len(given) != 1 or not LIMIT.fullmatch(given[0]) or int(given[0]) > MOST_SHOWN:
        raise InputError(
            "the limit is no whole number that is allowed.", where="limit", fix=f"Use 1 to {MOST_SHOWN:,}, once."
        )
    return int(given[0])


LIMIT_PARAMETER = parameter(
    "limit",
    "query",
    {"type": "integer", "minimum": 1, "maximum": MOST_SHOWN, "default": SHOWN},
    "Cells that are wanted at most; of a larger reference as many at random, always the same.",
)
VIEW_REFUSALS = (401, 403, 422, 429, 500, 503)
REFERENCE_ROUTES = (
    Route(
        method="GET",
        path="/v1/reference/map",
        endpoint=_reference_map,
        answered=MapAnswered,
        refusals=VIEW_REFUSALS,
        extra={"parameters": [LIMIT_PARAMETER]},
    ),
    Route(
        method="GET",
        path="/v1/reference/examples",
        endpoint=_reference_examples,
        answered=ExamplesAnswered,
        refusals=VIEW_REFUSALS,
    ),
)
