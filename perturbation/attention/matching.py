"""Genes to compare a gene with: of the same cell, at a near rank, of near expression and found in as many cells.

Axis suffixes: `g` genes of a cell in rank order, `p` genes of a list in it, `c` candidates, `m` matched genes,
`t` token ids, `f` features.

Attention depends on where a gene stands and on how often the model met it, whatever it does in the cell. Rank in the
cell, the corpus' median (with the rank it fixes the count in this cell) and the share of cells that have the gene are
therefore held nearly equal; what is left is what is particular about the gene.
"""

from __future__ import annotations

import numpy as np

from genescale.platform.vocabulary import Vocabulary

# Differences that count as one step: 10 % in rank, a factor of e**0.5 in expression, and in the angle of the detection
# rate (arcsine of its root, of even variance) 0.1, such as from 50 % to 60 %.
RANK_STEP, EXPRESSION_STEP, DETECTION_STEP = 0.1, 0.5, 0.1


def gene_features(vocabulary: Vocabulary, cells_t: np.ndarray, n_cells: int) -> np.ndarray:
    """(t, f) float64 by token: log median and angle of the detection rate, in steps.

    cells_t: how many of the `n_cells` chosen cells have the gene. A gene without a median gets the middle one.
    """
    medians_t = np.log(vocabulary.medians_t)
    known = medians_t[np.isfinite(medians_t)]
    medians_t = np.where(np.isfinite(medians_t), medians_t, np.median(known) if known.size else 0.0)
    angle_t = np.arcsin(np.sqrt(np.clip(cells_t / max(n_cells, 1), 0.0, 1.0)))
    return np.stack([medians_t / EXPRESSION_STEP, angle_t / DETECTION_STEP], axis=1)


def matched_genes(genes_g: np.ndarray, listed_p: np.ndarray, features_tf: np.ndarray, *, controls: int) -> np.ndarray:
    """(p, m) int64 places in `genes_g` of the nearest genes that are not in the list; -1 where there are fewer.

    genes_g: tokens in rank order; listed_p: places of the list's genes. Nearest by the sum of squared steps, ties by
    rank. The same gene may be matched with several.
    """
    candidates_c = np.setdiff1d(np.arange(len(genes_g)), listed_p, assume_unique=True)
    matched_pm = np.full((len(listed_p), controls), -1, dtype=np.int64)
    taken = min(controls, len(candidates_c))
    if not taken or not len(listed_p):
        return matched_pm
    places_gf = np.column_stack([np.log1p(np.arange(len(genes_g))) / RANK_STEP, features_tf[genes_g]])
    steps_pc = np.zeros((len(listed_p), len(candidates_c)))
    for feature_g in places_gf.T:
        steps_pc += (feature_g[listed_p][:, None] - feature_g[candidates_c][None, :]) ** 2
    matched_pm[:, :taken] = candidates_c[np.argsort(steps_pc, axis=1, kind="stable")[:, :taken]]
    return matched_pm
