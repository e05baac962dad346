"""The corpus: commits are whole and once, versions stay readable, and every reader sees the same cells."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.transaction import AddAction

from genescale.ingestion.corpus import Corpus, NewPart, Source, dataset_folder, parse_reference
from genescale.ingestion.schema import CORPUS_SCHEMA_VERSION, part_schema, rows_table
from genescale.ingestion.table.delta_table import LostRaceError, Table
from genescale.ingestion.table.gc import collect_garbage
from genescale.ingestion.table.parts import ROW_GROUP_CELLS, part_bytes
from genescale.ingestion.table.verify import verify
from genescale.platform.errors import CorpusError, IntegrityError
from genescale.platform.storage import Store, join
from genescale.platform.vocabulary import Vocabulary

Cells = list[np.ndarray]


def random_cells(n_cells: int, seed: int, vocabulary: Vocabulary) -> Cells:
    rng = np.random.default_rng(seed)
    genes = vocabulary.token_ids
    return [rng.permutation(genes)[: rng.integers(1, 30)].astype(vocabulary.token_dtype) for _ in range(n_cells)]


def rows_of(cells: Cells, name: str, vocabulary: Vocabulary) -> pa.Table:
    schema = part_schema(vocabulary.token_dtype)
    lengths = np.array([cell.size for cell in cells], dtype=np.int32)
    columns = {
        "cell_id": [f"{name}-{i}" for i in range(len(cells))],
        "source_row": np.arange(len(cells)),
        "input_ids": [cell.tolist() for cell in cells],
        "length": lengths,
        "total_counts": lengths * 2.0,
        "n_genes": lengths,
        "cell_type": [name] * len(cells),
    }
    return rows_table(columns, schema)


def source_of(name: str, vocabulary: Vocabulary) -> Source:
    return Source(uri=f"/atlas/{name}.h5ad", size_bytes=1, etag="1", vocabulary_digest=vocabulary.digest, recipe={})


def written(corpus: Corpus, name: str, parts: Sequence[Cells]) -> list[NewPart]:
    """Part files of a dataset in the corpus's folder, not committed."""
    new = []
    for number, cells in enumerate(parts):
        path = f"{dataset_folder(name)}/part-{number:03d}.parquet"
        data = part_bytes(rows_of(cells, name, corpus.vocabulary))
        corpus.store.write(join(corpus.uri, path), data)
        new.append(NewPart(path=path, rows=len(cells), size_bytes=len(data)))
    return new


def added(corpus: Corpus, name: str, parts: Sequence[Cells]) -> Corpus:
    source = source_of(name, corpus.vocabulary)
    return corpus.commit_source(source, name, written(corpus, name, parts), {"kept": sum(map(len, parts))})


def same(found: Cells, expected: Cells) -> bool:
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


def test_cells_come_back_in_one_global_order(empty: Corpus, vocabulary: Vocabulary) -> None:
    a, b, c = (random_cells(n, seed, vocabulary) for seed, n in enumerate((ROW_GROUP_CELLS + 100, 7, 50)))
    corpus = added(added(empty, "beta", [c]), "alpha", [a, b])
    everything = a + b + c
    assert corpus.n_cells == len(everything)
    order = np.random.default_rng(0).permutation(corpus.n_cells)
    found = corpus.tokens(order.tolist())
    assert same(found, [everything[i] for i in order])
    assert found[0].dtype == np.uint16
    table = corpus.cells(["cell_id", "dataset_id", "length", "source_row", "cell_type", "sex"])
    assert table["length"].to_pylist() == [cell.size for cell in everything]
    assert table["dataset_id"].to_pylist() == ["alpha"] * len(a + b) + ["beta"] * 50
    assert table["cell_id"][0].as_py() == "alpha-0"
    assert table["sex"].null_count == corpus.n_cells
    assert table.schema.field("dataset_id").type == pa.string()
    assert corpus.tokens([]) == []
    with pytest.raises(CorpusError, match="there is no cell"):
        corpus.tokens([corpus.n_cells])
    with pytest.raises(CorpusError, match="there is no cell"):
        corpus.tokens([-1])


def test_a_tiny_cache_changes_speed_only(empty: Corpus, vocabulary: Vocabulary, local_store: Store) -> None:
    cells = random_cells(300, 3, vocabulary)
    uri = added(empty, "a", [cells[:100], cells[100:200], cells[200:]]).uri
    corpus = Corpus.open(uri, local_store, cache_bytes=1)
    order = np.random.default_rng(1).permutation(300)
    for _ in range(2):
        assert same(corpus.tokens(order), [cells[i] for i in order])
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens([0])[0][0] = 1


