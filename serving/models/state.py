"""Which version answers under which name: immutable, with one function for each way it may change.

start                  current v1
with_candidate(v2, s)  current v1, candidate v2 with the share s of requests
promoted(v2)           current v2, before (v1)
without_candidate()    current v1
back()                 current v1 again, after a promotion
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from genescale.platform.errors import InputError, SettingsError, did_you_mean
from genescale.serving.release import Release

MODEL_PARAMETER = "model"
"""The query parameter that names a model."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Enough to go back over a bad week; the bytes of old versions are in the registry, not here.
MOST_BEFORE = 10


@dataclass(frozen=True, kw_only=True)
class ServedName:
    """What answers under one name."""

    name: str
    current: Release
    before: tuple[Release, ...] = ()
    """Versions that answered earlier, the newest last."""
    candidate: Release | None = None
    share: float = 0.0
    """Of requests that the candidate answers; 0 without one."""

    @property
    def releases(self) -> tuple[Release, ...]:
        """All that answer now."""
        return (self.current, self.candidate) if self.candidate else (self.current,)

    @property
    def registered_name(self) -> str:
        """The name in the registry that versions are looked up under."""
        return self.current.name if self.current.is_registered else self.name

    def chosen(self, request_id: str) -> Release:
        """The release that answers this request: the same one for the same id, whoever is asked.

        Only what stands before the first colon counts, so that requests that belong together can stay together.
        """
        if self.candidate is None:
            return self.current
        group = request_id.partition(":")[0]
        drawn = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
        return self.candidate if drawn < self.share else self.current

    def with_candidate(self, release: Release, share: float) -> ServedName:
        """`release` answers `share` of the requests."""
        if not 0 < share < 1:
            raise InputError(f"the share is {share}.", where="canary", fix="Use a number between 0 and 1.")
        return replace(self, candidate=release, share=share)

    def promoted(self, release: Release) -> ServedName:
        """`release` answers every request."""
        before = (*self.before, self.current)[-MOST_BEFORE:] if release.key != self.current.key else self.before
        return replace(self, current=release, before=before, candidate=None, share=0.0)

    def without_candidate(self) -> ServedName:
        """The current version answers every request again."""
        return replace(self, candidate=None, share=0.0)

    def back(self) -> ServedName:
        """The candidate leaves; without one, the version before answers. InputError when there is neither."""
        if self.candidate is not None:
            return self.without_candidate()
        if not self.before:
            raise InputError(
                f"'{self.name}' has no candidate, and no version before {self.current.version}.",
                where="back",
                fix="Name a version to roll out.",
            )
        return replace(self, current=self.before[-1], before=self.before[:-1])


@dataclass(frozen=True, kw_only=True)
class ModelsState:
    """What answers under every name of a service; the first name is the default."""

    base: str
    """Digest of what was deployed: a state belongs to one deployment, and a new one begins its own."""
    generation: int = 0
    """Grows by one with each change."""
    names: tuple[ServedName, ...]

    @property
    def default(self) -> ServedName:
        """What answers a question that names no model."""
        return self.names[0]

    @property
    def releases(self) -> Iterator[Release]:
        """All that answer now, the default's first."""
        return (release for name in self.names for release in name.releases)

    def find(self, name: str) -> ServedName | None:
        """What answers under `name`; None for an unknown one."""
        return next((one for one in self.names if one.name == name), None)

    def changed(self, name: ServedName) -> ModelsState:
        """The next generation, with another entry for one name."""
        names = tuple(name if one.name == name.name else one for one in self.names)
        return replace(self, names=names, generation=self.generation + 1)

    def to_json(self) -> bytes:
        """As stored."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ModelsState:
        """As stored by `to_json`."""
        content = json.loads(data)
        return cls(
            base=content["base"],
            generation=content["generation"],
            names=tuple(_name_of(one) for one in content["names"]),
        )


def initial_state(releases: Mapping[str, Release]) -> ModelsState:
    """The state of a deployment that just began."""
    keys = json.dumps([(name, release.key) for name, release in releases.items()])
    return ModelsState(
        base=hashlib.sha256(keys.encode()).hexdigest(),
        names=tuple(ServedName(name=name, current=release) for name, release in releases.items()),
    )


def check_name(name: str, where: str) -> None:
    """SettingsError for what cannot be a model's name in a question."""
    if not NAME.fullmatch(name):
        raise SettingsError(
            f"'{name}' cannot be the name of a model.",
            where=where,
            fix="Use up to 64 letters, digits, dots, dashes and underscores.",
        )


def no_such_model(name: str, known: list[str]) -> str:
    """What to say of an unknown name."""
    hint = did_you_mean(name, known)
    return f"no model is called '{name}' here. {hint} It has: {', '.join(known)}.".replace("  ", " ")


def _name_of(content: dict[str, Any]) -> ServedName:
    candidate = content["candidate"]
    return ServedName(
        name=content["name"],
        current=Release(**content["current"]),
        before=tuple(Release(**one) for one in content["before"]),
        candidate=Release(**candidate) if candidate else None,
        share=content["share"],
    )
