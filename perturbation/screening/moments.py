"""Means and deviations that can be merged: what a screen keeps of its gene cosines and masked-gene changes.

Legend: `p` pairs of (edit, affected gene).

A screen of a thousand cells sees billions of per-gene cosines; each unit of work keeps a count, a mean and a sum of
squared deviations per pair, and these merge exactly (Chan, Golub and LeVeque 1979). Merging is in float64 and in a
fixed order, so the same units give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# Single observations are folded together when this many have come, so that memory follows pairs and not cells.
FOLD_AT = 4_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations per pair, by rising (edit, token)."""

    edit_p: np.ndarray
    """Position of the edit among the screen's edits, int32."""
    token_p: np.ndarray
    """Token of the affected gene, int32."""
    count_p: np.ndarray
    """Cells, int64."""
    mean_p: np.ndarray
    """Mean cosine, or mean change of log-probability, float64."""
    squares_p: np.ndarray
    """Sum of squared deviations from the mean, float64."""

    @property
    def deviation_p(self) -> np.ndarray:
        """Standard deviation between cells (n - 1); NaN for a single cell."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(self.squares_p / (self.count_p - 1))


def observed(edits: np.ndarray, tokens: np.ndarray, values: np.ndarray) -> Moments:
    """Moments of single observations `(p,)`, not yet merged."""
    return Moments(
        edit_p=edits.astype(np.int32),
        token_p=tokens.astype(np.int32),
        count_p=np.ones(len(edits), dtype=np.int64),
        mean_p=values.astype(np.float64),
        squares_p=np.zeros(len(edits)),
    )


def merge(parts: Sequence[Moments]) -> Moments:
    """One row per pair from any number of parts."""
    edit_p = np.concatenate([part.edit_p for part in parts] or [np.zeros(0, dtype=np.int32)])
    token_p = np.concatenate([part.token_p for part in parts] or [np.zeros(0, dtype=np.int32)])
    count_p = np.concatenate([part.count_p for part in parts] or [np.zeros(0, dtype=np.int64)])
    mean_p = np.concatenate([part.mean_p for part in parts] or [np.zeros(0)])
    squares_p = np.concatenate([part.squares_p for part in parts] or [np.zeros(0)])
    key_p = edit_p.astype(np.int64) << 32 | token_p.astype(np.int64)
    order = np.argsort(key_p, kind="stable")
    _, first, pair = np.unique(key_p[order], return_index=True, return_inverse=True)
    if len(first) == 0:
        return observed(edit_p, token_p, mean_p)
    counts = np.add.reduceat(count_p[order], first)
    means = np.add.reduceat((count_p * mean_p)[order], first) / counts
    between = count_p[order] * (mean_p[order] - means[pair]) ** 2
    return Moments(
        edit_p=edit_p[order][first],
        token_p=token_p[order][first],
        count_p=counts,
        mean_p=means,
        squares_p=np.add.reduceat(squares_p[order] + between, first),
    )


def fold(parts: Iterable[Moments]) -> Moments:
    """As `merge`, from a stream, holding little more than the pairs themselves."""
    waiting: list[Moments] = []
    for part in parts:
        waiting.append(part)
        if sum(len(one.edit_p) for one in waiting[1:]) >= FOLD_AT:
            waiting = [merge(waiting)]
    return merge(waiting)
