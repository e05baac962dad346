"""`/v1/tokens`: cells become what the model would take, without the model.

Axis suffixes: `t` tokens of one cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genescale.serving.answering.cells import PreparedCell
from genescale.serving.answering.intake import Intake
from genescale.serving.answering.questions import ReadCells, Sent, read_question
from genescale.serving.forms.arrow_tokens import render_arrow
from genescale.serving.forms.media import ARROW_TYPE
from genescale.serving.schemas import Timings
from genescale.serving.schemas_tokens import TokenisedCell, TokensAnswered, TokensAsked, TokensFacts, TokensOptions


@dataclass(frozen=True, kw_only=True, eq=False)
class TokensPlan:
    """A request for tokens, read and tokenised."""

    read: ReadCells
    beyond_window: bool

    def tokens_of(self, cell: PreparedCell) -> np.ndarray:
        """(t) what is shown of a cell."""
        return cell.uncropped if self.beyond_window else cell.tokens


class Tokens:
    """Reads cells and shows what the model would take of them."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        self._genes, self._symbols = _names_by_token(intake)

    def plan(self, sent: Sent) -> TokensPlan:
        """The cells of a request; raises InputError, LimitError and RefusedError.

        Nothing is charged to the key: no token goes through the model.
        """
        question = read_question(self.intake, sent, TokensAsked, TokensOptions)
        plan = TokensPlan(read=question.read_cells(), beyond_window=question.options.beyond_window)
        limit = self.intake.limits.max_tokens
        self.intake.check_number(sum(len(plan.tokens_of(cell)) for cell in plan.read.cells), limit, "cells")
        return plan

    def render(self, plan: TokensPlan, timings: Timings, wanted: str) -> bytes:
        """JSON of TokensAnswered, or the same as an Arrow stream (`arrow_tokens`)."""
        facts = TokensFacts(
            provenance=self.intake.info.provenance,
            window=self.intake.info.encoder.window,
            file=plan.read.file,
            timings_ms=timings,
        )
        shown = [plan.tokens_of(cell) for cell in plan.read.cells]
        if wanted == ARROW_TYPE:
            return render_arrow(facts, plan.read.cells, shown, (self._genes, self._symbols), frame=self._frame)
        cells = [self._cell(cell, tokens_t) for cell, tokens_t in zip(plan.read.cells, shown, strict=True)]
        answered = TokensAnswered(
            provenance=facts.provenance, window=facts.window, file=facts.file, cells=cells, timings_ms=timings
        )
        return answered.model_dump_json().encode()

    @property
    def _frame(self) -> int:
        """Special tokens on each side of a cell's genes."""
        return 0 if self.intake.vocabulary.cls is None else 1

    def _cell(self, cell: PreparedCell, tokens_t: np.ndarray) -> TokenisedCell:
        genes_t = tokens_t[self._frame : len(tokens_t) - self._frame]
        return TokenisedCell(
            **cell.facts.fields,
            tokens=tokens_t.tolist(),
            genes=self._genes[genes_t].tolist(),
            symbols=self._symbols[genes_t].tolist(),
        )


def _names_by_token(intake: Intake) -> tuple[np.ndarray, np.ndarray]:
    """Gene id and symbol of each token; of special tokens empty."""
    vocabulary = intake.vocabulary
    special = set(vocabulary.special.values())
    ids = ["" if token in special else vocabulary.gene_of_token(token) for token in range(vocabulary.size)]
    symbols = [vocabulary.symbol_of(gene) if gene else "" for gene in ids]
    return np.array(ids, dtype=object), np.array(symbols, dtype=object)