def test_columns_that_are_not_there_are_refused(empty: Corpus) -> None:
    assert empty.cells(["length"]).num_rows == 0
    with pytest.raises(CorpusError, match="Did you mean 'cell_type'"):
        empty.cells(["celltype"])
    with pytest.raises(CorpusError, match="read with `tokens`"):
        empty.cells(["input_ids"])


def test_a_version_is_a_snapshot(empty: Corpus, vocabulary: Vocabulary, local_store: Store) -> None:
    a, b = random_cells(20, 1, vocabulary), random_cells(10, 2, vocabulary)
    first = added(empty, "a", [a])
    second = added(first, "b", [b])
    third = second.remove("a")
    assert (first.version, second.version, third.version) == (1, 2, 3)
    assert (first.n_cells, second.n_cells, third.n_cells) == (20, 30, 10)
    # An open corpus, a travelled one, and one opened by its version all see what they were pinned to.
    for corpus in (second, pickle.loads(pickle.dumps(second)), Corpus.open(f"{second.uri}@2", local_store)):
        assert corpus.version == 2
        assert same(corpus.tokens(range(30)), a + b)
        assert [d.dataset_id for d in corpus.datasets()] == ["a", "b"]
    assert Corpus.open(empty.uri, local_store).version == 3
    with pytest.raises(CorpusError, match=r"no version 9.*newest is 3"):
        Corpus.open(empty.uri, local_store, version=9)


def test_history_says_what_was_done(empty: Corpus, vocabulary: Vocabulary) -> None:
    corpus = added(empty, "a", [random_cells(5, 1, vocabulary)]).remove("a")
    records = corpus.history()
    assert [(r.version, r.operation, r.dataset_id) for r in records] == [
        (2, "remove", "a"), (1, "ingest", "a"), (0, "create", ""),
    ]  # fmt: skip
    assert records[1].details["kept"] == 5
    assert records[1].details["source"]["uri"] == "/atlas/a.h5ad"
    assert records[0].details["cells"] == 5
    assert records[0].time >= records[1].time


def test_a_source_is_committed_once_until_it_is_removed(empty: Corpus, vocabulary: Vocabulary) -> None:
    cells, source = random_cells(5, 1, vocabulary), source_of("a", vocabulary)
    corpus = added(empty, "a", [cells])
    assert not empty.is_committed(source.identity)
    assert corpus.is_committed(source.identity)
    with pytest.raises(CorpusError, match="already in this corpus"):
        added(corpus, "a", [cells])
    removed = corpus.remove("a")
    assert not removed.is_committed(source.identity)
    again = added(removed, "a", [cells])
    assert again.is_committed(source.identity)
    assert again.n_cells == 5


@pytest.mark.parametrize("same_source", [True, False], ids=["one source", "two sources of one name"])
def test_of_racing_writers_one_wins(same_source: bool, empty: Corpus, vocabulary: Vocabulary) -> None:
    parts = written(empty, "a", [random_cells(5, 1, vocabulary)])
    writers = 6
    start = threading.Barrier(writers)

    def race(number: int) -> str:
        corpus = pickle.loads(pickle.dumps(empty))
        source = source_of("a" if same_source else f"a{number}", vocabulary)
        start.wait()
        try:
            corpus.commit_source(source, "a", parts, {})
        except CorpusError:
            return "refused"
        return "committed"

    with ThreadPoolExecutor(writers) as pool:
        outcomes = list(pool.map(race, range(writers)))
    assert sorted(outcomes) == ["committed", *["refused"] * (writers - 1)]
    newest = empty.at_newest()
    assert (newest.version, newest.n_cells) == (1, 5)


def test_writers_of_different_sources_both_land(empty: Corpus, vocabulary: Vocabulary) -> None:
    a, b = random_cells(5, 1, vocabulary), random_cells(6, 2, vocabulary)
    added(empty, "a", [a])
    assert added(empty, "b", [b]).n_cells == 11, "a pinned corpus commits on top of the newest version"


def test_files_that_no_commit_names_do_not_exist(empty: Corpus, vocabulary: Vocabulary, local_store: Store) -> None:
    corpus = added(empty, "a", [random_cells(5, 1, vocabulary)])
    written(corpus, "b", [random_cells(9, 2, vocabulary)])
    local_store.write(join(corpus.uri, dataset_folder("a"), "part-999.parquet"), b"half a file")
    newest = Corpus.open(corpus.uri, local_store)
    assert (newest.version, newest.n_cells) == (1, 5)
    assert pl.scan_delta(corpus.uri).select(pl.len()).collect().item() == 5


