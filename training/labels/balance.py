"""Whether attributes such as sex or age are spread alike over the parts of a split, and splits in which they are.

Cells of one donor share sex and age, so the donors are what is counted: a test on cells would call any split of few
donors unbalanced. A donor's value is its most frequent text, or the mean of its numbers.

Axis suffixes: `u` units (cells), `g` groups (donors), `c` classes, `p` parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.training.labels.assignment import distance, fill_empty, greedy_assignment, held

BALANCED_P = 0.1
"""The published criterion: every attribute's p is at least this."""
CHOICES = 200_000
"""Trials x groups at most: trials are dear where there are many groups, and hardly needed there."""
SIZE_SLACK = 0.05
"""Units that may stand in another part than in the nearest assignment found, as a share of all."""


@dataclass(frozen=True, kw_only=True)
class BalanceTest:
    """Test of one attribute over the parts of a split; a small p says that they differ."""

    attribute: str
    test: str
    """`chi-square` for texts, `Kruskal-Wallis` (three parts or more) or `Wilcoxon rank-sum` (two) for numbers."""
    statistic: float
    p_value: float
    unit: str
    """What was counted: `groups`, or `units` where there are no groups."""
    parts: Mapping[str, Mapping[str, float]]
    """By part: number of each text, or number, mean and median of the numbers."""

    @property
    def balanced(self) -> bool:
        """Whether the p-value meets the published criterion."""
        return self.p_value >= BALANCED_P

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "balanced": self.balanced}


def group_attributes(
    attributes: Mapping[str, npt.NDArray[Any]], group_u: npt.NDArray[np.int64], n_groups: int
) -> dict[str, npt.NDArray[Any]]:
    """One value for each group: the mean of its numbers, or its most frequent text (the first of equals)."""
    return {name: _group_values(values_u, group_u, n_groups) for name, values_u in attributes.items()}


def _group_values(values_u: npt.NDArray[Any], group_u: npt.NDArray[np.int64], n_groups: int) -> npt.NDArray[Any]:
    if values_u.dtype.kind == "f":
        return np.asarray(np.bincount(group_u, values_u, n_groups) / np.bincount(group_u, minlength=n_groups))
    names, code_u = np.unique(values_u, return_inverse=True)
    counts_gc = np.zeros((n_groups, len(names)), dtype=np.int64)
    np.add.at(counts_gc, (group_u, code_u), 1)
    return np.asarray(names[counts_gc.argmax(axis=1)])


def balance_test(
    attribute: str, values_g: npt.NDArray[Any], part_g: npt.NDArray[np.int64], parts: Sequence[str], unit: str
) -> BalanceTest:
    """Test whether an attribute differs between parts: chi-square for texts, Kruskal-Wallis or Wilcoxon for numbers."""
    name, statistic, p_value = _tested(values_g, part_g, len(parts))
    shown = {part: _summary(values_g[part_g == number]) for number, part in enumerate(parts)}
    return BalanceTest(attribute=attribute, test=name, statistic=statistic, p_value=p_value, unit=unit, parts=shown)


def _tested(values_g: npt.NDArray[Any], part_g: npt.NDArray[np.int64], n_parts: int) -> tuple[str, float, float]:
    """Name of the test, statistic and p; an attribute that does not vary has p 1."""
    from scipy import stats

    if values_g.dtype.kind == "f":
        name = "Kruskal-Wallis" if n_parts > 2 else "Wilcoxon rank-sum"
        samples = [values_g[part_g == part] for part in range(n_parts)]
        if len(np.unique(values_g)) < 2 or not all(map(len, samples)):
            return name, 0.0, 1.0
        found = stats.kruskal(*samples) if n_parts > 2 else stats.ranksums(*samples)
        return name, float(found.statistic), float(found.pvalue)
    codes_g = np.unique(values_g, return_inverse=True)[1]
    counts_pc = np.zeros((n_parts, int(codes_g.max()) + 1))
    np.add.at(counts_pc, (part_g, codes_g), 1)
    if counts_pc.shape[1] < 2:
        return "chi-square", 0.0, 1.0
    found = stats.chi2_contingency(counts_pc, correction=False)
    return "chi-square", float(found.statistic), float(found.pvalue)


def _summary(values: npt.NDArray[Any]) -> dict[str, float]:
    if values.dtype.kind == "f":
        return {"n": float(len(values)), "mean": float(values.mean()), "median": float(np.median(values))}
    return {name: float(count) for name, count in sorted(Counter(values.tolist()).items())}


def balanced_assignment(
    counts_gc: np.ndarray,
    fractions_p: np.ndarray,
    attributes_g: Mapping[str, npt.NDArray[Any]],
    *,
    trials: int,
    generator: np.random.Generator,
) -> tuple[npt.NDArray[np.int64], int]:
    """Part of each group in the best of `trials` seeded assignments, and how many were tried.

    All keep groups whole and classes near `fractions_p`; of those whose sizes are about as near as the nearest, the one
    whose smallest p over the attributes is largest is taken (of equals the nearer one): the best, not the last.
    """
    tried = int(np.clip(CHOICES // len(counts_gc), 1, trials))
    wished_pc = fractions_p[:, None] * counts_gc.sum(axis=0)[None, :]
    found = []
    for _ in range(tried):
        order = generator.permutation(len(counts_gc))
        part_g = fill_empty(greedy_assignment(counts_gc, wished_pc, order), counts_gc, len(fractions_p))
        found.append((distance(held(part_g, counts_gc, len(fractions_p)), wished_pc), part_g))
    # A unit in a wrong part is one too many there and one too few elsewhere, hence the factor.
    limit = min(cost for cost, _ in found) + 2 * SIZE_SLACK * counts_gc.sum()
    near = {part_g.tobytes(): (cost, part_g) for cost, part_g in found if cost <= limit}
    scored = [(_smallest_p(attributes_g, part_g, len(fractions_p)), -cost, part_g) for cost, part_g in near.values()]
    return max(scored, key=lambda row: row[:2])[2], tried


def _smallest_p(attributes_g: Mapping[str, npt.NDArray[Any]], part_g: npt.NDArray[np.int64], n_parts: int) -> float:
    return min(_tested(values_g, part_g, n_parts)[2] for values_g in attributes_g.values())
