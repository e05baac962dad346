"""What the routes of models accept and answer: part of the HTTP contract in `schemas.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from genescale.serving.schemas import Answered, Asked, HeadFacts, VocabularyFacts

Alias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")]
Number = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,9}$")]


class VersionAnswered(Answered):
    """One version of a model."""

    model: str = Field(description="Its name in the registry, or that of its folder.")
    version: str
    alias: str | None = Field(description="The alias that stood for it when it was deployed; null for none.")
    digest: str
    vocabulary: VocabularyFacts
    heads: list[HeadFacts]
    neighbors: bool = Field(description="Whether it answers `/v1/neighbors`.")
    share: float = Field(description="Of the requests to this name that it answers.")
    size_bytes: int | None = Field(description="Memory of its weights; null while no replica has them.")
    loaded_on: int = Field(description="Replicas that have it in memory; others load it when they are asked.")


class RolloutFacts(Answered):
    """How the last rollout goes or went."""

    id: str
    asked: str = Field(description="`@ALIAS`, a version, or `back`.")
    share: float = Field(description="Of requests, for a canary; 0 for all, for good.")
    state: Literal["running", "succeeded", "failed"]
    step: Literal["resolve", "load", "prepare", "switch", "finish", "done"]
    version: str | None = Field(description="What was found; null while nothing is.")
    digest: str | None
    message: str = Field(description="How it ended, and what to do if it failed.")
    started_at: str
    finished_at: str | None


class ModelAnswered(VersionAnswered):
    """What answers under one name: the current version, and a candidate if there is one."""

    name: str = Field(description="What questions call it: `?model=NAME`.")
    default: bool = Field(description="Whether it answers questions that name no model.")
    candidate: VersionAnswered | None = Field(description="A version that answers a share of the requests.")
    before: list[str] = Field(description="Versions that answered before, the newest first: where `back` leads.")
    rollout: RolloutFacts | None


class ModelsAnswered(Answered):
    """Everything that answers here, the default first."""

    models: list[ModelAnswered]
    replicas: int = Field(description="Replicas that answered when they were asked what they have loaded.")


class RolloutAsked(Asked):
    """Another version of a model: one of `alias`, `version` and `back`."""

    alias: Alias | None = Field(None, description="Of the registry, resolved now.", examples=["production"])
    version: Number | None = None
    back: bool = Field(False, description="The candidate leaves; without one, the version before answers again.")
    canary: float | None = Field(
        None, gt=0, lt=1, description="Share of requests that the version answers for now, as a candidate."
    )
    accept_losses: bool = Field(
        False,
        description="Go on although the version cannot answer all that the current one can: neighbours in the "
        "reference, a head, a published state.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> RolloutAsked:
        if (self.alias is not None) + (self.version is not None) + self.back != 1:
            raise ValueError("give either alias, or version, or back")
        if self.back and self.canary is not None:
            raise ValueError("back has no canary")
        return self


class RolloutAnswered(Answered):
    """A rollout that began; `GET /v1/models/{name}` says how it goes."""

    model: str
    rollout: RolloutFacts
