"""A changed source takes the place of its dataset, once, with its files; commits whose answer was lost count once."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.table.delta_table import LostRaceError, Table
from genescale.platform.errors import CorpusError, IntegrityError
from genescale.platform.storage import join


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


def test_labels_are_columns_of_their_own(empty: Corpus, planted: Any) -> None:
    corpus = planted.add(empty, "a", [planted.cells(4, 1)])
    table = corpus.cells(["labels.stim", "labels.nothing", "length"])
    assert table["labels.stim"].to_pylist() == [None, "dose 1", None, "dose 3"]
    assert table["labels.nothing"].null_count == 4
    assert table.schema.field("labels.stim").type == pa.string()
    with pytest.raises(CorpusError, match="not a scalar column"):
        corpus.cells(["labels."])
