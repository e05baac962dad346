"""Figures: which genes are drawn, in which order, and that a file comes out."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from genescale.perturbation.reports.figures import draw_screen, png, ranked_genes, shifts_by_cell_type
from genescale.platform.errors import InputError


def table(*, cell_types: bool = True) -> pl.DataFrame:
    """Genes 0 to 9 in six cells each, gene 9 strongest; gene RARE in one cell; gene 3 in no B cell."""
    rows = []
    for gene in range(10):
        for cell in range(6):
            cell_type = ("b_cell", "monocyte", "nk")[cell % 3]
            absent = gene == 3 and cell_type == "b_cell"
            shift = 0.0 if absent else (gene + 1) * 1e-4 * (1 + cell)
            rows.append((f"ENSG{gene}", f"GENE{gene}", "absent" if absent else "edited", shift, cell_type))
    rows.append(("ENSG99", "RARE", "edited", 1.0, "nk"))
    frame = pl.DataFrame(rows, schema=["gene_id", "symbol", "outcome", "shift", "cell_type"], orient="row")
    none = pl.lit(None, dtype=pl.String)
    frame = frame.with_columns(kind=pl.lit("delete"), donor_id=none, goal_shift=pl.lit(None, dtype=pl.Float64))
    return frame if cell_types else frame.with_columns(cell_type=none)


def test_genes_of_a_single_cell_do_not_lead_the_ranking() -> None:
    assert ranked_genes(table(), top=3)["symbol"].to_list() == ["GENE9", "GENE8", "GENE7"]
    rare = table().filter(pl.col("symbol") == "RARE")
    assert ranked_genes(rare, top=3)["symbol"].to_list() == ["RARE"]


def test_the_heat_map_tells_absent_from_unmoved() -> None:
    wide = shifts_by_cell_type(table(), ["ENSG3", "ENSG1"])
    assert wide.columns == ["gene_id", "b_cell", "monocyte", "nk"]
    assert wide["gene_id"].to_list() == ["ENSG3", "ENSG1"]
    assert wide["b_cell"].to_list() == [None, pytest.approx(2e-4 * np.mean([1, 4]))]


@pytest.mark.parametrize("cell_types", [True, False])
def test_a_figure_shows_the_ranked_genes_from_the_top(cell_types: bool) -> None:
    figure = draw_screen(table(cell_types=cell_types), top=4)
    ranking = figure.axes[0]
    assert [label.get_text() for label in ranking.get_yticklabels()] == ["GENE9", "GENE8", "GENE7", "GENE6"]
    top, bottom = ranking.transData.transform([(0, 0), (0, 3)])[:, 1]
    assert top > bottom
    assert png(figure, dots_per_inch=40).startswith(b"\x89PNG")


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(InputError, match="no cell was edited"):
        draw_screen(table().with_columns(outcome=pl.lit("absent")))
