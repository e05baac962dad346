"""Attention that a list of genes receives beside matched genes of the same cells, summed cell by cell.

Axis suffixes: `l` layers, `h` heads and, last, their mean, `g` genes of a cell, `p` genes of the list, `m` matched
genes, `n` cells.

Two things are kept of each gene of the list: what it receives and what its matched genes receive on average, and its
place among them: the share of them that receive less (ties count half). The place is even between 0 and 1 for a gene
like its matched ones, however uneven attention is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genescale.perturbation.attention.matching import matched_genes
from genescale.perturbation.attention.stream import CellGenes

TIED = 1e-5
"""Attentions that differ by less than so much of themselves are equal: float32 rounds at a hundredth of it."""


@dataclass(frozen=True, kw_only=True)
class NamedGenes:
    """A list of genes as it was given, and which of them the vocabulary holds."""

    name: str
    tokens: tuple[int, ...]
    """Rising and distinct."""
    outside: tuple[str, ...] = ()
    """Names, as written, that the vocabulary does not hold or that name several of its genes."""


class ListShares:
    """Sums for one list over the cells that have genes of it."""

    def __init__(self, genes: NamedGenes, n_cells: int, n_layers: int, n_heads: int, size: int) -> None:
        """n_cells: cells that will come; size: token ids of the vocabulary. Heads are counted with their mean."""
        self.genes = genes
        n_genes, per_head = len(genes.tokens), (n_layers, n_heads)
        self._place_t = np.full(size, -1, dtype=np.int64)
        self._place_t[list(genes.tokens)] = np.arange(n_genes)
        self.listed_plh, self.matched_plh, self.place_plh = (np.zeros((n_genes, *per_head)) for _ in range(3))
        self.weight_p, self.cells_p = np.zeros(n_genes), np.zeros(n_genes, dtype=np.int64)
        self.rank_p, self.matched_rank_p = np.zeros(n_genes), np.zeros(n_genes)
        self.cell_listed_nlh, self.cell_matched_nlh, self.cell_place_nlh = (
            np.full((n_cells, *per_head), np.nan, dtype=np.float32) for _ in range(3)
        )
        self.cell_share_nlh = np.full((n_cells, *per_head), np.nan, dtype=np.float32)
        self.used_t = np.zeros(size)
        """(t) how often each gene of the vocabulary served as a matched one, in shares of a comparison."""
        self.genes_n = np.zeros(n_cells, dtype=np.int64)
        self.controls_pairs, self.unmatched = 0, 0
        """Matched genes that were compared, and genes of the list in a cell that had none."""

    def add(
        self,
        number: int,
        cell: CellGenes,
        received_lhg: np.ndarray,
        *,
        features_tf: np.ndarray,
        controls: int,
        weight: float,
    ) -> None:
        """Add a cell; received_lhg: mean attention from the cell's other genes, over uniform attention."""
        genes_g = cell.genes_g
        listed_p = np.flatnonzero(self._place_t[genes_g] >= 0)
        matched_pm = matched_genes(genes_g, listed_p, features_tf, controls=controls)
        with_controls_p = (matched_pm >= 0).any(axis=1)
        self.unmatched += int((~with_controls_p).sum())
        listed_p, matched_pm = listed_p[with_controls_p], matched_pm[with_controls_p]
        if not listed_p.size:
            return
        # Controls are as many for all genes of a cell: fewer only where the cell has no more.
        matched_pm = matched_pm[:, matched_pm[0] >= 0]
        listed_plh = received_lhg[:, :, listed_p].transpose(2, 0, 1)
        matched_pmlh = received_lhg[:, :, matched_pm].transpose(2, 3, 0, 1)
        own_p1lh = listed_plh[:, None]
        tied_pmlh = np.abs(matched_pmlh - own_p1lh) <= TIED * own_p1lh
        place_plh = (((matched_pmlh < own_p1lh) & ~tied_pmlh) + 0.5 * tied_pmlh).mean(axis=1)
        means_plh = matched_pmlh.mean(axis=1)
        self._add_genes(genes_g, listed_p, matched_pm, (listed_plh, means_plh, place_plh), weight)
        self.genes_n[number] = len(listed_p)
        self.cell_listed_nlh[number] = listed_plh.mean(axis=0)
        self.cell_matched_nlh[number] = means_plh.mean(axis=0)
        self.cell_place_nlh[number] = place_plh.mean(axis=0)
        self.cell_share_nlh[number] = listed_plh.sum(axis=0) * cell.uniform

    def _add_genes(
        self,
        genes_g: np.ndarray,
        listed_p: np.ndarray,
        matched_pm: np.ndarray,
        found: tuple[np.ndarray, np.ndarray, np.ndarray],
        weight: float,
    ) -> None:
        rows = self._place_t[genes_g[listed_p]]
        for sums, values in zip((self.listed_plh, self.matched_plh, self.place_plh), found, strict=True):
            sums[rows] += weight * values
        self.weight_p[rows] += weight
        self.cells_p[rows] += 1
        self.rank_p[rows] += listed_p + 1
        self.matched_rank_p[rows] += matched_pm.mean(axis=1) + 1
        self.controls_pairs += matched_pm.size
        np.add.at(self.used_t, genes_g[matched_pm], weight / matched_pm.shape[1])
