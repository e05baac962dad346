"""Histograms of normalised counts per gene: whole numbers that add up in any order, with the same bits.

The bins are the upper bits of the float32 pattern: 128 for each doubling. Within a bin the median stands where its rank
says, so it is at most 0.8 % off, whatever the values are, and genes do not share a few values.

Axis suffixes: `n` cells, `g` genes of the new vocabulary, `k` occupied bins, sorted by gene and bin; `t`
tokens, `b` bins, `v` normalised values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.ingestion.annotation.genes import GeneMap
from genescale.ingestion.atlas import Rows
from genescale.ingestion.counts import exact_limit
from genescale.ingestion.ranking.cell_loops import normalise_cells, sweep_cells
from genescale.ingestion.ranking.compiled import compiled
from genescale.ingestion.ranking.kernel import check_structure, gene_numbers, plain_indices, plain_values
from genescale.platform.errors import IntegrityError
from genescale.platform.rank_value import TARGET_SUM
from genescale.platform.vocabulary import Vocabulary

# A float32 has 23 bits of fraction; keeping the upper 7 of them splits every doubling into 128 bins.
FRACTION_SHIFT = 23 - 7
BINS = 1 << (31 - FRACTION_SHIFT)
# Bins that are held as an array: twelve doublings from the smallest value that the first block can have.
_HELD_BINS = 12 * 128


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """Occupied bins: key = gene × BINS + bin (int64, rising), and how many values fell into each (int64)."""

    keys_k: npt.NDArray[np.int64]
    counts_k: npt.NDArray[np.int64]

    @classmethod
    def empty(cls) -> Histogram:
        """No value yet."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    @classmethod
    def of(cls, genes: npt.NDArray[Any], values: npt.NDArray[np.float64]) -> Histogram:
        """Of positive values and the genes they belong to (same length)."""
        bins = np.ascontiguousarray(values, dtype=np.float32).view(np.int32).astype(np.int64) >> FRACTION_SHIFT
        keys, counts = np.unique(genes.astype(np.int64) * BINS + bins, return_counts=True)
        return cls(keys, counts.astype(np.int64))

    def __add__(self, other: Histogram) -> Histogram:
        keys = np.empty(self.keys_k.size + other.keys_k.size, dtype=np.int64)
        counts = np.empty_like(keys)
        size = _merge(self.keys_k, self.counts_k, other.keys_k, other.counts_k, keys, counts)
        return Histogram(keys[:size].copy(), counts[:size].copy())

    def to_bytes(self) -> bytes:
        """Both arrays, one after the other."""
        return self.keys_k.tobytes() + self.counts_k.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Histogram:
        """Read `to_bytes`; IntegrityError when they are not that."""
        if len(data) % 16:
            raise IntegrityError(f"{len(data)} bytes are no histogram.")
        both = np.frombuffer(data, dtype=np.int64)
        return cls(both[: both.size // 2], both[both.size // 2 :])

    def observations(self, n_genes: int) -> npt.NDArray[np.int64]:
        """Values per gene (g)."""
        observed = np.zeros(n_genes, dtype=np.int64)
        np.add.at(observed, self.keys_k // BINS, self.counts_k)
        return observed

    def medians(self, n_genes: int) -> npt.NDArray[np.float64]:
        """Median per gene (g, float64; NaN without values): the middle value, or the mean of the two in the middle."""
        medians, up_to_k = np.full(n_genes, np.nan), np.cumsum(self.counts_k)
        seen, middles = self._middles(n_genes)
        halves = []
        for middle in middles:
            k = np.searchsorted(up_to_k, middle, side="right")
            rank = middle - (up_to_k[k] - self.counts_k[k])
            lower, upper = _edges(self.keys_k[k] % BINS)
            halves.append(lower + (upper - lower) * ((rank + 0.5) / self.counts_k[k]))
        medians[seen] = (halves[0] + halves[1]) / 2
        return medians

    def median_bins(self, n_genes: int) -> npt.NDArray[np.int64]:
        """The bins in which the two middle values of each gene lie (g × 2; -1 without values)."""
        bins, up_to_k = np.full((n_genes, 2), -1, dtype=np.int64), np.cumsum(self.counts_k)
        seen, middles = self._middles(n_genes)
        for side, middle in enumerate(middles):
            bins[seen, side] = self.keys_k[np.searchsorted(up_to_k, middle, side="right")] % BINS
        return bins

    def exact_medians(
        self, n_genes: int, genes_v: npt.NDArray[np.int64], values_v: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Medians (g) from all values that lie in the bins of `median_bins`, given in any order.

        Raises IntegrityError when these are not as many as the histogram counted there.
        """
        bins = self.median_bins(n_genes)
        wanted = np.unique((np.arange(n_genes)[:, None] * BINS + bins)[bins >= 0])
        places = np.searchsorted(self.keys_k, wanted)
        expected = np.zeros(n_genes, dtype=np.int64)
        np.add.at(expected, wanted // BINS, self.counts_k[places])
        if not np.array_equal(np.bincount(genes_v, minlength=n_genes), expected):
            raise IntegrityError("the second pass saw other values than the first.", fix="Start over with fixed files.")
        values_v = values_v[np.lexsort((values_v, genes_v))]
        first_v = np.cumsum(expected) - expected
        before_k = np.cumsum(self.counts_k) - self.counts_k
        medians = np.full(n_genes, np.nan)
        seen, middles = self._middles(n_genes)
        lowest_k = np.searchsorted(self.keys_k, seen * BINS + bins[seen, 0])
        halves = []
        for side, middle in enumerate(middles):
            k = np.searchsorted(self.keys_k, seen * BINS + bins[seen, side])
            # Values of the lower bin stand first; the upper one follows, whatever lies between holds no value.
            skipped = np.where(k > lowest_k, self.counts_k[lowest_k], 0)
            halves.append(values_v[first_v[seen] + skipped + middle - before_k[k]])
        medians[seen] = (halves[0] + halves[1]) / 2
        return medians

    def _middles(self, n_genes: int) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.int64]]]:
        """Genes with values, and the places of their two middle values among all values, genes one after the other."""
        observed = self.observations(n_genes)
        before, seen = np.cumsum(observed) - observed, np.flatnonzero(observed)
        return seen, [before[seen] + (observed[seen] - 1) // 2, before[seen] + observed[seen] // 2]


@dataclasses.dataclass(frozen=True, eq=False)
class CellSums:
    """Of each cell (n): library size, detected genes, mitochondrial counts, and the code of a fault."""

    totals_n: npt.NDArray[np.float64]
    n_genes_n: npt.NDArray[np.int32]
    mito_n: npt.NDArray[np.float64]
    faults_n: npt.NDArray[np.uint8]


class Counter:
    """Counts the normalised values of many blocks of cells of one file.

    genes: the gene columns in `vocabulary`, whose medians do not matter. Memory: 6 kB for each gene that occurs.
    """

    def __init__(self, genes: GeneMap, vocabulary: Vocabulary) -> None:
        self.vocabulary, self._table_g = vocabulary, gene_numbers(genes, vocabulary)
        self._bins_tb: npt.NDArray[np.uint32] | None = None
        self._lowest, self._spilled = 0, Histogram.empty()

    def sums(self, rows: Rows, *, allow_fractional: bool = False) -> CellSums:
        """Look at every value of a block: which cells hold counts, and how many."""
        check_structure(rows)
        n, most = len(rows.indptr_n) - 1, exact_limit(rows.values_z.dtype)
        sums = CellSums(np.zeros(n), np.zeros(n, np.int32), np.zeros(n), np.zeros(n, np.uint8))
        sweep_cells(
            *_plain(rows, most), float(most), not allow_fractional, self._table_g, self.vocabulary.size,
            sums.totals_n, sums.n_genes_n, sums.mito_n, sums.faults_n,
        )  # fmt: skip
        return sums

    def add(self, rows: Rows, sums: CellSums, taken_n: npt.NDArray[np.bool_]) -> None:
        """Count the values of those cells of a block that are taken; cells with a fault or without counts never are."""
        taken_n = taken_n & (sums.faults_n == 0) & (sums.totals_n > 0)
        if not taken_n.any():
            return
        if self._bins_tb is None:
            smallest = np.float32(TARGET_SUM / sums.totals_n[taken_n].max())
            self._lowest = max(int(smallest.view(np.int32)) >> FRACTION_SHIFT, 0)
            # Zeros are given out by the system as they are touched: genes that do not occur take no memory.
            self._bins_tb = np.zeros((self.vocabulary.size, _HELD_BINS), dtype=np.uint32)
        tokens_v, values_v = self._normalised(rows, sums, taken_n)
        spilled = np.empty((values_v.size, 2), dtype=np.int64)
        outside = _count(tokens_v, values_v.astype(np.float32), self._lowest, FRACTION_SHIFT, self._bins_tb, spilled)
        if outside:
            keys, counts = np.unique(spilled[:outside, 0] * BINS + spilled[:outside, 1], return_counts=True)
            self._spilled += Histogram(keys, counts.astype(np.int64))

    def histogram(self) -> Histogram:
        """What was counted so far, by gene in the order of the vocabulary."""
        total = self._spilled
        if self._bins_tb is not None:
            tokens, bins = np.nonzero(self._bins_tb)
            counts = self._bins_tb[tokens, bins].astype(np.int64)
            total = total + Histogram(tokens * BINS + bins + self._lowest, counts)
        gene_t = np.full(self.vocabulary.size, -1, dtype=np.int64)
        gene_t[self.vocabulary.token_ids] = np.arange(len(self.vocabulary.gene_ids))
        genes = gene_t[total.keys_k // BINS]
        order = np.argsort(genes, kind="stable")
        return Histogram((genes * BINS + total.keys_k % BINS)[order], total.counts_k[order])

    def values(
        self, rows: Rows, sums: CellSums, taken_n: npt.NDArray[np.bool_], bins_g2: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Genes and values (float64) that fall into the two bins given for each gene: see `Histogram.median_bins`."""
        taken_n = taken_n & (sums.faults_n == 0) & (sums.totals_n > 0)
        tokens_v, values_v = self._normalised(rows, sums, taken_n)
        genes_v = np.searchsorted(self.vocabulary.token_ids, tokens_v)
        bins_v = values_v.astype(np.float32).view(np.int32) >> FRACTION_SHIFT
        wanted_v = (bins_v == bins_g2[genes_v, 0]) | (bins_v == bins_g2[genes_v, 1])
        return genes_v[wanted_v], values_v[wanted_v]

    def _normalised(
        self, rows: Rows, sums: CellSums, taken_n: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
        tokens_v, values_v = np.empty(rows.indices_z.size, np.int32), np.empty(rows.indices_z.size)
        found = normalise_cells(
            *_plain(rows, exact_limit(rows.values_z.dtype)), self._table_g, self.vocabulary.size, sums.totals_n,
            taken_n, TARGET_SUM, tokens_v, values_v,
        )  # fmt: skip
        return tokens_v[:found], values_v[:found]


def _plain(rows: Rows, most: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    indptr_n = np.ascontiguousarray(rows.indptr_n, dtype=np.int64)
    return indptr_n, plain_indices(rows.indices_z), plain_values(rows.values_z, most)


def _edges(bins: npt.NDArray[np.int64]) -> list[npt.NDArray[np.float64]]:
    """Lower and upper limits of bins."""
    return [((bins + step) << FRACTION_SHIFT).astype(np.int32).view(np.float32).astype(np.float64) for step in (0, 1)]


@compiled
def _count(
    tokens_v: npt.NDArray[Any],
    single_v: npt.NDArray[Any],
    lowest: int,
    fraction_shift: int,
    bins_tb: npt.NDArray[Any],
    spilled: npt.NDArray[Any],
) -> int:
    """Count values in their bins, from bin `lowest` on; the others go to `spilled` as token, bin. Returns how many."""
    bits_v, outside = single_v.view(np.int32), 0
    for v in range(tokens_v.size):
        place = (bits_v[v] >> fraction_shift) - lowest
        if 0 <= place < bins_tb.shape[1]:
            bins_tb[tokens_v[v], place] += 1
        else:
            spilled[outside, 0], spilled[outside, 1] = tokens_v[v], place + lowest
            outside += 1
    return outside


@compiled
def _merge(
    keys_a: npt.NDArray[Any],
    counts_a: npt.NDArray[Any],
    keys_b: npt.NDArray[Any],
    counts_b: npt.NDArray[Any],
    keys: npt.NDArray[Any],
    counts: npt.NDArray[Any],
) -> int:
    """Merge two rising lists of keys, adding the counts of equal ones; returns how many keys there are."""
    a, b, size = 0, 0, 0
    while a < keys_a.size or b < keys_b.size:
        from_a = b >= keys_b.size or (a < keys_a.size and keys_a[a] <= keys_b[b])
        key = keys_a[a] if from_a else keys_b[b]
        keys[size], counts[size] = key, 0
        if a < keys_a.size and keys_a[a] == key:
            counts[size] += counts_a[a]
            a += 1
        if b < keys_b.size and keys_b[b] == key:
            counts[size] += counts_b[b]
            b += 1
        size += 1
    return size
