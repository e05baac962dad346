"""The compiled loops that bring values in any order into rows: counting, and a sort in two passes over the values.

Axis suffixes: `z` values, `k` groups that they are sorted into.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.ingestion.ranking.compiled import compiled

Array = npt.NDArray[Any]


def grouped(groups_z: Array, n_groups: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The order that puts values group by group, as they came within each, and where each group begins (k+1).

    Every group must lie within 0 … n_groups-1.
    """
    starts_k = np.zeros(n_groups + 1, dtype=np.int64)
    order_z = np.empty(groups_z.size, dtype=np.int64)
    _group(groups_z, starts_k, order_z)
    return order_z, starts_k


@compiled
def count_groups(groups_z: Array, counts_k: Array) -> None:
    """Add the number of values of each group to counts_k; every group must have a place there."""
    for z in range(groups_z.size):
        counts_k[groups_z[z]] += 1


@compiled
def _group(groups_z: Array, starts_k: Array, order_z: Array) -> None:
    """Fill starts_k, which holds zeros, and the order."""
    for z in range(groups_z.size):
        starts_k[groups_z[z] + 1] += 1
    for k in range(1, starts_k.size):
        starts_k[k] += starts_k[k - 1]
    next_k = starts_k[:-1].copy()
    for z in range(groups_z.size):
        order_z[next_k[groups_z[z]]] = z
        next_k[groups_z[z]] += 1
