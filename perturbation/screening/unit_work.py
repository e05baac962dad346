"""One unit of work: its cells, their edits and controls, answered and turned into tables. Needs no Ray.

Legend: `t` tokens of one cell, `p` pairs of (edit, affected gene).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from genescale.perturbation.answers import EditAnswer, Readouts
from genescale.perturbation.editing.cell import gene_span
from genescale.perturbation.editing.controls import matched_controls
from genescale.perturbation.editing.requests import EditRequest
from genescale.perturbation.perturb import perturb_cells
from genescale.perturbation.screening.edit_codes import EditCodes
from genescale.perturbation.screening.first_pass import FirstPass
from genescale.perturbation.screening.gene_shifts import moments_table
from genescale.perturbation.screening.masked_genes import masked_gene_model, masked_moments
from genescale.perturbation.screening.moments import Moments, fold, merge, observed
from genescale.perturbation.screening.plan import Plan
from genescale.perturbation.screening.results import (
    CELL_SHIFTS,
    FIRST_PASS,
    GENE_MOMENTS,
    MASKED_MOMENTS,
    OUTCOMES,
    Row,
    cell_shifts_table,
    outcome_of,
)
from genescale.perturbation.screening.two_pass import Chosen, cell_rng, choose
from genescale.training.embedder import Embedder
from genescale.training.model import MaskedGeneModel

FIRST_PASS_SCHEMA = pa.schema(
    [
        ("cell_id", pa.string()),
        ("dataset_id", pa.string()),
        ("source_row", pa.int64()),
        ("gene_id", pa.string()),
        ("rank", pa.int32()),
        ("score", pa.float64()),
        ("chosen", pa.string()),
    ]
)
Scored = tuple[np.ndarray | None, Chosen | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitResult:
    """What came of one unit."""

    cell_shifts: pa.Table
    moments: Moments | None
    """Of the gene shifts, where they were asked for."""
    masked: Moments | None
    """Of the changes of masked genes, likewise."""
    first_pass: pa.Table | None
    """Scores of every gene, where a first pass chose the edits."""
    counts: Mapping[str, int]
    """Rows by role and outcome, and what was computed for them."""
    edits: list[int]
    """Codes of the edits that it tried."""
    seconds: float

    def tables(self) -> dict[str, pa.Table]:
        """What is written, by folder."""
        found = {CELL_SHIFTS: self.cell_shifts}
        if self.moments is not None:
            found[GENE_MOMENTS] = moments_table(self.moments)
        if self.masked is not None:
            found[MASKED_MOMENTS] = moments_table(self.masked)
        if self.first_pass is not None:
            found[FIRST_PASS] = self.first_pass
        return found

    def mark(self) -> dict[str, Any]:
        """What the unit says of itself when it is complete."""
        sums = {"observed": self.moments, "observed_masked": self.masked}
        observed = {name: 0 if one is None else len(one.edit_p) for name, one in sums.items()}
        return {"counts": {**self.counts, **observed}, "edits": self.edits, "seconds": self.seconds}


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """One row to come: an edit of a cell, or a control of one."""

    request: EditRequest
    edit_id: str
    symbol: str
    code: int
    """By which gene shifts know the edit."""
    control_of: str | None = None
    chosen: str | None = None
    chance: float | None = None


class UnitWorker:
    """Answers the units of one plan with one model."""

    def __init__(
        self, plan: Plan, embedder: Embedder, readouts: Readouts, *, model: MaskedGeneModel | None = None
    ) -> None:
        """`model` is what `masked_gene_model` makes of the embedder, where it was made before."""
        self.plan, self.embedder, self.readouts = plan, embedder, readouts
        self.model = masked_gene_model(embedder) if model is None and plan.masked is not None else model
        self.first_pass = None if plan.two_pass is None else FirstPass(embedder, readouts, plan.two_pass)

    def run(self, unit: int, tokens_of: Callable[[Sequence[int]], Sequence[np.ndarray]]) -> UnitResult:
        """All edits of one unit; `tokens_of(cells)` gives the token arrays of places in the corpus."""
        began = time.perf_counter()
        plan = self.plan
        pieces = plan.pieces.filter(pl.col("unit") == unit)
        rows = plan.cells[pieces["row"].to_list()]
        cells = tokens_of(rows["cell"].to_list())
        scored = [self._scored(cell, tokens_t) for cell, tokens_t in zip(rows["cell"], cells, strict=True)]
        asked = [
            asked_of_cell(plan, tokens_t, start, stop, chosen)
            for tokens_t, start, stop, (_, chosen) in zip(cells, pieces["start"], pieces["stop"], scored, strict=True)
        ]
        # The same deletion may be an edit and the control of several others: it is computed once.
        requests = [list(dict.fromkeys(one.request for one in of_cell)) for of_cell in asked]
        uncropped = dict(enumerate(cells)) if plan.edits.options.refill else None
        answered = perturb_cells(self.embedder, cells, requests, readouts=self.readouts, uncropped=uncropped)
        by_request = [dict(zip(*pair, strict=True)) for pair in zip(requests, answered, strict=True)]
        found = [_row(at, one, by_request[at]) for at, of_cell in enumerate(asked) for one in of_cell]
        asked_n = int((pieces["stop"] - pieces["start"]).sum())
        return UnitResult(
            cell_shifts=cell_shifts_table(rows, found, plan.edits, self.readouts),
            moments=None if plan.affected is None else _moments(asked, by_request),
            masked=None if self.model is None else self._masked(cells, asked, by_request, self.model),
            first_pass=None if self.first_pass is None else first_pass_table(rows, cells, scored, plan),
            counts={**_counts(found, plan, answered), "not_chosen": asked_n - sum(r.control_of is None for r in found)},
            edits=sorted({one.code for of_cell in asked for one in of_cell if one.control_of is None}),
            seconds=time.perf_counter() - began,
        )

    def _masked(
        self,
        cells: Sequence[np.ndarray],
        asked: Sequence[Sequence[_Asked]],
        answers: Sequence[Mapping[EditRequest, EditAnswer]],
        model: MaskedGeneModel,
    ) -> Moments:
        return fold(
            masked_moments(
                model,
                self.embedder,
                self.plan.masked,
                tokens_t,
                # Edits that found nothing are no observation.
                [(one.code, one.request) for one in of_cell if outcome_of(answered[one.request]) == "edited"],
                whole=self.plan.edits.options.refill,
            )
            for tokens_t, of_cell, answered in zip(cells, asked, answers, strict=True)
        )

    def _scored(self, cell: int, tokens_t: np.ndarray) -> Scored:
        if self.first_pass is None or self.plan.two_pass is None:
            return None, None
        scores_g = self.first_pass.scores(tokens_t)
        return scores_g, choose(scores_g, self.plan.two_pass, cell_rng(self.plan.two_pass, cell))


def asked_of_cell(plan: Plan, tokens_t: np.ndarray, start: int, stop: int, chosen: Chosen | None) -> list[_Asked]:
    """Edits `start` to `stop` of a cell, or those that a first pass has chosen, each followed by its controls."""
    requests = list(enumerate(plan.edits.of_cell(tokens_t)))[start:stop]
    if chosen is None:
        return [one for at, request in requests for one in _with_controls(plan, tokens_t, at, request)]
    return [
        one
        for position, role, chance in zip(chosen.positions, chosen.roles, chosen.chances, strict=True)
        for one in _with_controls(plan, tokens_t, *requests[position], chosen=str(role), chance=float(chance))
    ]


def _with_controls(plan: Plan, tokens_t: np.ndarray, at: int, request: EditRequest, **chosen: Any) -> Iterator[_Asked]:
    edits, codes = plan.edits, EditCodes.of(plan)
    # Two sets may hold the same genes: a listed edit is known by its place.
    listed = edits.listed[at] if at < len(edits.listed) else None
    name = listed.edit_id if listed else edits.edit_id(request.genes)
    symbol = listed.symbol if listed else edits.symbol(request.genes)
    code = codes.of_edit(at, request.genes)
    yield _Asked(request=request, edit_id=name, symbol=symbol, code=code, **chosen)
    for control in _controls(plan, tokens_t, request):
        yield _Asked(
            request=control,
            edit_id=edits.gene_id(control.genes),
            symbol=edits.symbol(control.genes),
            code=codes.of_controls(code),
            control_of=name,
        )


def _controls(plan: Plan, tokens_t: np.ndarray, request: EditRequest) -> list[EditRequest]:
    if not plan.n_controls:
        return []
    return matched_controls(
        tokens_t,
        request,
        n=plan.n_controls,
        expression_g=plan.detected_v.astype(np.float64),
        seed=plan.seed,
        vocabulary=plan.edits.vocabulary,
        exclude=plan.not_controls,
    )


def _row(cell: int, asked: _Asked, answers: Mapping[EditRequest, EditAnswer]) -> Row:
    return Row(
        cell=cell,
        answer=answers[asked.request],
        edit_id=asked.edit_id,
        symbol=asked.symbol,
        control_of=asked.control_of,
        chosen=asked.chosen,
        chance=asked.chance,
    )


def _moments(asked: Sequence[Sequence[_Asked]], answers: Sequence[Mapping[EditRequest, EditAnswer]]) -> Moments:
    pairs = zip(asked, answers, strict=True)
    return fold(_observed([(one.code, of_cell[one.request]) for one in rows]) for rows, of_cell in pairs)


def _observed(answers: Sequence[tuple[int, EditAnswer]]) -> Moments:
    """Gene cosines of one cell; edits that found nothing are no observation."""
    edited = [(code, answer) for code, answer in answers if outcome_of(answer) == "edited"]
    if not edited:
        return merge([])
    return observed(
        np.repeat(np.array([code for code, _ in edited]), [len(one.gene_tokens) for _, one in edited]),
        np.concatenate([one.gene_tokens for _, one in edited]),
        np.concatenate([one.gene_cosine_values for _, one in edited]),
    )


def _counts(found: Sequence[Row], plan: Plan, answered: Sequence[Sequence[EditAnswer]]) -> dict[str, int]:
    outcomes = Counter(outcome_of(row.answer) for row in found if row.control_of is None)
    n_controls = sum(row.control_of is not None for row in found)
    return {
        **{name: outcomes[name] for name in OUTCOMES},
        "controls": n_controls,
        "controls_missing": outcomes["edited"] * plan.n_controls - n_controls,
        "sequences": sum(1 + sum(outcome_of(one) == "edited" for one in of_cell) for of_cell in answered),
    }


def first_pass_table(rows: pl.DataFrame, cells: Sequence[np.ndarray], scored: Sequence[Scored], plan: Plan) -> pa.Table:
    """One row per cell and gene: its score, and whether and with which chance it was chosen."""
    tables = []
    for cell, tokens_t, (scores_g, chosen) in zip(rows.iter_rows(named=True), cells, scored, strict=True):
        assert scores_g is not None
        assert chosen is not None
        tokens = tokens_t[gene_span(tokens_t, plan.edits.vocabulary)]
        role_g: list[str | None] = [None] * len(tokens)
        for position, role in zip(chosen.positions.tolist(), chosen.roles.tolist(), strict=True):
            role_g[position] = role
        columns: dict[str, Any] = {name: [cell[name]] * len(tokens) for name in ("cell_id", "dataset_id", "source_row")}
        genes = [plan.edits.vocabulary.gene_of_token(token) for token in tokens.tolist()]
        columns |= {"gene_id": genes, "rank": list(range(len(tokens))), "score": scores_g, "chosen": role_g}
        tables.append(pa.table(columns, schema=FIRST_PASS_SCHEMA))
    return pa.concat_tables(tables)