Change = Callable[[Corpus, list[NewPart]], list[NewPart]]


def lost(corpus: Corpus, parts: list[NewPart]) -> list[NewPart]:
    corpus.store.delete(join(corpus.uri, parts[0].path))
    return parts


def shortened(corpus: Corpus, parts: list[NewPart]) -> list[NewPart]:
    corpus.store.write(join(corpus.uri, parts[0].path), b"PAR1")
    return parts


@pytest.mark.parametrize(("change", "message"), [(lost, "gone before its commit"), (shortened, "4 bytes")])
def test_parts_are_checked_before_they_are_committed(
    change: Change, message: str, empty: Corpus, vocabulary: Vocabulary
) -> None:
    parts = change(empty, written(empty, "a", [random_cells(5, 1, vocabulary)]))
    with pytest.raises(IntegrityError, match=message):
        empty.commit_source(source_of("a", vocabulary), "a", parts, {})
    assert empty.at_newest().version == 0


def test_what_does_not_belong_is_refused(empty: Corpus, vocabulary: Vocabulary) -> None:
    cells = [random_cells(5, 1, vocabulary)]
    corpus = added(empty, "a", cells)
    other = source_of("b", vocabulary)
    with pytest.raises(CorpusError, match=r"already holds a dataset 'a'.*corpus remove"):
        corpus.commit_source(other, "a", written(corpus, "a", cells), {})
    with pytest.raises(CorpusError, match="cannot name a dataset"):
        corpus.commit_source(other, "../b", [], {})
    with pytest.raises(CorpusError, match="brings no cell"):
        corpus.commit_source(other, "b", [], {})
    with pytest.raises(CorpusError, match="does not stand in its folder"):
        corpus.commit_source(other, "b", written(corpus, "c", cells), {})
    with pytest.raises(CorpusError, match=r"no dataset 'b'\. Datasets: a"):
        corpus.remove("b")


def test_vocabularies_are_not_mixed(empty: Corpus, vocabulary: Vocabulary, local_store: Store) -> None:
    other = Vocabulary.build(vocabulary.gene_ids, vocabulary.medians * 2, window=64)
    with pytest.raises(CorpusError, match="cannot be mixed"):
        Corpus.create(empty.uri, other, local_store)
    source = Source(uri="/x", size_bytes=1, etag="1", vocabulary_digest=other.digest, recipe={})
    with pytest.raises(CorpusError, match="another vocabulary"):
        empty.commit_source(source, "a", [], {})
    assert Corpus.create(empty.uri, vocabulary, local_store).version == 0
    local_store.write(join(empty.uri, "_genescale", "vocabulary.parquet"), other.to_parquet_bytes())
    with pytest.raises(IntegrityError, match="not the one it was made with"):
        Corpus.open(empty.uri, local_store)


def test_where_there_is_no_corpus(tmp_path: Path, vocabulary: Vocabulary, local_store: Store) -> None:
    with pytest.raises(CorpusError, match="there is no corpus here"):
        Corpus.open(str(tmp_path / "nothing"), local_store)
    assert Corpus.find(str(tmp_path / "nothing"), vocabulary, local_store) is None
    assert not (tmp_path / "nothing").exists()


def test_one_flipped_bit_is_noticed(empty: Corpus, vocabulary: Vocabulary, local_store: Store) -> None:
    cells, harmless = random_cells(2_000, 1, vocabulary), 0
    corpus = added(empty, "a", [cells])
    path = Path(corpus.parts[0].uri)
    whole = path.read_bytes()
    for position in np.linspace(8, len(whole) - 8, 40, dtype=int):
        broken = bytearray(whole)
        broken[position] ^= 0x10
        path.write_bytes(bytes(broken))
        fresh = Corpus.open(corpus.uri, local_store)
        # Where the bit stands in another column, the tokens must be untouched; nowhere may they be wrong.
        with contextlib.suppress(IntegrityError):
            found = fresh.tokens(range(2_000))
            assert same(found, cells)
            harmless += 1
    assert harmless < 20, "most of a part is tokens"
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0x10
    path.write_bytes(bytes(broken))
    with pytest.raises(IntegrityError, match=path.name):
        Corpus.open(corpus.uri, local_store).tokens(range(2_000))


