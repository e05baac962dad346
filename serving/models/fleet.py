"""The replicas and HTTP sides of a running service, as a rollout sees them; and the process that a rollout runs in.

A rollout has a process of its own, which is there only meanwhile: looking into the registry takes seconds of a
processor, which must not be those of an HTTP side, and it goes on when the HTTP side that was asked dies. Its name is
taken once in the cluster, so there is one rollout at a time.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from genescale.platform.errors import ConflictError, GenescaleError, ServiceError
from genescale.platform.log import get_logger
from genescale.platform.settings import Settings
from genescale.serving.config import ServingConfig
from genescale.serving.models.record import NAMESPACE, Record
from genescale.serving.models.rollout import ASK_EVERY_S, Rollout, Wanted, moment
from genescale.serving.models.state import ModelsState
from genescale.serving.release import Release, resolve

REPLICAS = "ModelReplica"
# Fetching and loading takes as long as the model is large; this only ends what hangs.
LOAD_TIMEOUT_S = 1800.0
CALL_TIMEOUT_S = 30.0
log = get_logger(__name__)


class RayFleet:
    """The fleet of one Serve application."""

    def __init__(self, name: str, initial: ModelsState, config: ServingConfig, settings: Settings) -> None:
        from genescale.serving.replicas import cache_folder

        self._name, self._initial, self._settings = name, initial, settings
        self._cache = cache_folder(config)
        self._record = Record(config.application)
        self._http = serve.get_app_handle(config.application)
        self._replicas = serve.get_deployment_handle(REPLICAS, config.application)

    def current(self) -> ModelsState:
        """What answers now."""
        return self._record.current(self._initial)

    def resolve(self, address: str) -> Release:
        """The release behind an address of the registry; raises TrackingError and IntegrityError."""
        return resolve(address, self._settings, self._cache)

    def hold(self, release: Release, beside: Sequence[str]) -> None:
        """Load a release on every replica, beside the models with these digests; raises ServiceError."""
        _all(self._replicas, "hold", release, tuple(beside), timeout_s=LOAD_TIMEOUT_S)

    def prepare(self, release: Release) -> frozenset[str]:
        """Make every HTTP side ready for a release; what it can answer beside embeddings. Raises ServiceError."""
        return frozenset.intersection(*_all(self._http, "prepare_version", release, timeout_s=LOAD_TIMEOUT_S))

    def commit(self, state: ModelsState) -> None:
        """Write down what answers from now on, and tell every HTTP side."""
        self._record.write(state)
        _as_many_as_possible(self._http, "adopt", state)

    def in_work(self, release: Release) -> int:
        """Questions that a release is still working on."""
        return sum(_as_many_as_possible(self._http, "in_work", release))

    def leave(self, release: Release, *, unload: bool) -> None:
        """Every HTTP side forgets a release; every replica unloads its model, if that is wanted."""
        _as_many_as_possible(self._http, "forget", release)
        if unload:
            _as_many_as_possible(self._replicas, "retire", release.digest)

    def tell(self, facts: dict[str, Any]) -> None:
        """Let it be known how the rollout goes."""
        self._record.tell_rollout(self._name, facts)


class RolloutProcess:
    """What carries out one rollout, and ends."""

    def run(self, wanted: Wanted, initial: ModelsState, config: ServingConfig, settings: Settings, id_: str) -> None:
        """Carry it out; its record says how it ended."""
        from genescale.serving.replicas import prepare_process

        prepare_process(settings, config)
        try:
            fleet = RayFleet(wanted.name, initial, config, settings)
            Rollout(wanted, fleet, begun(id_, wanted), patience_s=config.limits.deadline_s).run()
        finally:
            # An actor that exits by itself waits for the threads of Serve's handles, which never end.
            ray.kill(ray.get_runtime_context().current_actor)


def begun(id_: str, wanted: Wanted) -> dict[str, Any]:
    """What is known of a rollout when it begins."""
    asked = "back" if wanted.back else f"@{wanted.alias}" if wanted.alias else wanted.version
    return {
        "id": id_,
        "asked": asked,
        "share": wanted.share,
        "state": "running",
        "step": "resolve",
        "version": None,
        "digest": None,
        "message": "",
        "started_at": moment(),
        "finished_at": None,
    }


def begin_rollout(wanted: Wanted, initial: ModelsState, config: ServingConfig, settings: Settings) -> dict[str, Any]:
    """Start a rollout in a process of its own; ConflictError while there is another one."""
    record = Record(config.application)
    actor = _new_process(config.application, [one.name for one in initial.names], record)
    facts = begun(uuid.uuid4().hex, wanted)
    try:
        record.tell_rollout(wanted.name, facts)
        actor.run.remote(wanted, initial, config, settings, facts["id"])
    except BaseException:
        # It ends with its run; without one it would stand in the way of every other rollout.
        ray.kill(actor)
        raise
    return facts


def _new_process(application: str, names: Sequence[str], record: Record) -> Any:
    # It outlives the HTTP side that starts it.
    options = {"name": _actor_name(application), "namespace": NAMESPACE, "lifetime": "detached"}
    until_s = time.monotonic() + CALL_TIMEOUT_S
    while True:
        try:
            return ray.remote(num_cpus=0, max_restarts=0)(RolloutProcess).options(**options).remote()
        except ValueError:
            told = [facts["state"] for name in names if (facts := record.rollout(name))]
            # One that has ended keeps its name until Ray has cleared it away; one that begins says so in a moment.
            if "running" in told or time.monotonic() > until_s:
                raise ConflictError(
                    "another rollout is under way.", where="rollout", fix="Wait until it has ended."
                ) from None
            time.sleep(ASK_EVERY_S)


def rollout_facts(name: str, application: str) -> dict[str, Any] | None:
    """How the last rollout of a name goes or went; one whose process is gone has failed."""
    facts = Record(application).rollout(name)
    if facts is None or facts["state"] != "running" or rollout_runs(application):
        return facts
    # It may have ended between the two questions.
    facts = Record(application).rollout(name) or facts
    if facts["state"] != "running":
        return facts
    return {**facts, "state": "failed", "message": "its process ended before it did; ask again.", "step": facts["step"]}


def rollout_runs(application: str) -> bool:
    """Whether there is a rollout now."""
    try:
        ray.get_actor(_actor_name(application), namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def end_rollout(application: str) -> None:
    """Stop a rollout that runs: its service stops."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(_actor_name(application), namespace=NAMESPACE))


