"""How far reference cells are from one another: what a distance is measured against.

Axis suffixes: `n` reference cells, `s` sampled ones, `k` neighbours.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from genescale.platform.errors import CorpusError
from genescale.serving.neighbours.vectors import VectorIndex

MOST_NEIGHBORS = 100
LEAST_OTHERS = 10
"""With fewer cells to compare with, distances say nothing."""
SAMPLED_AT_ONCE = 256


def sample(n_cells: int, wanted: int, seed: int) -> np.ndarray:
    """(s) rising rows: `wanted` of the cells at random, or all."""
    if n_cells <= wanted:
        return np.arange(n_cells)
    return np.sort(np.random.default_rng([seed, n_cells, 1]).choice(n_cells, wanted, replace=False))


def group_codes(values: pa.ChunkedArray) -> np.ndarray:
    """(n) int64: a number for each value, the same for the same one; cells without a value are one group."""
    codes: np.ndarray = values.combine_chunks().dictionary_encode(null_encoding="encode").indices.to_numpy()
    return codes.astype(np.int64)


def most_neighbors(n_cells: int, codes_n: np.ndarray | None, *, column: str = "") -> int:
    """Largest k for which every cell has neighbours: among the other cells, or among those outside its group.

    CorpusError when nearly all cells are in one group of `column`.
    """
    n_others = n_cells - (1 if codes_n is None else int(np.bincount(codes_n).max()))
    if n_others < min(LEAST_OTHERS, n_cells - 1):
        raise CorpusError(
            f"only {n_others:,} of the {n_cells:,} cells differ from the others in '{column}'.",
            where="apart",
            fix="Choose another column, or leave it out.",
        )
    return min(MOST_NEIGHBORS, n_others)


def reference_distances(
    index: VectorIndex, sampled_s: np.ndarray, k: int, *, codes_n: np.ndarray | None = None
) -> np.ndarray:
    """(k, s) float64: rising distances of sampled cells to their 1st … k-th neighbour among the other cells.

    With `codes_n`, the group of each cell, neighbours are cells of other groups. k: at most `most_neighbors`.
    """
    if codes_n is None:
        found = [_without_themselves(index, rows, k) for rows in _parts(sampled_s)]
    else:
        found = [
            index.nearest(index.rows(rows), k, without_n=np.flatnonzero(codes_n == code))[1]
            for code in np.unique(codes_n[sampled_s])
            for rows in _parts(sampled_s[codes_n[sampled_s] == code])
        ]
    return np.ascontiguousarray(np.sort(np.concatenate(found).T, axis=1))


def _without_themselves(index: VectorIndex, rows_s: np.ndarray, k: int) -> np.ndarray:
    """(s, k) distances to the nearest other cells."""
    found_sk, distances_sk = index.nearest(index.rows(rows_s), k + 1)
    itself_sk = found_sk == rows_s[:, None]
    # Among many equal cells a cell need not be one of its own nearest: the last one found goes then.
    itself_sk[~itself_sk.any(axis=1), -1] = True
    return distances_sk[~itself_sk].reshape(len(rows_s), k)


def _parts(rows_s: np.ndarray) -> list[np.ndarray]:
    return [rows_s[start : start + SAMPLED_AT_ONCE] for start in range(0, len(rows_s), SAMPLED_AT_ONCE)]
