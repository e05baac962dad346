"""The part of the page on ranks, and the sentences on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from genescale.ingestion.reports.report_figures import percent
from genescale.perturbation.attention.attention_figures import full_colour, head_rows, ratio_key, ratio_map
from genescale.perturbation.attention.rank_profile import ALL_RANKS
from genescale.perturbation.attention.rank_summary import TOP_RANKS, layer_summary, survey_and_focus
from genescale.training.evaluation.bundle_report import table

if TYPE_CHECKING:
    from genescale.perturbation.attention.corpus_attention import AttentionResult

MOST_HEADS_DRAWN = 18
MARKED = 1.2
"""Halves of the layers differ when one is so many times the other: less is not called a pattern."""


def rank_sentences(result: AttentionResult) -> list[str]:
    """What was found of ranks, in words."""
    summary = layer_summary(result.tables.between_ranks, result.tables.heads)
    found = survey_and_focus(summary)
    if found is None:
        return []
    early_late = {
        name: (found[f"early_{name}"], found[f"late_{name}"])
        for name in ("spread_bits", "top_relative", "looked_at_share")
    }
    survey, focus, wide = (early_late[name] for name in ("spread_bits", "top_relative", "looked_at_share"))
    surveys, focuses = survey[0] > MARKED * survey[1], focus[1] > MARKED * max(focus[0], 1.0)
    verdict = "That is" if surveys and focuses else "That is not"
    return [
        f"A gene looks at {percent(wide[0])} of the tokens of its cell in the first half of the layers and at "
        f"{percent(wide[1])} in the second (as if alike).",
        f"Heads of the first half differ in the ranks they look at by {survey[0]:.2g} bits, those of the second by "
        f"{survey[1]:.2g}; ranks {TOP_RANKS} get {focus[0]:.2f} and {focus[1]:.2f} times uniform attention. {verdict} "
        "the pattern reported for Geneformer, early layers that survey the ranks and late ones that focus on the top.",
    ]


def rank_section(result: AttentionResult) -> str:
    """Attention to and from ranks, and how wide genes look."""
    profiles = result.tables.between_ranks.filter(pl.col("from_rank") == ALL_RANKS)
    bins = profiles["to_rank"].unique(maintain_order=True).to_list()
    layers = [f"layer {number + 1}" for number in range(result.n_layers)]
    means = profiles.group_by("layer", "to_rank").agg(pl.col("relative").mean())
    mean_ij = _wide(means, "layer", "to_rank", bins)
    full = full_colour(
        _wide(profiles.with_columns(one=pl.col("layer") * 1_000 + pl.col("head")), "one", "to_rank", bins)
    )
    every = result.tables.heads.filter(pl.col("from_rank") == ALL_RANKS)
    shown = {"full": full, "column_title": "rank looked at"}
    wide = head_rows(
        every,
        "looked_at_share",
        axis_title="tokens looked at as if alike, over those of the cell",
        label="How wide a gene looks, by layer",
    )
    drawn = ratio_map(mean_ij, layers, bins, label="Attention to ranks by layer", **shown)  # type: ignore[arg-type]
    return (
        "<h2>Ranks</h2><p>Rank 1 is the gene with the highest rank value in its cell.</p>"
        f"<figure>{drawn}{ratio_key(full)}<figcaption>Attention to genes of a rank bin over that of a head that looks "
        "at all tokens alike; mean over the heads of a layer.</figcaption></figure>"
        f"<figure>{wide}<figcaption>The exponential of the entropy of a gene's attention, as a share of the tokens of "
        "the cell; 1 looks at all alike.</figcaption></figure>"
        f"{_summary_table(result)}{_each_head(result, bins, full)}{_from_to(result, bins)}"
    )


def _summary_table(result: AttentionResult) -> str:
    body = [
        (
            f"{row['layer']}",
            percent(row["to_genes"]),
            percent(row["to_self"]),
            percent(row["to_special"]),
            percent(row["looked_at_share"]),
            f"{row['top_relative']:.2f}",
            f"{row['spread_bits']:.3f}",
        )
        for row in layer_summary(result.tables.between_ranks, result.tables.heads).iter_rows(named=True)
    ]
    heads = (
        "layer", "to other genes", "to itself", "to special tokens", "width", f"ranks {TOP_RANKS}, over uniform",
        "heads differ, bits",
    )  # fmt: skip
    return table(heads, ["number"] * len(heads), body)


def _each_head(result: AttentionResult, bins: list[str], full: float) -> str:
    panels = ""
    profiles = result.tables.between_ranks.filter(pl.col("from_rank") == ALL_RANKS)
    heads = min(result.n_heads, MOST_HEADS_DRAWN)
    for layer in range(1, result.n_layers + 1):
        rows = profiles.filter((pl.col("layer") == layer) & (pl.col("head") <= heads))
        drawn = ratio_map(
            _wide(rows, "head", "to_rank", bins),
            [f"head {number + 1}" for number in range(heads)],
            bins,
            full=full,
            label=f"Attention to ranks by head of layer {layer}",
            column_title="rank looked at",
        )
        panels += f"<div><h3>Layer {layer}</h3>{drawn}</div>"
    left = f" The first {heads} heads are drawn; all are in the table." if heads < result.n_heads else ""
    return f'<h3>Each head</h3><p>As above, head by head.{left}</p><div class="panels">{panels}</div>'


def _from_to(result: AttentionResult, bins: list[str]) -> str:
    panels = ""
    means = (
        result.tables.between_ranks.filter(pl.col("from_rank") != ALL_RANKS)
        .group_by("layer", "from_rank", "to_rank")
        .agg(pl.col("relative").mean())
    )
    full = full_colour(means["relative"].to_numpy())
    for layer in sorted({1, (result.n_layers + 1) // 2, result.n_layers}):
        drawn = ratio_map(
            _wide(means.filter(pl.col("layer") == layer), "from_rank", "to_rank", bins, rows=bins),
            bins,
            bins,
            full=full,
            label=f"Attention from ranks to ranks, layer {layer}",
            column_title="rank looked at",
        )
        panels += f"<div><h3>Layer {layer}</h3>{drawn}</div>"
    return (
        "<h3>Who looks at which ranks</h3><p>Rows: the rank of the gene that looks; mean over heads.</p>"
        f'<div class="panels">{panels}</div>{ratio_key(full)}'
    )


def _wide(frame: pl.DataFrame, index: str, on: str, columns: list[str], rows: list[str] | None = None) -> np.ndarray:
    """Relative attention as a table, NaN where there is none."""
    wide = frame.pivot(on, index=index, values="relative")
    wide = wide.sort(index) if rows is None else pl.DataFrame({index: rows}).join(wide, on=index, how="left")
    missing = [pl.lit(None, dtype=pl.Float64).alias(name) for name in columns if name not in wide.columns]
    return wide.with_columns(*missing).select(columns).cast(pl.Float64).fill_null(np.nan).to_numpy()
