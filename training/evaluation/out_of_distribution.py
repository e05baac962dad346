"""How unlike the training units a unit is: its distance to the nearest class, as a share of the training distances.

Axis suffixes: `u` units, `d` width, `c` classes, `q` quantiles.

The distance is Mahalanobis' to the nearest class mean, with one covariance for all classes (Lee, Lee, Lee and Shin, "A
Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", NeurIPS 2018, equation 2),
shrunk after Ledoit and Wolf (2004), because there may be fewer training units than a vector is wide. A score of 0.99
says: nearer to its class than this unit are 99 % of the units that the reference was made of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.platform.errors import InputError

QUANTILES = 1_001
LEAST_HELD_OUT = 50
"""So many held-out units give the distances; of fewer the large distances are not known."""
PARTS = 5
_UNITS_AT_ONCE = 8_192


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What the training units look like; five small arrays, so that it can travel with a head."""

    means_cd: npt.NDArray[np.float32]
    """Mean of each class; one row for numbers."""
    whitening_dd: npt.NDArray[np.float32]
    """Turns a difference into one whose Euclidean length is the Mahalanobis distance."""
    distances_q: npt.NDArray[np.float64]
    """Rising quantiles of the distances of the reference units, from their least to their largest."""

    def distances(self, vectors_ud: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """(u) Mahalanobis distance of each vector to the nearest class mean."""
        found_u = np.empty(len(vectors_ud))
        # Sums of squares are taken near zero, where float32 keeps their difference.
        middle_d = self.means_cd.mean(axis=0)
        centres_cd = (self.means_cd - middle_d) @ self.whitening_dd
        for start in range(0, len(vectors_ud), _UNITS_AT_ONCE):
            part_ud = np.asarray(vectors_ud[start : start + _UNITS_AT_ONCE], dtype=np.float32)
            turned_ud = (part_ud - middle_d) @ self.whitening_dd
            squares_uc = ((turned_ud**2).sum(axis=1)[:, None] - 2 * turned_ud @ centres_cd.T) + (centres_cd**2).sum(
                axis=1
            )
            found_u[start : start + len(turned_ud)] = np.sqrt(np.maximum(squares_uc.min(axis=1), 0))
        return found_u

    def scores(self, vectors_ud: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """(u) share of the reference units that are nearer to their class than this vector: 0 … 1."""
        levels_q = np.linspace(0, 1, len(self.distances_q))
        return np.interp(self.distances(vectors_ud), self.distances_q, levels_q, left=0.0, right=1.0)


def reference(
    train_ud: npt.NDArray[Any],
    codes_u: npt.NDArray[Any] | None = None,
    held_out_ud: npt.NDArray[Any] | None = None,
    *,
    distances_u: npt.NDArray[Any] | None = None,
) -> Reference:
    """Fit a reference on training vectors; `codes_u` are their classes (None for numbers).

    held_out_ud: vectors of the validation part, whose distances are compared with. With fewer than 50 of them, training
    units are compared, each with a reference that was made without it (five parts in turn): distances to means and a
    covariance that a unit helped to make are too small. `distances_u`: distances of held-out units that are known
    already, as from the folds of a cross-validation. Raises InputError without two training units.
    """
    train_ud = np.asarray(train_ud, dtype=np.float64)
    if len(train_ud) < 2:
        raise InputError(f"{len(train_ud)} training units describe nothing.", where="out-of-distribution score")
    codes_u = np.zeros(len(train_ud), dtype=np.int64) if codes_u is None else np.asarray(codes_u)
    made = _fitted(train_ud, codes_u)
    if distances_u is None and held_out_ud is not None and len(held_out_ud) >= LEAST_HELD_OUT:
        distances_u = made.distances(held_out_ud)
    elif distances_u is None:
        distances_u = _left_out_distances(train_ud, codes_u)
    distances_q = np.quantile(distances_u, np.linspace(0, 1, QUANTILES))
    return replace(made, distances_q=distances_q)


def _fitted(train_ud: npt.NDArray[Any], codes_u: npt.NDArray[Any]) -> Reference:
    """Means and whitening; no distances yet."""
    from sklearn.covariance import ledoit_wolf

    place_u = np.unique(codes_u, return_inverse=True)[1]
    counts_c = np.bincount(place_u)
    means_cd = np.zeros((len(counts_c), train_ud.shape[1]))
    np.add.at(means_cd, place_u, train_ud)
    means_cd /= counts_c[:, None]
    covariance_dd, _ = ledoit_wolf(train_ud - means_cd[place_u], assume_centered=True)
    values_d, axes_dd = np.linalg.eigh(covariance_dd)
    # A direction in which nothing varies would make any distance infinite.
    floor = max(float(values_d.max()), float(np.finfo(np.float64).tiny)) * 1e-9
    return Reference(
        means_cd=means_cd.astype(np.float32),
        whitening_dd=(axes_dd / np.sqrt(np.maximum(values_d, floor))).astype(np.float32),
        distances_q=np.empty(0),
    )


def _left_out_distances(train_ud: npt.NDArray[Any], codes_u: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(u) distance of each training unit to what the other parts say is usual; parts hold every class alike."""
    part_u = np.empty(len(train_ud), dtype=np.int64)
    part_u[np.argsort(codes_u, kind="stable")] = np.arange(len(train_ud)) % min(PARTS, len(train_ud))
    distances_u = np.empty(len(train_ud))
    for part in np.unique(part_u):
        inside = part_u == part
        distances_u[inside] = _fitted(train_ud[~inside], codes_u[~inside]).distances(train_ud[inside])
    return distances_u
