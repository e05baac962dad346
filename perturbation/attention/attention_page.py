"""The analysis of attention as one HTML page: what was found, each part with figure and table, and how it was done.

The page needs no network and no script. Every text that comes from a file or a person is escaped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from genescale.ingestion.reports.report_figures import escaped, number
from genescale.ingestion.reports.report_style import STYLE
from genescale.perturbation.attention.attention_figures import ATTENTION_STYLE, MOST_DRAWN_EDGES, graph_figure
from genescale.perturbation.attention.attention_methods import methods
from genescale.perturbation.attention.list_section import list_section, list_sentence
from genescale.perturbation.attention.rank_section import rank_section, rank_sentences
from genescale.training.evaluation.bundle_report import PAGE_STYLE, table
from genescale.training.evaluation.charts import CHART_STYLE

if TYPE_CHECKING:
    from genescale.perturbation.attention.corpus_attention import AttentionResult

STRONGEST_GENES, SHOWN_EDGES = 15, 25


def page(result: AttentionResult) -> str:
    """The whole page."""
    parts = [_head(result), *(list_section(result, one) for one in result.lists), rank_section(result)]
    if result.tables.edges is not None:
        parts.append(_graph(result, result.tables.edges))
    parts += [_genes(result), methods(result)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Attention</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{CHART_STYLE}{PAGE_STYLE}{ATTENTION_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(result: AttentionResult) -> str:
    facts = result.provenance
    lead = (f"model {facts['model']} ({facts['bundle_digest'][:12]})", f"cells of {facts['corpus']}")
    tiles = [
        (f"{result.n_cells:,}", "cells looked at"),
        (f"{len(result.donors.names):,}", "donors"),
        (f"{result.n_layers} × {result.n_heads}", "layers × heads"),
        (f"{len(result.tables.genes):,}", "genes in the cells"),
    ]
    drawn = "".join(f"<div><b>{escaped(v)}</b><span>{escaped(n)}</span></div>" for v, n in tiles)
    sentences = "".join(f"<p>{escaped(one)}</p>" for one in rank_sentences(result))
    verdicts = "".join(f'<div class="verdict">{escaped(list_sentence(result, one))}</div>' for one in result.lists)
    return (
        f'<h1>Attention</h1><p class="lead">{"<br>".join(escaped(line) for line in lead)}</p>'
        f'{verdicts}<div class="tiles">{drawn}</div>{sentences}'
    )


def _graph(result: AttentionResult, edges: pl.DataFrame) -> str:
    assert result.tables.nodes is not None
    config = result.config
    if not len(edges):
        return (
            f"<h2>Graph of genes</h2><p>No edge: {result.tables.n_pairs:,} ordered pairs of "
            f"{len(result.tables.nodes):,} genes stand together in {config.min_cells} cells, none above the threshold."
        )
    drawn = graph_figure(result.tables.nodes, edges, order=config.edge_order)
    body = [
        (
            escaped(row["source_symbol"]),
            escaped(row["target_symbol"]),
            f"{row['weight']:.2e}",
            number(row["relative"]),
            number(row["lift"]),
            f"{row['n_cells']:,}",
        )
        for row in edges.head(SHOWN_EDGES).iter_rows(named=True)
    ]
    heads, kinds = ("gene", "looks at", "attention", "over uniform", "lift", "cells"), ("name", "name", *["number"] * 4)
    listed = " Filled: genes of the lists." if result.lists else ""
    return (
        f"<h2>Graph of genes</h2><p>{len(edges):,} edges of {result.tables.n_pairs:,} ordered pairs of "
        f"{len(result.tables.nodes):,} genes that stand together in {config.min_cells} cells or more; "
        f"{_averaged(result)}.</p>"
        f"<figure>{drawn}<figcaption>The {min(len(edges), MOST_DRAWN_EDGES)} strongest edges by {config.edge_order}; "
        f"an arrow points from the gene that looks to the one looked at.{listed}</figcaption></figure>"
        f"{table(heads, kinds, body)}<p class='soft'>All edges: graph_edges.csv and graph.graphml. Lift: over what the "
        "gene looked at gets from the other genes of the graph.</p>"
    )


def _averaged(result: AttentionResult) -> str:
    config = result.config
    layers = f"layers {', '.join(map(str, config.graph_layers))}" if config.graph_layers else "all layers"
    heads = f"heads {', '.join(map(str, config.graph_heads))}" if config.graph_heads else "all heads"
    return f"mean over {layers} and {heads}"


def _genes(result: AttentionResult) -> str:
    columns = [name for name in result.tables.genes.columns if name.startswith("received_layer_")]
    genes = result.tables.genes.filter(pl.col("n_cells") >= result.config.min_cells).with_columns(
        mean=pl.mean_horizontal(columns)
    )
    shown = genes.sort("mean", descending=True).head(STRONGEST_GENES)
    ends = list(dict.fromkeys([columns[0], columns[-1]]))
    body = [
        (
            escaped(row["symbol"]),
            f"{row['n_cells']:,}",
            number(row["mean_rank"]),
            *(number(row[name]) for name in ends),
            number(row["mean"]),
        )
        for row in shown.iter_rows(named=True)
    ]
    heads = ("gene", "cells", "mean rank", *(name.removeprefix("received_").replace("_", " ") for name in ends), "mean")
    kinds = ("name", *["number"] * (len(heads) - 1))
    return (
        "<h2>Genes that receive most</h2><p>In multiples of uniform attention, mean over heads and cells; all genes "
        f"are in genes.csv.</p>{table(heads, kinds, body)}"
    )
