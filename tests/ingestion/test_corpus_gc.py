"""`gc`: what no version names goes after its grace period; what any version names is never touched."""

from __future__ import annotations

import datetime
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genescale.ingestion.corpus import Corpus, dataset_folder
from genescale.ingestion.table.gc import collect_garbage, parse_age
from genescale.ingestion.table.verify import verify
from genescale.platform.errors import CorpusError, IntegrityError, SettingsError
from genescale.platform.storage import join

AT_ONCE, DAY = datetime.timedelta(0), datetime.timedelta(days=1)


def stored(corpus: Corpus) -> dict[str, int]:
    return {entry.uri.removeprefix(f"{corpus.uri}/"): entry.size_bytes for entry in corpus.store.list(corpus.uri)}


def test_a_late_writers_files_go_and_everything_named_stays(anywhere: Corpus, planted: Any) -> None:
    corpus = planted.add(anywhere, "a", [planted.cells(20, 1), planted.cells(9, 2)], files={"report.json": b"{}"})
    corpus = planted.add(corpus, "a", [planted.cells(30, 3)], etag="2", replace=True, files={"report.json": b"[]"})
    corpus = planted.add(corpus, "b", [planted.cells(5, 4)]).remove("b")
    before = stored(corpus)
    late = planted.parts(corpus, "c", [planted.cells(7, 5)])[0]
    left = ("_genescale/sources/0123456789abcdef/abcdef-report.json", "_genescale/shuffle/key/run-00000000.arrow")
    for path in left:
        corpus.store.write(join(corpus.uri, path), b"left behind")
    corpus.store.write(join(corpus.uri, "notes", "readme.txt"), b"somebody's own")
    assert collect_garbage(corpus, older_than=DAY).deleted == ()
    tried = collect_garbage(corpus, older_than=AT_ONCE, dry_run=True)
    assert stored(corpus).keys() == before.keys() | {late.path, *left, "notes/readme.txt"}
    report = collect_garbage(corpus, older_than=AT_ONCE)
    assert report.deleted == tried.deleted
    assert {entry.uri.removeprefix(f"{corpus.uri}/") for entry in report.deleted} == {late.path, *left}
    assert report.size_bytes == late.size_bytes + 2 * len(b"left behind")
    assert stored(corpus) == {**before, "notes/readme.txt": 14}
    for version in range(corpus.version + 1):
        assert verify(Corpus.open(corpus.uri, corpus.store, version=version)).ok, version
    assert collect_garbage(corpus, older_than=AT_ONCE).deleted == ()


def test_only_files_beyond_the_grace_period_go(empty: Corpus, planted: Any) -> None:
    old, young = planted.parts(empty, "c", [planted.cells(7, 5), planted.cells(8, 6)])
    hours_ago = datetime.datetime.now().timestamp() - 5 * 3600
    os.utime(join(empty.uri, old.path), (hours_ago, hours_ago))
    report = collect_garbage(empty, older_than=parse_age("4h"))
    assert [entry.uri for entry in report.deleted] == [join(empty.uri, old.path)]
    assert [entry.uri for entry in report.young] == [join(empty.uri, young.path)]
    assert not Path(empty.uri, old.path).exists()
    assert Path(empty.uri, young.path).exists()


@pytest.mark.parametrize("seed", range(4))
def test_any_history_survives(seed: int, empty: Corpus, planted: Any) -> None:
    """Random adds, replacements, removals and litter: after gc every version reads what it read before."""
    rng, corpus, here, litter = np.random.default_rng(seed), empty, set[str](), 0
    for step in range(14):
        name, cells = f"d{rng.integers(4)}", [planted.cells(int(rng.integers(1, 20)), int(rng.integers(6)))]
        action = rng.integers(4)
        if action == 3:
            litter += len(planted.parts(corpus, f"lost{step}", cells))
        elif action == 2 and name in here:
            corpus, here = corpus.remove(name), here - {name}
        else:
            # Few different cells, so that parts come back with the same names as earlier ones.
            corpus, here = planted.add(corpus, name, cells, etag=str(step), replace=name in here), here | {name}
    versions = [Corpus.open(corpus.uri, corpus.store, version=number) for number in range(corpus.version + 1)]
    before = [planted.content(version) for version in versions]
    assert len(collect_garbage(corpus, older_than=AT_ONCE).deleted) == litter
    versions = [Corpus.open(corpus.uri, corpus.store, version=number) for number in range(corpus.version + 1)]
    assert [planted.content(version) for version in versions] == before


def test_writers_beside_gc_lose_nothing(empty: Corpus, planted: Any) -> None:
    """With a grace period, gc may run at any moment of an ingest."""
    stop, faults = threading.Event(), list[BaseException]()

    def clean() -> None:
        try:
            while not stop.is_set():
                collect_garbage(empty, older_than=datetime.timedelta(seconds=60))
        except BaseException as error:  # noqa: BLE001 - raised again below
            faults.append(error)

    thread = threading.Thread(target=clean)
    thread.start()
    try:
        corpus = empty
        for number in range(12):
            corpus = planted.add(corpus, f"d{number}", [planted.cells(4, number)], files={"report.json": b"{}"})
    finally:
        stop.set()
        thread.join()
    assert not faults
    assert verify(corpus).ok


def test_a_file_that_is_written_again_meanwhile_stays(
    empty: Corpus, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that is ingested once more gives parts of the same names as the run that was killed."""
    cells, delete, hours_ago = [planted.cells(7, 5), planted.cells(8, 6)], empty.store.delete, 1e9
    planted.parts(empty, "a", cells[:1])
    for part in [*planted.parts(empty, "a", cells[:1]), *planted.parts(empty, "b", cells)]:
        os.utime(join(empty.uri, part.path), (hours_ago, hours_ago))

    def beside(uri: str) -> None:
        monkeypatch.undo()
        planted.add(empty, "b", cells)
        delete(uri)

    monkeypatch.setattr(empty.store, "delete", beside)
    assert len(collect_garbage(empty, older_than=DAY).deleted) == 1
    assert verify(empty.at_newest()).ok


def test_a_part_that_gc_took_is_never_committed(empty: Corpus, planted: Any) -> None:
    parts = planted.parts(empty, "a", [planted.cells(5, 1)])
    collect_garbage(empty, older_than=AT_ONCE)
    with pytest.raises(IntegrityError, match="gone before its commit"):
        empty.commit_source(planted.source("a"), "a", parts, {})


def test_a_log_with_a_gap_deletes_nothing(empty: Corpus, planted: Any) -> None:
    corpus = planted.add(planted.add(empty, "a", [planted.cells(5, 1)]), "b", [planted.cells(5, 2)])
    planted.parts(corpus, "lost", [planted.cells(5, 3)])
    first = Path(corpus.uri) / "_delta_log" / f"{1:020d}.json"
    text = first.read_bytes()
    before = stored(corpus)
    for damage in (first.unlink, lambda: first.write_bytes(text[:40])):
        damage()
        with pytest.raises(CorpusError, match="commit"):
            collect_garbage(corpus, older_than=AT_ONCE)
        assert {path for path in before if "_delta_log" not in path} <= stored(corpus).keys()
    assert dataset_folder("lost") in "".join(stored(corpus))


@pytest.mark.parametrize("text", ["", "1", "h", "1w", "-3h", "1 h 5"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(SettingsError, match="--older-than"):
        parse_age(text)
    assert parse_age("1.5h") == datetime.timedelta(minutes=90)
