"""The versions that one HTTP process answers with, and which of them answers a request.

A request keeps the version that it began with: a rollout in the middle of it changes nothing for it. What a process
answers with is swapped as a whole, so every request sees one state.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from genescale.serving.answering.answers import Answers
from genescale.serving.models.state import MODEL_PARAMETER, ModelsState, no_such_model
from genescale.serving.neighbours.answering import NeighborAnswers
from genescale.serving.problems import Problem, RefusedError, refused
from genescale.serving.release import Release
from genescale.serving.schemas import ModelFacts


@dataclass(frozen=True, kw_only=True, eq=False)
class Version:
    """One release, ready to answer in this process."""

    release: Release
    answers: Answers
    neighbors: NeighborAnswers | None = None
    """None where the service has no reference, or one of another model."""
    begun: weakref.WeakSet[Chosen] = field(default_factory=weakref.WeakSet)
    """Requests that it answers now: each holds its choice for as long as it lives."""

    @property
    def able(self) -> frozenset[str]:
        """What it can answer beside embeddings and edits, in words."""
        info = self.answers.info
        heads = (f"the head '{head.label}'" for head in info.heads)
        states = (f"the state '{state.name}' ({state.layer}, {state.pooling})" for state in info.states)
        return frozenset((*(["neighbours in the reference"] if self.neighbors else []), *heads, *states))


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """The version that answers one request, and the name it was asked by."""

    name: str
    version: Version


_Ready = dict[str, Version]
"""Versions by the key of their release."""


class Versions:
    """The versions of one process. `make` makes a release ready: it may take seconds, and raises what opening raises.

    Safe to ask from any thread; changes take turns.
    """

    def __init__(self, state: ModelsState, make: Callable[[Release], Version]) -> None:
        self._make, self._lock = make, threading.Lock()
        # One pair, swapped as a whole: who reads both must not see the state of one moment and the versions of another.
        self._now: tuple[ModelsState, _Ready] = (state, {})
        for release in state.releases:
            self._prepared(release)

    @property
    def state(self) -> ModelsState:
        """What answers under every name now."""
        return self._now[0]

    @property
    def default(self) -> Version:
        """What answers a question that names no model, but for a candidate's share."""
        state, ready = self._now
        return ready[state.default.current.key]

    @property
    def models(self) -> dict[str, ModelFacts]:
        """The current version under every name."""
        state, ready = self._now
        return {one.name: ready[one.current.key].answers.info.provenance.model for one in state.names}

    def choose(self, asked: Sequence[str], request_id: str) -> Chosen:
        """Who answers a request that names these models; RefusedError with the status 404 for an unknown one."""
        if len(asked) > 1:
            raise refused(422, "several models are named.", where=MODEL_PARAMETER)
        state, ready = self._now
        served = state.find(asked[0]) if asked else state.default
        if served is None:
            raise unknown(asked[0], state)
        version = ready[served.chosen(request_id).key]
        chosen = Chosen(name=served.name, version=version)
        version.begun.add(chosen)
        return chosen

    def ready(self, release: Release) -> Version:
        """The version of a release that answers now; KeyError for another one."""
        return self._now[1][release.key]

    def in_work(self, release: Release) -> int:
        """Requests that a release answers now in this process; 0 for one that is not here."""
        version = self._now[1].get(release.key)
        return len(version.begun) if version else 0

    def prepare(self, release: Release) -> Version:
        """Make a release ready, so that it can be adopted at once; raises what `make` raises."""
        with self._lock:
            return self._prepared(release)

    def adopt(self, state: ModelsState) -> int:
        """Answer as `state` says from now on; an older state, or one of another deployment, changes nothing.

        Returns the generation that this process answers with. Raises what `make` raises; nothing changes then.
        """
        with self._lock:
            if state.base == self.state.base and state.generation > self.state.generation:
                for release in state.releases:
                    self._prepared(release)
                self._now = (state, self._now[1])
            return self.state.generation

    def forget(self, release: Release) -> None:
        """Let a release go that nothing names any more; what it is answering goes on."""
        with self._lock:
            state, ready = self._now
            if release.key not in {one.key for one in state.releases}:
                self._now = (state, {key: version for key, version in ready.items() if key != release.key})

    def _prepared(self, release: Release) -> Version:
        state, ready = self._now
        if release.key not in ready:
            ready = {**ready, release.key: self._make(release)}
            self._now = (state, ready)
        return ready[release.key]


def unknown(name: str, state: ModelsState) -> RefusedError:
    """The refusal of a name that nothing answers under."""
    message = no_such_model(name, [one.name for one in state.names])
    return RefusedError(Problem(status=404, code="not_found", message=message, details={"where": MODEL_PARAMETER}))
