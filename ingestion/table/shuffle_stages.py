"""The two stages of a shuffle: cut parts into runs that are sorted by place, then gather a bucket from every run.

A run is one object with the cells of some parts in the order of their hashes, a record batch for each bucket that it
has cells of, and beside it an index of where these begin. So the number of objects rises with the number of runs, and
not with runs times buckets; and each stage holds one run or one bucket in memory.

Axis suffixes: `n` cells, `b` buckets.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from genescale.ingestion.fan_out import fan_out
from genescale.ingestion.plan import guarded
from genescale.ingestion.schema import PARTITION_COLUMN
from genescale.ingestion.table.delta_table import TableFile
from genescale.ingestion.table.part_files import done, read_rows, write_rows
from genescale.ingestion.table.records import NewPart
from genescale.ingestion.table.shuffle_order import buckets, place_hashes
from genescale.platform.errors import IntegrityError, NotFoundError
from genescale.platform.progress import Progress
from genescale.platform.storage import Store, join

SHUFFLED_FOLDER = "shuffled"
READERS_AT_ONCE = 8
# Compressed bytes of the parts of one run; a task holds about four times as much while it sorts them.
RUN_BYTES = 128 * 1024 * 1024
RESUMES = "Nothing was committed; the same command goes on where this run stopped."
_HASH = "place_hash"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What both stages need to know; it decides the parts, together with the cells that go in."""

    source_uri: str
    output_uri: str
    scratch_uri: str
    seed: int
    n_buckets: int
    first_number: int
    row_group_cells: int
    schema: pa.Schema
    store: Store


def make_runs(job: Job, files: Sequence[TableFile], progress: Progress) -> list[npt.NDArray[np.int64]]:
    """First stage: a run for each group of parts; returns (b+1) offsets of the buckets within each run, in bytes."""
    items = [
        {"run": number, "files": [dataclasses.asdict(file) for file in group]}
        for number, group in enumerate(_groups(files))
    ]
    offsets: dict[int, npt.NDArray[np.int64]] = {}
    for answer, payload in fan_out(items, functools.partial(_make_run, job=job)):
        run = done(answer, job.output_uri, fix=RESUMES)
        offsets[run["run"]] = np.frombuffer(payload, dtype=np.int64)
        progress.advance(sum(file["rows"] for file in run["files"]), "sorting")
    return [offsets[number] for number in sorted(offsets)]


def make_parts(job: Job, offsets: Sequence[npt.NDArray[np.int64]], progress: Progress) -> list[NewPart]:
    """Second stage: a part for each bucket that has cells, in the order of their hashes."""
    items = []
    for bucket in range(job.n_buckets):
        ranges = [
            [run, int(starts[bucket]), int(starts[bucket + 1] - starts[bucket])]
            for run, starts in enumerate(offsets)
            if starts[bucket + 1] > starts[bucket]
        ]
        if ranges:
            items.append({"bucket": bucket, "ranges": ranges})
    parts = []
    for answer, _ in fan_out(items, functools.partial(_make_part, job=job)):
        parts.append(NewPart(**done(answer, job.output_uri, fix=RESUMES)["part"]))
        progress.advance(parts[-1].rows, "gathering")
    return sorted(parts, key=lambda part: part.path)


def _groups(files: Sequence[TableFile]) -> Iterator[list[TableFile]]:
    group: list[TableFile] = []
    for file in files:
        if group and sum(member.size_bytes for member in group) + file.size_bytes > RUN_BYTES:
            yield group
            group = []
        group.append(file)
    if group:
        yield group


def _make_run(item: dict[str, Any], *, job: Job) -> tuple[dict[str, Any], bytes]:
    """One task of the first stage; a run whose index is there was finished by a run that was cut off."""
    payload = b""

    def work() -> dict[str, Any]:
        nonlocal payload
        try:
            payload = job.store.read(_index_uri(job, item["run"]))
        except NotFoundError:
            payload = _written_run(item, job)
        return {}

    return {**item, **guarded(work, where=job.source_uri)}, payload


