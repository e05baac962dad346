"""The model behind the HTTP side: as Ray Serve replicas, or in this process.

A replica holds one model and runs one pass at a time on a thread of its own, so that its event loop can take requests
while torch works. Ray Serve collects passes of all waiting requests up to the token budget.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from genescale.platform.errors import GenescaleError, OverloadedError, ServiceError
from genescale.platform.settings import Settings
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.config import ServingConfig
from genescale.serving.passes import (
    Classified,
    Comparison,
    Outcome,
    Pass,
    Rows,
    carry_out,
    classify_in_passes,
    embed_in_passes,
    perturb_in_passes,
)
from genescale.serving.release import Release
from genescale.serving.schemas import Layer

PROBE_GENES = 16
PROBE_PLACES = 2
HEALTH_CHECK_PERIOD_S = 10.0
# What fails twice, a download say, may be worth a third try; a wrong device fails twenty times as well.
CONSTRUCTOR_TRIES = 3


def total_cost(passes: Sequence[Pass]) -> int:
    """Size of a batch for Ray Serve: its tokens."""
    return sum(one.cost for one in passes)


@serve.deployment
class ModelReplica:
    """One copy of the model: loaded and verified, warmed up, and probed at every health check."""

    def __init__(self, release: Release, config: ServingConfig, settings: Settings) -> None:
        import torch

        from genescale.serving.classifier import heads_on
        from genescale.training.embedder import Embedder

        prepare_process(settings, config)
        torch.set_num_threads(max(1, round(config.num_cpus)))
        bundle = release.open(settings, cache_folder(config))
        self._embedder = Embedder.load(
            bundle, device=config.device, tokens_per_batch=config.tokens_per_batch, attention=config.attention
        )
        self._classifier = heads_on(self._embedder, bundle)
        self._tokens_per_batch = config.tokens_per_batch
        self._lane = ThreadPoolExecutor(max_workers=1, thread_name_prefix="genescale-model")
        self._probe = probe_cell(bundle.vocabulary)
        self._expected_1d = self._embed_probe()
        self.run_batched.set_max_batch_size(config.tokens_per_batch)
        self.run_batched.set_batch_wait_timeout_s(config.batch_wait_s)

    async def embed(self, cells: Sequence[np.ndarray], layer: Layer, pooling: Rows) -> Outcome[np.ndarray]:
        """Rows `(r, d)` float32 in the order of `cells`: one for each, or one for each gene of each."""
        return await embed_in_passes(self.run_batched, cells, layer, pooling, tokens_per_pass=self._tokens_per_batch)

    async def perturb(
        self,
        cells: Sequence[np.ndarray],
        edits: Sequence[EditRequest],
        comparison: Comparison,
        uncropped: Mapping[int, np.ndarray],
    ) -> Outcome[list[list[EditAnswer]]]:
        """Each edit of each cell, in the order given."""
        return await perturb_in_passes(
            self.run_batched, cells, edits, comparison, uncropped, tokens_per_pass=self._tokens_per_batch
        )

    async def classify(self, cells: Sequence[np.ndarray], genes: frozenset[int] | None) -> Outcome[Classified]:
        """Answers of every head."""
        return await classify_in_passes(self.run_batched, cells, genes, tokens_per_pass=self._tokens_per_batch)

    async def ping(self) -> None:
        """Return: a replica takes calls only once its model is loaded and warm."""

    # Size and wait are set per replica, from its config.
    @serve.batch(max_batch_size=8_192, batch_wait_timeout_s=0.005, batch_size_fn=total_cost)
    async def run_batched(self, passes: list[Pass]) -> list[Outcome[Any]]:
        """Carry out passes of several requests together."""
        return await asyncio.get_running_loop().run_in_executor(
            self._lane, carry_out, self._embedder, passes, self._classifier
        )

    async def check_health(self) -> None:
        """Raise, so that Ray Serve replaces the replica, unless a fixed cell gets the embedding it got at the start."""
        vector_1d = await asyncio.get_running_loop().run_in_executor(self._lane, self._embed_probe)
        if not np.allclose(vector_1d, self._expected_1d, rtol=1e-3, atol=1e-3):
            raise ServiceError("the model no longer gives the embedding it gave at the start.")

    def _embed_probe(self) -> np.ndarray:
        vector_1d = self._embedder.embed_cells([self._probe], layer="last", pooling="mean_genes")
        if not np.isfinite(vector_1d).all():
            raise ServiceError("the model gives embeddings that are not finite numbers.", fix="Check its weights.")
        return vector_1d


class ServedModel:
    """The model deployment as the HTTP side sees it; Ray's errors become ours. At most `places` questions at a time."""

    def __init__(self, handle: DeploymentHandle, *, places: int) -> None:
        self._handle, self._places = handle, asyncio.Semaphore(places)

    async def embed(self, cells: Sequence[np.ndarray], layer: Layer, pooling: Rows) -> Outcome[np.ndarray]:
        """Rows `(r, d)` float32 in the order of `cells`: one for each, or one for each gene of each."""
        async with self._places:
            return await _answer_of(self._handle.embed.remote(cells, layer, pooling))

    async def perturb(
        self,
        cells: Sequence[np.ndarray],
        edits: Sequence[EditRequest],
        comparison: Comparison,
        uncropped: Mapping[int, np.ndarray],
    ) -> Outcome[list[list[EditAnswer]]]:
        """Each edit of each cell, in the order given."""
        async with self._places:
            return await _answer_of(self._handle.perturb.remote(cells, edits, comparison, uncropped))

    async def classify(self, cells: Sequence[np.ndarray], genes: frozenset[int] | None) -> Outcome[Classified]:
        """Answers of every head."""
        async with self._places:
            return await _answer_of(self._handle.classify.remote(cells, genes))

    async def ping(self) -> None:
        """Return when a replica answers."""
        await _answer_of(self._handle.ping.remote())


