"""Where a restarted process finds what is current: the store of Ray's control service, beside Serve's own checkpoint.

Whoever dies, be it a replica, an HTTP side or the controller of Serve, starts again with what it was deployed with, and
finds here what was rolled out since. The store lives as long as the cluster; with a Redis behind it, it survives the
head of the cluster as well. A file would be on one node only.
"""

from __future__ import annotations

import json
from typing import Any

from ray.experimental import internal_kv

from genescale.serving.models.state import ModelsState

NAMESPACE = "genescale"


class Record:
    """What one Serve application keeps: what answers under which name, and how the last rollout of each name went.

    Calls go over the network and may block for a moment: not for an event loop. Works wherever Ray is connected.
    """

    def __init__(self, application: str) -> None:
        self._application = application

    def current(self, initial: ModelsState) -> ModelsState:
        """The state now, if it is one of the deployment that began as `initial`; else `initial`."""
        kept = self._kept()
        return kept if kept is not None and kept.base == initial.base else initial

    def begin(self, initial: ModelsState) -> ModelsState:
        """As `current`; what another deployment left is written over, so that going back to it begins anew."""
        kept = self._kept()
        if kept is None:
            # Unless somebody wrote meanwhile: it may be a rollout already.
            self._put(initial, overwrite=False)
        elif kept.base != initial.base:
            self.write(initial)
        return self.current(initial)

    def write(self, state: ModelsState) -> None:
        """From here on this is what answers."""
        self._put(state, overwrite=True)

    def rollout(self, name: str) -> dict[str, Any] | None:
        """What is known of the last rollout of a name."""
        content = internal_kv._internal_kv_get(self._key(f"rollout/{name}"), namespace=NAMESPACE)
        return json.loads(content) if content else None

    def tell_rollout(self, name: str, facts: dict[str, Any]) -> None:
        """Write down how a rollout goes."""
        content = json.dumps(facts).encode()
        internal_kv._internal_kv_put(self._key(f"rollout/{name}"), content, overwrite=True, namespace=NAMESPACE)

    def clear(self) -> None:
        """Forget everything: the application ended, or begins."""
        internal_kv._internal_kv_del(self._key(""), del_by_prefix=True, namespace=NAMESPACE)

    def _kept(self) -> ModelsState | None:
        content = internal_kv._internal_kv_get(self._key("state"), namespace=NAMESPACE)
        return ModelsState.from_json(content) if content else None

    def _put(self, state: ModelsState, *, overwrite: bool) -> None:
        internal_kv._internal_kv_put(self._key("state"), state.to_json(), overwrite=overwrite, namespace=NAMESPACE)

    def _key(self, what: str) -> str:
        return f"models/{self._application}/{what}"
