"""Means with bootstrap intervals and rank statistics, for comparing a screen with what was planted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

CONFIDENCE = 0.95
RESAMPLES = 2_000
# Over fewer regulators an interval says nothing.
FEWEST = 3


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over regulators (or pairs), with its bootstrap interval; NaN where there is nothing to average."""

    mean: float
    low: float
    high: float
    n: int
    """Regulators (or pairs of regulators) behind it."""

    @property
    def above_zero(self) -> bool:
        """True when there are enough of them and the whole interval is above 0."""
        return self.n >= FEWEST and self.low > 0

    @property
    def below_zero(self) -> bool:
        """True when there are enough of them and the whole interval is below 0."""
        return self.n >= FEWEST and self.high < 0


def rank_auc(more: npt.NDArray[np.float64], less: npt.NDArray[np.float64]) -> float:
    """Chance that a value of `more` exceeds one of `less`, ties counting half (Mann-Whitney); NaN if one is empty."""
    if not len(more) or not len(less):
        return float("nan")
    ranks = rankdata(np.concatenate([more, less]))[: len(more)]
    return float((ranks.sum() - len(more) * (len(more) + 1) / 2) / (len(more) * len(less)))


def share_positive(values: Sequence[float]) -> float:
    """Share of the known values that are above 0; NaN where none is known."""
    known = np.array([value for value in values if np.isfinite(value)])
    return float((known > 0).mean()) if len(known) else float("nan")


def mean(values: npt.NDArray[np.float64]) -> float:
    """Mean of the values that are known; NaN where none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def estimate(values: Sequence[float], draws: np.random.Generator) -> Estimate:
    """Mean with a percentile bootstrap interval; undefined values are left out and not counted."""
    known = np.array([value for value in values if np.isfinite(value)], dtype=np.float64)
    if not len(known):
        return Estimate(mean=float("nan"), low=float("nan"), high=float("nan"), n=0)
    means = known[draws.integers(0, len(known), size=(RESAMPLES, len(known)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(mean=float(known.mean()), low=float(low), high=float(high), n=len(known))
