"""What every question shares: its cells become tokens, its gene names become genes, and its size is checked.

A refusal says where in the request it comes from: `cells[3].counts`, `edits[0].genes[1]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel

from genescale.platform.errors import InputError, LimitError, UnknownGeneError
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.access.rates import charge
from genescale.serving.answering.cells import CellReader, PreparedCell
from genescale.serving.config import Limits
from genescale.serving.forms.reading import read_body
from genescale.serving.schemas import CellAsked, InfoAnswered

Question = TypeVar("Question", bound=BaseModel)


class Intake:
    """Reads questions to one model, within its limits."""

    def __init__(self, vocabulary: Vocabulary, info: InfoAnswered, limits: Limits) -> None:
        self.vocabulary, self.info, self.limits = vocabulary, info, limits

    def read(self, kind: type[Question], body: bytes) -> Question:
        """The question in a JSON body; raises as `reading.read_body`."""
        return read_body(kind, body, max_keys=self.limits.max_genes_per_cell)

    def cells(self, asked: Sequence[CellAsked]) -> list[PreparedCell]:
        """Tokens of the cells of a question; InputError or LimitError, which name the cell, for what cannot be used."""
        self.check_number(len(asked), self.limits.max_cells, "cells")
        for at, cell in enumerate(asked):
            self.check_number(cell.n_given, self.limits.max_genes_per_cell, f"cells[{at}]")
        reader = self.cell_reader()
        return [reader.read(cell, where=f"cells[{at}]") for at, cell in enumerate(asked)]

    def cell_reader(self) -> CellReader:
        """What turns the cells of one question into tokens."""
        return CellReader(
            self.vocabulary, window=self.info.encoder.window, max_listed_genes=self.limits.max_listed_genes
        )

    def genes(self, names: Sequence[str], where: str) -> tuple[int, ...]:
        """Token of each gene; UnknownGeneError for a name of none, InputError for one gene twice."""
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

    def check_cls(self, wanted: str, where: str, *, fix: str) -> None:
        """InputError when `<cls>` is wanted of a model that has none."""
        if wanted == "cls" and self.vocabulary.cls is None:
            raise InputError("this model has no <cls>.", where=where, fix=fix)

    def check_tokens(self, n_tokens: int) -> None:
        """LimitError for a question that would put too many tokens through the model; else they are on its key."""
        if n_tokens > self.limits.max_tokens:
            raise LimitError(
                f"the request would put {n_tokens:,} tokens through the model; {self.limits.max_tokens:,} are allowed.",
                fix="Send fewer cells or edits at a time.",
            )
        # Here its cost is known for the first time, and nothing was spent on it yet.
        charge(n_tokens)

    @staticmethod
    def check_number(n: int, limit: int, where: str) -> None:
        """LimitError for more than `limit` of something."""
        if n > limit:
            raise LimitError(f"{n:,} are given; {limit:,} are allowed.", where=where, fix="Send several requests.")
