"""`shuffle`: every cell once, in an order that depends on nothing but the seed and the cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.table import compact as compact_module
from genescale.ingestion.table import shuffle as shuffle_module
from genescale.ingestion.table import shuffle_stages
from genescale.ingestion.table.gc import collect_garbage, parse_age
from genescale.ingestion.table.shuffle import SCRATCH_FOLDER, ShuffleConfig, shuffle
from genescale.ingestion.table.shuffle_order import buckets, place_hashes
from genescale.ingestion.table.verify import verify
from genescale.platform.errors import ClusterError, CorpusError, IntegrityError
from genescale.platform.storage import join

PINNED = [2200152310434931078, 1715537843659101872]
SMALL = {"part_cells": 100, "row_group_cells": 30}


def pool_of(workers: int) -> Callable[..., Iterator[Any]]:
    """A fan_out of threads that answers in any order."""

    def run(items: Sequence[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
        with ThreadPoolExecutor(workers) as pool:
            for future in as_completed([pool.submit(work, item) for item in items]):
                yield future.result()

    return run


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Run tasks in threads of this process instead of Ray's workers."""

    def use(workers: int) -> None:
        monkeypatch.setattr(shuffle_stages, "fan_out", pool_of(workers))
        monkeypatch.setattr(compact_module, "fan_out", pool_of(workers))

    use(2)
    return use


@pytest.fixture
def three(empty: Corpus, planted: Any) -> Corpus:
    """Three datasets in five parts, 700 cells."""
    corpus = planted.add(empty, "b", [planted.cells(100, 1), planted.cells(130, 2)])
    corpus = planted.add(corpus, "a", [planted.cells(200, 3)])
    return planted.add(corpus, "c", [planted.cells(150, 4), planted.cells(120, 5)])


def shuffled(source: Corpus, folder: Path, **options: Any) -> Corpus:
    shuffle(source, str(folder), config=ShuffleConfig(**{**SMALL, **options}))
    return Corpus.open(str(folder), source.store)


def digests(corpus: Corpus) -> list[str]:
    return [file.path for file in corpus.files]


def order(corpus: Corpus) -> list[tuple[str, int]]:
    table = corpus.cells(["dataset_id", "source_row"])
    return list(zip(table["dataset_id"].to_pylist(), table["source_row"].to_pylist(), strict=True))


def test_every_cell_is_there_once_with_all_it_had(
    three: Corpus, tmp_path: Path, planted: Any, threads: Callable[[int], None]
) -> None:
    corpus = shuffled(three, tmp_path / "out")
    assert planted.content(corpus) == planted.content(three)
    assert (corpus.layout, corpus.n_cells) == ("shuffled", 700)
    assert {part.dataset_id for part in corpus.parts} == {""}
    names = [name for name in corpus.schema.names if name not in ("input_ids", "labels")] + ["labels.stim"]
    keys = [("dataset_id", "ascending"), ("source_row", "ascending")]
    assert corpus.cells(names).sort_by(keys).equals(three.cells(names).sort_by(keys))
    assert verify(corpus).ok
    assert [(d.dataset_id, d.n_cells, d.source_uri, d.source_identity) for d in corpus.datasets()] == [
        (d.dataset_id, d.n_cells, d.source_uri, d.source_identity) for d in three.datasets()
    ]


