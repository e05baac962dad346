"""The part of the page on one gene list, and the sentence on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from genescale.ingestion.reports.report_figures import escaped, number, percent
from genescale.perturbation.attention.attention_figures import full_colour, list_rows, ratio_key, ratio_map
from genescale.perturbation.attention.list_shares import NamedGenes
from genescale.perturbation.attention.list_tests import significant
from genescale.training.evaluation.bundle_report import table

if TYPE_CHECKING:
    from genescale.perturbation.attention.corpus_attention import AttentionResult

STRONGEST_HEADS, STRONGEST_GENES = 10, 15


def list_sentence(result: AttentionResult, one: NamedGenes) -> str:
    """What was found of a list, in words."""
    assert result.tables.lists is not None
    rows = result.tables.lists.filter((pl.col("list") == one.name) & (pl.col("head") > 0))
    first = rows.row(0, named=True)
    if not first["n_genes"]:
        return f"{one.name}: not measured, {first['reason']}."
    if not first["testable"]:
        return f"{one.name}: measured but not tested, {first['reason']}."
    above, below = (significant(rows, above=side) for side in (True, False))
    text = (
        f"{one.name}: {first['n_genes']:,} genes receive more attention than matched genes in {len(above):,} of "
        f"{len(rows):,} heads and less in {len(below):,} (q < 0.05)"
    )
    if not len(above):
        return f"{text}."
    best = above.sort("place", descending=True).row(0, named=True)
    return (
        f"{text}; clearest in layer {best['layer']}, head {best['head']}: more than {percent(best['place'])} of "
        f"matched genes, {_interval(best)} times their attention."
    )


def list_section(result: AttentionResult, one: NamedGenes) -> str:
    """The list against its matched genes: by head, by layer, and its genes."""
    assert result.tables.lists is not None
    rows = result.tables.lists.filter(pl.col("list") == one.name).sort("layer", "head")
    first = rows.row(0, named=True)
    about = _about_list(one, first)
    if not first["n_genes"]:
        return f"<h2>{escaped(one.name)}</h2>{about}"
    layers, heads = result.n_layers, result.n_heads
    ratio_ij = _by_head(rows, "ratio", layers)
    sure_ij = _by_head(rows, "q", layers) < 0.05
    beside = [[_said(rows, i * (heads + 1) + j) for j in range(1, heads + 1)] for i in range(layers)]
    full = full_colour(ratio_ij[:, 1:])
    drawn = ratio_map(
        ratio_ij[:, 1:],
        [f"layer {i + 1}" for i in range(layers)],
        [f"{j + 1}" for j in range(heads)],
        full=full,
        label=f"{one.name} against matched genes by layer and head",
        column_title="head",
        sure_ij=sure_ij[:, 1:],
        beside=beside,
    )
    return (
        f"<h2>{escaped(one.name)} against matched genes</h2>{about}"
        f"<figure>{drawn}{ratio_key(full, sure='q < 0.05')}<figcaption>Attention to a gene of the list over attention "
        "to its matched genes of the same cells, by layer and head.</figcaption></figure>"
        f"<figure>{list_rows(rows, [one.name])}<figcaption>Mean over the heads of each layer and, beside "
        f"the name, the genes; the line is the {result.config.confidence:.0%} interval over "
        f"{escaped(first['over'])}.</figcaption></figure>"
        f"{_strongest_heads(rows)}{_list_genes(result, one)}"
    )


def _about_list(one: NamedGenes, first: dict[str, object]) -> str:
    text = (
        f"{first['n_genes']:,} of {first['n_listed']:,} genes stand in enough of {first['n_cells']:,} cells of "
        f"{first['n_donors']:,} donors, each beside {number(float(first['mean_controls']))} matched genes."  # type: ignore[arg-type]
    )
    if one.outside:
        shown = ", ".join(one.outside[:10]) + (", …" if len(one.outside) > 10 else ".")
        text += f" {len(one.outside):,} names are not in the vocabulary: {shown}"
    if first["reason"]:
        text += f" {str(first['reason'])[0].upper()}{str(first['reason'])[1:]}."
    return f"<p>{escaped(text)}</p>"


def _by_head(rows: pl.DataFrame, column: str, layers: int) -> np.ndarray:
    return rows[column].cast(pl.Float64).fill_null(np.nan).to_numpy().reshape(layers, -1)


def _said(rows: pl.DataFrame, at: int) -> str:
    row = rows.row(at, named=True)
    q = "" if row["q"] is None else f", q {row['q']:.2g}"
    return f"({number(row['received'])} against {number(row['matched'])} of uniform attention{q})"


def _strongest_heads(rows: pl.DataFrame) -> str:
    known = rows.filter(pl.col("head") > 0).with_columns(far=(pl.col("place") - 0.5).abs())
    order = ["q", "far"] if known["q"].is_not_null().any() else ["far"]
    shown = known.sort(order, descending=[name == "far" for name in order]).head(STRONGEST_HEADS)
    body = [
        (
            f"{row['layer']}",
            f"{row['head']}",
            percent(row["share"]),
            number(row["received"]),
            number(row["matched"]),
            _interval(row),
            percent(row["place"]),
            *(_p(row[name]) for name in ("p_genes", "p_donors", "q")),
            f"{row['donors_above']:,} of {row['n_donors']:,}",
        )
        for row in shown.iter_rows(named=True)
    ]
    heads = (
        "layer", "head", "share of attention", "to a gene", "to matched", "ratio (interval)", "beats", "p over genes",
        "p over donors", "q", "donors above",
    )  # fmt: skip
    return (
        f"<h3>The {len(body)} heads that differ most</h3>{table(heads, ['number'] * len(heads), body)}"
        '<p class="soft">Attention to a gene is in multiples of uniform attention. Beats: matched genes that receive '
        "less, on average over genes; 50 % is no difference.</p>"
    )


def _interval(row: dict[str, object]) -> str:
    if row["ci_low"] is None:
        return number(row["ratio"])  # type: ignore[arg-type]
    return f"{row['ratio']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f})"


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _list_genes(result: AttentionResult, one: NamedGenes) -> str:
    assert result.tables.list_genes is not None
    rows = result.tables.list_genes.filter(
        (pl.col("list") == one.name) & (pl.col("n_cells") >= result.config.min_cells)
    )
    means = (
        rows.filter(pl.col("head") == 0)
        .group_by("gene_id", maintain_order=True)
        .agg(pl.col("symbol", "n_cells", "mean_rank").first(), pl.col("received", "matched", "place").mean())
        .sort("place", descending=True)
    )
    body = [
        (
            escaped(row["symbol"]),
            escaped(row["gene_id"]),
            f"{row['n_cells']:,}",
            number(row["mean_rank"]),
            number(row["received"]),
            number(row["matched"]),
            percent(row["place"]),
        )
        for row in means.head(STRONGEST_GENES).iter_rows(named=True)
    ]
    heads = ("gene", "id", "cells", "mean rank", "to it", "to matched", "beats")
    kinds = ("name", "name", *["number"] * 5)
    title = "<h3>Its genes that beat most of their matched genes</h3><p>Mean over all heads.</p>"
    return title + table(heads, kinds, body)
