"""`/v1/embeddings`: from the bytes of a request to what the model is asked, and from its rows to bytes.

Axis suffixes: `r` rows of all cells (one for each, or one for each gene of each), `d` width.
"""

from __future__ import annotations

import numpy as np

from genescale.platform.errors import InputError, LimitError
from genescale.serving.answering.cells import PreparedCell
from genescale.serving.answering.embedding_plan import EmbeddingPlan, gene_ids
from genescale.serving.answering.intake import Intake
from genescale.serving.answering.questions import ReadCells, Sent, read_question
from genescale.serving.forms.arrow_embeddings import render_arrow
from genescale.serving.forms.media import ARROW_TYPE
from genescale.serving.schemas import (
    EmbeddedCell,
    EmbeddingOptions,
    EmbeddingsAnswered,
    EmbeddingsAsked,
    Pooling,
    Timings,
)


class Embeddings:
    """Plans and renders embeddings for one model."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake

    def plan(self, sent: Sent) -> EmbeddingPlan:
        """What was asked of the model; raises InputError, LimitError and RefusedError."""
        question = read_question(self.intake, sent, EmbeddingsAsked, EmbeddingOptions)
        pooling = self._pooling(question.options)
        return self._checked(question.options, pooling, question.read_cells())

    def render(self, plan: EmbeddingPlan, rows_rd: np.ndarray, timings: Timings, wanted: str) -> bytes:
        """JSON of EmbeddingsAnswered, or the same as an Arrow stream (`arrow_embeddings`)."""
        if wanted == ARROW_TYPE:
            return render_arrow(self.intake, plan, rows_rd, timings)
        make = self._with_genes if plan.output == "genes" else self._with_vector
        answered = EmbeddingsAnswered(
            provenance=self.intake.info.provenance,
            layer=plan.layer,
            output=plan.output,
            pooling=plan.pooling,
            file=plan.file,
            cells=[make(cell, part) for cell, part in zip(plan.cells, plan.parts(rows_rd), strict=True)],
            timings_ms=timings,
        )
        return answered.model_dump_json().encode()

    def _pooling(self, asked: EmbeddingOptions) -> Pooling | None:
        """None for one vector per gene; InputError for a pooling that says something else than the output."""
        self.intake.check_cls(asked.output, "output", fix="Use 'cell' or 'genes'.")
        self.intake.check_cls(asked.pooling, "pooling", fix="Use 'mean_genes'.")
        if asked.output == "cell":
            return asked.pooling
        pooling: Pooling | None = "cls" if asked.output == "cls" else None
        if "pooling" in asked.model_fields_set and asked.pooling != pooling:
            raise InputError(
                f"the output '{asked.output}' is not pooled by '{asked.pooling}'.",
                where="pooling",
                fix="Leave `pooling` out, or use the output 'cell'.",
            )
        return pooling

    def _checked(self, asked: EmbeddingOptions, pooling: Pooling | None, read: ReadCells) -> EmbeddingPlan:
        cells = read.cells
        plan = EmbeddingPlan(layer=asked.layer, output=asked.output, pooling=pooling, cells=cells, file=read.file)
        n_values = sum(cell.n_shown for cell in cells) * self.intake.info.encoder.width
        limit = self.intake.limits.max_gene_values
        if plan.output == "genes" and n_values > limit:
            raise LimitError(
                f"the embeddings of the genes would be {n_values:,} numbers; {limit:,} are allowed.",
                where="output",
                fix="Send fewer cells at a time.",
            )
        self.intake.check_tokens(read.n_tokens)
        return plan

    def _with_vector(self, cell: PreparedCell, row_1d: np.ndarray) -> EmbeddedCell:
        return EmbeddedCell(**cell.facts.fields, embedding=row_1d[0].tolist(), genes=None, gene_embeddings=None)

    def _with_genes(self, cell: PreparedCell, rows_gd: np.ndarray) -> EmbeddedCell:
        names = gene_ids(cell, self.intake.vocabulary)
        return EmbeddedCell(**cell.facts.fields, embedding=None, genes=names, gene_embeddings=rows_gd.tolist())