def _written_run(item: dict[str, Any], job: Job) -> bytes:
    files = [TableFile(**file) for file in item["files"]]
    table = pa.concat_tables([read_rows(job.source_uri, file, job.schema, job.store) for file in files])
    hashes_n = np.concatenate(
        [place_hashes(job.seed, file.dataset_id, rows_n) for file, rows_n in _rows_by_file(table, files)]
    )
    order_n = np.argsort(hashes_n, kind="stable")
    table = table.take(pa.array(order_n)).append_column(_HASH, pa.array(hashes_n[order_n])).combine_chunks()
    edges_b = np.searchsorted(buckets(hashes_n[order_n], job.n_buckets), np.arange(job.n_buckets + 1))
    sink, offsets = pa.BufferOutputStream(), [0]
    for start, stop in zip(edges_b[:-1].tolist(), edges_b[1:].tolist(), strict=True):
        if stop > start:
            for batch in table.slice(start, stop - start).combine_chunks().to_batches():
                sink.write(batch.serialize())
        offsets.append(sink.tell())
    job.store.write(_run_uri(job, item["run"]), sink.getvalue().to_pybytes())
    index = np.array(offsets, dtype=np.int64).tobytes()
    job.store.write(_index_uri(job, item["run"]), index)
    return index


def _rows_by_file(table: pa.Table, files: Sequence[TableFile]) -> Iterator[tuple[TableFile, npt.NDArray[np.int64]]]:
    rows_n, at = table.column("source_row").to_numpy(), 0
    for file in files:
        yield file, rows_n[at : at + file.rows]
        at += file.rows


def _make_part(item: dict[str, Any], *, job: Job) -> tuple[dict[str, Any], bytes]:
    """One task of the second stage; the mark of a finished bucket holds its part."""
    mark = join(job.scratch_uri, f"bucket-{item['bucket']:08d}.json")

    def work() -> dict[str, Any]:
        try:
            part = json.loads(job.store.read(mark))
            if job.store.exists(join(job.output_uri, part["path"])):
                return {"part": part}
        except NotFoundError:
            pass
        written = write_rows(
            _gathered(item["ranges"], job),
            job.first_number + item["bucket"],
            SHUFFLED_FOLDER,
            corpus_uri=job.output_uri,
            store=job.store,
            row_group_cells=job.row_group_cells,
        )
        part = dataclasses.asdict(written)
        job.store.write(mark, json.dumps(part).encode())
        return {"part": part}

    return {**item, **guarded(work, where=job.output_uri)}, b""


def _gathered(ranges: Sequence[Sequence[int]], job: Job) -> pa.Table:
    """The cells of a bucket from all runs, in order of hash; equal hashes by dataset and source row."""
    schema = job.schema.append(pa.field(_HASH, pa.uint64()))

    def read(place: Sequence[int]) -> pa.Table:
        run, start, length = place
        data = job.store.read_range(_run_uri(job, run), start, length)
        if len(data) != length:
            raise IntegrityError("a run of the shuffle is cut short.", where=_run_uri(job, run), fix="Run it again.")
        return pa.Table.from_batches(_batches(data, schema), schema)

    with ThreadPoolExecutor(READERS_AT_ONCE) as pool:
        table = pa.concat_tables(pool.map(read, ranges)).combine_chunks()
    keys = [(_HASH, "ascending"), (PARTITION_COLUMN, "ascending"), ("source_row", "ascending")]
    order = pc.sort_indices(table.select([name for name, _ in keys]), sort_keys=keys)
    return table.drop_columns([_HASH]).take(order).combine_chunks()


def _batches(data: bytes, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    reader = pa.BufferReader(data)
    while reader.tell() < len(data):
        yield pa.ipc.read_record_batch(pa.ipc.read_message(reader), schema)


def _run_uri(job: Job, run: int) -> str:
    return join(job.scratch_uri, f"run-{run:08d}.arrow")


def _index_uri(job: Job, run: int) -> str:
    return join(job.scratch_uri, f"run-{run:08d}.index")
