"""The models behind the HTTP side, as Ray Serve replicas.

A replica holds models beside each other (`models/held.py`) and runs one batch at a time on a thread of its own, so that
its event loop can take requests while torch works. Passes of one model that wait meanwhile go together, up to the token
budget (`lane.py`). Each question says which release it is for, so a
replica needs to know nothing of names and rollouts.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from genescale.perturbation.perturb import EditAnswer, EditRequest
from genescale.platform import log
from genescale.platform.bundle import Bundle
from genescale.platform.errors import GenescaleError, OverloadedError, ServiceError
from genescale.platform.settings import Settings
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.answering.passes import (
    Classified,
    Comparison,
    Outcome,
    Pass,
    Rows,
    RunPass,
    carry_out,
    classify_in_passes,
    embed_in_passes,
    perturb_in_passes,
)
from genescale.serving.config import ServingConfig
from genescale.serving.lane import Lane
from genescale.serving.models.held import HeldModel, HeldModels, why
from genescale.serving.models.record import Record
from genescale.serving.models.state import ModelsState
from genescale.serving.release import Release
from genescale.serving.schemas import Layer
from genescale.serving.watching.model_numbers import ModelNumbers
from genescale.serving.watching.noted import in_turn
from genescale.serving.watching.reporter import reporter_in

PROBE_GENES = 16
PROBE_PLACES = 2
# Ray Serve sees only by this check that a process died: what it costs is a pass of 16 genes.
HEALTH_CHECK_PERIOD_S = 2.0
# What fails twice, a download say, may be worth a third try; a wrong device fails twenty times as well.
CONSTRUCTOR_TRIES = 3
REPLICA_GONE = (RayActorError, ReplicaUnavailableError)


class LoadedModel:
    """One model in memory: verified, loaded, warmed up, and probed at every health check."""

    def __init__(self, bundle: Bundle, config: ServingConfig) -> None:
        from genescale.serving.classifier import heads_on
        from genescale.training.embedder import Embedder

        self.embedder = Embedder.load(
            bundle, device=config.device, tokens_per_batch=config.tokens_per_batch, attention=config.attention
        )
        self.classifier = heads_on(self.embedder, bundle)
        self._probe = probe_cell(bundle.vocabulary)
        self._expected_1d = self._embed_probe()

    def carry_out(self, passes: Sequence[Pass]) -> list[Outcome[Any]]:
        """Run passes of any requests together; `value` of a pass that failed is its exception."""
        return carry_out(self.embedder, passes, self.classifier)

    def check(self) -> None:
        """Raise ServiceError unless a fixed cell gets the embedding it got at the start."""
        if not np.allclose(self._embed_probe(), self._expected_1d, rtol=1e-3, atol=1e-3):
            raise ServiceError("the model no longer gives the embedding it gave at the start.")

    def _embed_probe(self) -> np.ndarray:
        vector_1d = self.embedder.embed_cells([self._probe], layer="last", pooling="mean_genes")
        if not np.isfinite(vector_1d).all():
            raise ServiceError("the model gives embeddings that are not finite numbers.", fix="Check its weights.")
        return vector_1d


@serve.deployment
class ModelReplica:
    """Models in one process. It begins with all that its deployment serves now, as far as they have room."""

    def __init__(self, initial: ModelsState, config: ServingConfig, settings: Settings) -> None:
        import torch

        prepare_process(settings, config)
        torch.set_num_threads(max(1, round(config.num_cpus)))
        cache = cache_folder(config)
        self._numbers = ModelNumbers(
            budget=config.tokens_per_batch, max_bytes=config.max_model_bytes, held=lambda: self._held.facts
        )
        self._held: HeldModels[Bundle, LoadedModel] = HeldModels(
            lambda release: release.open(settings, cache),
            model_bytes,
            self._numbers.counting_loads(lambda bundle: LoadedModel(bundle, config)),
            max_bytes=config.max_model_bytes,
        )
        self._tokens_per_batch = config.tokens_per_batch
        self._lane = Lane[Pass, Outcome[Any]](
            config.tokens_per_batch, wait_s=config.batch_wait_s, ran=self._numbers.ran
        )
        self._held.start_with(list(Record(config.application).current(initial).releases))
        self._reporter = reporter_in(config.application)
        self._reporter.start(self._numbers.report)

    async def embed(
        self, release: Release, cells: Sequence[np.ndarray], layer: Layer, pooling: Rows
    ) -> Outcome[np.ndarray]:
        """Rows `(r, d)` float32 in the order of `cells`: one for each, or one for each gene of each."""
        async with self._held.borrowed(release) as model:
            return await embed_in_passes(
                self._runner(model), cells, layer, pooling, tokens_per_pass=self._tokens_per_batch
            )

    async def perturb(
        self,
        release: Release,
        cells: Sequence[np.ndarray],
        edits: Sequence[EditRequest],
        comparison: Comparison,
        uncropped: Mapping[int, np.ndarray],
    ) -> Outcome[list[list[EditAnswer]]]:
        """Each edit of each cell, in the order given."""
        async with self._held.borrowed(release) as model:
            return await perturb_in_passes(
                self._runner(model), cells, edits, comparison, uncropped, tokens_per_pass=self._tokens_per_batch
            )

    async def classify(
        self, release: Release, cells: Sequence[np.ndarray], genes: frozenset[int] | None
    ) -> Outcome[Classified]:
        """Answers of every head."""
        async with self._held.borrowed(release) as model:
            return await classify_in_passes(self._runner(model), cells, genes, tokens_per_pass=self._tokens_per_batch)

    async def ping(self) -> None:
        """Return: a replica takes calls only once its first model is loaded and warm."""

    async def hold(self, release: Release, beside: Sequence[str]) -> int:
        """Load a release beside the models with these digests; returns its bytes.

        Raises ServiceError, which says why, when it cannot be loaded; nothing has changed then.
        """
        try:
            return await self._held.hold(release, beside=beside)
        # Whatever it was, who asked is told in our words, and the log has the trace.
        except Exception as error:  # noqa: BLE001
            log.get_logger(__name__).error("a model could not be loaded", exc_info=error)
            raise ServiceError(f"a replica could not load it: {why(error)}") from None

    async def retire(self, digest: str) -> None:
        """Drop a model as soon as it has no work."""
        self._held.retire(digest)

    async def held(self) -> list[HeldModel]:
        """What is loaded."""
        return self._held.facts

    async def check_health(self) -> None:
        """Raise, so that Ray Serve replaces the replica, unless every model still answers as it did at its start."""
        for model in self._held.models:
            await self._lane.call(model.check)

    def _runner(self, model: LoadedModel) -> RunPass:
        return lambda one: self._lane.run(model.carry_out, one, one.cost)


class ServedModel:
    """One release at the model deployment, as the HTTP side sees it; Ray's errors become ours.

    `places` are shared by all releases of an HTTP side: so many questions are at the replicas at a time.
    """

    def __init__(self, handle: DeploymentHandle, release: Release, places: asyncio.Semaphore) -> None:
        self._handle, self._release, self._places = handle, release, places

    async def embed(self, cells: Sequence[np.ndarray], layer: Layer, pooling: Rows) -> Outcome[np.ndarray]:
        """Rows `(r, d)` float32 in the order of `cells`: one for each, or one for each gene of each."""
        return await self._asked(lambda: self._handle.embed.remote(self._release, cells, layer, pooling))

    async def perturb(
        self,
        cells: Sequence[np.ndarray],
        edits: Sequence[EditRequest],
        comparison: Comparison,
        uncropped: Mapping[int, np.ndarray],
    ) -> Outcome[list[list[EditAnswer]]]:
        """Each edit of each cell, in the order given."""
        return await self._asked(
            lambda: self._handle.perturb.remote(self._release, cells, edits, comparison, uncropped)
        )

    async def classify(self, cells: Sequence[np.ndarray], genes: frozenset[int] | None) -> Outcome[Classified]:
        """Answers of every head."""
        return await self._asked(lambda: self._handle.classify.remote(self._release, cells, genes))

    async def ping(self) -> None:
        """Return when a replica answers."""
        await _answer_of(self._handle.ping.remote())

    async def _asked(self, ask: Callable[[], DeploymentResponse]) -> Any:
        """The answer of a replica, or of another one when the first dies over it.

        Once and no more: what made one replica die may make the next one die as well.
        """
        async with in_turn(self._places):
            try:
                return await _answer_of(ask())
            except ServiceError as error:
                if not isinstance(error.__cause__, REPLICA_GONE):
                    raise
                log.get_logger(__name__).warning("a replica went away at work; its question is put to another one")
                return await _answer_of(ask())


async def _answer_of(response: DeploymentResponse) -> Any:
    try:
        return await response
    except asyncio.CancelledError:
        # The deadline passed or the caller left: what still waits at the replica is dropped there.
        response.cancel()
        raise
    except BackPressureError:
        raise OverloadedError("the model's queue is full.", fix="Try again later.") from None
    except (*REPLICA_GONE, DeploymentUnavailableError, RequestCancelledError) as error:
        raise ServiceError("the model's replica went away.", fix="Try again in a moment.") from error
    except RayTaskError as error:
        if isinstance(error.cause, GenescaleError):
            raise error.cause from None
        raise


def model_deployment(initial: ModelsState, config: ServingConfig, settings: Settings) -> Any:
    """The models as a node of a Serve application."""
    limits = config.limits
    return ModelReplica.options(  # type: ignore[attr-defined]
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        # The HTTP sides hold back what is more; the places beyond are for probes, so that busy does not look dead.
        max_ongoing_requests=config.max_ongoing * config.ingress_replicas + PROBE_PLACES,
        max_queued_requests=config.max_queued,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        # A check waits for the pass before it, never for a whole request.
        health_check_timeout_s=limits.deadline_s,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=limits.deadline_s,
    ).bind(initial, config, settings)


def probe_cell(vocabulary: Vocabulary) -> np.ndarray:
    """A fixed short cell of this vocabulary `(t,)`: its first genes."""
    if vocabulary.cls is None:
        return vocabulary.token_ids[: min(PROBE_GENES, vocabulary.window)].astype(vocabulary.token_dtype)
    genes = vocabulary.token_ids[: min(PROBE_GENES, vocabulary.window - 2)]
    return np.concatenate([[vocabulary.cls], genes, [vocabulary.eos]]).astype(vocabulary.token_dtype)


def model_bytes(bundle: Bundle) -> int:
    """Memory of a loaded model, as far as it depends on the model: its weights, and those of its heads."""
    return sum(record.size_bytes for name, record in bundle.files.items() if name.endswith(".safetensors"))


def cache_folder(config: ServingConfig) -> Path:
    """Where a node keeps downloaded models."""
    return Path(config.cache) if config.cache else Path(tempfile.gettempdir()) / "genescale-models"


def prepare_process(settings: Settings, config: ServingConfig) -> None:
    """Logging of a Serve process: our lines in the chosen format, without secrets, and none that misleads."""
    log.configure(settings.log, secrets=(*settings.secrets, *config.api_keys))
    logging.getLogger("ray.serve").addFilter(_tells_the_truth)


def _tells_the_truth(record: logging.LogRecord) -> bool:
    # Ray Serve compares max_batch_size with max_ongoing_requests as if both counted requests; ours counts tokens.
    return "the replica will never achieve" not in record.getMessage()
