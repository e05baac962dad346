"""From the bytes of a request to the bytes of its answer.

The main way: read strictly, turn cells into tokens, ask the model, render. Parsing and rendering are work for a
processor, so they run on a thread and the event loop stays free for other requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genescale.perturbation.perturb import EditAnswer, EditRequest
from genescale.platform.errors import InputError, LimitError, ServiceError, UnknownGeneError
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.cells import CellReader, PreparedCell
from genescale.serving.config import Limits
from genescale.serving.passes import Classified, Comparison, Model
from genescale.serving.reading import read_body
from genescale.serving.schemas import (
    CellAsked,
    CellFacts,
    ClassifiedCell,
    ClassifiedGene,
    ClassifyAnswered,
    ClassifyAsked,
    EditAnswered,
    EditAsked,
    EmbeddedCell,
    EmbeddingsAnswered,
    EmbeddingsAsked,
    FoundGene,
    GeneShift,
    HeadAnswered,
    HeadFacts,
    InfoAnswered,
    PerturbationsAnswered,
    PerturbationsAsked,
    PerturbedCell,
    Timings,
)

PING_TIMEOUT_S = 3.0


@dataclass(frozen=True, kw_only=True, eq=False)
class _EmbeddingPlan:
    """A request for embeddings, read and tokenised."""

    asked: EmbeddingsAsked
    cells: list[PreparedCell]


@dataclass(frozen=True, kw_only=True, eq=False)
class _PerturbationPlan:
    """A request for perturbations, read and tokenised."""

    asked: PerturbationsAsked
    cells: list[PreparedCell]
    edits: list[EditRequest]
    comparison: Comparison

    @property
    def uncropped(self) -> dict[int, np.ndarray]:
        """Whole cells, where an edit refills the window from them."""
        if not any(edit.refill for edit in self.edits):
            return {}
        return {at: cell.uncropped for at, cell in enumerate(self.cells)}


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

    async def embeddings(self, body: bytes) -> bytes:
        """JSON of EmbeddingsAnswered for JSON of EmbeddingsAsked; raises InputError and ServiceError."""
        began = time.perf_counter()
        plan = await asyncio.to_thread(self._plan_embeddings, body)
        parsed = time.perf_counter()
        outcome = await self.model.embed([cell.tokens for cell in plan.cells], plan.asked.layer, plan.asked.pooling)
        timings = self._timings(began, parsed, outcome.forward_s)
        return await asyncio.to_thread(self._render_embeddings, plan, outcome.value, timings)

    async def perturbations(self, body: bytes) -> bytes:
        """JSON of PerturbationsAnswered for JSON of PerturbationsAsked; raises InputError and ServiceError."""
        began = time.perf_counter()
        plan = await asyncio.to_thread(self._plan_perturbations, body)
        parsed = time.perf_counter()
        tokens = [cell.tokens for cell in plan.cells]
        outcome = await self.model.perturb(tokens, plan.edits, plan.comparison, plan.uncropped)
        timings = self._timings(began, parsed, outcome.forward_s)
        return await asyncio.to_thread(self._render_perturbations, plan, outcome.value, timings)

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

    def _plan_embeddings(self, body: bytes) -> _EmbeddingPlan:
        asked = read_body(EmbeddingsAsked, body, max_keys=self.limits.max_genes_per_cell)
        if asked.pooling == "cls" and self.vocabulary.cls is None:
            raise InputError("this model has no <cls>.", where="pooling", fix="Use 'mean_genes'.")
        cells = self._cells(asked.cells)
        self._check_tokens(sum(len(cell.tokens) for cell in cells))
        return _EmbeddingPlan(asked=asked, cells=cells)

    def _plan_perturbations(self, body: bytes) -> _PerturbationPlan:
        asked = read_body(PerturbationsAsked, body, max_keys=self.limits.max_genes_per_cell)
        if asked.measure == "cls" and self.vocabulary.cls is None:
            raise InputError("this model has no <cls>.", where="measure", fix="Use 'remaining_genes' or 'mean_pooled'.")
        self._check_number(len(asked.edits), self.limits.max_edits, "edits")
        self._check_number(len(asked.gene_shifts), self.limits.max_gene_shifts, "gene_shifts")
        edits = [self._edit(edit, f"edits[{at}]") for at, edit in enumerate(asked.edits)]
        comparison = Comparison(
            layer=asked.layer,
            measure=asked.measure,
            goal=self._goal(asked.goal),
            gene_shifts_of=self._genes(asked.gene_shifts, "gene_shifts") if asked.gene_shifts else None,
        )
        cells = self._cells(asked.cells)
        self._check_tokens(sum(len(cell.tokens) for cell in cells) * (1 + len(edits)))
        return _PerturbationPlan(asked=asked, cells=cells, edits=edits, comparison=comparison)

    def _plan_classification(self, body: bytes) -> _ClassifyPlan:
        asked = read_body(ClassifyAsked, body, max_keys=self.limits.max_genes_per_cell)
        if not self.info.heads:
            raise InputError("this model has no head.", fix="Ask a service of a model that `genescale finetune` made.")
        if asked.genes and self._head.kind != "gene_classes":
            raise InputError("this model's head reads cells, not genes.", where="genes", fix="Leave `genes` out.")
        self._check_number(len(asked.genes), self.limits.max_classified_genes, "genes")
        tokens = self._genes(asked.genes, "genes")
        cells = self._cells(asked.cells)
        self._check_tokens(sum(len(cell.tokens) for cell in cells))
        return _ClassifyPlan(cells=cells, genes=dict(zip(tokens, asked.genes, strict=True)))

    @property
    def _head(self) -> HeadFacts:
        """The first head; all heads of a model read the same."""
        return self.info.heads[0]

    def _cells(self, asked: Sequence[CellAsked]) -> list[PreparedCell]:
        self._check_number(len(asked), self.limits.max_cells, "cells")
        for at, cell in enumerate(asked):
            given = cell.counts if cell.counts is not None else cell.tokens or ()
            self._check_number(len(given), self.limits.max_genes_per_cell, f"cells[{at}]")
        window, max_listed_genes = self.info.encoder.window, self.limits.max_listed_genes
        reader = CellReader(self.vocabulary, window=window, max_listed_genes=max_listed_genes)
        return [reader.read(cell, where=f"cells[{at}]") for at, cell in enumerate(asked)]

    def _edit(self, edit: EditAsked, where: str) -> EditRequest:
        self._check_number(len(edit.genes), self.limits.max_genes_per_edit, f"{where}.genes")
        try:
            return EditRequest(kind=edit.kind, genes=self._genes(edit.genes, f"{where}.genes"), refill=edit.refill)
        except InputError as error:
            raise type(error)(error.what, where=error.where or where, fix=error.fix) from None

    def _genes(self, names: Sequence[str], where: str) -> tuple[int, ...]:
        name_of: dict[int, str] = {}
        for at, name in enumerate(names):
            try:
                token = self.vocabulary.token(name)
            except UnknownGeneError as error:
                raise UnknownGeneError(error.what, where=f"{where}[{at}]", fix=error.fix) from None
            if token in name_of:
                raise InputError(
                    f"'{name_of[token]}' and '{name}' are the same gene.", where=where, fix="Name each gene once."
                )
            name_of[token] = name
        return tuple(name_of)

    def _goal(self, goal: Sequence[float] | None) -> np.ndarray | None:
        if goal is None:
            return None
        width = self.info.encoder.width
        if len(goal) != width or not any(goal):
            raise InputError(
                f"the goal has {len(goal)} values, {sum(map(bool, goal))} of them not 0; an embedding has {width}.",
                where="goal",
                fix="Use the mean of embeddings of the goal state, from the same model and layer.",
            )
        return np.asarray(goal, dtype=np.float64)

    def _check_tokens(self, n_tokens: int) -> None:
        if n_tokens > self.limits.max_tokens:
            raise LimitError(
                f"the request would put {n_tokens:,} tokens through the model; {self.limits.max_tokens:,} are allowed.",
                fix="Send fewer cells or edits at a time.",
            )

    @staticmethod
    def _check_number(n: int, limit: int, where: str) -> None:
        if n > limit:
            raise LimitError(f"{n:,} are given; {limit:,} are allowed.", where=where, fix="Send several requests.")

    def _render_embeddings(self, plan: _EmbeddingPlan, vectors_nd: np.ndarray, timings: Timings) -> bytes:
        answered = EmbeddingsAnswered(
            provenance=self.info.provenance,
            layer=plan.asked.layer,
            pooling=plan.asked.pooling,
            cells=[
                EmbeddedCell(**_fields(cell.facts), embedding=vector)
                for cell, vector in zip(plan.cells, vectors_nd.tolist(), strict=True)
            ],
            timings_ms=timings,
        )
        return answered.model_dump_json().encode()

    def _render_perturbations(
        self, plan: _PerturbationPlan, answers: Sequence[Sequence[EditAnswer]], timings: Timings
    ) -> bytes:
        answered = PerturbationsAnswered(
            provenance=self.info.provenance,
            layer=plan.asked.layer,
            measure=plan.asked.measure,
            cells=[
                PerturbedCell(**_fields(cell.facts), edits=[self._edited(plan, *one) for one in enumerate(of_cell)])
                for cell, of_cell in zip(plan.cells, answers, strict=True)
            ],
            timings_ms=timings,
        )
        return answered.model_dump_json().encode()

    def _render_classification(self, plan: _ClassifyPlan, found: Classified, timings: Timings) -> bytes:
        of_genes = self._head.kind == "gene_classes"
        answered = ClassifyAnswered(
            provenance=self.info.provenance,
            heads=self.info.heads,
            cells=[
                ClassifiedCell(
                    **_fields(cell.facts),
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
        self._check_number(len(tokens), self.limits.max_classified_genes, "genes of the cells")
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

    def _edited(self, plan: _PerturbationPlan, at: int, answer: EditAnswer) -> EditAnswered:
        asked = plan.asked.edits[at]
        name_of = dict(zip(answer.request.genes, asked.genes, strict=True))
        return EditAnswered(
            kind=asked.kind,
            genes=asked.genes,
            found=[FoundGene(gene=name_of[token], rank=rank) for token, rank in answer.found.items()],
            absent=[name_of[token] for token in answer.absent],
            cosine=answer.cosine,
            shift=answer.shift,
            goal_shift=answer.goal_shift,
            reason=answer.reason,
            n_compared=answer.n_compared,
            n_cut=answer.n_cut,
            n_refilled=answer.n_refilled,
            gene_shifts=self._gene_shifts(plan, answer.gene_cosines),
        )

    @staticmethod
    def _gene_shifts(plan: _PerturbationPlan, cosines: Mapping[int, float]) -> list[GeneShift]:
        tokens = plan.comparison.gene_shifts_of or ()
        found = [(name, cosines.get(token)) for name, token in zip(plan.asked.gene_shifts, tokens, strict=True)]
        return [GeneShift(gene=name, cosine=c, shift=None if c is None else 1.0 - c) for name, c in found]


def _of_head(head: HeadFacts, values: Sequence[float]) -> HeadAnswered:
    if head.kind == "number":
        return HeadAnswered(label=head.label, predicted=None, probabilities={}, number=values[0])
    probabilities = dict(zip(head.classes, values, strict=True))
    predicted = max(probabilities, key=probabilities.__getitem__)
    return HeadAnswered(label=head.label, predicted=predicted, probabilities=probabilities, number=None)


def _fields(facts: CellFacts) -> dict[str, Any]:
    return {name: getattr(facts, name) for name in CellFacts.model_fields}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