def test_the_order_is_random_and_parts_hold_all_datasets(
    three: Corpus, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    corpus = shuffled(three, tmp_path / "out")
    assert 6 <= len(corpus.parts) <= 8
    for number, part in enumerate(corpus.parts):
        assert 60 < part.rows < 145
        names = Counter(corpus.cells(["dataset_id"], parts=[number])["dataset_id"].to_pylist())
        assert set(names) == {"a", "b", "c"}
    rows = [row for name, row in order(corpus) if name == "a"]
    assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.2
    assert order(corpus) != order(shuffled(three, tmp_path / "other", seed=1))


@pytest.mark.parametrize("workers", [1, 4])
def test_the_result_depends_on_cells_and_seed_only(
    workers: int,
    three: Corpus,
    tmp_path: Path,
    planted: Any,
    threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other workers, other runs, other parts, other order of ingestion: the same bytes."""
    expected = digests(shuffled(three, tmp_path / "expected"))
    threads(workers)
    monkeypatch.setattr(shuffle_stages, "RUN_BYTES", 1)
    assert digests(shuffled(three, tmp_path / "out")) == expected
    other = Corpus.create(str(tmp_path / "source"), three.vocabulary, three.store)
    cells = {"a": planted.cells(200, 3), "b": planted.cells(100, 1) + planted.cells(130, 2)}
    cells["c"] = planted.cells(150, 4) + planted.cells(120, 5)
    for name in ("c", "a", "b"):
        other = planted.add(other, name, [cells[name][:77], cells[name][77:]])
    assert planted.content(other) == planted.content(three)
    rows = order(shuffled(other, tmp_path / "again"))
    assert rows == order(Corpus.open(str(tmp_path / "expected"), three.store))


def test_ray_gives_what_threads_give(
    three: Corpus, tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_ray = shuffled(three, tmp_path / "ray")
    monkeypatch.setattr(shuffle_stages, "fan_out", pool_of(3))
    assert digests(with_ray) == digests(shuffled(three, tmp_path / "threads"))


def test_new_datasets_are_appended_and_only_they_are_read(
    three: Corpus, tmp_path: Path, planted: Any, threads: Callable[[int], None]
) -> None:
    first = shuffled(three, tmp_path / "out")
    more = planted.add(three, "new", [planted.cells(250, 9)])
    for file in three.files:
        Path(three.uri, file.path).rename(tmp_path / file.path.replace("/", "_"))
    report = shuffle(more, first.uri, config=ShuffleConfig(**SMALL))
    assert (report.datasets, report.cells, report.seed) == (("new",), 250, 0)
    for file in three.files:
        (tmp_path / file.path.replace("/", "_")).rename(Path(three.uri, file.path))
    second = Corpus.open(first.uri, first.store)
    assert digests(second)[: len(first.files)] == digests(first)
    assert planted.content(second) == planted.content(more)
    assert planted.content(Corpus.open(f"{first.uri}@{first.version}", first.store)) == planted.content(three)
    assert [d.dataset_id for d in second.datasets()] == ["a", "b", "c", "new"]
    assert verify(second).ok
    assert shuffle(more, first.uri, config=ShuffleConfig(**SMALL)).datasets == ()
    assert second.at_newest().version == second.version, "nothing new, no commit"


def test_what_left_or_changed_asks_for_a_rebuild(
    three: Corpus, tmp_path: Path, planted: Any, threads: Callable[[int], None]
) -> None:
    first = shuffled(three, tmp_path / "out", seed=5)
    changed = planted.add(three.remove("a"), "b", [planted.cells(90, 7)], etag="2", replace=True)
    with pytest.raises(CorpusError, match=r"removed: a; replaced: b.*--rebuild"):
        shuffled(changed, tmp_path / "out")
    rebuilt = shuffled(changed, tmp_path / "out", rebuild=True)
    assert planted.content(rebuilt) == planted.content(changed)
    assert [d.dataset_id for d in rebuilt.datasets()] == ["b", "c"]
    assert digests(rebuilt) != digests(first)
    assert planted.content(Corpus.open(first.uri, first.store, version=first.version)) == planted.content(three)
    assert verify(rebuilt).ok


def test_compaction_of_the_source_changes_nothing(
    three: Corpus, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    first = shuffled(three, tmp_path / "out")
    compact_module.compact(three)
    compacted = three.at_newest()
    assert len(compacted.parts) == 3
    assert shuffle(compacted, first.uri, config=ShuffleConfig(**SMALL)).datasets == ()
    assert order(shuffled(compacted, tmp_path / "again")) == order(first)


def test_a_shuffle_that_was_cut_off_goes_on(
    three: Corpus, tmp_path: Path, planted: Any, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle_stages, "RUN_BYTES", 1)
    expected = digests(shuffled(three, tmp_path / "expected"))
    gathered, calls = shuffle_stages._gathered, []

    def failing(ranges: Any, job: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise CorpusError("out of luck.")
        return gathered(ranges, job)

    monkeypatch.setattr(shuffle_stages, "_gathered", failing)
    with pytest.raises(ClusterError, match=r"out of luck.*goes on where this run stopped"):
        shuffled(three, tmp_path / "out")
    out = Corpus.open(str(tmp_path / "out"), three.store)
    assert (out.version, out.n_cells) == (0, 0)
    calls.clear()
    monkeypatch.setattr(shuffle_stages, "_gathered", lambda *a: (calls.append(1), gathered(*a))[1])
    monkeypatch.setattr(shuffle_stages, "_written_run", lambda *a: pytest.fail("the runs were there"))
    assert digests(shuffled(three, tmp_path / "out")) == expected
    assert len(calls) == len(expected) - 3
    assert not (tmp_path / "out" / SCRATCH_FOLDER).exists() or not any((tmp_path / "out" / SCRATCH_FOLDER).iterdir())


def test_what_cannot_be_shuffled(three: Corpus, tmp_path: Path, planted: Any, threads: Callable[[int], None]) -> None:
    corpus = shuffled(three, tmp_path / "out", seed=3)
    with pytest.raises(CorpusError, match="is a shuffled corpus"):
        shuffle(corpus, str(tmp_path / "twice"))
    with pytest.raises(CorpusError, match="the corpus itself"):
        shuffle(three, three.uri)
    with pytest.raises(CorpusError, match=r"with the seed 3.*--rebuild"):
        shuffled(three, tmp_path / "out", seed=4)
    with pytest.raises(CorpusError, match="is a shuffled corpus"):
        corpus.remove("a")
    with pytest.raises(CorpusError, match="is a shuffled corpus"):
        planted.add(corpus, "z", [planted.cells(3, 1)])
    with pytest.raises(CorpusError, match="is a shuffled corpus"):
        compact_module.compact(corpus)
    with pytest.raises(CorpusError, match="is a shuffled corpus"):
        Corpus.find(corpus.uri, corpus.vocabulary, corpus.store)
    with pytest.raises(CorpusError, match="layout is 'datasets'"):
        shuffle(three, _other(three, tmp_path))
    elsewhere = Corpus.create(str(tmp_path / "elsewhere"), three.vocabulary, three.store)
    elsewhere = planted.add(elsewhere, "a", [planted.cells(200, 3)])
    with pytest.raises(CorpusError, match="it was shuffled from"):
        shuffled(elsewhere, tmp_path / "out")


def _other(three: Corpus, tmp_path: Path) -> str:
    return Corpus.create(str(tmp_path / "plain"), three.vocabulary, three.store).uri


def test_other_readers_and_gc(three: Corpus, tmp_path: Path, planted: Any, threads: Callable[[int], None]) -> None:
    corpus = shuffled(three, tmp_path / "out")
    table = pl.scan_delta(corpus.uri).select("dataset_id", "source_row", "input_ids").collect()
    found = sorted((d, r, tuple(t)) for d, r, t in table.iter_rows())
    assert found == planted.content(three)
    corpus.store.write(join(corpus.uri, "shuffled", "part-0000000099-late.parquet"), b"late")
    assert len(collect_garbage(corpus, older_than=parse_age("0s")).deleted) == 1
    assert planted.content(corpus) == planted.content(three)


def test_in_object_storage(anywhere: Corpus, planted: Any, threads: Callable[[int], None]) -> None:
    source = planted.add(anywhere, "a", [planted.cells(120, 1)])
    source = planted.add(source, "b", [planted.cells(80, 2)])
    output = f"{source.uri}-shuffled"
    shuffle(source, output, config=ShuffleConfig(**SMALL))
    corpus = Corpus.open(output, source.store)
    assert planted.content(corpus) == planted.content(source)
    assert not source.store.list(join(output, SCRATCH_FOLDER))


def test_training_reads_a_shuffled_corpus_like_any_other(
    three: Corpus, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    batches = pytest.importorskip("genescale.training.batches")
    corpus = shuffled(three, tmp_path / "out")
    cells = batches.CorpusCells(corpus)
    assert [cell.size for cell in cells.tokens(range(corpus.n_cells))] == cells.lengths.tolist()


def test_hashes_are_spread_and_never_shared() -> None:
    rows = np.arange(200_000)
    hashes = place_hashes(7, "lung", rows)
    assert len(np.unique(hashes)) == len(rows)
    counts = np.bincount(buckets(hashes, 50), minlength=50)
    assert counts.min() > 3_600
    assert counts.max() < 4_400
    assert not np.array_equal(hashes, place_hashes(8, "lung", rows))
    assert not np.array_equal(hashes, place_hashes(7, "liver", rows))
    # Pinned: a corpus that was shuffled years ago is added to in the same order.
    assert place_hashes(0, "a", [0, 1]).tolist() == PINNED
    rising = np.sort(hashes)
    assert np.all(np.diff(buckets(rising, 7)) >= 0)


def test_a_part_that_gc_took_is_never_committed(
    three: Corpus, tmp_path: Path, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shuffle that goes on after a day takes over parts that are old enough to be deleted."""
    made, output = shuffle_module.make_parts, str(tmp_path / "out")

    def beside_gc(*arguments: Any) -> Any:
        parts = made(*arguments)
        collect_garbage(Corpus.open(output, three.store), older_than=parse_age("0s"))
        return parts

    monkeypatch.setattr(shuffle_module, "make_parts", beside_gc)
    with pytest.raises(IntegrityError, match="gone before its commit"):
        shuffled(three, tmp_path / "out")
    monkeypatch.setattr(shuffle_module, "make_parts", made)
    assert verify(shuffled(three, tmp_path / "out")).ok
