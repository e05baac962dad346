"""A model in this process: for tests, notebooks and ASGI servers without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from genescale.perturbation.perturb import EditAnswer, EditRequest
from genescale.serving.answering.passes import (
    Classified,
    Classifier,
    Comparison,
    Outcome,
    Pass,
    Rows,
    ServedEmbedder,
    carry_out,
    classify_in_passes,
    embed_in_passes,
    perturb_in_passes,
)
from genescale.serving.schemas import Layer


class InProcessModel:
    """The `Model` of an embedder, and of heads on it, that live here; one pass at a time, on a thread of its own."""

    def __init__(
        self, embedder: ServedEmbedder, classifier: Classifier | None = None, *, tokens_per_batch: int = 8_192
    ) -> None:
        self.embedder, self.classifier, self.tokens_per_batch = embedder, classifier, tokens_per_batch
        self._lane = ThreadPoolExecutor(max_workers=1, thread_name_prefix="genescale-model")

    async def embed(self, cells: Sequence[np.ndarray], layer: Layer, pooling: Rows) -> Outcome[np.ndarray]:
        """Rows `(r, d)` float32 in the order of `cells`: one for each, or one for each gene of each."""
        return await embed_in_passes(self._run, cells, layer, pooling, tokens_per_pass=self.tokens_per_batch)

    async def perturb(
        self,
        cells: Sequence[np.ndarray],
        edits: Sequence[EditRequest],
        comparison: Comparison,
        uncropped: Mapping[int, np.ndarray],
    ) -> Outcome[list[list[EditAnswer]]]:
        """Each edit of each cell, in the order given."""
        return await perturb_in_passes(
            self._run, cells, edits, comparison, uncropped, tokens_per_pass=self.tokens_per_batch
        )

    async def classify(self, cells: Sequence[np.ndarray], genes: frozenset[int] | None) -> Outcome[Classified]:
        """Answers of every head."""
        return await classify_in_passes(self._run, cells, genes, tokens_per_pass=self.tokens_per_batch)

    async def ping(self) -> None:
        """A model in this process is always there."""

    async def _run(self, one: Pass) -> Outcome[Any]:
        loop = asyncio.get_running_loop()
        return (await loop.run_in_executor(self._lane, carry_out, self.embedder, [one], self.classifier))[0]
