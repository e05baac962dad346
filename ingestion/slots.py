"""Which place of a file holds the raw counts: every candidate is sampled, the first that can be counts is taken.

A sample decides only between places; that all values of the chosen one are counts is proved when they are read.

Axis suffixes: `n` cells, `z` stored values.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from genescale.ingestion.atlas import Matrix, Rows, Slot
from genescale.ingestion.counts import Fault, equal_sums, faults, fractions, percent, row_sums
from genescale.platform.errors import AtlasError, NotCountsError, did_you_mean

AUTO = "auto"
PLACES = "Use auto, X, raw.X or layers/NAME."
# Layers that are by custom raw counts, best first; the names are compared without case and signs.
COUNT_LAYERS = (
    "counts",
    "rawcounts",
    "raw",
    "count",
    "umi",
    "umis",
    "umicounts",
    "rawdata",
    "decontxcounts",
    "decontx",
)
SAMPLED_PLACES = 8
SAMPLED_VALUES = 200_000
SAMPLED_ROWS = 512

Candidates = Mapping[str, Callable[[], Matrix]]
Names = Callable[[], Sequence[str]] | None
Columns = npt.NDArray[np.int64]


@runtime_checkable
class Samplable(Protocol):
    """A matrix whose rows cost the whole file, but that can show some of its values at once."""

    def sample_values(self) -> npt.NDArray[Any]:
        """Values from places spread over the matrix."""


@dataclasses.dataclass(frozen=True)
class Look:
    """What a sample of one place looks like: whether it passes for counts, and whether only as corrected ones."""

    text: str
    is_counts: bool
    is_fractional: bool = False


def choose_slot(
    candidates: Candidates,
    requested: str,
    *,
    where: str,
    allow_fractional: bool = False,
    genes: Mapping[str, Callable[[], Sequence[str]]] | None = None,
) -> Slot:
    """The place of the counts among `candidates` (name -> opener, in the order of looking).

    requested: `auto`, or the one place to take without looking further; genes: names of the columns of each place, by
    which places of different width are compared. Raises AtlasError when that place is absent,
    and NotCountsError, with what every place looked like, when none passes or when two pass and differ.
    """
    if requested != AUTO:
        return Slot(name=requested, matrix=_named(candidates, requested, where), reason="named by --counts-slot")
    seen: dict[str, str] = {}
    for names in _tiers(candidates):
        passed = _passing(candidates, names, seen, allow_fractional)
        if passed:
            return _first_of(passed, seen, where, genes or {})
    raise _nothing(seen, where)


def ordered_layers(names: list[str]) -> list[str]:
    """Layer names in the order of looking: those that by custom hold raw counts, then the others by name."""
    return sorted(names, key=lambda name: (_rank(name), name))


def slot_path(slot: str, where: str) -> str:
    """The path of a slot within an anndata file; AtlasError for texts that name none."""
    if slot in ("X", "raw.X"):
        return slot.replace(".", "/")
    if re.fullmatch(r"layers/[^/]+", slot) and slot not in ("layers/.", "layers/.."):
        return slot
    raise AtlasError(f"'{slot}' is no place for counts.", where=where, fix=PLACES)


def _rank(layer: str) -> int:
    plain = re.sub(r"[^a-z0-9]", "", layer.lower())
    return COUNT_LAYERS.index(plain) if plain in COUNT_LAYERS else len(COUNT_LAYERS)


def _named(candidates: Candidates, requested: str, where: str) -> Matrix:
    if requested not in candidates:
        slot_path(requested, where)
        hint = did_you_mean(requested, candidates)
        raise AtlasError(
            "this slot is absent.",
            where=f"{where}: {requested}",
            fix=" ".join(filter(None, (f"The file has {', '.join(candidates) or 'none'}.", hint))),
        )
    return candidates[requested]()


def _tiers(candidates: Candidates) -> list[list[str]]:
    """Places that hold counts by custom, and the layers that may hold anything (spliced, unspliced, …)."""
    by_custom = [name for name in candidates if not _is_other_layer(name)]
    return [by_custom, [name for name in candidates if name not in by_custom]]


def _is_other_layer(name: str) -> bool:
    return name.startswith("layers/") and _rank(name.removeprefix("layers/")) == len(COUNT_LAYERS)


Passed = list[tuple[str, Matrix]]


def _passing(candidates: Candidates, names: list[str], seen: dict[str, str], allow_fractional: bool) -> Passed:
    """Places that look like counts; those that only pass as corrected counts come in when no other does."""
    whole: Passed = []
    fractional: Passed = []
    for name in names:
        try:
            matrix = candidates[name]()
            look = looks_like(matrix, allow_fractional=allow_fractional)
        except AtlasError as error:
            # The error of the only place says more than a summary of places.
            if len(candidates) == 1:
                raise
            seen[name] = f"cannot be read: {error.what}"
            continue
        seen[name] = look.text
        if look.is_counts:
            (fractional if look.is_fractional else whole).append((name, matrix))
    return whole or fractional


def _first_of(
    passed: Passed, seen: Mapping[str, str], where: str, genes: Mapping[str, Callable[[], Sequence[str]]]
) -> Slot:
    (name, matrix), *others = passed
    elsewhere = "; ".join(f"{place}: {look}" for place, look in seen.items() if place != name)
    reason = f"{name} holds {seen[name]}" + (f" ({elsewhere})" if elsewhere else "")
    for other_name, other in others:
        if share := _difference(matrix, other, (genes.get(name), genes.get(other_name))):
            raise NotCountsError(
                f"{name} and {other_name} both look like counts but differ in {percent(share)} of the sampled entries.",
                where=where,
                fix=f"Choose one with --counts-slot {name} or --counts-slot {other_name}.",
            )
    return Slot(name=name, matrix=matrix, reason=reason, seen=dict(seen))


def _nothing(seen: Mapping[str, str], where: str) -> AtlasError:
    """The error for a file without counts; when places could not even be read, that is what to tell."""
    told = "; ".join(f"{name}: {look}" for name, look in seen.items()) or "there is no X, raw.X or layer"
    if seen and all(look.startswith("cannot be read") for look in seen.values()):
        return AtlasError(f"no matrix can be read ({told}).", where=where, fix="Write the file again with anndata.")
    corrected = any("ambient-corrected" in look for look in seen.values())
    return NotCountsError(
        f"no raw counts found ({told}).",
        where=where,
        fix="Ranking needs raw counts: give the file that holds them, or name their slot with --counts-slot."
        + (" Corrected counts are taken with --allow-fractional." if corrected else ""),
    )


def looks_like(matrix: Matrix, *, allow_fractional: bool = False) -> Look:
    """What a sample of the matrix looks like."""
    if isinstance(matrix, Samplable):
        values = matrix.sample_values()
        # Rows are unknown, so what needs row sums is found when the matrix is read.
        return _look(Rows(np.array([0, values.size]), np.zeros(values.size, dtype=np.int64), values), allow_fractional)
    if int(matrix.stored_before[-1]) == 0:
        return Look("no stored values", False)
    return _look(sample(matrix), allow_fractional)


def _look(rows: Rows, allow_fractional: bool) -> Look:
    values = rows.values_z
    if not np.any(values):
        return Look("zeros only in the sample", False)
    for fault in faults(rows):
        share = percent(float(fault.marked_z.mean()))
        corrected = fault.is_fractional and fractions(rows).acceptable
        text = f"{share} of {values.size:,} sampled values {fault.what}, for example {first_of(values, fault)}"
        return Look(text, corrected and allow_fractional, True)
    sums = row_sums(values.astype(np.float64), rows.indptr_n)
    if (shown := equal_sums(sums)) and np.count_nonzero(values == 1) < np.count_nonzero(sums) / 2:
        return Look(f"whole numbers, but row sums are constant at {shown}: normalised and rounded", False)
    return Look(f"whole numbers up to {values.max():,.0f}", True)


def first_of(values_z: npt.NDArray[Any], fault: Fault) -> str:
    """The first value that is at fault."""
    value = values_z[int(np.argmax(fault.marked_z))]
    return f"{value:.6g}" if isinstance(value, np.floating) else str(value)


def sample(matrix: Matrix) -> Rows:
    """Whole rows from places spread over the stored values, few enough to look at quickly."""
    pieces = [matrix.read(start, stop) for start, stop in sampled_rows(matrix.stored_before)]
    sizes = np.concatenate([[0], *(np.diff(piece.indptr_n) for piece in pieces)])
    return Rows(
        np.cumsum(sizes, dtype=np.int64),
        np.concatenate([piece.indices_z for piece in pieces]),
        np.concatenate([piece.values_z for piece in pieces]),
    )


def sampled_rows(stored_before: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Row ranges that do not overlap, the first and the last stored values among them."""
    n_cells, stored = len(stored_before) - 1, int(stored_before[-1])
    values = SAMPLED_VALUES // SAMPLED_PLACES
    ranges: list[tuple[int, int]] = []
    for place in np.linspace(0, max(stored - values, 0), SAMPLED_PLACES).astype(np.int64):
        start = int(np.searchsorted(stored_before, place, side="right")) - 1
        last = int(np.searchsorted(stored_before, min(place + values, stored), side="left"))
        start = max(start, ranges[-1][1] if ranges else 0)
        stop = min(max(last, start + 1), start + SAMPLED_ROWS, n_cells)
        if start < stop:
            ranges.append((start, stop))
    if ranges and ranges[-1][1] < n_cells:
        tail = max(ranges[-1][1], n_cells - SAMPLED_ROWS // SAMPLED_PLACES)
        ranges.append((tail, n_cells))
    return ranges


def _difference(one: Matrix, other: Matrix, names: tuple[Names, Names]) -> float:
    """Share of the entries of sampled rows in which two matrices differ, over the genes that both have."""
    if one.n_cells != other.n_cells or one.sequential or other.sequential:
        return 0.0
    columns = _shared_columns(one.n_genes, other.n_genes, names)
    if columns is None:
        return 0.0
    different = total = 0
    for start, stop in sampled_rows(one.stored_before):
        left, right = (
            _gathered(matrix.read(start, stop), columns_g)
            for matrix, columns_g in zip((one, other), columns, strict=True)
        )
        different, total = different + int((left != right).nnz), total + int((abs(left) + abs(right)).nnz)
    return different / max(total, 1)


def _shared_columns(n_one: int, n_other: int, names: tuple[Names, Names]) -> tuple[Columns, Columns] | None:
    """Columns of the two matrices in one numbering, -1 for genes that only one has; None when that cannot be known."""
    first, second = (list(give()) if give else None for give in names)
    if first == second and n_one == n_other:
        return np.arange(n_one), np.arange(n_other)
    if first is None or second is None or len(set(first)) < len(first) or len(set(second)) < len(second):
        return None
    place = {name: number for number, name in enumerate(first)}
    others_g = np.array([place.get(name, -1) for name in second], dtype=np.int64)
    ones_g = np.full(n_one, -1, dtype=np.int64)
    ones_g[others_g[others_g >= 0]] = others_g[others_g >= 0]
    return ones_g, others_g


def _gathered(rows: Rows, columns_g: Columns) -> Any:
    from scipy import sparse

    targets_z = columns_g[np.clip(rows.indices_z.astype(np.int64), 0, len(columns_g) - 1)]
    kept = targets_z >= 0
    before = np.concatenate(([0], np.cumsum(kept)))[rows.indptr_n]
    shape = (len(rows.indptr_n) - 1, int(columns_g.max(initial=0)) + 1)
    matrix = sparse.csr_matrix((rows.values_z[kept].astype(np.float64), targets_z[kept], before), shape=shape)
    matrix.sum_duplicates()
    return matrix
