"""The rank kernel: stored values of many cells become tokens in one compiled sweep.

A sweep over the values of a cell proves that they are counts, finds the target of each gene column, sums what belongs
together, and adds up library size, mitochondrial counts, counts by fate and a content hash. What is left is ranked by
count / median in float64, falling, ties to the smaller token id: exactly `platform.rank_value.rank_value_tokens`,
which tests compare cell by cell.

Axis suffixes: `n` cells, `g` genes of the file, `z` stored values, `k` genes of one cell, `t` tokens (of the
vocabulary, or of all cells one after the other).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.ingestion.annotation.genes import FATES, GeneMap
from genescale.ingestion.atlas import Rows
from genescale.ingestion.counts import exact_limit
from genescale.ingestion.ranking.cell_loops import (
    COUNTED,
    FATE_BITS,
    LARGEST_MEDIAN,
    MITO,
    SHARED,
    TARGET_SHIFT,
    rank_cells,
)
from genescale.platform.errors import AtlasError, InputError, LimitError, NotCountsError
from genescale.platform.vocabulary import Vocabulary

FAULTS = ("", "index", "not_finite", "negative", "fractional", "too_large")
"""Why a cell holds no counts, by code: a gene index out of range, or a value that is no count."""

_MOST_TARGETS = 1 << (31 - TARGET_SHIFT)
_MOST_FATES = FATE_BITS + 1


@dataclasses.dataclass(frozen=True, eq=False)
class RankedRows:
    """Tokens of consecutive cells, one cell after the other, and what the sweep over their values found.

    tokens_t: the vocabulary's token_dtype; offsets_n: int64, n+1; totals_n: sum over the counted genes; n_genes_n:
    vocabulary genes detected, those without a median included; mito_n: counts of mitochondrial genes; cropped_n: genes
    fell out of the window; content_hash_n: int64, the same for the same counts of the same vocabulary genes in any
    order; faults_n: code of FAULTS, 0 for good cells. A cell with a fault has no token and adds to no sum.

    counts_by_fate is aligned with `genes.FATES`; explicit_zeros, repeated_entries (stored again for the same gene
    column, summed), n_values (positive values) and n_ones are numbers of stored values.
    """

    tokens_t: npt.NDArray[Any]
    offsets_n: npt.NDArray[np.int64]
    totals_n: npt.NDArray[np.float64]
    n_genes_n: npt.NDArray[np.int32]
    mito_n: npt.NDArray[np.float64]
    cropped_n: npt.NDArray[np.bool_]
    content_hash_n: npt.NDArray[np.int64]
    faults_n: npt.NDArray[np.uint8]
    counts_by_fate: npt.NDArray[np.float64]
    explicit_zeros: int
    repeated_entries: int
    n_values: int
    n_ones: int
    largest_count: float

    @property
    def fault(self) -> str | None:
        """Kind of the first fault, None when every value is a count of a gene of the file."""
        found = self.faults_n[self.faults_n > 0]
        return FAULTS[found[0]] if found.size else None


def rank_rows(
    rows: Rows, genes: GeneMap, vocabulary: Vocabulary, *, window: int | None = None, allow_fractional: bool = False
) -> RankedRows:
    """Tokens of the cells of `rows`, and everything else that one look at every value tells.

    window: tokens to keep, special tokens included (default: the vocabulary's). A value that is no count, and a gene
    index out of range, are reported per cell, never raised (`counts.explain` says what is wrong). Raises AtlasError
    when pointers and arrays do not belong together, InputError when the gene map is not one of this vocabulary.
    """
    check_structure(rows)
    table_g = gene_numbers(genes, vocabulary)
    frame_t = _frame(vocabulary)
    capacity = (vocabulary.window if window is None else window) - len(frame_t)
    if capacity < 1:
        raise LimitError(f"a window of {window} tokens holds no gene.", fix=f"Use at least {len(frame_t) + 1}.")
    stored_n, most = np.diff(rows.indptr_n), exact_limit(rows.values_z.dtype)
    room = int(np.minimum(stored_n, capacity).sum()) + len(frame_t) * len(stored_n)
    found = _unfilled(len(stored_n), np.empty(room, dtype=frame_t.dtype))
    sums = np.zeros(4, dtype=np.int64)
    largest = rank_cells(
        np.ascontiguousarray(rows.indptr_n, dtype=np.int64),
        plain_indices(rows.indices_z),
        plain_values(rows.values_z, most),
        float(most),
        not allow_fractional,
        table_g,
        vocabulary.medians_t,
        near_factors(vocabulary),
        capacity,
        frame_t,
        int(stored_n.max(initial=0)),
        found.tokens_t,
        found.offsets_n,
        found.totals_n,
        found.n_genes_n,
        found.mito_n,
        found.cropped_n,
        found.content_hash_n,
        found.faults_n,
        found.counts_by_fate,
        sums,
    )
    return dataclasses.replace(
        found,
        tokens_t=found.tokens_t[: found.offsets_n[-1]],
        counts_by_fate=found.counts_by_fate[: len(FATES)],
        explicit_zeros=int(sums[0]),
        repeated_entries=int(sums[1]),
        n_values=int(sums[2]),
        n_ones=int(sums[3]),
        largest_count=float(largest),
    )


def _frame(vocabulary: Vocabulary) -> npt.NDArray[Any]:
    """The tokens (t) before and after the genes of each cell: two, or none."""
    framed = vocabulary.cls is not None and vocabulary.eos is not None
    return np.array([vocabulary.cls, vocabulary.eos] if framed else [], dtype=vocabulary.token_dtype)


def _unfilled(n: int, tokens_t: npt.NDArray[Any]) -> RankedRows:
    """What the sweep writes into, for `n` cells."""
    return RankedRows(
        tokens_t=tokens_t,
        offsets_n=np.zeros(n + 1, dtype=np.int64),
        totals_n=np.zeros(n),
        n_genes_n=np.zeros(n, dtype=np.int32),
        mito_n=np.zeros(n),
        cropped_n=np.zeros(n, dtype=np.bool_),
        content_hash_n=np.zeros(n, dtype=np.int64),
        faults_n=np.zeros(n, dtype=np.uint8),
        counts_by_fate=np.zeros(_MOST_FATES),
        explicit_zeros=0,
        repeated_entries=0,
        n_values=0,
        n_ones=0,
        largest_count=0.0,
    )


def check_structure(rows: Rows) -> None:
    """Raise AtlasError or NotCountsError unless pointers, indices and values belong together and are numbers."""
    indptr, stored = rows.indptr_n, len(rows.indices_z)
    rising = len(indptr) > 0 and indptr[0] == 0 and bool((indptr[1:] >= indptr[:-1]).all())
    if not (rising and indptr[-1] == stored == len(rows.values_z) and rows.indices_z.dtype.kind in "iu"):
        raise AtlasError(
            f"row pointers, {stored:,} gene indices and {len(rows.values_z):,} values do not belong together.",
            fix="The file is damaged: fetch or export it again.",
        )
    if rows.values_z.dtype.kind not in "iuf":
        raise NotCountsError(
            f"values of type {rows.values_z.dtype} are no counts.", fix="Store raw counts as whole numbers."
        )


@functools.lru_cache(maxsize=4)
def gene_numbers(genes: GeneMap, vocabulary: Vocabulary) -> npt.NDArray[np.int32]:
    """One number per gene column (g): target, flags and fate; kept, because a file is read block by block."""
    targets_g = np.asarray(genes.targets_g, dtype=np.int64)
    if vocabulary.size >= _MOST_TARGETS:
        raise LimitError(f"a vocabulary of {vocabulary.size:,} tokens.", fix=f"At most {_MOST_TARGETS - 1:,} work.")
    if not (targets_g.shape == genes.fate_g.shape == genes.counted_g.shape == genes.mito_g.shape):
        raise InputError("the columns of the gene map differ in length.", fix="Build it with genes.map_genes.")
    if targets_g.size and not -1 <= targets_g.min() <= targets_g.max() < vocabulary.size:
        raise InputError(f"token ids outside 0 … {vocabulary.size - 1}.", fix="Map the genes with the same vocabulary.")
    if np.isin(list(vocabulary.special.values()), targets_g).any():
        raise InputError("a special token stands among the genes.", fix="Map genes to gene tokens only.")
    if genes.fate_g.max(initial=0) >= len(FATES):
        raise InputError(f"a gene has the fate {genes.fate_g.max()}.", fix=f"Fates are 0 to {len(FATES) - 1}.")
    columns_t = np.bincount(targets_g[targets_g >= 0], minlength=vocabulary.size)
    shared_g = (targets_g >= 0) & (columns_t[targets_g] > 1)
    flags_g = genes.counted_g * COUNTED + genes.mito_g * MITO + shared_g * SHARED
    return ((targets_g + 1 << TARGET_SHIFT) + flags_g + genes.fate_g).astype(np.int32)


@functools.lru_cache(maxsize=4)
def near_factors(vocabulary: Vocabulary) -> npt.NDArray[np.float32]:
    """1 / median (t): NaN where there is none, 0 where the median is too small or too large for exact bounds."""
    medians_t = vocabulary.medians_t
    with np.errstate(divide="ignore", over="ignore"):
        outside_t = (medians_t > LARGEST_MEDIAN) | (medians_t < 1 / LARGEST_MEDIAN)
        return np.where(outside_t, 0.0, 1.0 / medians_t).astype(np.float32)


def plain_values(values_z: npt.NDArray[Any], most: int) -> npt.NDArray[Any]:
    """The same values in one of the four types that the kernel is compiled for; too large ones stay too large."""
    kind, size = values_z.dtype.kind, values_z.dtype.itemsize
    if kind == "f":
        return np.ascontiguousarray(values_z, dtype=np.float32 if size <= 4 else np.float64)
    if size < 8:
        return np.ascontiguousarray(values_z, dtype=np.int64 if kind == "u" and size == 4 else np.int32)
    if values_z.max(initial=0) > most:
        # Beyond 2^53 the next double may be smaller: such a value must not become one that passes.
        values_z = np.where(values_z > most, 2 * most, values_z)
    return np.ascontiguousarray(values_z, dtype=np.int64)


def plain_indices(indices_z: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same gene indices in one of two types; those out of range stay out of range."""
    if indices_z.dtype.itemsize == 8 and indices_z.dtype.kind == "u":
        indices_z = np.minimum(indices_z, np.uint64(np.iinfo(np.int64).max))
    small = indices_z.dtype.itemsize < 4 or indices_z.dtype == np.int32
    return np.ascontiguousarray(indices_z, dtype=np.int32 if small else np.int64)
