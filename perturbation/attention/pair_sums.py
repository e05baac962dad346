"""Who looks at whom: attention between chosen genes, averaged over the cells that have both.

Axis suffixes: `k` genes of the graph, `h` heads, `q` genes that look, `e` edges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch

from genescale.perturbation.attention.stream import CellGenes, Rows
from genescale.platform.vocabulary import Vocabulary

# Without an edge there is nothing to tell the type of a column from.
_TEXTS = dict.fromkeys(("source", "target", "source_symbol", "target_symbol"), pl.String)


class PairSums:
    """Sums over cells of the attention from each gene of the graph to each other one."""

    def __init__(self, tokens_k: np.ndarray, size: int, *, layers: Sequence[int], heads: Sequence[int]) -> None:
        """tokens_k: genes of the graph; size: token ids of the vocabulary; layers, heads: those averaged, from 0."""
        self.tokens_k = tokens_k
        self.layers, self.heads = tuple(layers), tuple(heads)
        self._place_t = np.full(size, -1, dtype=np.int64)
        self._place_t[tokens_k] = np.arange(len(tokens_k))
        shape = (len(tokens_k), len(tokens_k))
        self._weight_kk, self._relative_kk = np.zeros(shape), np.zeros(shape)
        self._cells_kk = np.zeros(shape, dtype=np.int32)
        self._rank_k = np.zeros(len(tokens_k))

    def begin(self, cell: CellGenes) -> None:
        """Prepare for the rows of this cell."""
        self._cell = cell
        genes_g = cell.genes_g
        self._there_g = np.flatnonzero(self._place_t[genes_g] >= 0)
        self._nodes = self._place_t[genes_g[self._there_g]]
        self._block = np.zeros((len(self._there_g), len(self._there_g)))

    def see(self, rows: Rows) -> None:
        """Add some rows of the present cell."""
        if rows.layer not in self.layers:
            return
        inside = np.flatnonzero((self._there_g >= rows.first) & (self._there_g < rows.stop))
        if not inside.size:
            return
        device = rows.to_others_hqg.device
        looking, seen, heads = (
            torch.from_numpy(np.asarray(places)).to(device)
            for places in (self._there_g[inside] - rows.first, self._there_g, np.array(self.heads))
        )
        sums = rows.to_others_hqg[heads].sum(dim=0)[looking][:, seen]
        self._block[inside] += sums.double().cpu().numpy()

    def end(self) -> None:
        """Add the present cell to the sums."""
        block = self._block / (len(self.layers) * len(self.heads))
        pairs = np.ix_(self._nodes, self._nodes)
        self._weight_kk[pairs] += block
        self._relative_kk[pairs] += block / self._cell.uniform
        self._cells_kk[pairs] += 1
        self._rank_k[self._nodes] += self._there_g + 1

    def edges(
        self, vocabulary: Vocabulary, *, min_cells: int, order: str, threshold: float, most: int
    ) -> tuple[pl.DataFrame, int]:
        """The strongest edges, and how many pairs of genes stand together in `min_cells` cells.

        source looks at target. weight: mean attention; relative: mean of attention over that of a head that looks at
        all tokens of the cell alike; lift: relative over the mean that the target gets from the genes of the graph.
        Kept are edges above `threshold` in the column `order`, the `most` strongest of them (0: all); ties by tokens.
        """
        known_kk = self._cells_kk >= min_cells
        np.fill_diagonal(known_kk, False)
        cells_kk = np.maximum(self._cells_kk, 1)
        relative_kk = np.where(known_kk, self._relative_kk / cells_kk, 0.0)
        mean_k = relative_kk.sum(axis=0) / np.maximum(known_kk.sum(axis=0), 1)
        lift_kk = relative_kk / np.where(mean_k > 0, mean_k, 1.0)
        value_kk = relative_kk if order == "relative" else lift_kk
        source_e, target_e = np.nonzero(known_kk & (value_kk > threshold))
        strongest = np.argsort(-value_kk[source_e, target_e], kind="stable")[: most or None]
        source_e, target_e = source_e[strongest], target_e[strongest]
        ids = np.array([vocabulary.gene_of_token(int(token)) for token in self.tokens_k], dtype=object)
        symbols = np.array([vocabulary.symbol_of(gene) for gene in ids], dtype=object)
        columns = {
            "source": ids[source_e].tolist(),
            "target": ids[target_e].tolist(),
            "source_symbol": symbols[source_e].tolist(),
            "target_symbol": symbols[target_e].tolist(),
            "weight": (self._weight_kk / cells_kk)[source_e, target_e],
            "relative": relative_kk[source_e, target_e],
            "lift": lift_kk[source_e, target_e],
            "n_cells": self._cells_kk[source_e, target_e].astype(np.int64),
        }
        return pl.DataFrame(columns, schema_overrides=_TEXTS), int(known_kk.sum())

    def nodes(self, vocabulary: Vocabulary, *, min_cells: int) -> pl.DataFrame:
        """The genes of the graph: gene_id, symbol, n_cells, mean_rank (1 = the highest; null without a cell),
        received and given: mean relative attention from and to the other genes of the graph."""
        known_kk = self._cells_kk >= min_cells
        n_cells_k = np.diag(self._cells_kk).copy()
        np.fill_diagonal(known_kk, False)
        relative_kk = np.where(known_kk, self._relative_kk / np.maximum(self._cells_kk, 1), 0.0)
        ids = [vocabulary.gene_of_token(int(token)) for token in self.tokens_k]
        return pl.DataFrame(
            {
                "gene_id": ids,
                "symbol": [vocabulary.symbol_of(gene) for gene in ids],
                "n_cells": n_cells_k.astype(np.int64),
                "mean_rank": np.where(n_cells_k > 0, self._rank_k / np.maximum(n_cells_k, 1), np.nan),
                "received": relative_kk.sum(axis=0) / np.maximum(known_kk.sum(axis=0), 1),
                "given": relative_kk.sum(axis=1) / np.maximum(known_kk.sum(axis=1), 1),
            }
        ).with_columns(pl.col("mean_rank").fill_nan(None))