async def _answer_of(response: DeploymentResponse) -> Any:
    try:
        return await response
    except asyncio.CancelledError:
        # The deadline passed or the caller left: what still waits at the replica is dropped there.
        response.cancel()
        raise
    except BackPressureError:
        raise OverloadedError("the model's queue is full.", fix="Try again later.") from None
    except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError, RequestCancelledError) as error:
        raise ServiceError("the model's replica went away.", fix="Try again in a moment.") from error
    except RayTaskError as error:
        if isinstance(error.cause, GenescaleError):
            raise error.cause from None
        raise


def model_deployment(release: Release, config: ServingConfig, settings: Settings) -> Any:
    """The model as a node of a Serve application."""
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
    ).bind(release, config, settings)


def probe_cell(vocabulary: Vocabulary) -> np.ndarray:
    """A fixed short cell of this vocabulary `(t,)`: its first genes."""
    if vocabulary.cls is None:
        return vocabulary.token_ids[: min(PROBE_GENES, vocabulary.window)].astype(vocabulary.token_dtype)
    genes = vocabulary.token_ids[: min(PROBE_GENES, vocabulary.window - 2)]
    return np.concatenate([[vocabulary.cls], genes, [vocabulary.eos]]).astype(vocabulary.token_dtype)


def cache_folder(config: ServingConfig) -> Path:
    """Where a node keeps downloaded models."""
    return Path(config.cache) if config.cache else Path(tempfile.gettempdir()) / "genescale-models"


def prepare_process(settings: Settings, config: ServingConfig) -> None:
    """Logging of a Serve process: our lines in the chosen format, without secrets, and none that misleads."""
    secrets = (settings.storage.access_key_id, settings.storage.secret_access_key, *config.api_keys)
    log.configure(settings.log, secrets=secrets)
    logging.getLogger("ray.serve").addFilter(_tells_the_truth)


def _tells_the_truth(record: logging.LogRecord) -> bool:
    # Ray Serve compares max_batch_size with max_ongoing_requests as if both counted requests; ours counts tokens.
    return "the replica will never achieve" not in record.getMessage()
