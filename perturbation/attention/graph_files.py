"""A graph of genes as GraphML, for Cytoscape, Gephi, igraph or networkx."""

from __future__ import annotations

import io
from collections.abc import Mapping

import polars as pl


def graphml(nodes: pl.DataFrame, edges: pl.DataFrame, about: Mapping[str, str | int | float]) -> bytes:
    """A directed graph (an edge goes from the gene that looks to the one looked at), UTF-8 GraphML.

    nodes: `gene_id` (the node's id) and whatever else is known; edges: `source`, `target` and numbers; about: what
    stands on the graph itself. A value that is not known is left out, as GraphML has no empty ones.
    """
    import networkx

    graph = networkx.DiGraph(**dict(about))
    for node in nodes.iter_rows(named=True):
        graph.add_node(node.pop("gene_id"), **_known(node))
    for edge in edges.drop("source_symbol", "target_symbol", strict=False).iter_rows(named=True):
        graph.add_edge(edge.pop("source"), edge.pop("target"), **_known(edge))
    sink = io.BytesIO()
    networkx.write_graphml_xml(graph, sink, encoding="utf-8", prettyprint=False)
    return sink.getvalue()


def _known(values: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}
