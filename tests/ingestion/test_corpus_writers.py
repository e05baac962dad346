"""Several writers of one corpus, and corpora of other releases: nothing is lost, nothing counts twice."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.transaction import AddAction

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.schema import CORPUS_SCHEMA_VERSION
from genescale.ingestion.table import commits, delta_table
from genescale.ingestion.table.delta_table import BrokenOffError, Table
from genescale.ingestion.table.gc import collect_garbage
from genescale.ingestion.table.verify import verify
from genescale.platform.errors import CorpusError
from genescale.platform.storage import Store, join
from genescale.platform.vocabulary import Vocabulary

Cells = list[np.ndarray]


def same(found: Cells, expected: Cells) -> bool:
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


WRITER = """
import sys
from genescale.ingestion.corpus import Corpus, NewPart, Source
from genescale.platform.errors import CorpusError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
import json
uri, jobs = sys.argv[1], json.loads(sys.argv[2])
corpus = Corpus.open(uri, Store(StorageSettings()))
print("ready", flush=True)
sys.stdin.readline()
for job in jobs:
    try:
        corpus.commit_source(Source(**job["source"]), job["dataset_id"], [NewPart(**p) for p in job["parts"]],
                             {"kept": 1}, files={"report.json": job["who"].encode()}, replace=job["replace"])
        print("committed", flush=True)
    except CorpusError as error:
        print("refused " + str(error), flush=True)
"""


def written_by_processes(corpus: Corpus, work: list[list[dict[str, Any]]]) -> list[list[str]]:
    """Start one process for each list of commits, let all begin at once, and return what each said."""
    command = [sys.executable, "-c", WRITER, corpus.uri]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, json.dumps(jobs)], **pipes) for jobs in work]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate(timeout=100)[0].splitlines() for process in processes]


def job_of(
    planted: Any, corpus: Corpus, name: str, *, who: str, seed: int, replace: bool = False, etag: str = "1"
) -> Any:
    parts = planted.parts(corpus, name, [planted.cells(5 + seed, seed)])
    return {
        "source": dataclasses.asdict(planted.source(name, etag=etag)),
        "dataset_id": name,
        "parts": [dataclasses.asdict(part) for part in parts],
        "replace": replace,
        "who": who,
    }


def test_processes_with_different_sources_all_succeed(empty: Corpus, planted: Any) -> None:
    """Also when half of them replace datasets, which cannot simply be appended."""
    corpus = planted.add(empty, "w0-0", [planted.cells(3, 90)], etag="0")
    corpus = planted.add(corpus, "w1-1", [planted.cells(4, 91)], etag="0")
    work = [
        [job_of(planted, corpus, f"w{w}-{k}", who=f"{w}", seed=10 * w + k, replace=True) for k in range(4)]
        for w in range(3)
    ]
    said = written_by_processes(corpus, work)
    assert said == [["committed"] * 4] * 3
    newest = corpus.at_newest()
    assert {d.dataset_id: d.n_cells for d in newest.datasets()} == {
        f"w{w}-{k}": 5 + 10 * w + k for w in range(3) for k in range(4)
    }
    assert newest.version == corpus.version + 12


def test_of_processes_with_one_source_one_wins_and_the_others_say_why(empty: Corpus, planted: Any) -> None:
    work = [[job_of(planted, empty, "a", who=str(w), seed=1)] for w in range(3)]
    said = sorted(lines[0] for lines in written_by_processes(empty, work))
    assert said[0] == "committed"
    assert all("already in this corpus" in text for text in said[1:]), said
    newest = empty.at_newest()
    assert (newest.version, newest.n_cells) == (1, 6)
    assert newest.read_source_file("a", "report.json").decode() in "012"


def test_of_processes_that_replace_one_dataset_all_versions_are_whole(empty: Corpus, planted: Any) -> None:
    corpus = planted.add(empty, "a", [planted.cells(3, 1)], etag="0")
    work = [[job_of(planted, corpus, "a", who="x", seed=w, replace=True, etag=f"e{w}")] for w in range(3)]
    said = [lines[0] for lines in written_by_processes(corpus, work)]
    assert said == ["committed"] * 3, "each replaces the one before"
    newest = corpus.at_newest()
    for version in range(2, newest.version + 1):
        held = Corpus.open(corpus.uri, corpus.store, version=version)
        assert len(held.parts) == 1
        assert held.n_cells == held.dataset("a").n_cells in (5, 6, 7)
    present = [newest.is_committed(planted.source("a", etag=f"e{w}").identity) for w in range(3)]
    assert sum(present) == 1


@pytest.mark.parametrize("operation", ["ingest", "replace", "remove"])
def test_a_commit_that_lands_late_is_ours(
    operation: str, empty: Corpus, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage may break a commit off and carry it out all the same, when we have looked for it already."""
    corpus = planted.add(empty, "a", [planted.cells(3, 1)])
    commit, waiting, said = Table.commit, list[Callable[[], None]](), list[str]()

    def broken_off(table: Table, record: Any, **actions: Any) -> None:
        if said:
            return commit(table, record, **actions)
        said.append(record["operation"])
        waiting.append(functools.partial(commit, table, record, **actions))
        raise BrokenOffError("the commit failed: timed out.", where=table.uri)

    monkeypatch.setattr(Table, "commit", broken_off)
    monkeypatch.setattr(commits, "time", SimpleNamespace(sleep=lambda _: waiting.pop()()))
    if operation == "remove":
        newest = corpus.remove("a")
    else:
        name = "b" if operation == "ingest" else "a"
        newest = planted.add(corpus, name, [planted.cells(4, 2)], etag="2", replace=operation == "replace")
    assert [record.operation for record in newest.history()][:2] == [said[0], "ingest"]
    assert newest.version == corpus.version + 1
    assert newest.n_cells == {"ingest": 7, "replace": 4, "remove": 0}[operation]