def test_polars_reads_the_table_and_its_parts(empty: Corpus, vocabulary: Vocabulary) -> None:
    cells = random_cells(40, 1, vocabulary)
    corpus = added(added(empty, "a", [cells[:30]]), "b", [cells[30:]])
    table = pl.scan_delta(corpus.uri).sort("dataset_id", "source_row").collect()
    assert table["input_ids"].to_list() == [cell.tolist() for cell in cells]
    assert table["dataset_id"].to_list() == ["a"] * 30 + ["b"] * 10
    assert set(table.columns) == set(corpus.schema.names)
    b = pl.scan_delta(corpus.uri).filter(pl.col("dataset_id") == "b").collect()
    assert b.height == 10
    files = pl.read_parquet(f"{corpus.uri}/dataset_id=*/*.parquet", hive_partitioning=True)
    assert files.height == 40
    assert files.schema["input_ids"] == pl.List(pl.UInt16)


def test_tokens_beyond_the_signed_range_survive_every_reader(tmp_path: Path, local_store: Store) -> None:
    """Delta Lake would declare uint16 as a signed 16-bit number."""
    wide = Vocabulary.build([f"ENSG{i:011d}" for i in range(40_000)], np.ones(40_000), window=64)
    assert wide.token_dtype is np.uint16
    corpus = Corpus.create(str(tmp_path / "wide"), wide, local_store)
    cells = [np.array([39_999, 32_768, 4], dtype=np.uint16)]
    corpus = added(corpus, "a", [cells])
    assert same(corpus.tokens([0]), cells)
    assert pl.scan_delta(corpus.uri).collect()["input_ids"].to_list() == [[39_999, 32_768, 4]]


def test_in_object_storage(s3_store: tuple[Store, str], vocabulary: Vocabulary) -> None:
    store, bucket = s3_store
    cells = random_cells(40, 1, vocabulary)
    corpus = added(Corpus.create(f"{bucket}/corpora/one", vocabulary, store), "a", [cells[:25], cells[25:]])
    corpus = pickle.loads(pickle.dumps(corpus))
    assert same(corpus.tokens(range(40)), cells)
    assert corpus.cells(["length"])["length"].to_pylist() == [cell.size for cell in cells]
    assert corpus.remove("a").n_cells == 0
    table = pl.scan_delta(corpus.uri, version=1, storage_options=store.table_options(corpus.uri)).collect()
    assert table.height == 40
    assert (Corpus.open(f"{corpus.uri}@1", store).n_cells, corpus.at_newest().version) == (40, 2)
    with pytest.raises(CorpusError, match="there is no corpus here"):
        Corpus.open(f"{bucket}/corpora/two", store)


def test_references() -> None:
    assert parse_reference("s3://b/corpus@12") == ("s3://b/corpus", 12)
    assert parse_reference("/data/me@home/corpus") == ("/data/me@home/corpus", None)
    assert parse_reference("/data/corpus") == ("/data/corpus", None)


def identity(**changes: Any) -> str:
    fields: dict[str, Any] = {"uri": "a", "size_bytes": 1, "etag": "e", "vocabulary_digest": "v", "recipe": {"x": 1}}
    return Source(**{**fields, **changes}).identity


def test_identity_changes_with_everything_that_decides_rows() -> None:
    changes = [{"uri": "b"}, {"size_bytes": 2}, {"etag": "f"}, {"vocabulary_digest": "w"}, {"recipe": {"x": 2}}]
    changes.append({"schema_version": 99})
    assert len({identity(), *(identity(**change) for change in changes)}) == len(changes) + 1


# --- replacing, files of sources, writers at once --------------------------------------------------------------------


def test_a_changed_source_takes_the_place_of_its_dataset(empty: Corpus, planted: Any) -> None:
    a, b = planted.cells(20, 1), planted.cells(30, 2)
    first = planted.add(planted.add(empty, "a", [a[:12], a[12:]]), "other", [b])
    second = planted.add(first, "a", [planted.cells(7, 3)], etag="2", replace=True)
    assert second.version == first.version + 1, "out and in, in one transaction"
    assert {d.dataset_id: d.n_cells for d in second.datasets()} == {"a": 7, "other": 30}
    assert second.is_committed(planted.source("a", etag="2").identity)
    assert not second.is_committed(planted.source("a").identity)
    old = Corpus.open(f"{first.uri}@{first.version}", first.store)
    assert planted.content(old) == planted.content(first)
    assert old.is_committed(planted.source("a").identity)
    (record, *_) = second.history()
    assert record.details["replaces"] == {"identity": planted.source("a").identity, "version": 1}
    back = planted.add(second, "a", [a[:12], a[12:]], replace=True)
    assert planted.content(back) == planted.content(first), "the first content may come back"
    assert back.is_committed(planted.source("a").identity)


