"""What stands behind the routes of one HTTP process."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from genescale.serving.answers import Answers
from genescale.serving.neighbours.answering import NeighborAnswers


@dataclass(frozen=True, kw_only=True)
class Services:
    """Who answers; None for what this service was not started with."""

    answers: Answers
    neighbors: NeighborAnswers | None = None
    retry_after_s: int = 1
    """The longest time that a refusal for want of room asks a caller to wait."""


def services_of(request: Request) -> Services:
    """The services of the process that answers `request`."""
    services: Services = request.app.state.services
    return services
