"""Interactions: combined minus the sum of singles, in the same cell, on each read-out."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from genescale.perturbation.readouts.interactions import interactions, readout_columns
from genescale.platform.errors import InputError


def row(cell: int, genes: str, shift: float | None, *, outcome: str = "edited", **options: Any) -> dict[str, Any]:
    toward = None if shift is None else -2 * shift
    return {
        "cell_id": f"cell-{cell}",
        "dataset_id": "d",
        "source_row": cell,
        "edit_id": genes,
        "gene_id": genes,
        "kind": "delete",
        "role": "edit",
        "outcome": outcome,
        "shift": shift,
        "toward:well": toward,
        "class:ill": shift,
        **options,
    }


def found(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return interactions(pl.DataFrame(rows))


def test_what_genes_do_together_beyond_their_sum() -> None:
    pair = found([row(0, "A", 1.0), row(0, "B", 2.0), row(0, "A+B", 3.5), row(1, "A", 9.0), row(1, "B", 9.0)])
    (only,) = pair.to_dicts()
    assert (only["singles:shift"], only["interaction:shift"]) == (3.0, 0.5)
    assert (only["singles:toward:well"], only["interaction:toward:well"]) == (-6.0, -1.0)
    assert only["interaction:class:ill"] == 0.5
    assert only["no_interaction"] is None
    assert only["cell_id"] == "cell-0"


def test_sets_of_three_and_named_sets_are_compared_with_their_genes() -> None:
    rows = [row(0, gene, 1.0) for gene in "ABC"]
    (only,) = found([*rows, row(0, "A+B+C", 5.0, edit_id="programme")]).to_dicts()
    assert (only["edit_id"], only["interaction:shift"]) == ("programme", 2.0)


def test_a_gene_that_the_cell_lacks_leaves_no_interaction() -> None:
    rows = [row(0, "A", 0.0, outcome="absent"), row(0, "B", 2.0), row(0, "A+B", 2.0)]
    (only,) = found(rows).to_dicts()
    assert only["no_interaction"] == "absent"
    assert only["interaction:shift"] is None
    undefined = found([row(0, "A", 1.0), row(0, "B", 1.0), row(0, "A+B", None, outcome="undefined")])
    assert undefined["no_interaction"].to_list() == ["undefined"]


def test_a_single_that_was_not_screened_is_told() -> None:
    pair = found([row(0, "A", 1.0), row(0, "B", 1.0), row(0, "A+B", 3.0), row(1, "A", 1.0), row(1, "A+B", 3.0)])
    assert pair["no_interaction"].to_list() == [None, "single missing"]
    assert pair["interaction:shift"].to_list() == [1.0, None]
    with pytest.raises(InputError, match="none of the genes that were edited together was edited alone"):
        found([row(0, "A+B", 3.0)])
    with pytest.raises(InputError, match="no edit has several genes"):
        found([row(0, "A", 3.0)])


def test_controls_and_other_kinds_do_not_stand_in_for_singles() -> None:
    rows = [row(0, "A", 1.0), row(0, "B", 1.0), row(0, "A+B", 3.0)]
    noise = [row(0, "A", 50.0, role="control"), row(0, "B", 50.0, kind="inhibit"), row(0, "C+D", 9.0, role="control")]
    (only,) = found([*noise, *rows]).to_dicts()
    assert only["interaction:shift"] == 1.0


def test_every_recorded_readout_is_covered() -> None:
    assert readout_columns(pl.DataFrame([row(0, "A", 1.0)])) == ["shift", "toward:well", "class:ill"]
