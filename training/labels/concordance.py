"""Whether one fitted classifier says the same of the same genes in other cells: fetal against adult, say.

A gene's score comes from the cells it is read in. Reading the same genes in two kinds of cells with the same
classifier asks whether what it has learned depends on the context. A difference is not an error of either.

Axis suffixes: `u` units (genes) that both have, `c` classes, `b` bootstrap draws.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.platform.errors import InputError, SettingsError

CONFIDENT = 0.8
_SHOWN = 50


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with the middle 95 % of its bootstrap draws; NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Concordance:
    """Agreement of one classifier on two sets of cells, over the units that both have."""

    units: int
    only_first: int
    only_second: int
    """Units that occur in one set of cells only."""
    agreement: Interval
    """Share of units with the same call."""
    confident: int
    """Units whose call is confident in the first set."""
    confident_agreement: Interval
    """Share of these with the same call in the second set; the published figure (96 %, 84 %) is of this kind."""
    both_confident: int
    both_confident_agreement: Interval
    """Among units that are confident in both."""
    kappa: Interval
    """Cohen's kappa (1960): agreement above what the classes' shares give by chance."""
    spearman: tuple[Interval, ...]
    """Rank correlation of the probabilities of each class."""
    classes: tuple[str, ...]
    confidence: float
    changed: tuple[tuple[str, str, str], ...]
    """Confident units with another call in the second set: id, first call, second call; at most fifty."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def concordance(
    first_ids: Sequence[str],
    first_uc: npt.ArrayLike,
    second_ids: Sequence[str],
    second_uc: npt.ArrayLike,
    classes: Sequence[str],
    *,
    confidence: float = CONFIDENT,
    bootstrap: int = 1_000,
    seed: int = 0,
) -> Concordance:
    """Compare class probabilities of units in two sets of cells; units are matched by id.

    A call is the most probable class, and confident when its probability is at least `confidence`. Intervals draw
    units with replacement. Raises InputError when ids repeat, shapes do not fit, or no unit is in both.
    """
    if not 0 < confidence <= 1 or bootstrap < 1:
        raise SettingsError("confidence lies in 0 … 1, and bootstrap is 1 or more.", where="concordance")
    first, second = _by_id(first_ids, first_uc, classes), _by_id(second_ids, second_uc, classes)
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise InputError("no unit has a score in both sets of cells.", where="concordance", fix="Choose other cells.")
    a_uc, b_uc = (np.array([scores[unit] for unit in shared]) for scores in (first, second))
    a_u, b_u = a_uc.argmax(axis=1), b_uc.argmax(axis=1)
    sure_a, sure_b = a_uc.max(axis=1) >= confidence, b_uc.max(axis=1) >= confidence
    draws = np.random.default_rng(seed).integers(len(shared), size=(bootstrap, len(shared)))

    def interval(statistic: Callable[[npt.NDArray[np.int64]], float]) -> Interval:
        values_b = np.array([statistic(drawn) for drawn in draws])
        values_b = values_b[~np.isnan(values_b)]
        low, high = np.quantile(values_b, [0.025, 0.975]) if len(values_b) else (np.nan, np.nan)
        return Interval(value=statistic(np.arange(len(shared))), low=float(low), high=float(high))

    columns = zip(a_uc.T, b_uc.T, strict=True)
    moved = np.flatnonzero(sure_a & (a_u != b_u))[:_SHOWN]
    return Concordance(
        units=len(shared),
        only_first=len(first.keys() - second.keys()),
        only_second=len(second.keys() - first.keys()),
        agreement=interval(lambda at: _share_equal(a_u[at], b_u[at])),
        confident=int(sure_a.sum()),
        confident_agreement=interval(lambda at: _agreed(a_u, b_u, sure_a, at)),
        both_confident=int((sure_a & sure_b).sum()),
        both_confident_agreement=interval(lambda at: _agreed(a_u, b_u, sure_a & sure_b, at)),
        kappa=interval(lambda at: cohen_kappa(a_u[at], b_u[at], len(classes))),
        spearman=tuple(interval(functools.partial(_correlated, a_u=a, b_u=b)) for a, b in columns),
        classes=tuple(classes),
        confidence=confidence,
        changed=tuple((shared[u], classes[a_u[u]], classes[b_u[u]]) for u in moved),
    )


def _by_id(ids: Sequence[str], scores_uc: npt.ArrayLike, classes: Sequence[str]) -> dict[str, npt.NDArray[np.float64]]:
    """Scores by unit; units without any score (NaN) did not occur in the cells."""
    values_uc = np.asarray(scores_uc, dtype=np.float64)
    if values_uc.shape != (len(ids), len(classes)):
        raise InputError(
            f"scores of shape {values_uc.shape} for {len(ids)} units and {len(classes)} classes.", where="concordance"
        )
    if len(set(ids)) != len(ids):
        raise InputError("a unit has two scores in one set of cells.", where="concordance", fix="Average them.")
    return {str(unit): row for unit, row in zip(ids, values_uc, strict=True) if not np.isnan(row).any()}


def _agreed(
    a_u: npt.NDArray[np.int64], b_u: npt.NDArray[np.int64], among_u: npt.NDArray[np.bool_], at: npt.NDArray[np.int64]
) -> float:
    return _share_equal(a_u[at][among_u[at]], b_u[at][among_u[at]])


def _share_equal(a_u: npt.NDArray[np.int64], b_u: npt.NDArray[np.int64]) -> float:
    return float((a_u == b_u).mean()) if len(a_u) else float("nan")


def cohen_kappa(a_u: npt.NDArray[np.int64], b_u: npt.NDArray[np.int64], n_classes: int) -> float:
    """(observed - expected) / (1 - expected) agreement (Cohen 1960); NaN when both always say the same one class."""
    shares = [np.bincount(calls, minlength=n_classes) / len(calls) for calls in (a_u, b_u)]
    expected = float(shares[0] @ shares[1])
    return float("nan") if expected == 1 else (_share_equal(a_u, b_u) - expected) / (1 - expected)


def _correlated(at: npt.NDArray[np.int64], *, a_u: npt.NDArray[np.float64], b_u: npt.NDArray[np.float64]) -> float:
    """Rank correlation over the units `at`, ties at their mean rank; NaN when one side does not vary."""
    from scipy.stats import rankdata

    ranks_a, ranks_b = rankdata(a_u[at]), rankdata(b_u[at])
    if np.ptp(ranks_a) == 0 or np.ptp(ranks_b) == 0:
        return float("nan")
    return float(np.corrcoef(ranks_a, ranks_b)[0, 1])
