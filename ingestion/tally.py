"""What became of the cells of a unit or a source, in numbers that add up over units in any order."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from genescale.ingestion.reports.distribution import doubling_edges

MOST_BINS = 8 * 60
_EDGES = doubling_edges(MOST_BINS)


@dataclasses.dataclass
class Tally:
    """Counts of cells, tokens and stored values; read = kept + all dropped.

    The bins divide each doubling from 1 upwards into eight (`distribution.doubling_edges`), over kept cells.
    """

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Cells by reason."""
    tokens: int = 0
    cropped: int = 0
    """Kept cells that have more genes than the window."""
    explicit_zeros: int = 0
    """Zeros that were stored; they were left out."""
    repeated_entries: int = 0
    """Values stored again for the same gene and cell; they were summed."""
    n_values: int = 0
    """Positive stored values."""
    n_ones: int = 0
    """Values of 1 among them: most values of raw counts."""
    largest_count: float = 0.0
    counts_by_fate: dict[str, float] = dataclasses.field(default_factory=dict)
    """Counts of all cells read by what became of their gene (`genes.FATES`)."""
    length_bins: list[int] = dataclasses.field(default_factory=list)
    """Cells by tokens."""
    depth_bins: list[int] = dataclasses.field(default_factory=list)
    """Cells by library size."""
    genes_bins: list[int] = dataclasses.field(default_factory=list)
    """Cells by detected vocabulary genes."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Processor seconds by step: read, inflate, rank (with all checks), obs, write, hash."""

    def add(self, other: Tally) -> None:
        """Take in the counts of another unit."""
        for field in dataclasses.fields(self):
            mine, more = getattr(self, field.name), getattr(other, field.name)
            if field.name == "largest_count":
                setattr(self, field.name, max(mine, more))
            elif isinstance(mine, dict):
                setattr(self, field.name, _sum_by_name(mine, more))
            elif isinstance(mine, list):
                setattr(self, field.name, _sum_by_bin(mine, more))
            else:
                setattr(self, field.name, mine + more)

    def drop(self, other: Tally) -> None:
        """Take cells that had been kept out again: `other` holds them as dropped, with their tokens and bins."""
        self.kept -= other.n_dropped
        self.dropped = {name: int(cells) for name, cells in _sum_by_name(self.dropped, other.dropped).items()}
        self.tokens -= other.tokens
        self.cropped -= other.cropped
        for name in ("length_bins", "depth_bins", "genes_bins"):
            setattr(self, name, _sum_by_bin(getattr(self, name), [-cells for cells in getattr(other, name)]))

    @property
    def n_dropped(self) -> int:
        """Cells dropped for any reason."""
        return sum(self.dropped.values())


def binned(values: npt.NDArray[np.generic]) -> list[int]:
    """Cells by bin: eight for each doubling from 1 upwards, smaller values in the first; the last is not empty."""
    places = np.searchsorted(_EDGES, values, side="right") - 1
    return np.bincount(places.clip(0, MOST_BINS - 1)).tolist()


def _sum_by_name(mine: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    total = Counter(mine)
    total.update(more)
    return dict(sorted(total.items()))


def _sum_by_bin(mine: Sequence[int], more: Sequence[int]) -> list[int]:
    total = np.zeros(max(len(mine), len(more)), dtype=np.int64)
    total[: len(mine)] += np.asarray(mine, dtype=np.int64)
    total[: len(more)] += np.asarray(more, dtype=np.int64)
    return np.trim_zeros(total, "b").tolist()
