"""`/v1/classify`: from what was sent to what the heads are asked, and from their answers to bytes.

Axis suffixes: `n` cells or genes, `r` genes of all cells, `c` classes of a head (1 for a number).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genescale.platform.errors import InputError
from genescale.serving.answering.cells import PreparedCell
from genescale.serving.answering.intake import Intake
from genescale.serving.answering.passes import Classified
from genescale.serving.answering.questions import ReadCells, Sent, read_question
from genescale.serving.forms.arrow_classes import render_cells, render_genes
from genescale.serving.forms.media import ARROW_TYPE
from genescale.serving.schemas import (
    ClassifiedCell,
    ClassifiedGene,
    ClassifyAnswered,
    ClassifyAsked,
    ClassifyFacts,
    ClassifyOptions,
    HeadAnswered,
    HeadFacts,
    Timings,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifyPlan:
    """A request for what the heads say, read and tokenised."""

    read: ReadCells
    genes: dict[int, str]
    """Wanted genes by token, under the names that were asked for; empty means every gene of the cells."""

    @property
    def cells(self) -> list[PreparedCell]:
        """The cells of the request."""
        return self.read.cells

    @property
    def wanted(self) -> frozenset[int] | None:
        """Tokens of the wanted genes; None for every gene of the cells."""
        return frozenset(self.genes) if self.genes else None


class Classifications:
    """Plans and renders what the heads of one model say."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake

    def plan(self, sent: Sent) -> ClassifyPlan:
        """What was asked of the heads; raises InputError, LimitError and RefusedError."""
        intake = self.intake
        question = read_question(intake, sent, ClassifyAsked, ClassifyOptions)
        genes = question.options.genes
        if not intake.info.heads:
            raise InputError("this model has no head.", fix="Ask a service of a model that `genescale finetune` made.")
        if genes and not self._reads_genes:
            raise InputError("this model's head reads cells, not genes.", where="genes", fix="Leave `genes` out.")
        intake.check_number(len(genes), intake.limits.max_classified_genes, "genes")
        tokens = intake.genes(genes, "genes")
        read = question.read_cells()
        intake.check_tokens(read.n_tokens)
        return ClassifyPlan(read=read, genes=dict(zip(tokens, genes, strict=True)))

    def render(self, plan: ClassifyPlan, found: Classified, timings: Timings, wanted: str) -> bytes:
        """JSON of ClassifyAnswered, or the same as an Arrow stream (`arrow_classes`)."""
        genes = self._genes(plan, found) if self._reads_genes else []
        facts = ClassifyFacts(
            provenance=self.intake.info.provenance,
            heads=self.intake.info.heads,
            file=plan.read.file,
            timings_ms=timings,
        )
        if wanted == ARROW_TYPE:
            if self._reads_genes:
                return render_genes(facts, plan.cells, genes, facts.heads[0])
            return render_cells(facts, plan.cells, found.answers)
        cells = [self._cell(cell.facts.fields, found, at) for at, cell in enumerate(plan.cells)]
        return ClassifyAnswered(**dict(facts), cells=cells, genes=genes).model_dump_json().encode()

    @property
    def _reads_genes(self) -> bool:
        """All heads of a model read the same."""
        return self.intake.info.heads[0].kind == "gene_classes"

    def _cell(self, fields: dict[str, object], found: Classified, at: int) -> ClassifiedCell:
        heads = [] if self._reads_genes else zip(self.intake.info.heads, found.answers, strict=True)
        return ClassifiedCell.model_validate(
            {**fields, "heads": [_of_head(head, rows_nc[at].tolist()) for head, rows_nc in heads]}
        )

    def _genes(self, plan: ClassifyPlan, found: Classified) -> list[ClassifiedGene]:
        """The wanted genes in the order asked for, or every gene of the cells by token."""
        intake, classes = self.intake, self.intake.info.heads[0].classes
        tokens = plan.genes or {int(token): "" for token in np.unique(found.tokens_r)}
        intake.check_number(len(tokens), intake.limits.max_classified_genes, "genes of the cells")
        made = []
        for token, name in tokens.items():
            rows_nc = found.answers[0][found.tokens_r == token].astype(np.float64)
            mean_c = rows_nc.mean(axis=0).tolist() if len(rows_nc) else []
            spread_c = rows_nc.std(axis=0).tolist() if len(rows_nc) else []
            made.append(
                ClassifiedGene(
                    gene=name or intake.vocabulary.gene_of_token(token),
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
