"""The rows a head learns from: one row is one vector of the encoder with its targets.

Axis suffixes: `n` cells, `r` rows, `u` labelled units (cells or genes), `c` classes, `d` width.

A cell task has one row for each cell: its pooled vector. A gene task has one row for each cell that a labelled gene is
read from: the vector of its token. Several rows may then belong to one unit, and a unit's answer is the mean over them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

POOLED = -1
"""`row_token_r` of a row that is a cell's pooled vector."""
NO_LABEL = -1
"""Code of a row without a class; a number that is missing is NaN."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Rows, in the order of their cells, with the cells they are read from."""

    index_n: np.ndarray
    """(n) int64 global corpus indices of the cells."""
    lengths_n: np.ndarray
    """(n) int64 tokens of the cells."""
    row_cell_r: np.ndarray
    """(r) int64 positions in `index_n`."""
    row_token_r: np.ndarray
    """(r) int64 positions of the token inside the cell; -1 for the pooled vector of the cell."""
    targets: tuple[np.ndarray, ...]
    """One for each head, (r): int64 codes with -1 = no label, or float64 numbers with NaN = none."""
    unit_r: np.ndarray
    """(r) int64 labelled unit of the row: the cell itself, or the gene's position among the labelled genes."""

    @property
    def n_rows(self) -> int:
        """How many rows there are."""
        return len(self.row_cell_r)

    def rows_of(self, units: np.ndarray) -> np.ndarray:
        """Rising positions of the rows that belong to these units, int64."""
        return np.flatnonzero(np.isin(self.unit_r, units)).astype(np.int64)

    def take(self, units: np.ndarray) -> Examples:
        """Only the rows of these units, and only the cells that such a row is read from; units keep their numbers."""
        rows = self.rows_of(units)
        cells_n, row_cell_r = np.unique(self.row_cell_r[rows], return_inverse=True)
        return replace(
            self,
            index_n=self.index_n[cells_n],
            lengths_n=self.lengths_n[cells_n],
            row_cell_r=row_cell_r.astype(np.int64),
            row_token_r=self.row_token_r[rows],
            targets=tuple(target_r[rows] for target_r in self.targets),
            unit_r=self.unit_r[rows],
        )

    def rows_digest(self) -> str:
        """sha256 (hex) of which vectors the rows are: cells, token positions and order, whatever their targets."""
        digest = hashlib.sha256()
        for values in (self.index_n[self.row_cell_r], self.row_token_r):
            digest.update(np.ascontiguousarray(values, dtype="<i8").tobytes())
        return digest.hexdigest()


def cell_examples(index_n: np.ndarray, lengths_n: np.ndarray, targets: tuple[np.ndarray, ...]) -> Examples:
    """One row for each cell, its pooled vector; the cell's position is its unit."""
    positions = np.arange(len(index_n), dtype=np.int64)
    return Examples(
        index_n=np.asarray(index_n, dtype=np.int64),
        lengths_n=np.asarray(lengths_n, dtype=np.int64),
        row_cell_r=positions,
        row_token_r=np.full(len(positions), POOLED, dtype=np.int64),
        targets=targets,
        unit_r=positions,
    )


def gene_examples(
    index_n: np.ndarray,
    lengths_n: np.ndarray,
    row_cell_r: np.ndarray,
    row_token_r: np.ndarray,
    gene_r: np.ndarray,
    codes_g: np.ndarray,
) -> Examples:
    """One row for each token of a labelled gene, sorted by cell and token; the gene's position is its unit."""
    order = np.lexsort((row_token_r, row_cell_r))
    unit_r = np.asarray(gene_r, dtype=np.int64)[order]
    return Examples(
        index_n=np.asarray(index_n, dtype=np.int64),
        lengths_n=np.asarray(lengths_n, dtype=np.int64),
        row_cell_r=np.asarray(row_cell_r, dtype=np.int64)[order],
        row_token_r=np.asarray(row_token_r, dtype=np.int64)[order],
        targets=(np.asarray(codes_g, dtype=np.int64)[unit_r],),
        unit_r=unit_r,
    )


def unit_means(values_rc: np.ndarray, unit_r: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, ...]:
    """(mean (u, c), standard deviation (u, c), number of rows (u)) of each unit's rows; a unit without rows is NaN.

    The standard deviation is over the unit's rows (population form): 0 for a unit of one row.
    """
    place = np.full(int(max(unit_r.max(initial=-1), units.max(initial=-1))) + 1, -1, dtype=np.int64)
    place[units] = np.arange(len(units))
    place_r = place[unit_r]
    used = place_r >= 0
    rows_u = np.bincount(place_r[used], minlength=len(units))
    sums_uc = np.zeros((len(units), values_rc.shape[1]))
    squares_uc = np.zeros_like(sums_uc)
    values = values_rc[used].astype(np.float64)
    np.add.at(sums_uc, place_r[used], values)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_uc = sums_uc / rows_u[:, None]
    np.add.at(squares_uc, place_r[used], (values - mean_uc[place_r[used]]) ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread_uc = np.sqrt(squares_uc / rows_u[:, None])
    return mean_uc, spread_uc, rows_u
