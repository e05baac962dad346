"""`/v1/models`: what answers here, and rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request, Response

from genescale.platform.errors import InputError
from genescale.serving.described import parameter
from genescale.serving.forms.reading import read_body
from genescale.serving.models.contract import (
    ModelAnswered,
    ModelsAnswered,
    RolloutAnswered,
    RolloutAsked,
    RolloutFacts,
    VersionAnswered,
)
from genescale.serving.models.desk import Held, ModelsDesk
from genescale.serving.models.rollout import Wanted
from genescale.serving.models.state import ServedName
from genescale.serving.models.versions import unknown
from genescale.serving.release import Release
from genescale.serving.routing import FACTS, QUESTIONS, Route, json_answer, json_body
from genescale.serving.services import all_services

MOST_KEYS = 16
NAME_PARAMETER = {"parameters": [parameter("name", "path", {"type": "string"})]}


async def _models(request: Request) -> Response:
    """List the models that answer here."""
    desk = desk_of(request)
    held = await desk.held()
    rollouts = {served.name: await desk.rollout(served.name) for served in desk.versions.state.names}
    # Put together in one go: what is current may change at any wait.
    models = [_model_answered(desk, served, held, rollouts[served.name]) for served in desk.versions.state.names]
    return json_answer(ModelsAnswered(models=models, replicas=len(held)))


async def _model(request: Request) -> Response:
    """Say what answers under one name, and how its last rollout went."""
    desk, name = desk_of(request), _served(request).name
    held, rollout = await desk.held(), await desk.rollout(name)
    return json_answer(_model_answered(desk, _served(request), held, rollout))


async def _rollout(request: Request) -> Response:
    """Begin to roll out another version, or to go back."""
    body = await json_body(request)
    desk, served = desk_of(request), _served(request)
    asked = read_body(RolloutAsked, body, max_keys=MOST_KEYS)
    if asked.back:
        served.back()
    wanted = Wanted(
        name=served.name,
        alias=asked.alias or "",
        version=asked.version or "",
        back=asked.back,
        share=asked.canary or 0.0,
        accept_losses=asked.accept_losses,
    )
    facts = RolloutFacts(**await desk.begin(wanted))
    return json_answer(RolloutAnswered(model=served.name, rollout=facts), status=202)


def desk_of(request: Request) -> ModelsDesk:
    """The models of the process that answers; InputError where there is one model that never changes."""
    desk = all_services(request).models
    if desk is None:
        raise InputError("this service has one model in its own process, and keeps it.", fix="Ask /v1/info.")
    return desk


def _served(request: Request) -> ServedName:
    name, state = request.path_params["name"], desk_of(request).versions.state
    served = state.find(name)
    if served is None:
        raise unknown(name, state)
    return served


def _model_answered(
    desk: ModelsDesk, served: ServedName, held: Sequence[Held], rollout: Mapping[str, Any] | None
) -> ModelAnswered:
    candidate = served.candidate
    return ModelAnswered(
        **_facts(desk, served.current, 1 - served.share, held),
        name=served.name,
        default=served.name == desk.versions.state.default.name,
        candidate=VersionAnswered(**_facts(desk, candidate, served.share, held)) if candidate else None,
        before=[release.version for release in reversed(served.before)],
        rollout=RolloutFacts(**rollout) if rollout else None,
    )


def _facts(desk: ModelsDesk, release: Release, share: float, held: Sequence[Held]) -> dict[str, Any]:
    version = desk.versions.ready(release)
    sizes = [one[release.digest] for one in held if release.digest in one]
    return {
        "model": release.name,
        "version": release.version,
        "alias": release.alias or None,
        "digest": release.digest,
        "vocabulary": version.answers.info.provenance.vocabulary,
        "heads": version.answers.info.heads,
        "neighbors": version.neighbors is not None,
        "share": share,
        "size_bytes": sizes[0] if sizes else None,
        "loaded_on": len(sizes),
    }


MODEL_ROUTES = (
    Route(method="GET", path="/v1/models", endpoint=_models, answered=ModelsAnswered, refusals=(*FACTS, 422)),
    Route(
        method="GET",
        path="/v1/models/{name}",
        endpoint=_model,
        answered=ModelAnswered,
        refusals=(*FACTS, 404, 422),
        extra=NAME_PARAMETER,
    ),
    Route(
        method="POST",
        path="/v1/models/{name}/rollout",
        endpoint=_rollout,
        asked=RolloutAsked,
        answered=RolloutAnswered,
        refusals=(*QUESTIONS, 404, 409),
        status=202,
        extra=NAME_PARAMETER,
    ),
)
