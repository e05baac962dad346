"""What the routes of models ask: which versions answer, where they are loaded, and for a rollout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from genescale.serving.models.rollout import Wanted
from genescale.serving.models.versions import Versions

Held = Mapping[str, int]
"""What one replica has loaded: bytes of memory by digest."""


class ModelsDesk(Protocol):
    """The models of a service, as one HTTP process sees them."""

    versions: Versions

    async def held(self) -> list[Held]:
        """What each replica that answers has loaded."""

    async def rollout(self, name: str) -> dict[str, Any] | None:
        """How the last rollout of a name goes or went; None when there was none."""

    async def begin(self, wanted: Wanted) -> dict[str, Any]:
        """Start a rollout; ConflictError while there is another one."""
