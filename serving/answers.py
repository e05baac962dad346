"""From the bytes of a request to the bytes of its answer.

The main way: read strictly, turn cells into tokens, ask the model, render. Parsing and rendering are work for a
processor, so they run on a thread and the event loop stays free for other requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genescale.platform.errors import InputError, ServiceError
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.cells import PreparedCell
from genescale.serving.config import Limits
from genescale.serving.embeddings import Embeddings
from genescale.serving.intake import Intake
from genescale.serving.passes import Classified, Model
from genescale.serving.perturbations import Perturbations
from genescale.serving.problems import JSON_TYPE
from genescale.serving.schemas import (
    CellAsked,
    ClassifiedCell,
    ClassifiedGene,
    ClassifyAnswered,
    ClassifyAsked,
    HeadAnswered,
    HeadFacts,
    InfoAnswered,
    Timings,
)

PING_TIMEOUT_S = 3.0


@dataclass(frozen=True, kw_only=True, eq=False)
class _ClassifyPlan:
    """A request for what the heads say, read and tokenised."""

    cells: list[PreparedCell]
    genes: dict[int, str]
    """Wanted genes by token, under the names that were asked for; empty means every gene of the cells."""


class Answers:
    """Answers requests with one model, its vocabulary and its limits."""

    def __init__(self, model: Model, vocabulary: Vocabulary, info: InfoAnswered, limits: Limits) -> None:
        self.model, self.vocabulary, self.info, self.limits = model, vocabulary, info, limits
        self.intake = Intake(vocabulary, info, limits)
        self._embeddings, self._perturbations = Embeddings(self.intake), Perturbations(self.intake)

    async def embeddings(self, body: bytes, *, sent: str = JSON_TYPE, wanted: str = JSON_TYPE) -> bytes:
        """The answer to a question for embeddings, each in its form; raises InputError and ServiceError.

        As JSON they are EmbeddingsAsked and EmbeddingsAnswered, as Arrow what `arrow_cells` and `arrow_embeddings` say.
        """
        began = time.perf_counter()
        plan = await asyncio.to_thread(self._embeddings.planner(sent), body)
        parsed = time.perf_counter()
        outcome = await self.model.embed([cell.tokens for cell in plan.cells], plan.layer, plan.rows)
        timings = self._timings(began, parsed, outcome.forward_s)
        return await asyncio.to_thread(self._embeddings.renderer(wanted), plan, outcome.value, timings)

    async def perturbations(self, body: bytes) -> bytes:
        """JSON of PerturbationsAnswered for JSON of PerturbationsAsked; raises InputError and ServiceError."""
        began = time.perf_counter()
        plan = await asyncio.to_thread(self._perturbations.plan, body)
        parsed = time.perf_counter()
        tokens = [cell.tokens for cell in plan.cells]
        outcome = await self.model.perturb(tokens, plan.edits, plan.comparison, plan.uncropped)
        timings = self._timings(began, parsed, outcome.forward_s)
        return await asyncio.to_thread(self._perturbations.render, plan, outcome.value, timings)

    async def classifications(self, body: bytes) -> bytes:
        """JSON of ClassifyAnswered for JSON of ClassifyAsked; raises InputError and ServiceError."""
        began = time.perf_counter()
        plan = await asyncio.to_thread(self._plan_classification, body)
        parsed = time.perf_counter()
        wanted = frozenset(plan.genes) if plan.genes else None
        outcome = await self.model.classify([cell.tokens for cell in plan.cells], wanted)
        timings = self._timings(began, parsed, outcome.forward_s)
        return await asyncio.to_thread(self._render_classification, plan, outcome.value, timings)

    async def ready(self) -> None:
        """Return when the model answers; raises ServiceError when it does not, or not soon."""
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await self.model.ping()
        except TimeoutError:
            raise ServiceError("the model does not answer.", fix="Try again in a moment.") from None

    def _timings(self, began: float, parsed: float, forward_s: float) -> Timings:
        waited_s = time.perf_counter() - parsed
        # Two clocks in two processes: never report a negative wait.
        return Timings(parse=_ms(parsed - began), queue=_ms(max(0.0, waited_s - forward_s)), forward=_ms(forward_s))

    def _plan_classification(self, body: bytes) -> _ClassifyPlan:
        asked = self.intake.read(ClassifyAsked, body)
        if not self.info.heads:
            raise InputError("this model has no head.", fix="Ask a service of a model that `genescale finetune` made.")
        if asked.genes and self._head.kind != "gene_classes":
            raise InputError("this model's head reads cells, not genes.", where="genes", fix="Leave `genes` out.")
        self.intake.check_number(len(asked.genes), self.limits.max_classified_genes, "genes")
        tokens = self.intake.genes(asked.genes, "genes")
        return _ClassifyPlan(cells=self.read_cells(asked.cells), genes=dict(zip(tokens, asked.genes, strict=True)))

    @property
    def _head(self) -> HeadFacts:
        """The first head; all heads of a model read the same."""
        return self.info.heads[0]

    def read_cells(self, asked: Sequence[CellAsked]) -> list[PreparedCell]:
        """Cells that go through the model once, tokenised; InputError for a wrong cell, LimitError for too many."""
        cells = self.intake.cells(asked)
        self.intake.check_tokens(sum(len(cell.tokens) for cell in cells))
        return cells

    def _render_classification(self, plan: _ClassifyPlan, found: Classified, timings: Timings) -> bytes:
        of_genes = self._head.kind == "gene_classes"
        answered = ClassifyAnswered(
            provenance=self.info.provenance,
            heads=self.info.heads,
            cells=[
                ClassifiedCell(
                    **cell.facts.fields,
                    heads=[] if of_genes else [_of_head(*pair) for pair in self._answers_of(found, at)],
                )
                for at, cell in enumerate(plan.cells)
            ],
            genes=self._classified_genes(plan, found) if of_genes else [],
            timings_ms=timings,
        )
        return answered.model_dump_json().encode()

    def _answers_of(self, found: Classified, at: int) -> list[tuple[HeadFacts, list[float]]]:
        return [(head, rows[at].tolist()) for head, rows in zip(self.info.heads, found.answers, strict=True)]

    def _classified_genes(self, plan: _ClassifyPlan, found: Classified) -> list[ClassifiedGene]:
        """The wanted genes in the order asked for, or every gene of the cells by token."""
        tokens, classes = plan.genes or {int(token): "" for token in np.unique(found.tokens_r)}, self._head.classes
        self.intake.check_number(len(tokens), self.limits.max_classified_genes, "genes of the cells")
        made = []
        for token, name in tokens.items():
            rows_nc = found.answers[0][found.tokens_r == token].astype(np.float64)
            mean_c = rows_nc.mean(axis=0).tolist() if len(rows_nc) else []
            spread_c = rows_nc.std(axis=0).tolist() if len(rows_nc) else []
            made.append(
                ClassifiedGene(
                    gene=name or self.vocabulary.gene_of_token(token),
                    n_cells=len(rows_nc),
                    predicted=classes[int(np.argmax(mean_c))] if mean_c else None,
                    probabilities=dict(zip(classes, mean_c, strict=False)),
                    spread=dict(zip(classes, spread_c, strict=False)),
                )
            )
        return made


def _of_head(head: HeadFacts, values: Sequence[float]) -> HeadAnswered:
    if head.kind == "number":
        return HeadAnswered(label=head.label, predicted=None, probabilities={}, number=values[0])
    probabilities = dict(zip(head.classes, values, strict=True))
    predicted = max(probabilities, key=probabilities.__getitem__)
    return HeadAnswered(label=head.label, predicted=predicted, probabilities=probabilities, number=None)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