def test_parts_that_stay_the_same_may_be_replaced(empty: Corpus, planted: Any) -> None:
    """Content-derived names: a new version of a dataset can share parts with the one before."""
    a, b, c = planted.cells(10, 1), planted.cells(10, 2), planted.cells(10, 3)
    first = planted.add(empty, "a", [a, b])
    second = planted.add(first, "a", [a, c], etag="2", replace=True)
    shared = {file.path for file in first.files} & {file.path for file in second.files}
    assert len(shared) == 1
    assert [cell.tolist() for cell in second.tokens(range(20))] == [cell.tolist() for cell in a + c]
    third = planted.add(second, "a", [a, c], etag="3", replace=True)
    assert (third.version, third.n_cells) == (3, 20)
    assert third.is_committed(planted.source("a", etag="3").identity)
    assert not third.is_committed(planted.source("a", etag="2").identity)


def test_replacing_is_asked_for_and_never_twice(empty: Corpus, planted: Any) -> None:
    corpus = planted.add(empty, "a", [planted.cells(5, 1)])
    with pytest.raises(CorpusError, match=r"already holds a dataset 'a'.*--replace"):
        planted.add(corpus, "a", [planted.cells(5, 2)], etag="2")
    with pytest.raises(CorpusError, match="already in this corpus"):
        planted.add(corpus, "a", [planted.cells(5, 1)], replace=True)
    assert planted.add(corpus, "new", [planted.cells(2, 1)], replace=True).n_cells == 7, (
        "nothing to replace is no error"
    )


def test_files_come_with_a_source_and_its_versions_keep_theirs(anywhere: Corpus, planted: Any) -> None:
    files = {"report.json": b'{"cells": 5}', "quarantine.parquet": b"PAR1"}
    first = planted.add(anywhere, "a", [planted.cells(5, 1)], files=files)
    assert {name: first.read_source_file("a", name) for name in first.source_files("a")} == files
    removed = first.remove("a")
    second = planted.add(removed, "a", [planted.cells(5, 1)], files={"report.json": b'{"again": true}'})
    assert second.read_source_file("a", "report.json") == b'{"again": true}'
    assert first.read_source_file("a", "report.json") == files["report.json"], "the version before has its own"
    with pytest.raises(CorpusError, match=r"no file 'repot.json'\. Did you mean 'report.json'"):
        first.read_source_file("a", "repot.json")
    with pytest.raises(CorpusError, match="no dataset 'z'"):
        first.read_source_file("z", "report.json")
    address = join(first.uri, str(first.source_files("a")["report.json"]["path"]))
    first.store.write(address, b'{"cells": 6}')
    with pytest.raises(IntegrityError, match="not what its commit recorded"):
        first.read_source_file("a", "report.json")
    first.store.delete(address)
    with pytest.raises(IntegrityError, match="gone"):
        first.read_source_file("a", "report.json")


def test_names_of_files_stay_in_their_folder(empty: Corpus, planted: Any) -> None:
    for name in ("../x", "a/b", "", ".hidden"):
        with pytest.raises(CorpusError, match="cannot name a file"):
            planted.add(empty, "a", [planted.cells(5, 1)], files={name: b""})
    assert empty.at_newest().version == 0


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


@pytest.mark.parametrize("failure", [LostRaceError, CorpusError])
def test_a_commit_whose_answer_was_lost_counts_once(
    failure: type[CorpusError], empty: Corpus, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction landed, but its writer was told that it failed."""
    commit = Table.commit

    def lost(self: Table, *arguments: Any, **options: Any) -> None:
        commit(self, *arguments, **options)
        raise failure("the connection was closed.", where=self.uri)

    monkeypatch.setattr(Table, "commit", lost)
    corpus = planted.add(empty, "a", [planted.cells(5, 1)])
    assert (corpus.version, corpus.n_cells) == (1, 5)


def test_a_commit_that_failed_is_said(empty: Corpus, planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Table, *arguments: Any, **options: Any) -> None:
        raise CorpusError("no room left.", where=self.uri)

    monkeypatch.setattr(Table, "commit", refused)
    with pytest.raises(CorpusError, match="no room left"):
        planted.add(empty, "a", [planted.cells(5, 1)])
    assert empty.at_newest().version == 0


# --- corpora of the first release ------------------------------------------------------------------------------------


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


def test_labels_are_columns_of_their_own(empty: Corpus, planted: Any) -> None:
    corpus = planted.add(empty, "a", [planted.cells(4, 1)])
    table = corpus.cells(["labels.stim", "labels.nothing", "length"])
    assert table["labels.stim"].to_pylist() == [None, "dose 1", None, "dose 3"]
    assert table["labels.nothing"].null_count == 4
    assert table.schema.field("labels.stim").type == pa.string()
    with pytest.raises(CorpusError, match="not a scalar column"):
        corpus.cells(["labels."])


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
