"""States that are published with a service: saved by `genescale perturb states`, named in requests.

A state is the mean embedding of cells under one model, so each file belongs to the one model whose digest it carries. A
file of another model is refused when the service starts.

Axis suffixes: `d` width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genescale.perturbation.readouts.states_file import read_rows
from genescale.platform.errors import InputError, SettingsError, did_you_mean
from genescale.platform.log import get_logger
from genescale.platform.settings import Settings
from genescale.platform.storage import Store
from genescale.serving.config import ServingConfig
from genescale.serving.release import Release
from genescale.serving.schemas import Layer, Pooling, StateFacts

StateKey = tuple[str, Layer, Pooling]
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedState:
    """One state of one model."""

    name: str
    layer: Layer
    pooling: Pooling
    cells: int
    """Cells that it is the mean of; 0 when unknown."""
    vector_d: np.ndarray
    """float64."""
    model_digest: str

    @property
    def key(self) -> StateKey:
        """What a request must agree with."""
        return self.name, self.layer, self.pooling

    @property
    def facts(self) -> StateFacts:
        """What `/v1/info` says of it."""
        return StateFacts(name=self.name, layer=self.layer, pooling=self.pooling, cells=self.cells or None)


PublishedStates = tuple[PublishedState, ...]


def read_published(uris: Sequence[str], store: Store) -> PublishedStates:
    """Every state of these files; raises InputError for what holds no states, or holds one twice."""
    states: dict[tuple[str, StateKey], PublishedState] = {}
    for uri in uris:
        for row in read_rows(uri, store):
            state = PublishedState(
                name=row["state"],
                layer=row["layer"],
                pooling=row["pooling"],
                cells=row["cells"] or 0,
                vector_d=np.asarray(row["vector"], dtype=np.float64),
                model_digest=row["model_digest"],
            )
            _check(state, uri)
            if (state.model_digest, state.key) in states:
                raise InputError(f"the state '{state.name}' is published twice.", where=uri, fix="Publish it once.")
            states[state.model_digest, state.key] = state
    return tuple(states.values())


def of_model(states: Sequence[PublishedState], digest: str, width: int) -> dict[StateKey, PublishedState]:
    """Those of the model with this digest; SettingsError for one that cannot be compared with its embeddings."""
    found = {state.key: state for state in states if state.model_digest == digest}
    for state in found.values():
        if len(state.vector_d) != width:
            raise SettingsError(
                f"the state '{state.name}' has {len(state.vector_d)} values; the model's embeddings have {width}.",
                where="states",
                fix="Make it again: genescale perturb states.",
            )
    return found


def published_with(releases: Iterable[Release], config: ServingConfig, settings: Settings) -> PublishedStates:
    """The states of the config, read once for a deployment.

    Those of other models than `releases` are kept for a version that is rolled out later. Raises SettingsError when no
    state is of any of `releases`, and what `read_published` raises.
    """
    states = read_published(config.states, Store(settings.storage)) if config.states else ()
    digests = {release.digest for release in releases}
    foreign = sorted({state.model_digest for state in states} - digests)
    if states and not {state.model_digest for state in states} & digests:
        raise SettingsError(
            f"the states are of the model with the digest {', '.join(foreign)}; served: {', '.join(sorted(digests))}.",
            where="states",
            fix="Make them again with the model that is served: genescale perturb states.",
        )
    for digest in foreign:
        log.warning("states of a model that is not served yet, digest %s: kept for its rollout", digest)
    return states


def named_vector(
    published: Mapping[StateKey, PublishedState], name: str, layer: Layer, pooling: Pooling, where: str
) -> np.ndarray:
    """(d) float64: the published state of this name; InputError when there is none that can be compared."""
    if (name, layer, pooling) in published:
        return published[name, layer, pooling].vector_d
    others = [f"layer={key[1]}, pooling={key[2]}" for key in published if key[0] == name]
    if others:
        raise InputError(
            f"the published state '{name}' is of {' and '.join(others)}; this request compares {layer}, {pooling}.",
            where=where,
            fix="Ask with its layer, and the measure 'cls' for the pooling 'cls' only.",
        )
    names = list(dict.fromkeys(key[0] for key in published))
    fix = did_you_mean(name, names) or (
        f"Published: {', '.join(names[:20])}." if names else "This service publishes none: give its vector."
    )
    raise InputError(f"no state '{name}' is published.", where=where, fix=fix)


def _check(state: PublishedState, uri: str) -> None:
    if not state.name or not np.isfinite(state.vector_d).all() or not state.vector_d.any():
        raise InputError(
            f"the state '{state.name}' has no name, or a vector of zeros or of values that are not finite.",
            where=uri,
            fix="Make the file with `genescale perturb states`.",
        )
