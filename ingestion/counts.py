"""The proof that stored values are raw counts: every value is looked at, and a refusal says which one failed and why.

The kernel only marks rows that fail; this file finds the value, names its cell and gene, and says what to do.

Axis suffixes: `n` cells, `z` stored values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from genescale.ingestion.atlas import Atlas, Rows
from genescale.platform.errors import AtlasError, GenescaleError, NotCountsError

POSITIONS_SHOWN = 5
# Equal row sums of a few cells may be chance.
LEAST_CELLS_FOR_EQUAL_SUMS = 20
EQUAL_SUMS = 1e-3
# Natural logarithms of counts or of counts per ten thousand stay below this; so do their logarithms to base 2.
LARGEST_LOGARITHM = 25.0
FRACTIONAL_OF_LOGARITHMS = 0.9
ANOTHER_SLOT = "Give raw counts, or name the slot that holds them with --counts-slot."


@dataclasses.dataclass(frozen=True, eq=False)
class CountBlock:
    """Counts of consecutive cells as they are stored: indptr of n+1, gene indices and counts of z.

    Explicit zeros are taken out and counted. Indices of a row may be unsorted or repeated.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    counts: npt.NDArray[np.float64]
    explicit_zeros: int


@dataclasses.dataclass(frozen=True, eq=False)
class Fault:
    """Values that are no counts: a mark for each (z), what they are, and what to do."""

    marked_z: npt.NDArray[np.bool_]
    what: str
    fix: str
    is_fractional: bool = False
    """Finite numbers from zero up that are not whole: perhaps corrected counts."""


def checked(atlas: Atlas, start: int, stop: int, *, allow_fractional: bool = False) -> CountBlock:
    """Counts of cells start … stop-1; AtlasError or NotCountsError for values that are no counts.

    allow_fractional: ambient-corrected values (finite, not negative, not normalised) are taken as they are.
    """
    rows = atlas.read(start, stop)
    if outside(rows, atlas.n_genes).any() or any(True for _ in faults(rows, allow_fractional=allow_fractional)):
        explain(rows, atlas, start, allow_fractional=allow_fractional)
    counts_z, wide_z = rows.values_z.astype(np.float64), rows.indices_z.astype(np.int64)
    stored = counts_z > 0
    if stored.all():
        return CountBlock(rows.indptr_n, wide_z, counts_z, 0)
    kept_before = np.concatenate(([0], np.cumsum(stored)))
    return CountBlock(kept_before[rows.indptr_n], wide_z[stored], counts_z[stored], int((~stored).sum()))


def explain(rows: Rows, atlas: Atlas, start: int, *, allow_fractional: bool = False) -> NoReturn:
    """Raise the error of the first fault of these rows, the first of which is cell `start` of the atlas."""
    where = f"{atlas.uri}: {atlas.slot}"
    if (marked := outside(rows, atlas.n_genes)).any():
        raise AtlasError(
            f"{int(marked.sum()):,} gene indices lie outside 0 … {atlas.n_genes - 1}, the first in cell "
            f"{start + int(cells_of(rows, marked)[0]):,}.",
            where=where,
            fix="Matrix and gene table do not belong together: write the file again.",
        )
    for fault in faults(rows, allow_fractional=allow_fractional):
        marked = fault.marked_z
        share = percent(float(marked.mean()))
        raise NotCountsError(
            f"{int(marked.sum()):,} of {marked.size:,} values ({share}) {fault.what}; the first: "
            f"{_positions(rows, marked, atlas, start)}.",
            where=where,
            fix=fault.fix,
        )
    raise GenescaleError("rows were marked as no counts, but each value is one.", where=where, fix="Please report it.")


def _positions(rows: Rows, marked_z: npt.NDArray[np.bool_], atlas: Atlas, start: int) -> str:
    """The first few marked values with their cells and genes."""
    places = np.flatnonzero(marked_z)[:POSITIONS_SHOWN]
    cells = start + cells_of(rows, marked_z, POSITIONS_SHOWN)
    shown = []
    for place, cell in zip(places.tolist(), cells.tolist(), strict=True):
        gene = int(rows.indices_z[place])
        name = atlas.var.index(gene, gene + 1)[0] if 0 <= gene < atlas.n_genes else "unknown"
        shown.append(f"{_shown(rows.values_z[place])} (cell {cell:,}, gene {name})")
    return ", ".join(shown)


def percent(share: float) -> str:
    """A share as people read it: `63 %`, `0.0045 %`."""
    return f"{100 * share:.3g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, np.floating) else str(value)


def cells_of(rows: Rows, marked_z: npt.NDArray[np.bool_], first: int = 1) -> npt.NDArray[np.int64]:
    """Rows, within the block, of the first marked values."""
    places = np.flatnonzero(marked_z)[:first]
    return np.searchsorted(rows.indptr_n, places, side="right").astype(np.int64) - 1


def outside(rows: Rows, n_genes: int) -> npt.NDArray[np.bool_]:
    """Marks the gene indices that the gene table does not have."""
    indices_z = rows.indices_z
    marked: npt.NDArray[np.bool_] = indices_z >= n_genes
    return marked if indices_z.dtype.kind == "u" else marked | (indices_z < 0)


