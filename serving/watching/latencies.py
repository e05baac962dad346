"""Latencies counted finely enough for percentiles, and additive: over processes, and by difference over time.

Classes grow by 5 %, so a percentile is at most 2.5 % off, whatever its size: a class is represented by its middle in
ratio (the idea of DDSketch, Masson et al. 2019).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

GROWTH = 1.05
SHORTEST_S = 1e-5
_LOG_GROWTH = math.log(GROWTH)

Counts = Mapping[int, int]


def class_of(seconds: float) -> int:
    """Number of the class that a time falls into; times up to SHORTEST_S share the class 0."""
    return max(0, math.ceil(math.log(max(seconds, SHORTEST_S) / SHORTEST_S) / _LOG_GROWTH))


def seconds_of(number: int) -> float:
    """The time that stands for a class: its middle in ratio."""
    return SHORTEST_S * GROWTH ** (number - 0.5)


def percentile_s(counts: Counts, share: float) -> float | None:
    """The time below which `share` of the counted ones lie (0.99 for p99); None when nothing was counted."""
    total = sum(counts.values())
    if not total:
        return None
    wanted, seen = max(1, math.ceil(share * total)), 0
    for number in sorted(counts):
        seen += counts[number]
        if seen >= wanted:
            return seconds_of(number)
    raise AssertionError("a percentile lies within its own counts")


def added(parts: Iterable[Counts]) -> Counter[int]:
    """The sum of several counts."""
    total: Counter[int] = Counter()
    for part in parts:
        total.update(part)
    return total


def since(now: Counts, before: Counts) -> Counter[int]:
    """What was counted between two looks at growing counts."""
    return Counter({number: n - before.get(number, 0) for number, n in now.items() if n > before.get(number, 0)})
