"""Cells that stand in a corpus already: found by the hash of their counts, reported or left out before they commit.

Two cells with the same counts of the same vocabulary genes have the same `content_hash` (64 bits). That different cells
share one by chance even once has a probability of n²/2⁶⁵: 3 in 10,000 among 100 million cells. Equal counts do not
prove one origin where cells hold very few of them, which is why the default only reports.

Only a source's own new parts are rewritten; cells that are committed stay. Sources are resolved in the order in which
they are committed, so the outcome does not depend on which of them finished first.

Axis suffixes: `n` cells of the new source, `u` different hashes among them, `m` cells of a committed part.
"""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from genescale.ingestion.annotation.cells import DUPLICATE_CELL
from genescale.ingestion.corpus import Corpus
from genescale.ingestion.schema import part_schema
from genescale.ingestion.table.delta_table import TableFile
from genescale.ingestion.table.part_files import read_rows, write_rows
from genescale.ingestion.table.parts import Part, PartReader
from genescale.ingestion.table.records import NewPart, dataset_folder
from genescale.ingestion.tally import Tally, binned
from genescale.ingestion.tokenise import QUARANTINE_SCHEMA
from genescale.platform.errors import SettingsError, did_you_mean
from genescale.platform.storage import join
from genescale.platform.vocabulary import Vocabulary

