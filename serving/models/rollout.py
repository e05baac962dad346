"""A rollout: another version is loaded beside the one that answers, every HTTP side switches, and the old one leaves.

    resolve   the alias becomes a version, at this moment
    load      every replica fetches, verifies, loads and warms it up; the running version goes on answering
    prepare   every HTTP side opens its vocabulary
    switch    what is current is written down, and every HTTP side is told
    finish    what the old version was asked is answered; then it leaves the memory

Whatever goes wrong before the switch leaves everything as it was. After it nothing that goes wrong matters: who missed
the switch reads what is current a moment later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from genescale.platform.errors import GenescaleError, InputError
from genescale.platform.log import get_logger
from genescale.serving.models.held import why
from genescale.serving.models.state import ModelsState, ServedName, no_such_model
from genescale.serving.release import REGISTRY, Release

State = Literal["running", "succeeded", "failed"]
Step = Literal["resolve", "load", "prepare", "switch", "finish", "done"]
ASK_EVERY_S = 0.2
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an operator asks for: a version of a model by alias or number, or the way back."""

    name: str
    alias: str = ""
    version: str = ""
    back: bool = False
    share: float = 0.0
    """Of requests that the version answers for now; 0 for all of them, for good."""
    accept_losses: bool = False
    """Go on when the version cannot answer all that the current one can."""

    def address_in(self, registered_name: str) -> str:
        """Where the registry has it."""
        return f"{REGISTRY}{registered_name}" + (f"@{self.alias}" if self.alias else f"/{self.version}")


class Fleet(Protocol):
    """All replicas and all HTTP sides of a service."""

    def current(self) -> ModelsState:
        """What answers now."""

    def resolve(self, address: str) -> Release:
        """The release behind an address of the registry; raises TrackingError and IntegrityError."""

    def hold(self, release: Release, beside: Sequence[str]) -> None:
        """Load a release on every replica, beside the models with these digests; raises ServiceError."""

    def prepare(self, release: Release) -> frozenset[str]:
        """Make every HTTP side ready for a release; what it can answer beside embeddings. Raises ServiceError."""

    def commit(self, state: ModelsState) -> None:
        """Write down what answers from now on, and tell every HTTP side."""

    def in_work(self, release: Release) -> int:
        """Questions that a release is still working on."""

    def leave(self, release: Release, *, unload: bool) -> None:
        """Every HTTP side forgets a release; every replica unloads its model, if that is wanted."""

    def tell(self, facts: dict[str, Any]) -> None:
        """Let it be known how the rollout goes."""


class Rollout:
    """One rollout, told step by step."""

    def __init__(
        self,
        wanted: Wanted,
        fleet: Fleet,
        facts: dict[str, Any],
        *,
        patience_s: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._wanted, self._fleet, self._facts = wanted, fleet, facts
        self._patience_s, self._sleep = patience_s, sleep

    def run(self) -> None:
        """Carry it out; how it ended is told, never raised."""
        try:
            message = self._carry_out()
        # Whoever asked is told, whatever it was: nobody waits for an exception of this process.
        except Exception as error:
            log.error("a rollout failed", exc_info=error)
            self._tell(state="failed", message=_said(error), finished_at=moment())
        else:
            self._tell(step="done", state="succeeded", message=message, finished_at=moment())

    def _carry_out(self) -> str:
        state = self._fleet.current()
        served = state.find(self._wanted.name)
        if served is None:
            raise InputError(no_such_model(self._wanted.name, [one.name for one in state.names]), where="model")
        after = served.back() if self._wanted.back else self._after(served)
        if after == served:
            return f"version {served.current.version} answers already."
        staying = {release.key for release in served.releases}
        arriving = [release for release in after.releases if release.key not in staying]
        committed = state.changed(after)
        try:
            for release in arriving:
                self._bring(release, served)
            self._tell(step="switch")
            self._switch(committed)
        except BaseException:
            self._take_away(arriving, state)
            raise
        self._tell(step="finish")
        kept = {release.key for release in after.releases}
        self._take_away([release for release in served.releases if release.key not in kept], committed)
        return _outcome(after)

    def _after(self, served: ServedName) -> ServedName:
        self._tell(step="resolve")
        release = self._fleet.resolve(self._wanted.address_in(served.registered_name))
        if not self._wanted.share:
            return served.promoted(release) if release.key != served.current.key or served.candidate else served
        if release.key == served.current.key:
            raise InputError(
                f"version {release.version} answers every request already.",
                where="canary",
                fix="Name another version, or leave the share out.",
            )
        return served.with_candidate(release, self._wanted.share)

    def _bring(self, release: Release, served: ServedName) -> None:
        self._tell(step="load", version=release.version, digest=release.digest)
        self._fleet.hold(release, [one.digest for one in served.releases])
        self._tell(step="prepare")
        able = self._fleet.prepare(release)
        lost = sorted(self._fleet.prepare(served.current) - able)
        if lost and not self._wanted.accept_losses:
            raise InputError(
                f"version {served.current.version} answers for {', '.join(lost)}; version {release.version} cannot.",
                where="accept_losses",
                fix="Deploy the version with what it lacks, or go on without (--accept-losses).",
            )

    def _switch(self, state: ModelsState) -> None:
        try:
            self._fleet.commit(state)
        except Exception as error:
            # Written down it counts, whatever failed then: every HTTP side comes to it by itself.
            if self._fleet.current() != state:
                raise
            log.warning("a switch was written down, and not told to all", exc_info=error)

    def _take_away(self, leaving: Sequence[Release], state: ModelsState) -> None:
        digests = {release.digest for release in state.releases}
        for release in leaving:
            until_s = time.monotonic() + self._patience_s
            while self._fleet.in_work(release) and time.monotonic() < until_s:
                self._sleep(ASK_EVERY_S)
            self._fleet.leave(release, unload=release.digest not in digests)

    def _tell(self, **changes: Any) -> None:
        self._facts = {**self._facts, **changes}
        self._fleet.tell(self._facts)


def moment() -> str:
    """Now, as answers have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _outcome(after: ServedName) -> str:
    if after.candidate:
        return f"version {after.candidate.version} answers {after.share:.2%} of the requests."
    return f"version {after.current.version} answers every request."


def _said(error: Exception) -> str:
    return why(error) if isinstance(error, GenescaleError) else f"a fault of the service: {why(error)}"
