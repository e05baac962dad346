"""Where a training gets its cells from, and which of them it keeps back to be measured on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from genescale.platform.errors import StorageError
from genescale.platform.patience import PATIENT, Patience, patiently
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus

# Columns are read for this many parts at a time, so that the texts of a large corpus are never in memory at once.
PARTS_AT_ONCE = 64
NO_DONOR = {"", "unknown", "pooled", "na", "nan", "none"}
# The key of the stream drawn for this from a seed; batches and masks have their own.
_HELD_OUT_STREAM = 3
# Whole donors are kept back only while they are at most this share of all cells; single cells at most a tenth.
DONOR_SHARE, CELL_SHARE = 5, 10


Indices = Sequence[int] | npt.NDArray[np.integer]
# Cells that lie closer than this share a row group, as a rule: reading one of them brings the others along.
NEIGHBOURS = 1_024


class MemoryCells:
    """Cells held in memory: for tests, notebooks and benchmarks without a corpus."""

    def __init__(
        self, cells: Sequence[npt.ArrayLike], vocabulary: Vocabulary, donors: npt.ArrayLike | None = None
    ) -> None:
        self.vocabulary = vocabulary
        self._cells = [np.asarray(cell) for cell in cells]
        self.lengths: npt.NDArray[np.integer] = np.array([len(cell) for cell in self._cells], dtype=np.int64)
        self.donors: npt.NDArray[np.int32] = (
            np.full(len(cells), -1, np.int32) if donors is None else np.asarray(donors, dtype=np.int32)
        )

    def tokens(self, indices: Indices) -> list[np.ndarray]:
        """The tokens of these cells, in this order."""
        return [self._cells[index] for index in indices]

    def warm(self, indices: npt.NDArray[np.integer]) -> None:
        """They are in memory."""

    def origin(self, indices: Sequence[int]) -> list[tuple[str, int]]:
        """Their positions."""
        return [("memory", int(index)) for index in indices]


def training_corpus(reference: str, store: Store, *, version: int | None = None, group_cells: int) -> Corpus:
    """A corpus to train on: it may keep two groups of `group_cells` decoded cells of full length in this process.

    That is the group which is trained on and the next one, which is read ahead, whatever the size of the corpus.
    """
    from genescale.ingestion.corpus import DEFAULT_CACHE_BYTES, Corpus

    corpus = Corpus.open(reference, store, version=version)
    vocabulary = corpus.vocabulary
    cell_bytes = vocabulary.window * np.dtype(vocabulary.token_dtype).itemsize
    cache_bytes = 2 * min(group_cells, corpus.n_cells) * cell_bytes
    if cache_bytes <= DEFAULT_CACHE_BYTES:
        return corpus
    return Corpus.open(corpus.uri, store, version=corpus.version, cache_bytes=cache_bytes)


class CorpusCells:
    """The cells of one pinned version of a corpus, read as they are needed; storage that is away is waited for."""

    def __init__(self, corpus: Corpus, *, patience: Patience = PATIENT) -> None:
        self.vocabulary = corpus.vocabulary
        self._corpus, self._patience = corpus, patience
        self.organisms: tuple[str, ...] = ()
        self.lengths: npt.NDArray[np.integer] = np.empty(corpus.n_cells, dtype=np.int32)
        self.donors: npt.NDArray[np.int32] = np.empty(corpus.n_cells, dtype=np.int32)
        self._read_columns()

    def tokens(self, indices: Indices) -> list[np.ndarray]:
        """The tokens of these cells, in this order."""
        wanted: Any = indices  # an array is as good as a list of its numbers, and a thousandth of its objects
        return patiently(lambda: self._corpus.tokens(wanted), patience=self._patience, what="reading cells")

    def warm(self, indices: npt.NDArray[np.integer]) -> None:
        """Read one cell of each row group that these cells lie in; the corpus keeps what it has decoded."""
        _, firsts = np.unique(indices // NEIGHBOURS, return_index=True)
        for cell in indices[firsts]:
            # What storage refuses now is asked for again, and reported, when a batch needs it.
            with contextlib.suppress(StorageError):
                self._corpus.tokens([int(cell)])

    def origin(self, indices: Sequence[int]) -> list[tuple[str, int]]:
        """(dataset, row in its source file) of these cells."""
        columns = self._corpus.cells(["dataset_id", "source_row"]).take(list(indices))
        return list(zip(columns["dataset_id"].to_pylist(), columns["source_row"].to_pylist(), strict=True))

    def _read_columns(self) -> None:
        numbers: dict[str, int] = {}
        organisms: set[str] = set()
        names = ["length", "donor_id", "organism"]
        start = 0
        for first in range(0, len(self._corpus.parts), PARTS_AT_ONCE):
            parts = range(first, min(first + PARTS_AT_ONCE, len(self._corpus.parts)))
            table = patiently(
                lambda parts=parts: self._corpus.cells(names, parts=parts),  # type: ignore[misc]
                patience=self._patience,
                what="reading cells",
            )
            stop = start + table.num_rows
            self.lengths[start:stop] = table["length"].to_numpy()
            self.donors[start:stop] = _numbered(table["donor_id"], numbers)
            organisms |= {text for text in table["organism"].unique().to_pylist() if text}
            start = stop
        self.organisms = tuple(sorted(organisms))


def _numbered(texts: pa.ChunkedArray, numbers: dict[str, int]) -> npt.NDArray[np.int32]:
    """A number for each text, the same for the same text; -1 for those that name no donor. Fills `numbers`."""
    codes = texts.combine_chunks().dictionary_encode()
    codes = codes.combine_chunks() if isinstance(codes, pa.ChunkedArray) else codes
    found = [
        numbers.setdefault(text, len(numbers)) if text is not None and text.lower() not in NO_DONOR else -1
        for text in codes.dictionary.to_pylist()
    ]
    # One row more, which is where a missing text points.
    table = np.array([*found, -1], dtype=np.int32)
    return table[codes.indices.fill_null(len(found)).to_numpy()]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutSplit:
    """Which cells are trained on and which are measured on; both rising numbers of cells."""

    trained: npt.NDArray[np.integer]
    held_out: npt.NDArray[np.integer]
    by_donor: bool
    """True when no donor has cells on both sides."""
    left_out: int = 0
    """Cells of held-out donors beyond those that are measured: on neither side."""


def hold_out(n_cells: int, count: int, *, seed: int, donors: npt.NDArray[np.integer] | None = None) -> HeldOutSplit:
    """Keep `count` cells back, never more than a tenth of them all: of donors that are not trained on at all, if any
    donors together have enough cells and are at most a fifth of all; else cells at random.
    """
    count = min(count, n_cells // CELL_SHARE)
    dtype = np.int32 if n_cells < 2**31 else np.int64
    chosen = _chosen_donors(donors, count, n_cells // DONOR_SHARE, seed) if donors is not None and count else None
    if chosen is None:
        held_out = _smallest(_draws(seed, 0, n_cells), count)
        return HeldOutSplit(trained=_others(n_cells, held_out, dtype), held_out=held_out.astype(dtype), by_donor=False)
    assert donors is not None
    theirs = np.flatnonzero(np.isin(donors, chosen))
    held_out = theirs[_smallest(_draws(seed, 0, len(theirs)), count)]
    return HeldOutSplit(
        trained=_others(n_cells, theirs, dtype),
        held_out=held_out.astype(dtype),
        by_donor=True,
        left_out=len(theirs) - len(held_out),
    )


def _chosen_donors(donors: npt.NDArray[np.integer], count: int, most: int, seed: int) -> npt.NDArray[np.int64] | None:
    """Donors in random order until they have `count` cells, passing over those that would make more than `most`."""
    cells_of = np.bincount(donors[donors >= 0])
    chosen, total = [], 0
    for donor in np.argsort(_draws(seed, 1, len(cells_of)), kind="stable"):
        if total + cells_of[donor] <= most and total < count:
            chosen.append(donor)
            total += int(cells_of[donor])
    return np.array(chosen) if total >= count else None


def _draws(seed: int, purpose: int, size: int) -> npt.NDArray[np.float64]:
    key = [seed, _HELD_OUT_STREAM, purpose] if purpose else [seed, _HELD_OUT_STREAM]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(size)


def _smallest(draws: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Rising positions of the `count` smallest draws."""
    return np.sort(np.argpartition(draws, count)[:count]) if 0 < count < len(draws) else np.arange(count)


def _others(n_cells: int, gone: npt.NDArray[np.integer], dtype: type) -> npt.NDArray[np.integer]:
    kept = np.ones(n_cells, dtype=bool)
    kept[gone] = False
    return np.flatnonzero(kept).astype(dtype)