Policy = Literal["report", "keep_first", "keep_primary", "off"]
POLICIES: tuple[str, ...] = get_args(Policy)
# A corpus of 30 million cells stays in memory between the sources of a run; a larger one is read again for each.
MOST_HELD_BYTES = 256 * 1024 * 1024
PARTS_AT_ONCE = 16
KEPT, SAME_FILE = -1, -2
_HASHES = pa.schema([pa.field("content_hash", pa.int64()), pa.field("is_primary_data", pa.bool_())])
_NEW_CELLS = pa.schema([*_HASHES, pa.field("source_row", pa.int64()), pa.field("cell_id", pa.string())])
_PART_NUMBER = re.compile(r"part-([0-9]{10})-[0-9a-f]+\.parquet$")
Marks = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """Equal cells of a new source; every count is of cells of that source."""

    policy: str
    matches: Mapping[str, int]
    """Cells that equal a cell of each dataset of the corpus; a cell may equal cells of several."""
    within: int
    """Cells that equal an earlier cell of the same source."""
    repeated_names: int
    """Cells whose name (barcode) an earlier cell of the source has."""
    not_compared: int
    """Cells of the corpus without a hash, from releases before schema version 2."""
    superseded: int
    """Primary cells that were kept although the corpus holds the same counts as secondary data."""
    twin_n: npt.NDArray[np.int32]
    """What each cell equals that is left out (n, in the order of parts and rows): SAME_FILE or a place in `matches`;
    KEPT for those that stay."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, a sentence each."""
        same = "cells are count-identical to"
        notes = [f"{cells:,} {same} cells of dataset {dataset}" for dataset, cells in self.matches.items()]
        if self.within:
            notes.append(f"{self.within:,} {same} an earlier cell of the same file")
        if left_out := int((self.twin_n != KEPT).sum()):
            notes.append(f"{left_out:,} count-identical cells left out")
        if self.superseded:
            notes.append(f"{self.superseded:,} primary cells stand beside secondary copies that the corpus held before")
        if self.not_compared:
            notes.append(f"{self.not_compared:,} cells of the corpus carry no content hash and were not compared")
        if self.repeated_names:
            notes.append(f"{self.repeated_names:,} cells share their name with another cell; rows tell them apart")
        return tuple(notes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolution:
    """What is left of a source's parts after its duplicates were dealt with."""

    found: Found
    parts: tuple[NewPart, ...]
    dropped: pa.Table
    """The cells left out, as a quarantine table."""
    dropped_tally: Tally
    """The same in numbers, to be taken off the source's tally with `Tally.drop`."""

    @property
    def matches(self) -> Mapping[str, int]:
        """Cells of the source that equal a cell of each dataset."""
        return self.found.matches

    @property
    def n_within(self) -> int:
        """Cells that equal an earlier cell of the same source."""
        return self.found.within

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, a sentence each."""
        return self.found.notes

    def to_dict(self) -> dict[str, Any]:
        """For the report: policy, matches by dataset, cells equal within the source, and cells dropped."""
        found = self.found
        return {
            "policy": found.policy,
            "matches": dict(found.matches),
            "within": found.within,
            "dropped": self.dropped.num_rows,
            "superseded": found.superseded,
            "not_compared": found.not_compared,
            "repeated_names": found.repeated_names,
        }


def resolve(
    parts: Sequence[NewPart], corpus: Corpus, *, policy: Policy, dataset_id: str, replaces: bool = False
) -> Resolution:
    """Find the cells of new parts that the corpus, or the parts themselves, hold already, and apply the policy.

    report: nothing is dropped. keep_first: a cell that equals one of the corpus, or an earlier one of its source, is
    dropped. keep_primary: as keep_first, but a primary cell is never dropped in favour of a secondary one. replaces:
    the dataset of this name leaves with the same commit and is not compared with. Raises SettingsError for another
    policy, and IntegrityError when a part cannot be read.
    """
    found = find(parts, corpus, policy=policy, leave_out=(dataset_id,) if replaces else ())
    kept: list[NewPart] = []
    dropped, tally, first = [QUARANTINE_SCHEMA.empty_table()], Tally(), 0
    for part in parts:
        twins = found.twin_n[first : first + part.rows]
        marks = twins != KEPT
        if marks.any():
            rows = _rows_of(part, corpus, dataset_id)
            out = rows.filter(pa.array(marks))
            dropped.append(_quarantined(out, twins[marks], found))
            tally.add(_taken_off(out, corpus.vocabulary))
            if not marks.all():
                kept.append(_rewritten(rows.filter(pa.array(~marks)), part, corpus, dataset_id))
        else:
            kept.append(part)
        first += part.rows
    return Resolution(found=found, parts=tuple(kept), dropped=pa.concat_tables(dropped), dropped_tally=tally)


def find(parts: Sequence[NewPart], corpus: Corpus, *, policy: Policy, leave_out: Sequence[str] = ()) -> Found:
    """Equal cells among new parts and between them and the corpus, without changing anything.

    leave_out: datasets of the corpus that are not compared with.
    """
    if policy not in POLICIES:
        raise SettingsError(f"'{policy}' is no policy for duplicates.", fix=did_you_mean(policy, POLICIES))
    hash_n, secondary_n, names = _new_cells(parts, corpus)
    if policy == "off":
        return _nothing(policy, len(hash_n), names)
    hash_u, place_n = np.unique(hash_n, return_inverse=True)
    matched: dict[str, Marks] = {}
    any_u, primary_u, unknown = _none(hash_u), _none(hash_u), 0
    for block in _committed(corpus, leave_out):
        unknown += block.unknown
        places = np.searchsorted(hash_u, block.hash_m).clip(max=max(len(hash_u) - 1, 0))
        equal_m = hash_u[places] == block.hash_m if len(hash_u) else np.zeros(len(places), dtype=np.bool_)
        if equal_m.any():
            matched.setdefault(block.dataset_id, _none(hash_u))[places[equal_m]] = True
            any_u[places[equal_m]] = True
            primary_u[places[equal_m & ~block.secondary_m]] = True
    repeats_n = _later(place_n, np.zeros_like(secondary_n))
    by_corpus_n, by_source_n = any_u[place_n], repeats_n
    if policy == "keep_primary":
        by_corpus_n = any_u[place_n] & (secondary_n | primary_u[place_n])
        by_source_n = _later(place_n, secondary_n)
    dropped_n = by_corpus_n | by_source_n if policy != "report" else np.zeros(len(hash_n), dtype=np.bool_)
    return Found(
        policy=policy,
        matches={dataset: int(marks_u[place_n].sum()) for dataset, marks_u in sorted(matched.items())},
        within=int(repeats_n.sum()),
        repeated_names=names,
        not_compared=unknown,
        superseded=int((any_u[place_n] & ~dropped_n).sum()) if policy == "keep_primary" else 0,
        twin_n=_twins(dropped_n, by_corpus_n, place_n, matched),
    )


def _nothing(policy: str, n: int, names: int) -> Found:
    return Found(
        policy=policy,
        matches={},
        within=0,
        repeated_names=names,
        not_compared=0,
        superseded=0,
        twin_n=np.full(n, KEPT, dtype=np.int32),
    )


def _none(values: npt.NDArray[Any]) -> Marks:
    return np.zeros(len(values), dtype=np.bool_)


def _later(place_n: npt.NDArray[np.int64], secondary_n: Marks) -> Marks:
    """Cells that are not the best of their equals: primary before secondary, then the first row."""
    order = np.lexsort((secondary_n, place_n))
    later_n = np.zeros(len(place_n), dtype=np.bool_)
    later_n[order[1:]] = place_n[order[1:]] == place_n[order[:-1]]
    return later_n


def _twins(
    dropped_n: Marks, by_corpus_n: Marks, place_n: npt.NDArray[np.int64], matched: Mapping[str, Marks]
) -> npt.NDArray[np.int32]:
    """For each cell to leave out the first dataset, by name, that holds its equal, or SAME_FILE."""
    twin_n = np.where(dropped_n, SAME_FILE, KEPT).astype(np.int32)
    for number, (_, marks_u) in reversed(list(enumerate(sorted(matched.items())))):
        twin_n[dropped_n & by_corpus_n & marks_u[place_n]] = number
    return twin_n


# --- reading what is compared ----------------------------------------------------------------------------------------


class _Hashes(NamedTuple):
    dataset_id: str
    hash_m: npt.NDArray[np.int64]
    secondary_m: Marks
    unknown: int

    @property
    def size_bytes(self) -> int:
        return int(self.hash_m.nbytes + self.secondary_m.nbytes)


_held: OrderedDict[str, _Hashes] = OrderedDict()
"""Hashes of committed parts by address: a part never changes, and each source of a run is compared with all of them."""


def _committed(corpus: Corpus, leave_out: Sequence[str]) -> Iterator[_Hashes]:
    numbers = [i for i, part in enumerate(corpus.parts) if part.dataset_id not in leave_out]
    for first in range(0, len(numbers), PARTS_AT_ONCE):
        some = numbers[first : first + PARTS_AT_ONCE]
        unread = [i for i in some if corpus.parts[i].uri not in _held]
        fresh = dict(zip(unread, _read(corpus, unread), strict=True))
        for i in some:
            yield fresh[i] if i in fresh else _held[corpus.parts[i].uri]
        for i, hashes in fresh.items():
            _hold(corpus.parts[i].uri, hashes)


def _read(corpus: Corpus, numbers: Sequence[int]) -> list[_Hashes]:
    if not numbers:
        return []
    table, first, found = corpus.cells(_HASHES.names, parts=numbers), 0, []
    for number in numbers:
        part = corpus.parts[number]
        rows = table.slice(first, part.rows)
        known = rows.filter(rows.column("content_hash").is_valid())
        found.append(_Hashes(part.dataset_id, *_arrays(known), part.rows - known.num_rows))
        first += part.rows
    return found


def _hold(uri: str, hashes: _Hashes) -> None:
    if hashes.size_bytes + sum(held.size_bytes for held in _held.values()) <= MOST_HELD_BYTES:
        _held[uri] = hashes


def _arrays(table: pa.Table) -> tuple[npt.NDArray[np.int64], Marks]:
    """Hashes, and whether the cell is marked as secondary data (an unknown mark counts as primary)."""
    primary = table.column("is_primary_data").fill_null(True).to_numpy()
    return table.column("content_hash").to_numpy().astype(np.int64), ~primary.astype(np.bool_)


def _new_cells(parts: Sequence[NewPart], corpus: Corpus) -> tuple[npt.NDArray[np.int64], Marks, int]:
    """Hash and secondary mark of every new cell in the order of parts, and how many repeat a name."""
    listed = [Part(uri=join(corpus.uri, part.path), rows=part.rows, dataset_id="") for part in parts]
    reader = PartReader(listed, corpus.store, corpus.vocabulary.token_dtype, 0)
    hashes, marks, names = [np.empty(0, np.int64)], [np.empty(0, np.bool_)], [np.empty(0, np.uint64)]
    for number in range(len(listed)):
        table = reader.scalars(_NEW_CELLS, [number])
        hash_n, secondary_n = _arrays(table)
        hashes.append(hash_n)
        marks.append(secondary_n)
        names.append(pl.Series(table.column("cell_id")).hash(seed=0).to_numpy())
    named = np.concatenate(names)
    return np.concatenate(hashes), np.concatenate(marks), int(named.size - np.unique(named).size)


# --- leaving cells out -----------------------------------------------------------------------------------------------


def _rows_of(part: NewPart, corpus: Corpus, dataset_id: str) -> pa.Table:
    file = TableFile(path=part.path, rows=part.rows, size_bytes=part.size_bytes, dataset_id=dataset_id)
    return read_rows(corpus.uri, file, part_schema(corpus.vocabulary.token_dtype), corpus.store)


def _rewritten(rows: pa.Table, part: NewPart, corpus: Corpus, dataset_id: str) -> NewPart:
    """The rows that stay, as a part that keeps its number; the part it was made from stays invisible."""
    match = _PART_NUMBER.search(part.path)
    number = int(match[1]) if match else int(rows.column("source_row")[0].as_py())
    return write_rows(rows, number, dataset_folder(dataset_id), corpus_uri=corpus.uri, store=corpus.store)


def _quarantined(rows: pa.Table, twins: npt.NDArray[np.int32], found: Found) -> pa.Table:
    reasons = pa.repeat(DUPLICATE_CELL, rows.num_rows)
    texts = [f"same counts as a cell of dataset {name}" for name in found.matches]
    texts.append("same counts as another cell of the same file")
    details = pa.array(texts, pa.string()).take(pa.array(np.where(twins == SAME_FILE, len(texts) - 1, twins)))
    columns = [rows.column("source_row"), rows.column("cell_id"), reasons, details]
    return pa.table(columns, schema=QUARANTINE_SCHEMA)


def _taken_off(rows: pa.Table, vocabulary: Vocabulary) -> Tally:
    lengths = rows.column("length").to_numpy()
    genes = rows.column("n_genes").to_numpy()
    framed = sum(token is not None for token in (vocabulary.cls, vocabulary.eos))
    return Tally(
        dropped={DUPLICATE_CELL: rows.num_rows},
        tokens=int(lengths.sum()),
        cropped=int(((lengths == vocabulary.window) & (genes + framed > vocabulary.window)).sum()),
        length_bins=binned(lengths),
        depth_bins=binned(rows.column("total_counts").to_numpy()),
        genes_bins=binned(genes),
    )
