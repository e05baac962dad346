"""`/v1/perturbations`: from the bytes of a request to what the model is asked, and from its answers to bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genescale.perturbation.perturb import EditAnswer, EditRequest
from genescale.platform.errors import InputError, did_you_mean
from genescale.serving.answering.cells import PreparedCell
from genescale.serving.answering.intake import Intake
from genescale.serving.answering.passes import Comparison, furthest_genes
from genescale.serving.answering.published_states import PublishedState, StateKey, named_vector
from genescale.serving.answering.questions import Sent, read_question
from genescale.serving.forms.arrow_shifts import render_arrow
from genescale.serving.forms.media import ARROW_TYPE
from genescale.serving.problems import JSON_TYPE
from genescale.serving.schemas import HeadFacts, Pooling, Timings
from genescale.serving.schemas_perturb import (
    EditAnswered,
    EditAsked,
    FoundGene,
    GeneShift,
    PerturbationsAnswered,
    PerturbationsAsked,
    PerturbationsFacts,
    PerturbationsOptions,
    PerturbedCell,
    StateAsked,
    TopGeneShift,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PerturbationPlan:
    """A request for perturbations, read and tokenised."""

    asked: PerturbationsOptions
    cells: list[PreparedCell]
    edits: list[EditRequest]
    comparison: Comparison
    classes: Sequence[str]
    """Of the head that was asked for; empty without one."""

    @property
    def uncropped(self) -> dict[int, np.ndarray]:
        """Whole cells, where an edit refills the window from them."""
        if not any(edit.refill for edit in self.edits):
            return {}
        return {at: cell.uncropped for at, cell in enumerate(self.cells)}


class Perturbations:
    """Plans and renders perturbations for one model."""

    def __init__(self, intake: Intake, published: Mapping[StateKey, PublishedState] | None = None) -> None:
        self.intake, self.published = intake, dict(published or {})

    def plan(self, sent: Sent) -> PerturbationPlan:
        """What was asked of the model; raises InputError, LimitError and RefusedError."""
        intake, limits = self.intake, self.intake.limits
        question = read_question(intake, sent, PerturbationsAsked, PerturbationsOptions)
        asked = question.options
        intake.check_cls(asked.measure, "measure", fix="Use 'remaining_genes' or 'mean_pooled'.")
        intake.check_number(len(asked.edits), limits.max_edits, "edits")
        intake.check_number(len(asked.gene_shifts), limits.max_gene_shifts, "gene_shifts")
        intake.check_number(asked.top_gene_shifts, limits.max_gene_shifts, "top_gene_shifts")
        head = self._head(asked.head)
        edits = [self._edit(edit, f"edits[{at}]") for at, edit in enumerate(asked.edits)]
        comparison = Comparison(
            layer=asked.layer,
            measure=asked.measure,
            states_sd=self._states(asked),
            gene_shifts_of=intake.genes(asked.gene_shifts, "gene_shifts"),
            n_furthest=asked.top_gene_shifts,
            head=asked.head or "",
        )
        read = question.read_cells()
        intake.check_tokens(read.n_tokens * (1 + len(edits)))
        return PerturbationPlan(
            asked=asked, cells=read.cells, edits=edits, comparison=comparison, classes=head.classes if head else ()
        )

    def render(
        self, plan: PerturbationPlan, answers: Sequence[Sequence[EditAnswer]], timings: Timings, wanted: str = JSON_TYPE
    ) -> bytes:
        """JSON of PerturbationsAnswered, or the same as an Arrow stream (`arrow_shifts`)."""
        facts = PerturbationsFacts(
            provenance=self.intake.info.provenance,
            layer=plan.asked.layer,
            measure=plan.asked.measure,
            timings_ms=timings,
        )
        cells = [
            PerturbedCell(**cell.facts.fields, edits=[self._edited(plan, *one) for one in enumerate(of_cell)])
            for cell, of_cell in zip(plan.cells, answers, strict=True)
        ]
        if wanted == ARROW_TYPE:
            return render_arrow(facts, cells)
        return PerturbationsAnswered(**dict(facts), cells=cells).model_dump_json().encode()

    def _edit(self, edit: EditAsked, where: str) -> EditRequest:
        self.intake.check_number(len(edit.genes), self.intake.limits.max_genes_per_edit, f"{where}.genes")
        try:
            return EditRequest(
                kind=edit.kind,
                genes=self.intake.genes(edit.genes, f"{where}.genes"),
                refill=edit.refill,
                quartiles=edit.quartiles,
                rank=edit.rank,
                ranks=tuple(edit.ranks),
            )
        except InputError as error:
            raise type(error)(error.what, where=error.where or where, fix=error.fix) from None

    def _states(self, asked: PerturbationsOptions) -> np.ndarray | None:
        """(s, d) float64: the states in the order given, then the goal; None without any."""
        self.intake.check_number(len(asked.states), self.intake.limits.max_states, "states")
        names = [state.name for state in asked.states]
        for at, state in enumerate(asked.states):
            if state.name in names[:at]:
                raise InputError(
                    f"two states are called '{state.name}'.", where=f"states[{at}].name", fix="Give each its own name."
                )
        vectors = [self._vector(asked, state, f"states[{at}]") for at, state in enumerate(asked.states)]
        if asked.goal is not None:
            self._check_vector(asked.goal, "the goal", "goal")
            vectors.append(asked.goal)
        return np.asarray(vectors, dtype=np.float64) if vectors else None

    def _vector(self, asked: PerturbationsOptions, state: StateAsked, where: str) -> Sequence[float] | np.ndarray:
        if state.vector is None:
            pooling: Pooling = "cls" if asked.measure == "cls" else "mean_genes"
            return named_vector(self.published, state.name, asked.layer, pooling, f"{where}.name")
        self._check_vector(state.vector, f"the state '{state.name}'", f"{where}.vector")
        return state.vector

    def _check_vector(self, vector: Sequence[float], what: str, where: str) -> None:
        width = self.intake.info.encoder.width
        if len(vector) != width or not any(vector):
            raise InputError(
                f"{what} has {len(vector)} values, {sum(map(bool, vector))} of them not 0; an embedding has {width}.",
                where=where,
                fix="Use the mean of embeddings of the state's cells, from the same model and layer.",
            )

    def _head(self, label: str | None) -> HeadFacts | None:
        if label is None:
            return None
        of_cells = {head.label: head for head in self.intake.info.heads if head.kind == "cell_classes"}
        if label not in of_cells:
            there = f"Heads: {', '.join(of_cells)}." if of_cells else "This model has none; leave `head` out."
            raise InputError(
                f"the model has no head '{label}' of cell classes.",
                where="head",
                fix=did_you_mean(label, of_cells) or there,
            )
        return of_cells[label]

    def _edited(self, plan: PerturbationPlan, at: int, answer: EditAnswer) -> EditAnswered:
        asked = plan.asked.edits[at]
        name_of = dict(zip(answer.request.genes, asked.genes, strict=True))
        toward = list(answer.state_shifts)
        changes = answer.class_changes
        return EditAnswered(
            kind=asked.kind,
            genes=asked.genes,
            found=[FoundGene(gene=name_of[token], rank=rank) for token, rank in answer.found.items()],
            absent=[name_of[token] for token in answer.absent],
            cosine=answer.cosine,
            shift=answer.shift,
            goal_shift=toward.pop() if plan.asked.goal is not None else None,
            state_shifts=_by_name(plan.asked.states, toward),
            class_changes=None if changes is None else dict(zip(plan.classes, changes, strict=True)),
            reason=answer.reason,
            n_compared=answer.n_compared,
            n_cut=answer.n_cut,
            n_refilled=answer.n_refilled,
            gene_shifts=_gene_shifts(plan, answer.gene_cosines),
            top_gene_shifts=self._furthest(plan, answer),
        )

    def _furthest(self, plan: PerturbationPlan, answer: EditAnswer) -> list[TopGeneShift]:
        vocabulary, made = self.intake.vocabulary, []
        for at in furthest_genes(answer, plan.comparison.n_furthest).tolist():
            gene = vocabulary.gene_of_token(int(answer.gene_tokens[at]))
            cosine = float(answer.gene_cosine_values[at])
            made.append(TopGeneShift(gene=gene, symbol=vocabulary.symbol_of(gene), cosine=cosine, shift=1.0 - cosine))
        return made


def _by_name(states: Sequence[StateAsked], toward: Sequence[float | None]) -> dict[str, float | None]:
    return {state.name: moved for state, moved in zip(states, toward, strict=True)}


def _gene_shifts(plan: PerturbationPlan, cosines: Mapping[int, float]) -> list[GeneShift]:
    tokens = plan.comparison.gene_shifts_of
    found = [(name, cosines.get(token)) for name, token in zip(plan.asked.gene_shifts, tokens, strict=True)]
    return [GeneShift(gene=name, cosine=c, shift=None if c is None else 1.0 - c) for name, c in found]
