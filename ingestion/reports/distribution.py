"""A distribution that travels as whole numbers in bins: quantiles of it, and the same in fewer bins for a figure.

Axis suffix: `k` bins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from genescale.ingestion.tally import Tally


@dataclasses.dataclass(frozen=True, eq=False)
class Distribution:
    """Cells by bin. edges: float64, k+1, rising; counts: int64, k."""

    edges: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, counts: Sequence[int], edges: Sequence[float] | npt.NDArray[np.float64]) -> Distribution:
        """Counts by these edges; bins that are missing at the end are empty, those beyond the edges join the last."""
        limits = np.asarray(edges, dtype=np.float64)
        bins = np.zeros(len(limits) - 1, dtype=np.int64)
        given = np.asarray(counts, dtype=np.int64)
        fitting = min(len(given), len(bins))
        bins[:fitting] = given[:fitting]
        if len(given) > fitting:
            bins[-1] += given[fitting:].sum()
        return cls(limits, bins)

    @property
    def total(self) -> int:
        """All cells."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float | None:
        """The value below which this share of the cells lies, interpolated inside its bin; None without cells."""
        if not self.total:
            return None
        below = np.concatenate(([0], np.cumsum(self.counts)))
        wanted = share * self.total
        at = min(int(np.searchsorted(below, wanted, side="right")) - 1, len(self.counts) - 1)
        while not self.counts[at]:
            at -= 1
        inside = min((wanted - below[at]) / self.counts[at], 1.0)
        return float(self.edges[at] + inside * (self.edges[at + 1] - self.edges[at]))

    @property
    def median(self) -> float | None:
        """The middle value; None without cells."""
        return self.quantile(0.5)

    def to_dict(self) -> dict[str, float | None]:
        """Quantiles as JSON; all None without cells."""
        shares = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
        values = {name: self.quantile(share) for name, share in shares.items()}
        return {name: None if value is None else round(value, 1) for name, value in values.items()}

    def rebinned(self, edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Share of the cells in each of these wider bins, cells spread evenly over their own bin on a log scale."""
        if not self.total:
            return np.zeros(len(edges) - 1)
        below = np.concatenate(([0], np.cumsum(self.counts))) / self.total
        return np.diff(np.interp(np.log(edges), np.log(np.maximum(self.edges, 0.5)), below))


def doubling_edges(n_bins: int, *, per_doubling: int = 8) -> npt.NDArray[np.float64]:
    """Limits of bins of which `per_doubling` make a factor of two, from 1 upwards."""
    return 2.0 ** (np.arange(n_bins + 1) / per_doubling)


def spreads(tally: Tally) -> dict[str, Distribution]:
    """The distributions of a tally over kept cells: `depth` (counts), `genes` and `length` (tokens); maybe empty."""
    bins = {name: getattr(tally, f"{name}_bins") for name in ("depth", "genes", "length")}
    return {name: Distribution.of(counts, doubling_edges(max(len(counts), 1))) for name, counts in bins.items()}