def faults(rows: Rows, *, allow_fractional: bool = False) -> Iterator[Fault]:
    """What keeps values from being counts, in the order of telling; nothing when all are."""
    return (fault for fault in _suspects(rows, allow_fractional) if fault.marked_z.any())


def _suspects(rows: Rows, allow_fractional: bool) -> Iterator[Fault]:
    values_z = rows.values_z
    kind = values_z.dtype.kind
    if kind not in "iuf":
        what = "are true/false: these are detection calls" if kind == "b" else f"are of type {values_z.dtype}"
        yield Fault(np.ones(values_z.shape, dtype=bool), what, ANOTHER_SLOT)
        return
    if kind == "f":
        yield Fault(~np.isfinite(values_z), "are not finite numbers", "Write the file again from the raw counts.")
    if kind in "if":
        yield Fault(values_z < 0, "are negative: this is scaled data", ANOTHER_SLOT)
    if kind == "f":
        yield from _fractional(rows, allow_fractional)
    exact = exact_limit(values_z.dtype)
    lost = f"exceed {exact:,} and have lost digits in {values_z.dtype}"
    yield Fault(values_z > exact, lost, "Store counts as integers.")


def _fractional(rows: Rows, allow_fractional: bool) -> Iterator[Fault]:
    marked_z = rows.values_z != np.floor(rows.values_z)
    # What they look like is told of numbers that are finite and not negative, and others were told of before.
    if marked_z.any() and bool((rows.values_z >= 0).all()) and np.isfinite(rows.values_z).all():
        told = fractions(rows)
        if not (allow_fractional and told.acceptable):
            yield Fault(marked_z, f"are not whole numbers: {told.what}", told.fix, is_fractional=True)


@dataclasses.dataclass(frozen=True)
class Fractions:
    """What values that are not whole numbers seem to be, whether `allow_fractional` takes them, and what to do."""

    what: str
    acceptable: bool
    fix: str


def fractions(rows: Rows) -> Fractions:
    """What finite, non-negative rows with fractions look like: normalised, log-transformed or ambient-corrected."""
    values_z = rows.values_z.astype(np.float64)
    largest, share = float(values_z.max(initial=0)), float(np.mean(values_z != np.floor(values_z)))
    sums = equal_sums(row_sums(values_z, rows.indptr_n))
    if sums:
        return Fractions(f"row sums are constant at {sums}: normalised, not counts", False, ANOTHER_SLOT)
    if largest < LARGEST_LOGARITHM:
        if sums := equal_sums(row_sums(np.expm1(values_z), rows.indptr_n)):
            what = f"row sums of expm1 are constant at {sums} and the largest value is {largest:.3g}: log-normalised"
            return Fractions(what, False, ANOTHER_SLOT)
        if share > FRACTIONAL_OF_LOGARITHMS:
            return Fractions(f"the largest value is {largest:.3g}: this looks log-transformed", False, ANOTHER_SLOT)
    return Fractions(
        "none is negative and rows are not normalised: this looks ambient-corrected",
        True,
        "Give the counts before correction, name their slot with --counts-slot, or accept the corrected values "
        "with --allow-fractional.",
    )


def refuse_equal_sums(totals_n: npt.NDArray[np.float64], n_ones: int, atlas: Atlas) -> None:
    """NotCountsError when whole numbers are normalised and rounded: equal row sums, and hardly a one among them.

    totals_n: sums of the cells of a block (n); n_ones: values of 1 among them. Counts that were drawn down to one
    depth have equal sums too, but a one in nearly every cell.
    """
    sums = equal_sums(totals_n)
    if sums and n_ones < np.count_nonzero(totals_n) / 2:
        raise NotCountsError(
            f"row sums are constant at {sums}: normalised and rounded, not counts.",
            where=f"{atlas.uri}: {atlas.slot}",
            fix=ANOTHER_SLOT,
        )


def row_sums(values_z: npt.NDArray[np.float64], indptr_n: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Sum of each row (n)."""
    rows = np.repeat(np.arange(len(indptr_n) - 1), np.diff(indptr_n))
    return np.bincount(rows, weights=values_z, minlength=len(indptr_n) - 1).astype(np.float64)


def equal_sums(totals_n: npt.NDArray[np.float64]) -> str:
    """`10,000 ± 3` when the sums of enough cells are all but equal, else an empty text."""
    sums = totals_n[totals_n > 0]
    if sums.size < LEAST_CELLS_FOR_EQUAL_SUMS:
        return ""
    middle = float(np.median(sums))
    spread = float(np.max(np.abs(sums - middle)))
    return f"{middle:,.6g} ± {spread:.2g}" if spread <= EQUAL_SUMS * middle else ""


def exact_limit(dtype: np.dtype[Any]) -> int:
    """The largest number up to which every whole number has its own value in `dtype` (at most 2**53)."""
    return int(2 ** min(np.finfo(dtype).nmant + 1, 53)) if dtype.kind == "f" else 2**53
