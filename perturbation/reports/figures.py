"""A screen as a figure: ranked genes with intervals, and beside each gene its shift per cell type.

Figures are made without a global drawing state, so they can be drawn in a service or a test. Colours are those of Okabe
and Ito and the map `viridis`, which readers with any colour vision can tell apart.
"""

from __future__ import annotations

import io
import math
import textwrap

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from genescale.perturbation.statistics.effects import effects
from genescale.platform.errors import InputError

BLUE, GREY, PALE = "#0072B2", "#555555", "#E8E8E8"
TITLES = {"delete": "Deletions that move cells most", "overexpress": "Overexpression that moves cells most"}
# A gene seen in one cell can top a ranking by chance; it is drawn only when there is nothing better.
LEAST_CELLS = 3
LONGEST_NAME = 22
MOST_TYPES = 20


def draw_screen(cell_shifts: pl.DataFrame, *, top: int = 25, title: str = "") -> Figure:
    """The `top` genes by mean shift with 95% intervals and, when cell types are known, their shifts per cell type.

    Raises InputError when no cell was edited.
    """
    summary = ranked_genes(cell_shifts, top=top)
    by_type = shifts_by_cell_type(cell_shifts, summary["gene_id"].to_list())
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        height = 1.6 + 0.22 * len(summary) + (0.5 if by_type.width > 1 else 0)
        width = 6.2 + (0.8 + 0.42 * (by_type.width - 1) if by_type.width > 1 else 0)
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        figure.suptitle(title or _title(summary), x=0.01, ha="left", fontsize=11, fontweight="bold")
        if by_type.width > 1:
            left, right = figure.subplots(1, 2, width_ratios=[4.4, 0.8 + 0.42 * (by_type.width - 1)], sharey=True)
            draw_heat_map(right, by_type, summary["gene_id"].to_list())
        else:
            left = figure.subplots()
        draw_ranking(left, summary)
    return figure


def ranked_genes(cell_shifts: pl.DataFrame, *, top: int) -> pl.DataFrame:
    """Rows of `effects` for the genes to draw: largest mean shift first, genes of very few cells left out."""
    summary = effects(cell_shifts).filter(pl.col("n_edited") > 0)
    summary = summary.sort("mean", "edit_id", descending=[True, False])
    if len(summary) == 0:
        raise InputError("no cell was edited, so there is nothing to draw.", fix="Choose genes that the cells have.")
    often = summary.filter(pl.col("n_edited") >= LEAST_CELLS)
    return (often if len(often) else summary).head(top)


def shifts_by_cell_type(cell_shifts: pl.DataFrame, gene_ids: list[str]) -> pl.DataFrame:
    """Mean shift per gene (rows, `gene_id` first) and frequent cell type (columns); null where none has the gene."""
    edited = cell_shifts.filter(
        (pl.col("role") == "edit") & (pl.col("outcome") == "edited") & pl.col("cell_type").is_not_null()
    )
    frequent = edited.group_by("cell_type").len().sort(["len", "cell_type"], descending=[True, False]).head(MOST_TYPES)
    wide = (
        edited.filter(pl.col("gene_id").is_in(gene_ids), pl.col("cell_type").is_in(frequent["cell_type"].to_list()))
        .sort("cell_type", "shift")
        .pivot(on="cell_type", index="gene_id", values="shift", aggregate_function="mean")
    )
    return pl.DataFrame({"gene_id": gene_ids}).join(wide, on="gene_id", how="left", maintain_order="left")


def draw_ranking(axes: Axes, summary: pl.DataFrame) -> None:
    """Points with intervals, one row per gene, the number of cells at the right edge."""
    row = np.arange(len(summary))
    mean = summary["mean"].to_numpy()
    low, high = (summary[name].fill_null(summary["mean"]).to_numpy() for name in ("ci_low", "ci_high"))
    power = _power(float(high.max()))
    mean, low, high = (values / 10.0**power for values in (mean, low, high))
    axes.hlines(row, low, high, color=BLUE, alpha=0.45, linewidth=2.5, zorder=2)
    axes.scatter(mean, row, color=BLUE, s=22, zorder=3)
    axes.set_yticks(row, [_short(symbol) for symbol in summary["symbol"]])
    axes.set_ylim(len(summary) - 0.4, -0.6)
    axes.set_xlim(min(0.0, float(low.min())), float(high.max()) * 1.04 or 1.0)
    axes.grid(axis="x", color=PALE, zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    for at, cells in enumerate(summary["n_edited"]):
        axes.annotate(
            f"{cells:,}",
            (1.0, at),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=GREY,
        )
    axes.annotate(
        "cells",
        (1.0, 1.0),
        xycoords="axes fraction",
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=7.5,
        color=GREY,
    )
    axes.set_xlabel(f"mean shift (1 − cosine){_times(power)}, 95% interval over {summary['over'][0]}s")


def draw_heat_map(axes: Axes, by_type: pl.DataFrame, gene_ids: list[str]) -> None:
    """Mean shift per gene and cell type; hatched where no cell of that type has the gene."""
    types = [name for name in by_type.columns if name != "gene_id"]
    values = np.ma.masked_invalid(by_type.select(types).cast(pl.Float64).fill_null(np.nan).to_numpy())
    power = _power(float(values.max()))
    across, down = np.arange(len(types) + 1) - 0.5, np.arange(len(gene_ids) + 1) - 0.5
    for row, column in zip(*np.nonzero(np.ma.getmaskarray(values)), strict=True):
        axes.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor=PALE, linewidth=0)
        )
    image = axes.pcolormesh(
        across,
        down,
        values / 10.0**power,
        cmap="viridis",
        vmin=min(0.0, float(values.min())) / 10.0**power,
        edgecolors="white",
        linewidth=0.6,
    )
    axes.set_xticks(
        range(len(types)), [_short(name) for name in types], rotation=45, ha="right", rotation_mode="anchor"
    )
    axes.tick_params(axis="both", length=0)
    axes.tick_params(axis="y", labelleft=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.03, aspect=30)
    bar.outline.set_visible(False)
    note = "; hatched: gene not in these cells" if np.ma.is_masked(values) else ""
    bar.set_label(f"mean shift{_times(power)}{note}", fontsize=8)


def png(figure: Figure, *, dots_per_inch: int = 160) -> bytes:
    """The figure as a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dots_per_inch)
    return out.getvalue()


def _title(summary: pl.DataFrame) -> str:
    return TITLES[summary["kind"][0]]


def _short(text: str) -> str:
    return textwrap.shorten(text, LONGEST_NAME, placeholder="…") if " " in text else text[:LONGEST_NAME]


def _power(largest: float) -> int:
    """Power of ten to write in a label instead of zeros at every tick; 0 when ticks are short anyway."""
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    return power if power < -1 else 0


def _times(power: int) -> str:
    return f" in $10^{{{power}}}$" if power else ""
