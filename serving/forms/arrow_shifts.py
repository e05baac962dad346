"""What edits did as an Arrow IPC stream: a flat table, one row for each number.

    cell      int32: which of `cells` in the metadata (what became of it, and its id)
    edit      int32: which edit of the request
    measure   dictionary<utf8>, see below
    of        utf8: the gene, state or class that the number is of; null where it is of the cell
    value     double; null where there is none

    measure             of         value
    cosine, shift       -          null where `reason` of the edit says why
    goal_shift          -          movement toward the goal, when one was given
    state_shift         state      movement toward it
    class_change        class      change of its probability
    gene_shift          gene       own shift of a gene that was asked for
    top_gene_shift      gene id    own shift of a gene that moved furthest, the furthest first
    found_rank          gene       rank of an edited gene in the cell (0 = the first)
    absent              gene       null: an edited gene that the cell lacks
    n_compared, n_cut, n_refilled   -    see `EditAnswered`

The metadata holds, as JSON, the rest of the answer: `cells` with what became of each, `edits` as they were asked for,
and `reasons`, one for each edit of each cell, empty where there is a cosine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
from pydantic import BaseModel

from genescale.serving.forms.arrow_answers import stream_of
from genescale.serving.schemas import CellFacts, Kind
from genescale.serving.schemas_perturb import EditAnswered, PerturbationsFacts, PerturbedCell

Row = tuple[str, str | None, float | None]
"""Measure, what it is of, and the number."""


class _Edit(BaseModel):
    kind: Kind
    genes: list[str]


class _Facts(PerturbationsFacts):
    cells: list[CellFacts]
    edits: list[_Edit]
    reasons: list[list[str]]


def render_arrow(facts: PerturbationsFacts, cells: Sequence[PerturbedCell]) -> bytes:
    """The answer as one record batch; every cell has the same edits."""
    rows = [
        (at, number, *row)
        for at, cell in enumerate(cells)
        for number, edit in enumerate(cell.edits)
        for row in rows_of(edit)
    ]
    cell, edit, measure, of, value = zip(*rows, strict=True)
    columns = {
        "cell": pa.array(cell, pa.int32()),
        "edit": pa.array(edit, pa.int32()),
        "measure": pa.array(measure, pa.utf8()).dictionary_encode(),
        "of": pa.array(of, pa.utf8()),
        "value": pa.array(value, pa.float64()),
    }
    return stream_of(columns, _with_cells(facts, cells))


def rows_of(edit: EditAnswered) -> Iterator[Row]:
    """Every number that one edit of one cell was answered with."""
    yield "cosine", None, edit.cosine
    yield "shift", None, edit.shift
    if edit.goal_shift is not None:
        yield "goal_shift", None, edit.goal_shift
    yield from (("state_shift", name, moved) for name, moved in edit.state_shifts.items())
    yield from (("class_change", name, change) for name, change in (edit.class_changes or {}).items())
    yield from (("gene_shift", one.gene, one.shift) for one in edit.gene_shifts)
    yield from (("top_gene_shift", one.gene, one.shift) for one in edit.top_gene_shifts)
    yield from (("found_rank", one.gene, one.rank) for one in edit.found)
    yield from (("absent", gene, None) for gene in edit.absent)
    yield from ((name, None, getattr(edit, name)) for name in ("n_compared", "n_cut", "n_refilled"))


def _with_cells(facts: PerturbationsFacts, cells: Sequence[PerturbedCell]) -> _Facts:
    return _Facts(
        **dict(facts),
        cells=[CellFacts(**cell.fields) for cell in cells],
        edits=[_Edit(kind=edit.kind, genes=edit.genes) for edit in cells[0].edits],
        reasons=[[edit.reason for edit in cell.edits] for cell in cells],
    )
