"""`compact` and `diff`: the same cells in fewer files, and what differs between versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.fan_out import fan_out as ray_fan_out
from genescale.ingestion.table import compact as compact_module
from genescale.ingestion.table.compact import compact
from genescale.ingestion.table.diff import compare
from genescale.ingestion.table.verify import verify
from genescale.platform.errors import ClusterError, CorpusError, SettingsError
from genescale.platform.vocabulary import Vocabulary

Merge = Callable[[list[dict[str, Any]], Any], Iterator[Any]]


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def serial(items: Sequence[Any], work: Any) -> Iterator[Any]:
        return (work(item) for item in reversed(items))

    monkeypatch.setattr(compact_module, "fan_out", serial)


@pytest.fixture
def many(anywhere: Corpus, planted: Any) -> Corpus:
    """Twelve small parts of one dataset around one of another."""
    corpus = planted.add(anywhere, "b", [planted.cells(11 + number, number) for number in range(12)])
    corpus = planted.add(corpus, "a", [planted.cells(5, 50), planted.cells(6, 51)])
    return planted.add(corpus, "c", [planted.cells(30, 60)])


def rows(corpus: Corpus) -> list[Any]:
    table = corpus.cells(["dataset_id", "source_row", "cell_id", "labels.stim"]).to_pylist()
    return [
        (*row.values(), tokens.tolist()) for row, tokens in zip(table, corpus.tokens(range(len(table))), strict=True)
    ]


def test_the_same_cells_in_the_same_order_in_fewer_parts(many: Corpus) -> None:
    before = rows(many)
    report = compact(many)
    after = many.at_newest()
    assert (report.parts_before, report.parts_after, report.version) == (14, 2, many.version + 1)
    assert [(part.dataset_id, part.rows) for part in after.parts] == [("a", 11), ("b", 198), ("c", 30)]
    assert rows(after) == before
    assert rows(Corpus.open(many.uri, many.store, version=many.version)) == before, "the version before is as it was"
    assert verify(after).ok
    assert [(d.dataset_id, d.n_cells, d.source_identity) for d in after.datasets()] == [
        (d.dataset_id, d.n_cells, d.source_identity) for d in many.datasets()
    ]
    (record, *_) = after.history()
    assert (record.operation, record.details["parts_before"], record.details["parts_after"]) == ("compact", 14, 2)
    again = compact(after)
    assert (again.parts_before, again.version) == (0, report.version), "nothing to merge, nothing committed"


def test_one_dataset_only(many: Corpus) -> None:
    report = compact(many, dataset_id="a")
    assert (report.datasets, report.parts_before) == (("a",), 2)
    assert sum(part.dataset_id == "b" for part in many.at_newest().parts) == 12
    with pytest.raises(CorpusError, match="no dataset 'z'"):
        compact(many, dataset_id="z")
    with pytest.raises(SettingsError, match="part_mib"):
        compact(many, part_mib=0)


def test_parts_grow_to_the_target_and_not_beyond(empty: Corpus, planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = planted.add(empty, "a", [planted.cells(20, number) for number in range(10)])
    largest = max(file.size_bytes for file in corpus.files)
    monkeypatch.setattr(compact_module, "MIB", 3 * largest)
    before = rows(corpus)
    compact(corpus, part_mib=1)
    after = corpus.at_newest()
    assert 3 <= len(after.parts) <= 5
    assert max(part.rows for part in after.parts) <= 80
    assert rows(after) == before


def test_removed_and_replaced_datasets_after_compaction(many: Corpus, planted: Any) -> None:
    compact(many)
    corpus = planted.add(many.at_newest(), "b", [planted.cells(3, 9)], etag="2", replace=True)
    assert {d.dataset_id: d.n_cells for d in corpus.datasets()} == {"a": 11, "b": 3, "c": 30}
    assert {d.dataset_id for d in corpus.remove("a").datasets()} == {"b", "c"}


def test_a_dataset_that_changes_meanwhile_is_left_alone(
    many: Corpus, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = compact_module.fan_out

    def interrupted(items: Any, work: Any) -> Iterator[Any]:
        answers = list(merge(items, work))
        many.remove("b")
        return iter(answers)

    monkeypatch.setattr(compact_module, "fan_out", interrupted)
    with pytest.raises(CorpusError, match="changed while it was being compacted"):
        compact(many)
    assert {d.dataset_id for d in many.at_newest().datasets()} == {"a", "c"}


def test_ingests_meanwhile_are_kept(many: Corpus, planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = compact_module.fan_out

    def beside(items: Any, work: Any) -> Iterator[Any]:
        answers = list(merge(items, work))
        planted.add(many, "late", [planted.cells(4, 99)])
        return iter(answers)

    monkeypatch.setattr(compact_module, "fan_out", beside)
    report = compact(many)
    after = many.at_newest()
    assert (report.version, len(after.parts)) == (many.version + 2, 4)
    assert {d.dataset_id for d in after.datasets()} == {"a", "b", "c", "late"}


def test_a_damaged_part_stops_it(empty: Corpus, planted: Any) -> None:
    corpus = planted.add(empty, "a", [planted.cells(20, 1), planted.cells(20, 2)])
    path = Path(corpus.parts[1].uri)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ClusterError, match=path.name):
        compact(corpus)
    assert corpus.at_newest().version == corpus.version


def test_with_ray(empty: Corpus, planted: Any, ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_module, "fan_out", ray_fan_out)
    corpus = planted.add(empty, "a", [planted.cells(20, 1), planted.cells(20, 2)])
    before = rows(corpus)
    assert compact(corpus).parts_after == 1
    assert rows(corpus.at_newest()) == before


# --- diff ------------------------------------------------------------------------------------------------------------


def test_what_differs_between_versions(empty: Corpus, planted: Any) -> None:
    first = planted.add(planted.add(empty, "a", [planted.cells(5, 1)]), "b", [planted.cells(6, 2)])
    first = planted.add(first, "same", [planted.cells(2, 3)])
    second = planted.add(first.remove("a"), "new", [planted.cells(9, 4)])
    changes = {"etag": "2", "recipe": {"min_genes": 3}}
    second = planted.add(second, "b", [planted.cells(4, 5)], replace=True, **changes)
    found = compare(first, second)
    assert ([r.dataset_id for r in found.added], [r.dataset_id for r in found.removed]) == (["new"], ["a"])
    (change,) = found.changed
    assert (change.dataset_id, change.cells) == ("b", (6, 4))
    assert change.source == {"etag": ("1", "2")}
    assert change.options == {"min_genes": (None, 3)}
    assert (found.unchanged, found.cells, found.same) == (("same",), (13, 15), False)
    back = compare(second, first)
    assert ([r.dataset_id for r in back.added], back.changed[0].cells) == (["a"], (4, 6))
    assert compare(first, Corpus.open(first.uri, first.store, version=first.version)).same


def test_across_corpora(empty: Corpus, planted: Any, tmp_path: Path, vocabulary: Vocabulary) -> None:
    one = planted.add(empty, "a", [planted.cells(5, 1)])
    other = planted.add(Corpus.create(str(tmp_path / "x"), vocabulary, one.store), "a", [planted.cells(5, 1)])
    assert compare(one, other).same, "the same source with the same options"
    wide = Vocabulary.build(vocabulary.gene_ids, vocabulary.medians * 2, window=64)
    with pytest.raises(CorpusError, match="different vocabularies"):
        compare(one, Corpus.create(str(tmp_path / "y"), wide, one.store))


def test_compaction_is_no_difference(many: Corpus) -> None:
    compact(many)
    assert compare(many, many.at_newest()).same
