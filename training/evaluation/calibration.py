"""Whether stated probabilities are kept: expected calibration error and the data of a reliability plot.

Axis suffixes: `u` units, `c` classes, `k` bins.

Expected calibration error (Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017,
equation 3): units fall into 15 bins of equal width by the probability of their predicted class, and
ECE = sum over bins of (units in the bin / units) x |accuracy in the bin - mean probability in the bin|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 15


@dataclass(frozen=True, kw_only=True, eq=False)
class Reliability:
    """One row a bin; confidence and accuracy are NaN in bins without units."""

    edges_k: npt.NDArray[np.float64]
    """(k + 1) limits from 0 to 1."""
    units_k: npt.NDArray[np.int64]
    confidence_k: npt.NDArray[np.float64]
    """Mean probability of the predicted class."""
    accuracy_k: npt.NDArray[np.float64]
    """Share of units whose predicted class is the true one."""

    @property
    def error(self) -> float:
        """Expected calibration error; NaN without units."""
        held = self.units_k > 0
        if not held.any():
            return float("nan")
        gaps = np.abs(self.accuracy_k[held] - self.confidence_k[held])
        return float((self.units_k[held] * gaps).sum() / self.units_k.sum())


def bin_of(confidence_u: npt.NDArray[np.floating[Any]], bins: int = BINS) -> npt.NDArray[np.int64]:
    """Bin of each probability: bin i holds (i / bins, (i + 1) / bins], the first also 0."""
    return np.clip(np.ceil(np.asarray(confidence_u, dtype=np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)


def reliability(
    true_u: npt.NDArray[Any], probabilities_uc: npt.NDArray[np.floating[Any]], bins: int = BINS
) -> Reliability:
    """Confidence and accuracy by bin of the predicted class's probability; Guo et al. 2017, see the file's head."""
    predicted_u, confidence_u = probabilities_uc.argmax(axis=1), probabilities_uc.max(axis=1).astype(np.float64)
    bin_u = bin_of(confidence_u, bins)
    units_k = np.bincount(bin_u, minlength=bins)
    at_least_one = np.maximum(units_k, 1)
    confidence_k = np.bincount(bin_u, weights=confidence_u, minlength=bins) / at_least_one
    accuracy_k = np.bincount(bin_u, weights=predicted_u == true_u, minlength=bins) / at_least_one
    empty = units_k == 0
    return Reliability(
        edges_k=np.linspace(0, 1, bins + 1),
        units_k=units_k.astype(np.int64),
        confidence_k=np.where(empty, np.nan, confidence_k),
        accuracy_k=np.where(empty, np.nan, accuracy_k),
    )