def _actor_name(application: str) -> str:
    return f"genescale-rollout-{application}"


def _all(handle: DeploymentHandle, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
    """What every process answers; raises ServiceError when one cannot, or when there is none."""
    try:
        answers = handle.broadcast(method, *arguments).results(timeout_s=timeout_s, return_exceptions=True)
    except TimeoutError:
        raise ServiceError(f"not every process answered within {timeout_s:g} s.") from None
    except (RayError, RayServeException) as error:
        raise _ours(error) from error
    for answer in answers:
        if isinstance(answer, Exception):
            raise _ours(answer)
    if not answers:
        raise ServiceError("no process of the service answers.", fix="Try again in a moment.")
    return answers


def _as_many_as_possible(handle: DeploymentHandle, method: str, *arguments: Any) -> list[Any]:
    """What those processes answer that can; the others come to the same end by themselves, and are logged."""
    try:
        answers = handle.broadcast(method, *arguments).results(timeout_s=CALL_TIMEOUT_S, return_exceptions=True)
    except (TimeoutError, RayError, RayServeException) as error:
        log.warning("'%s' was not answered: %s", method, type(error).__name__)
        return []
    for answer in answers:
        if isinstance(answer, Exception):
            log.warning("a process did not answer '%s': %s", method, type(answer).__name__)
    return [answer for answer in answers if not isinstance(answer, Exception)]


def _ours(error: Exception) -> GenescaleError:
    cause = getattr(error, "cause", error)
    if isinstance(cause, GenescaleError):
        return cause
    return ServiceError(f"a process went away ({type(cause).__name__}).", fix="Try again in a moment.")
