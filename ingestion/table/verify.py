"""Check a corpus against what was recorded of it: every byte of every part, every side file, every cell once.

Axis suffixes: `n` cells of a part, `t` their tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from genescale.ingestion.corpus import VOCABULARY_FILE, Corpus
from genescale.ingestion.schema import PARTITION_COLUMN, TOKEN_COLUMN, corpus_schema
from genescale.ingestion.table.delta_table import TableFile
from genescale.ingestion.table.parquet_pages import PageFault, differing_chunk, page_faults, place_of, undecodable
from genescale.ingestion.table.part_files import content_digest, named_digest
from genescale.ingestion.table.parts import part_bytes
from genescale.ingestion.table.source_files import read_recorded
from genescale.platform.errors import GenescaleError, IntegrityError, NotFoundError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store, join
from genescale.platform.vocabulary import Vocabulary

READERS_AT_ONCE = 4
SHOWN_DUPLICATES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that is not as it was recorded: which file, where in it, and what."""

    uri: str
    what: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.uri}: {self.what}" + (f" at {self.place}" if self.place else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was checked, and what is wrong. `unnamed`: parts whose names hold no digest (their footers are unproved)."""

    uri: str
    version: int
    parts: int
    cells: int
    size_bytes: int
    pages: int
    files: int
    """Side files: those of sources, and the vocabulary."""
    unnamed: int
    faults: tuple[Fault, ...]
    seconds: float
    compared: int = 0
    """Cells that were made again from their source and compared."""
    not_compared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Datasets whose source could not be read again, and why."""

    @property
    def ok(self) -> bool:
        """True when nothing is wrong."""
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {**dataclasses.asdict(self), "faults": [dataclasses.asdict(f) for f in self.faults], "ok": self.ok}


@dataclasses.dataclass(frozen=True, eq=False)
class _Checked:
    """What one part looked like; `rows` holds the source rows of every dataset it has cells of."""

    pages: int
    faults: tuple[Fault, ...]
    rows: Mapping[str, npt.NDArray[np.int64]]


def verify(corpus: Corpus, *, progress: Progress = SILENT) -> VerifyReport:
    """Read every part and side file of this version and compare them with what was recorded; raises nothing for faults.

    Memory: a few parts, and 8 bytes per cell to find cells that are there twice.
    """
    began = time.perf_counter()
    progress.start(corpus.n_cells, "cells")
    rows: dict[str, list[npt.NDArray[np.int64]]] = {}
    faults: list[Fault] = []
    pages = 0
    with ThreadPoolExecutor(READERS_AT_ONCE) as pool:
        checks = pool.map(lambda file: check_part(corpus.uri, file, corpus.vocabulary, corpus.store), corpus.files)
        for file, checked in zip(corpus.files, checks, strict=True):
            pages += checked.pages
            faults += checked.faults
            for dataset, rows_n in checked.rows.items():
                rows.setdefault(dataset, []).append(rows_n)
            progress.advance(file.rows, f"{len(faults)} faults" if faults else "")
    files, of_files = _check_side_files(corpus)
    faults += [*_duplicates(corpus.uri, rows), *of_files, *_miscounted(corpus, rows, faults)]
    return VerifyReport(
        uri=corpus.uri,
        version=corpus.version,
        parts=len(corpus.files),
        cells=corpus.n_cells,
        size_bytes=corpus.size_bytes,
        pages=pages,
        files=files,
        unnamed=sum(not named_digest(file.path) for file in corpus.files),
        faults=tuple(faults),
        seconds=time.perf_counter() - began,
    )


def check_part(corpus_uri: str, file: TableFile, vocabulary: Vocabulary, store: Store) -> _Checked:
    """Check one part: bytes, the digest in its name, page checksums, rows, tokens."""
    uri = join(corpus_uri, file.path)
    try:
        data = store.read(uri)
    except NotFoundError:
        return _Checked(0, (Fault(uri=uri, what="the file is gone"),), {})
    except GenescaleError as error:
        return _Checked(0, (Fault(uri=uri, what=f"the file cannot be read: {error.what}"),), {})
    if len(data) != file.size_bytes:
        what = f"the file has {len(data):,} bytes, its commit says {file.size_bytes:,}"
        return _Checked(0, (Fault(uri=uri, what=what),), {})
    named = named_digest(file.path)
    pages, places = page_faults(data)
    if not places and named and content_digest(data) != named:
        places = [_between_pages(data, named, corpus_schema(vocabulary.token_dtype))]
    if places:
        return _Checked(pages, tuple(Fault(uri=uri, what=f.what, place=f.place) for f in places), {})
    try:
        rows, wrong = _decoded(data, file, vocabulary)
    except (pa.ArrowException, OSError, KeyError) as error:
        return _Checked(pages, (Fault(uri=uri, what=f"the file cannot be decoded: {error}"),), {})
    return _Checked(pages, tuple(Fault(uri=uri, what=what) for what in wrong), rows)


def _between_pages(data: bytes, digest: str, schema: pa.Schema) -> PageFault:
    """Where a file is damaged whose pages all fit their checksums: in a page header or in the footer.

    The same rows give the same bytes, so the sound file is written anew from what can still be read, its digest proves
    that it is the one, and the first byte that differs is the place.
    """
    try:
        parquet = pq.ParquetFile(io.BytesIO(data))
        largest = max(parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups))
        table = pa.concat_tables([parquet.read_row_group(number) for number in range(parquet.num_row_groups)])
        declared = pa.schema([schema.field(name) for name in table.schema.names])
        sound = part_bytes(table.cast(declared), row_group_cells=largest)
    except (pa.ArrowException, OSError, ValueError, KeyError):
        sound = b""
    if content_digest(sound) != digest:
        unplaced = PageFault(what="the footer or a page header is damaged", offset=0)
        return undecodable(data) or differing_chunk(data, sound) or unplaced
    at = next(i for i, (a, b) in enumerate(zip(data, sound, strict=True)) if a != b)
    return place_of(sound, at)


def _decoded(
    data: bytes, file: TableFile, vocabulary: Vocabulary
) -> tuple[dict[str, npt.NDArray[np.int64]], list[str]]:
    """(source rows by dataset, what is wrong with the rows)."""
    parquet = pq.ParquetFile(io.BytesIO(data))
    stored = [] if file.dataset_id else [PARTITION_COLUMN]
    rows: dict[str, list[npt.NDArray[np.int64]]] = {}
    wrong: set[str] = set()
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, columns=[TOKEN_COLUMN, "length", "source_row", *stored])
        wrong.update(_wrong_tokens(table, vocabulary, group))
        source_rows_n = table.column("source_row").to_numpy()
        if file.dataset_id:
            rows.setdefault(file.dataset_id, []).append(source_rows_n)
            continue
        names = table.column(PARTITION_COLUMN).combine_chunks().dictionary_encode()
        codes_n = names.indices.to_numpy()
        for code, dataset in enumerate(names.dictionary.to_pylist()):
            rows.setdefault(dataset, []).append(source_rows_n[codes_n == code])
    if parquet.metadata.num_rows != file.rows:
        wrong.add(f"the file has {parquet.metadata.num_rows:,} rows, its commit says {file.rows:,}")
    return {dataset: np.concatenate(found) for dataset, found in rows.items()}, sorted(wrong)


def _wrong_tokens(table: pa.Table, vocabulary: Vocabulary, group: int) -> list[str]:
    lists = table.column(TOKEN_COLUMN).combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    wrong = []
    if not np.array_equal(np.diff(lists.offsets.to_numpy()), table.column("length").to_numpy()):
        wrong.append(f"row group {group}: a `length` is not the number of its tokens")
    tokens_t = lists.values.to_numpy(zero_copy_only=False)
    if tokens_t.size and int(tokens_t.max()) >= vocabulary.size:
        wrong.append(f"row group {group}: a token is not in the vocabulary")
    return wrong


def _duplicates(uri: str, rows: Mapping[str, Sequence[npt.NDArray[np.int64]]]) -> list[Fault]:
    faults = []
    for dataset, found in sorted(rows.items()):
        rows_n = np.sort(np.concatenate(found))
        repeated = np.unique(rows_n[1:][rows_n[1:] == rows_n[:-1]])
        if repeated.size:
            shown = ", ".join(f"{row:,}" for row in repeated[:SHOWN_DUPLICATES].tolist())
            more = " …" if repeated.size > SHOWN_DUPLICATES else ""
            what = (
                f"{repeated.size:,} cells of dataset '{dataset}' are there more than once (source rows {shown}{more})"
            )
            faults.append(Fault(uri=uri, what=what))
    return faults


def _miscounted(
    corpus: Corpus, rows: Mapping[str, Sequence[npt.NDArray[np.int64]]], faults: Sequence[Fault]
) -> list[Fault]:
    """Datasets that do not have the cells their commit says; only where every part could be read."""
    if faults:
        return []
    wrong = []
    for record in corpus.datasets():
        found = sum(map(len, rows.get(record.dataset_id, ())))
        said = record.details.get("kept", found)
        if said != found:
            what = f"dataset '{record.dataset_id}' has {found:,} cells, its commit says {said:,}"
            wrong.append(Fault(uri=corpus.uri, what=what))
    return wrong


def _check_side_files(corpus: Corpus) -> tuple[int, list[Fault]]:
    """(files checked, faults) of the files of sources and the vocabulary, which opening the corpus has compared."""
    faults, count = list(_check_vocabulary(corpus)), 1
    for record in corpus.datasets():
        files = record.details.get("files", {})
        for facts in files.values():
            count += 1
            try:
                read_recorded(corpus.uri, facts, corpus.store)
            except IntegrityError as error:
                faults.append(Fault(uri=error.where, what=error.what.rstrip(".")))
    return count, faults


def _check_vocabulary(corpus: Corpus) -> Iterator[Fault]:
    """Opening the corpus has compared the vocabulary's digest; here its file is compared, where its digest is known."""
    address = join(corpus.uri, *VOCABULARY_FILE)
    try:
        data = corpus.store.read(address)
    except GenescaleError as error:
        yield Fault(uri=address, what=error.what.rstrip("."))
        return
    if corpus.vocabulary_sha256 and hashlib.sha256(data).hexdigest() != corpus.vocabulary_sha256:
        yield Fault(uri=address, what="the file is not the one the corpus was made with")
