"""Whole numbers for the edits of a screen, and for their controls taken together, so that gene shifts can be merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from genescale.perturbation.editing.edit_sets import EditSet

if TYPE_CHECKING:
    from genescale.perturbation.screening.plan import Plan


@dataclass(frozen=True)
class EditCodes:
    """Listed edits come first, then single genes by token, then pairs with the anchor; then all of these once more for
    their controls."""

    n_listed: int
    n_tokens: int

    @classmethod
    def of(cls, plan: Plan) -> EditCodes:
        """The codes of a plan."""
        return cls(len(plan.edits.listed), plan.edits.vocabulary.size)

    @property
    def n_edits(self) -> int:
        """Codes below this are edits, those from here on their controls."""
        return self.n_listed + 2 * self.n_tokens

    def of_edit(self, at: int, genes: Sequence[int]) -> int:
        """Code of the edit at place `at` among those of a cell."""
        if at < self.n_listed:
            return at
        return self.n_listed + (self.n_tokens if len(genes) > 1 else 0) + genes[-1]

    def of_controls(self, code: int) -> int:
        """Code of all controls of an edit."""
        return code + self.n_edits

    def names(self, codes: Iterable[int], edits: EditSet) -> pl.DataFrame:
        """`edit` (the code), edit_id, gene_id, symbol, role and control_of of each."""
        rows: list[tuple[object, ...]] = []
        for code in codes:
            edit_id, gene_id, symbol = self._name(code % self.n_edits, edits)
            if code < self.n_edits:
                rows.append((code, edit_id, gene_id, symbol, "edit", None))
            else:
                rows.append((code, *(f"controls of {name}" for name in (edit_id, gene_id, symbol)), "control", edit_id))
        text = dict.fromkeys(("edit_id", "gene_id", "symbol", "role", "control_of"), pl.String)
        return pl.DataFrame(rows, schema={"edit": pl.Int32, **text}, orient="row")

    def _name(self, code: int, edits: EditSet) -> tuple[str, str, str]:
        if code < self.n_listed:
            listed = edits.listed[code]
            return listed.edit_id, edits.gene_id(listed.genes), listed.symbol
        with_anchor, token = divmod(code - self.n_listed, self.n_tokens)
        genes = (edits.anchor, token) if with_anchor and edits.anchor is not None else (token,)
        return edits.edit_id(genes), edits.gene_id(genes), edits.symbol(genes)
