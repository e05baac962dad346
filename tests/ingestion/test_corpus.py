"""The corpus: commits are whole and once, versions stay readable, and every reader sees the same cells."""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from genescale.ingestion.corpus import Corpus, NewPart, Source, dataset_folder, parse_reference
from genescale.ingestion.schema import part_schema, rows_table
from genescale.ingestion.table.parts import ROW_GROUP_CELLS, part_bytes
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


# --- corpora of the first release ------------------------------------------------------------------------------------
