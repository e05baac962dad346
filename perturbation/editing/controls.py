"""Control edits: the same edit of other genes of the same cell, matched by rank and by expression.

Legend: `t` tokens of a cell, `g` genes of a cell, `c` candidates. `expression_g` alone runs over the vocabulary.

Deleting any token moves every later token by one position and changes what a mean is taken over. What an edit does
beyond that is seen against edits of the same kind and size in the same cell, of genes that stand near by and are
expressed alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np

from genescale.perturbation.editing.cell import Cell
from genescale.perturbation.editing.edits import apply
from genescale.perturbation.editing.requests import EditRequest
from genescale.platform.vocabulary import Vocabulary

# Rank decides more of an edit's plain position effect than expression does: a difference of a tenth of the cell in
# rank counts like four tenths of its genes in expression.
RANK_WEIGHT = 4.0
POOL_PER_CONTROL = 4
SMALLEST_POOL = 20


def matched_controls(
    tokens_t: np.ndarray | Cell,
    request: EditRequest,
    *,
    n: int,
    expression_g: np.ndarray,
    seed: int,
    vocabulary: Vocabulary,
    exclude: Collection[int] = (),
) -> list[EditRequest]:
    """Up to `n` control edits for `request` on this cell, each with every gene replaced by a matched one.

    `expression_g` holds one value for each token id (a corpus median or a detection rate; NaN where unknown, which
    matches nothing in particular). A gene of the cell is replaced by another gene of the cell, out of the
    `POOL_PER_CONTROL` * n nearest by rank and expression; a gene that overexpression inserts by one that the cell lacks
    too. Genes of the request and of `exclude` are never taken, and no gene serves twice for the same gene of the
    request. Genes that the edit does not find are left out of its controls, as the edit leaves them.

    The draw depends on the seed, the cell and the edit alone. The list is shorter than `n` when the cell has too few
    other genes, and empty when the edit changes nothing: the cell lacks its genes, or has them there already.
    """
    cell = tokens_t if isinstance(tokens_t, Cell) else Cell.of(tokens_t, vocabulary)
    ranks = cell.ranks(request.genes)
    kept = [at for at, rank in enumerate(ranks) if rank is not None or request.kind == "overexpress"]
    if not kept or n < 1 or not (request.kind == "delete" or apply(request, cell, vocabulary).changed):
        return []
    generator = np.random.default_rng(_entropy(seed, cell, request))
    barred = np.fromiter({*request.genes, *exclude}, dtype=np.int64)
    pool_size = max(SMALLEST_POOL, POOL_PER_CONTROL * n) + len(kept)
    pools = []
    for at in kept:
        rank = ranks[at]
        if rank is None:
            nearest = _nearest_outside(request.genes[at], cell, barred, expression_g, vocabulary)
        else:
            nearest = _nearest_inside(rank, cell, barred, expression_g)
        pools.append(generator.permutation(nearest[:pool_size]).tolist())
    new_ranks = tuple(request.ranks[at] for at in kept) if request.ranks else ()
    return [request.on(genes, new_ranks) for genes in _without_repeats(pools, n)]


def _entropy(seed: int, cell: Cell, request: EditRequest) -> list[int]:
    digest = hashlib.blake2b(cell.genes.astype(np.int64).tobytes(), digest_size=16)
    digest.update(repr((request.kind, request.genes)).encode())
    return [seed, int.from_bytes(digest.digest(), "little")]


def _nearest_inside(rank: int, cell: Cell, barred: np.ndarray, expression_g: np.ndarray) -> np.ndarray:
    """Genes of the cell that may be taken, nearest first; distances are parts of the cell's genes."""
    rank_distance_g = np.abs(np.arange(cell.n_genes) - rank) / cell.n_genes
    level_g = _levels(expression_g[cell.genes])
    level_distance_g = np.nan_to_num(np.abs(level_g - level_g[rank]), nan=1.0)
    distance_g = np.hypot(RANK_WEIGHT * rank_distance_g, level_distance_g)
    nearest = cell.genes[np.argsort(distance_g, kind="stable")]
    return nearest[~np.isin(nearest, barred)]


def _levels(values_g: np.ndarray) -> np.ndarray:
    """Share of a cell's genes that are expressed less than each (float64, NaN where unknown)."""
    order = np.argsort(values_g)
    in_order, levels_g = values_g[order], np.empty(len(values_g))
    levels_g[order] = np.searchsorted(in_order, in_order) / max(1, int((~np.isnan(values_g)).sum()))
    return np.where(np.isnan(values_g), np.nan, levels_g)


def _nearest_outside(
    gene: int, cell: Cell, barred: np.ndarray, expression_g: np.ndarray, vocabulary: Vocabulary
) -> np.ndarray:
    """Genes that the cell lacks and that may be taken, nearest in expression first."""
    free_g = np.ones(vocabulary.size, dtype=bool)
    for taken in (cell.genes, barred, list(vocabulary.special.values())):
        free_g[taken] = False
    candidates_c = np.flatnonzero(free_g)
    distance_c = np.nan_to_num(np.abs(expression_g[candidates_c] - expression_g[gene]), nan=np.inf)
    return candidates_c[np.argsort(distance_c, kind="stable")]


def _without_repeats(pools: Sequence[list[int]], n: int) -> list[tuple[int, ...]]:
    """Up to `n` rows with one gene of each pool, all different within a row; each pool gives a gene once."""
    rows: list[tuple[int, ...]] = []
    waiting = [list(pool) for pool in pools]
    while len(rows) < n:
        row: list[int] = []
        for pool in waiting:
            free = next((gene for gene in pool if gene not in row), None)
            if free is None:
                return rows
            pool.remove(free)
            row.append(free)
        rows.append(tuple(row))
    return rows
