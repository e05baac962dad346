"""The models of one HTTP process: made ready here, loaded at the replicas, kept in step with what is current."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from genescale.platform.log import get_logger
from genescale.platform.settings import Settings
from genescale.serving.answering.answers import Answers
from genescale.serving.answering.published_states import PublishedStates, of_model
from genescale.serving.config import ServingConfig
from genescale.serving.facts import describe
from genescale.serving.models.desk import Held
from genescale.serving.models.fleet import begin_rollout, rollout_facts
from genescale.serving.models.record import Record
from genescale.serving.models.rollout import Wanted
from genescale.serving.models.state import ModelsState
from genescale.serving.models.versions import Version, Versions
from genescale.serving.neighbours.answering import NeighborAnswers
from genescale.serving.neighbours.reference import Reference
from genescale.serving.release import Release
from genescale.serving.replicas import ServedModel, cache_folder

# A switch is told at once; this finds one that was told while this process started.
LOOK_EVERY_S = 1.0
CALL_TIMEOUT_S = 3.0
log = get_logger(__name__)


class VersionMaker:
    """Makes releases ready to answer: their vocabulary, their facts, and a way to the replicas."""

    def __init__(
        self,
        handle: DeploymentHandle,
        reference: Reference | None,
        states: PublishedStates,
        config: ServingConfig,
        settings: Settings,
    ) -> None:
        self._handle, self._reference, self._config, self._settings = handle, reference, config, settings
        self._states = states
        self._places = asyncio.Semaphore(config.max_ongoing * config.replicas)

    def __call__(self, release: Release) -> Version:
        """The release, ready; raises what opening its bundle raises."""
        bundle = release.open(self._settings, cache_folder(self._config))
        reference = self._reference
        if reference is not None and reference.manifest.bundle_digest != release.digest:
            reference = None
        published = of_model(self._states, release.digest, bundle.config["hidden_size"])
        info = describe(
            release,
            bundle,
            self._config,
            reference=reference.facts if reference else None,
            states=[state.facts for state in published.values()],
        )
        model = ServedModel(self._handle, release, self._places)
        answers = Answers(model, bundle.vocabulary, info, self._config.limits, published)
        return Version(
            release=release,
            answers=answers,
            neighbors=NeighborAnswers(answers, reference) if reference else None,
        )


class RayModels:
    """The desk for models of an HTTP process behind Ray Serve."""

    def __init__(
        self,
        make: VersionMaker,
        handle: DeploymentHandle,
        initial: ModelsState,
        config: ServingConfig,
        settings: Settings,
    ) -> None:
        self._handle, self._initial, self._config, self._settings = handle, initial, config, settings
        self._record = Record(config.application)
        self.versions = Versions(self._record.begin(initial), make)
        threading.Thread(target=self._follow, name="genescale-models", daemon=True).start()

    async def held(self) -> list[Held]:
        """What each replica that answers has loaded."""
        try:
            response = self._handle.broadcast("held")
            found = await response.results_async(timeout_s=CALL_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException):
            return []
        return [{one.digest: one.size_bytes for one in each} for each in found if not isinstance(each, Exception)]

    async def rollout(self, name: str) -> dict[str, Any] | None:
        """How the last rollout of a name goes or went."""
        return await asyncio.to_thread(rollout_facts, name, self._config.application)

    async def begin(self, wanted: Wanted) -> dict[str, Any]:
        """Start a rollout; ConflictError while there is another one."""
        return await asyncio.to_thread(begin_rollout, wanted, self._initial, self._config, self._settings)

    def _follow(self) -> None:
        waiting, told = threading.Event(), False
        while not waiting.wait(LOOK_EVERY_S):
            try:
                self.versions.adopt(self._record.current(self._initial))
                told = False
            # Ray's control service may be away for a while: what is current is then looked up later, and said once.
            except Exception as error:  # noqa: BLE001
                if not told:
                    log.warning("what is current could not be looked up: %s", type(error).__name__)
                told = True
