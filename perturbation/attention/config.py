"""What an analysis of attention is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from genescale.perturbation.statistics.intervals import check_interval
from genescale.platform.errors import SettingsError

EdgeOrder = Literal["relative", "lift"]
LISTS, NONE = "lists", "none"
MOST_GRAPH_GENES = 3_000
"""Two tables of so many times so many numbers are held: 144 MB at 3,000 genes."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which cells are looked at, which gene lists are compared, and what the graph of genes holds."""

    where: str = ""
    """Polars SQL over the corpus' cell columns; empty means all."""
    max_cells: int = 500
    """Cells that are looked at, drawn at random; 0 means all."""
    seed: int = 0
    """Of the draw of cells and of the resamples."""
    genes: str = ""
    """Gene names separated by commas (one list), or an address of gene lists; empty compares no list."""
    controls: int = 10
    """Matched genes for each gene of a list, in the same cell."""
    min_cells: int = 5
    """Genes, and pairs of genes, that stand in fewer of the cells are neither tested nor drawn."""
    graph: str = "300"
    """Genes of the graph: so many found in most cells together with those of the lists; `lists` alone; or `none`."""
    graph_layers: tuple[int, ...] = ()
    """Layers whose attention the graph averages, 1 = the first; empty means all."""
    graph_heads: tuple[int, ...] = ()
    """Heads of those layers, 1 = the first; empty means all."""
    edges: int = 2_000
    """Edges that are kept, the strongest; 0 keeps all."""
    edge_order: EdgeOrder = "relative"
    """What makes an edge strong: the attention over that of a head that looks at all tokens alike (`relative`), or
    over what the looked-at gene gets from the other genes of the graph (`lift`), which does not favour hubs."""
    threshold: float = 0.0
    """Edges at or below this value of `edge_order` are left out."""
    confidence: float = 0.95
    draws: int = 2_000
    """Bootstrap resamples behind an interval."""
    device: str = "auto"

    def __post_init__(self) -> None:
        least = {"max_cells": 0, "seed": 0, "controls": 1, "min_cells": 1, "edges": 0, "threshold": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise SettingsError(f"{getattr(self, name)} is too small.", where=name, fix=f"Use {bound} or more.")
        check_interval(self.confidence, self.draws)
        if self.edge_order not in get_args(EdgeOrder):
            fix = f"Use one of {', '.join(get_args(EdgeOrder))}."
            raise SettingsError(f"'{self.edge_order}' is no order of edges.", where="edge_order", fix=fix)
        self._check_graph()

    def _check_graph(self) -> None:
        if self.graph not in (LISTS, NONE) and not self.graph.isdecimal():
            raise SettingsError(
                f"'{self.graph}' says no genes.", where="graph", fix=f"Use a number of genes, '{LISTS}' or '{NONE}'."
            )
        if self.graph.isdecimal() and not 2 <= self.detected_genes <= MOST_GRAPH_GENES:
            raise SettingsError(
                f"a graph of {self.detected_genes:,} genes cannot be made.",
                where="graph",
                fix=f"Use 2 to {MOST_GRAPH_GENES:,}, '{LISTS}' or '{NONE}'.",
            )
        if self.graph == LISTS and not self.genes:
            raise SettingsError("there are no lists.", where="graph", fix="Name genes, or give a number of genes.")
        for name in ("graph_layers", "graph_heads"):
            if any(number < 1 for number in getattr(self, name)):
                raise SettingsError("layers and heads are numbered from 1.", where=name, fix="Use for example 1,2.")

    @property
    def detected_genes(self) -> int:
        """How many of the genes found in most cells the graph has, besides those of the lists."""
        return int(self.graph) if self.graph.isdecimal() else 0

    def check_encoder(self, n_layers: int, n_heads: int) -> None:
        """SettingsError for layers or heads of the graph that the encoder has not."""
        for name, most in (("graph_layers", n_layers), ("graph_heads", n_heads)):
            if wrong := [number for number in getattr(self, name) if number > most]:
                what = name.removeprefix("graph_").removesuffix("s")
                raise SettingsError(f"there is no {what} {wrong[0]}.", where=name, fix=f"The encoder has {most}.")
