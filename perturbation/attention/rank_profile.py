"""Who looks at which ranks: attention by rank bin, layer and head, summed cell by cell.

Axis suffixes: `l` layers, `h` heads, `g` genes of a cell, `q` genes that look, `b` bins of the rank of the gene that
looks, `c` bins of the rank of the gene looked at. The last of `b` is all genes together.

Cells are averaged with given weights, so that no donor counts for more than another; within a cell, genes that look
count alike. A share is compared with that of a head that looks at all tokens of the cell alike.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import torch

from genescale.perturbation.attention.stream import CellGenes, Rows
from genescale.training.evaluation.masked_genes import bin_name, rank_bin

ALL_RANKS = "all"
_SELF, _SPECIAL, _LOOKED_AT, _LOOKED_SHARE = range(4)
_EXTRA = 4


class RankProfile:
    """Sums over cells, and the tables made of them."""

    def __init__(self, n_layers: int, n_heads: int, longest: int) -> None:
        self.n_bins = int(rank_bin(np.array([max(longest, 1) - 1]))[0]) + 1
        shape = (n_layers, n_heads, self.n_bins + 1)
        self._share_lhbc = np.zeros((*shape, self.n_bins))
        self._extra_lhbe = np.zeros((*shape, _EXTRA))
        self._uniform_bc = np.zeros((self.n_bins + 1, self.n_bins))
        self._weight_b = np.zeros(self.n_bins + 1)
        self._cells_b = np.zeros(self.n_bins + 1, dtype=np.int64)
        self._cell: CellGenes | None = None

    def begin(self, cell: CellGenes) -> None:
        """Prepare for the rows of this cell."""
        self._cell = cell
        self._bin_g = rank_bin(np.arange(len(cell.places_g)))
        self._inside_gc = torch.from_numpy(np.eye(self.n_bins, dtype=np.float32)[self._bin_g])
        self._cell_share = np.zeros_like(self._share_lhbc)
        self._cell_extra = np.zeros_like(self._extra_lhbe)

    def see(self, rows: Rows) -> None:
        """Add some rows of the present cell."""
        assert self._cell is not None
        device = rows.to_others_hqg.device
        if self._inside_gc.device != device:
            self._inside_gc = self._inside_gc.to(device)
        looking_bq = self._inside_gc[rows.first : rows.stop].T
        share_hbc = looking_bq @ (rows.to_others_hqg @ self._inside_gc)
        looked_at_hq = rows.entropy_hq.exp()
        parts = (rows.to_self_hq, rows.to_special_hq, looked_at_hq, looked_at_hq / len(self._cell.tokens_s))
        extra_hbe = looking_bq @ torch.stack(parts, dim=-1)
        self._cell_share[rows.layer, :, :-1] += share_hbc.cpu().numpy()
        self._cell_extra[rows.layer, :, :-1] += extra_hbe.cpu().numpy()

    def end(self, weight: float) -> None:
        """Add the present cell to the sums."""
        assert self._cell is not None
        for sums in (self._cell_share, self._cell_extra):
            sums[:, :, -1] = sums[:, :, :-1].sum(axis=2)
        genes_c = np.bincount(self._bin_g, minlength=self.n_bins)
        looking_b = np.append(genes_c, genes_c.sum())
        # A gene does not look at itself here: one gene fewer in its own bin.
        pairs_bc = np.outer(looking_b, genes_c) - np.vstack([np.diag(genes_c), genes_c])
        there_b = looking_b > 0
        per_gene_b = weight * there_b / np.maximum(looking_b, 1)
        self._share_lhbc += self._cell_share * per_gene_b[:, None]
        self._extra_lhbe += self._cell_extra * per_gene_b[:, None]
        self._uniform_bc += pairs_bc * self._cell.uniform * per_gene_b[:, None]
        self._weight_b += weight * there_b
        self._cells_b += there_b
        self._cell = None

    def between_ranks(self) -> pl.DataFrame:
        """One row per layer, head (1 = the first), rank bin that looks (`all` among them) and rank bin looked at.

        share: of the attention of a gene, to other genes; uniform: what a head that looks at all tokens alike gives;
        relative: the first over the second; n_cells: cells with genes in the bin that looks.
        """
        layer, head, b, c = (axis.ravel() for axis in np.indices(self._share_lhbc.shape))
        kept = self._uniform_bc[b, c] > 0
        layer, head, b, c = (axis[kept] for axis in (layer, head, b, c))
        names = np.array([*(bin_name(number) for number in range(self.n_bins)), ALL_RANKS])
        share = self._share_lhbc[layer, head, b, c] / self._weight_b[b]
        uniform = self._uniform_bc[b, c] / self._weight_b[b]
        columns = {
            "layer": layer + 1,
            "head": head + 1,
            "from_rank": names[b].tolist(),
            "to_rank": names[c].tolist(),
            "share": share,
            "uniform": uniform,
            "relative": share / uniform,
            "n_cells": self._cells_b[b],
        }
        return pl.DataFrame(columns)

    def heads(self) -> pl.DataFrame:
        """One row per layer, head and rank bin that looks: where the rest goes, and how wide a gene looks.

        to_self, to_special, to_genes: shares that add up to one; looked_at: exponential of the entropy of a row, the
        tokens that a gene looks at as if alike; looked_at_share: that over the tokens of the cell.
        """
        layer, head, b = (axis.ravel() for axis in np.indices(self._extra_lhbe.shape[:3]))
        kept = self._weight_b[b] > 0
        layer, head, b = (axis[kept] for axis in (layer, head, b))
        names = np.array([*(bin_name(number) for number in range(self.n_bins)), ALL_RANKS])
        extra = self._extra_lhbe[layer, head, b] / self._weight_b[b][:, None]
        columns = {
            "layer": layer + 1,
            "head": head + 1,
            "from_rank": names[b].tolist(),
            "to_genes": self._share_lhbc[layer, head, b].sum(axis=-1) / self._weight_b[b],
            "to_self": extra[:, _SELF],
            "to_special": extra[:, _SPECIAL],
            "looked_at": extra[:, _LOOKED_AT],
            "looked_at_share": extra[:, _LOOKED_SHARE],
            "n_cells": self._cells_b[b],
        }
        return pl.DataFrame(columns)
