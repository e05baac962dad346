"""The figure of a screen for other pages: which genes are drawn, in which order, and that a file comes out."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from genescale.perturbation.reports.figures import draw_screen, png, ranked_genes, shifts_by_cell_type
from genescale.platform.errors import InputError
from tests.perturbation.screen_rows import gene_id, screen_rows


def table(*, cell_types: bool = True) -> pl.DataFrame:
    """Genes 0 to 9, gene 9 strongest; gene 3 in no B cell; gene 99 strongest of all, but in one cell."""
    made = screen_rows(n_genes=10, n_cells=6, strong={g: g * 1e-2 for g in range(10)}, cell_types=cell_types)
    gone = (pl.col("gene_id") == gene_id(3)) & (pl.col("source_row") % 3 == 0)
    made = made.with_columns(
        outcome=pl.when(gone).then(pl.lit("absent")).otherwise("outcome"),
        shift=pl.when(gone).then(0.0).otherwise("shift"),
    )
    rare = made.head(1).with_columns(
        pl.lit(gene_id(99)).alias("edit_id"), pl.lit(gene_id(99)).alias("gene_id"), symbol=pl.lit("RARE"), shift=1.0
    )
    return pl.concat([made, rare])


def test_genes_of_a_single_cell_do_not_lead_the_ranking() -> None:
    assert ranked_genes(table(), top=3)["symbol"].to_list() == ["GENE9", "GENE8", "GENE7"]
    rare = table().filter(pl.col("symbol") == "RARE")
    assert ranked_genes(rare, top=3)["symbol"].to_list() == ["RARE"]


def test_the_heat_map_tells_absent_from_unmoved() -> None:
    wide = shifts_by_cell_type(table(), [gene_id(3), gene_id(1)])
    assert wide.columns == ["gene_id", "b_cell", "monocyte", "nk"]
    assert wide["gene_id"].to_list() == [gene_id(3), gene_id(1)]
    assert wide["b_cell"].to_list() == [None, pytest.approx(1.1e-2 + 0.2e-3 * np.sin(1), abs=3e-4)]


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