def test_storage_that_fails_for_a_moment_hides_no_version(
    empty: Corpus, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, opened = planted.add(empty, "a", [planted.cells(3, 1)]), delta_table.DeltaTable

    def failing(uri: str, version: int | None = None, **options: Any) -> Any:
        if version is not None:
            raise OSError("connection reset")
        return opened(uri, version=version, **options)

    monkeypatch.setattr(delta_table, "DeltaTable", failing)
    with pytest.raises(CorpusError, match=r"cannot be opened: connection reset.*try again"):
        Corpus.open(corpus.uri, corpus.store, version=0)


def first_release(uri: str, vocabulary: Vocabulary, store: Store, planted: Any) -> Cells:
    """A corpus as release 1 wrote it: fewer columns, one commit without files, a transaction for the source."""
    labels = ("cell_type", "tissue", "disease", "assay", "donor_id", "sex", "development_stage", "organism")
    scalars = [("length", pa.int32()), ("total_counts", pa.float64()), ("n_genes", pa.int32())]

    def schema(tokens: pa.DataType, *origin: pa.Field) -> pa.Schema:
        lists = pa.field("input_ids", pa.list_(pa.field("element", tokens, nullable=False)), nullable=False)
        return pa.schema(
            [
                pa.field("cell_id", pa.string(), nullable=False),
                *origin,
                pa.field("source_row", pa.int64(), nullable=False),
                lists,
                *(pa.field(name, kind, nullable=False) for name, kind in scalars),
                *(pa.field(name, pa.string()) for name in labels),
            ]
        )

    store.write(join(uri, "_genescale", "vocabulary.parquet"), vocabulary.to_parquet_bytes())
    table = schema(pa.int32(), pa.field("dataset_id", pa.string(), nullable=False))
    settings = {"genescale.schemaVersion": "1", "genescale.vocabularyDigest": vocabulary.digest}
    DeltaTable.create(uri, table, partition_by=["dataset_id"], configuration=settings, raise_if_key_not_exists=False)
    cells = planted.cells(40, 1)
    rows = planted.rows(cells, "old")
    old = schema(pa.uint16())
    rows = rows.select(old.names).cast(old)
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue().to_pybytes()
    path = f"dataset_id=old/part-0000000000-{hashlib.blake2b(data, digest_size=12).hexdigest()}.parquet"
    store.write(join(uri, path), data)
    source = {**dataclasses.asdict(planted.source("old")), "schema_version": 1}
    record = {"operation": "ingest", "dataset_id": "old", "identity": "1" * 64, "source": source, "kept": 40}
    stats = json.dumps({"numRecords": 40})
    DeltaTable(uri).create_write_transaction(
        [AddAction(path, len(data), {"dataset_id": "old"}, 1, True, stats)],
        mode="append",
        schema=table,
        partition_by=["dataset_id"],
        commit_properties=CommitProperties(
            custom_metadata={"genescale": json.dumps(record)},
            app_transactions=[Transaction("genescale/source/" + "1" * 64, 1)],
        ),
    )
    return cells


def test_a_corpus_of_the_first_release_is_read(
    tmp_path: Path, vocabulary: Vocabulary, local_store: Store, planted: Any
) -> None:
    cells = first_release(str(tmp_path / "old"), vocabulary, local_store, planted)
    corpus = Corpus.open(str(tmp_path / "old"), local_store)
    assert (corpus.schema_version, corpus.n_cells, corpus.layout) == (1, 40, "datasets")
    assert same(corpus.tokens(range(40)), cells)
    columns = ["cell_id", "cell_type", "content_hash", "is_primary_data", "tissue_ontology_term_id", "labels.stim"]
    table = corpus.cells(columns)
    assert table["cell_type"].to_pylist() == ["old"] * 40
    assert [table[name].null_count for name in columns[2:]] == [40] * 4
    assert corpus.is_committed("1" * 64)
    assert [(d.dataset_id, d.source_uri) for d in corpus.datasets()] == [("old", "/atlas/old.h5ad")]
    assert corpus.at_newest().version == 1, "reading changes nothing"
    assert verify(corpus).ok


def test_the_first_write_upgrades_it(tmp_path: Path, vocabulary: Vocabulary, local_store: Store, planted: Any) -> None:
    uri = str(tmp_path / "old")
    cells = first_release(uri, vocabulary, local_store, planted)
    corpus = planted.add(Corpus.open(uri, local_store), "new", [planted.cells(10, 2)])
    assert corpus.schema_version == CORPUS_SCHEMA_VERSION
    assert [record.operation for record in corpus.history()] == [
        "ingest",
        "upgrade",
        "upgrade",
        "ingest",
        "create table",
    ]
    stims = corpus.cells(["dataset_id", "labels.stim"]).to_pylist()
    assert [row["labels.stim"] for row in stims if row["dataset_id"] == "new"] == [
        f"dose {i}" if i % 2 else None for i in range(10)
    ]
    assert {row["labels.stim"] for row in stims if row["dataset_id"] == "old"} == {None}
    declared = {field.name for field in DeltaTable(uri).schema().fields}
    assert declared == set(corpus.schema.names)
    frame = pl.scan_delta(uri).select("dataset_id", "input_ids", "is_primary_data").collect()
    assert frame.filter(pl.col("dataset_id") == "old")["input_ids"].to_list() == [cell.tolist() for cell in cells]
    assert frame["is_primary_data"].null_count() == 50
    before = Corpus.open(f"{uri}@1", local_store)
    assert (before.schema_version, before.n_cells) == (1, 40)
    assert planted.add(corpus, "more", [planted.cells(3, 3)]).version == corpus.version + 1, "upgraded once"
    assert corpus.at_newest().remove("old").n_cells == 13


def test_writers_at_once_upgrade_it_together(
    tmp_path: Path, vocabulary: Vocabulary, local_store: Store, planted: Any
) -> None:
    uri = str(tmp_path / "old")
    first_release(uri, vocabulary, local_store, planted)
    corpus = Corpus.open(uri, local_store)
    work = [[job_of(planted, corpus, f"d{w}", who=str(w), seed=w)] for w in range(3)]
    assert written_by_processes(corpus, work) == [["committed"]] * 3
    newest = corpus.at_newest()
    assert (newest.schema_version, newest.n_cells) == (CORPUS_SCHEMA_VERSION, 40 + 5 + 6 + 7)


def test_a_corpus_of_a_newer_release_is_refused(empty: Corpus) -> None:
    DeltaTable(empty.uri).alter.set_table_properties({"genescale.schemaVersion": "99"}, raise_if_not_exists=False)
    with pytest.raises(CorpusError, match="newer release"):
        Corpus.open(empty.uri, empty.store)
    with pytest.raises(CorpusError, match="newer release"):
        empty.remove("a")


def test_writers_at_once_in_object_storage(s3_store: tuple[Store, str], vocabulary: Vocabulary, planted: Any) -> None:
    """Different sources land, all of them; of one source one wins; readers see whole sources throughout."""
    store, bucket = s3_store
    corpus = Corpus.create(f"{bucket}/corpus", vocabulary, store)
    seen: list[dict[str, int]] = []

    def write(number: int) -> str:
        mine = pickle.loads(pickle.dumps(corpus))
        try:
            planted.add(mine, f"d{number % 4}", [planted.cells(5, number % 4), planted.cells(6, number % 4)])
        except CorpusError as error:
            return str(error)
        seen.append({d.dataset_id: d.n_cells for d in mine.at_newest().datasets()})
        return "committed"

    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(write, range(6)))
    assert said.count("committed") == 4
    assert all("already in this corpus" in text for text in said if text != "committed"), said
    assert {d.dataset_id: d.n_cells for d in corpus.at_newest().datasets()} == {f"d{k}": 11 for k in range(4)}
    assert all(set(counts.values()) == {11} for counts in seen)


@pytest.mark.slow
def test_a_long_history_with_checkpoints_keeps_every_version(empty: Corpus, planted: Any) -> None:
    """Delta Lake writes a checkpoint after a hundred commits; neither it nor gc may forget an earlier one."""
    corpus = empty
    for number in range(105):
        corpus = planted.add(corpus, f"d{number % 7}", [planted.cells(3, number)], etag=str(number), replace=number > 6)
    assert list(Path(corpus.uri).glob("_delta_log/*.checkpoint.parquet"))
    planted.parts(corpus, "lost", [planted.cells(4, 1)])
    assert len(collect_garbage(corpus, older_than=datetime.timedelta(0)).deleted) == 1
    assert [record.version for record in corpus.history()] == list(range(105, -1, -1))
    for version in (1, 50, 99, 101, 105):
        assert verify(Corpus.open(corpus.uri, corpus.store, version=version)).ok
    assert not corpus.is_committed(planted.source("d0", etag="0").identity)
    assert corpus.is_committed(planted.source("d0", etag="98").identity)
