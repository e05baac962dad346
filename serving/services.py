"""What stands behind the routes of one HTTP process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from fastapi import Request

from genescale.serving.answering.answers import Answers
from genescale.serving.jobs.asking import Jobs
from genescale.serving.models.desk import ModelsDesk
from genescale.serving.models.state import MODEL_PARAMETER
from genescale.serving.models.versions import Chosen
from genescale.serving.neighbours.answering import NeighborAnswers
from genescale.serving.release import Release
from genescale.serving.watching.noted import note_model
from genescale.serving.watching.reports import Report

CHOSEN = "genescale.chosen"


@dataclass(frozen=True, kw_only=True)
class Services:
    """Who answers; None for what this service was not started with."""

    answers: Answers
    neighbors: NeighborAnswers | None = None
    release: Release | None = None
    """Of the model that answers; None for a model of this process."""
    models: ModelsDesk | None = None
    """All models; None where there is one and it never changes."""
    retry_after_s: int = 1
    """The longest time that a refusal for want of room asks a caller to wait."""
    deployment_run_id: Callable[[], str] = str
    """The id of this deployment's run in the tracker, as far as it is known now; empty while there is none."""
    jobs: Jobs | None = None
    """What takes work that is answered later; None where this service takes no jobs."""
    other_reports: Callable[[], Awaitable[Sequence[Report]]] | None = None
    """What the other processes of the service say of themselves; None where there is only this one."""


def services_of(request: Request) -> Services:
    """The services of the process that answers `request`, with the model that it names and the version that answers it.

    Raises RefusedError with the status 404 for a name of no model.
    """
    services = all_services(request)
    if services.models is None:
        model = services.answers.info.provenance.model
        _note(request, model.name, model.version)
        return services
    # Chosen once: a rollout must not change the version between two steps of one request.
    chosen: Chosen | None = request.scope.get(CHOSEN)
    if chosen is None:
        asked = request.query_params.getlist(MODEL_PARAMETER)
        chosen = services.models.versions.choose(asked, request.scope.get("request_id", ""))
        request.scope[CHOSEN] = chosen
    version = chosen.version
    _note(request, chosen.name, version.release.version)
    return replace(services, answers=version.answers, neighbors=version.neighbors, release=version.release)


def _note(request: Request, name: str, version: str) -> None:
    """Count the request under this model, whatever becomes of it; facts and probes ask no model."""
    if request.method == "POST":
        note_model(name, version)


def all_services(request: Request) -> Services:
    """The services of the process, whatever model is asked."""
    services: Services = request.app.state.services
    return services
