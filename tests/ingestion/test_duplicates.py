"""Cells that a corpus holds already: what is found, what each policy leaves out, and that the numbers still add up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import genescale.ingestion.duplicates as duplicates
from genescale.ingestion import pipeline, plan
from genescale.ingestion.annotation.cells import CellRules
from genescale.ingestion.annotation.genes import GeneRules, map_genes
from genescale.ingestion.corpus import Corpus, NewPart, Source, dataset_folder
from genescale.ingestion.duplicates import Policy, Resolution, resolve
from genescale.ingestion.opening import open_atlas
from genescale.ingestion.plan import Unit
from genescale.ingestion.schema import part_schema, rows_table
from genescale.ingestion.table.part_files import write_rows
from genescale.ingestion.tally import Tally, binned
from genescale.ingestion.tokenise import write_part
from genescale.ingestion.unit_work import forget
from genescale.platform.errors import SettingsError
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary, read_vocabulary

Cell = int | tuple[int, bool | None]
"""Hash of a cell, or hash and is_primary_data."""


def rows(cells: Sequence[Cell], start: int, vocabulary: Vocabulary) -> pa.Table:
    pairs = [cell if isinstance(cell, tuple) else (cell, None) for cell in cells]
    genes = vocabulary.token_ids
    tokens = [genes[: 1 + abs(value) % 20].tolist() for value, _ in pairs]
    lengths = np.array([len(cell) for cell in tokens], dtype=np.int32)
    columns = {
        "cell_id": [f"cell{start + i}" for i in range(len(pairs))],
        "source_row": np.arange(start, start + len(pairs)),
        "input_ids": tokens,
        "length": lengths,
        "total_counts": lengths * 3.0,
        "n_genes": lengths,
        "content_hash": [value for value, _ in pairs],
        "is_primary_data": [primary for _, primary in pairs],
    }
    return rows_table(columns, part_schema(vocabulary.token_dtype))


def new_parts(corpus: Corpus, name: str, *parts: Sequence[Cell]) -> list[NewPart]:
    made, start = [], 0
    for cells in parts:
        table = rows(cells, start, corpus.vocabulary)
        made.append(write_rows(table, start, dataset_folder(name), corpus_uri=corpus.uri, store=corpus.store))
        start += len(cells)
    return made


def added(corpus: Corpus, name: str, parts: Sequence[NewPart], **options: Any) -> Corpus:
    facts = {"size_bytes": 1, "recipe": {}, "vocabulary_digest": corpus.vocabulary.digest}
    source = Source(uri=f"/atlas/{name}.h5ad", etag=str(options.get("replace", False)), **facts)
    return corpus.commit_source(source, name, parts, {}, **options)


def resolved(corpus: Corpus, policy: Policy, *parts: Sequence[Cell], name: str = "new", **options: Any) -> Resolution:
    return resolve(new_parts(corpus, name, *parts), corpus, policy=policy, dataset_id=name, **options)


def hashes(corpus: Corpus, dataset: str = "new") -> list[int]:
    numbers = [i for i, part in enumerate(corpus.parts) if part.dataset_id == dataset]
    values: list[int] = corpus.cells(["content_hash"], parts=numbers).column(0).to_pylist()
    return values


def test_the_report_counts_and_changes_nothing(anywhere: Corpus) -> None:
    corpus = added(anywhere, "lung", new_parts(anywhere, "lung", [1, 2, -3], [4]))
    corpus = added(corpus, "heart", new_parts(corpus, "heart", [3, 4, 5]))
    parts = new_parts(corpus, "new", [1, 2, 4, 9], [9, 9, 7])
    found = resolve(parts, corpus, policy="report", dataset_id="new")
    assert found.parts == tuple(parts)
    assert found.to_dict() == {
        "policy": "report",
        "matches": {"heart": 1, "lung": 3},
        "within": 2,
        "dropped": 0,
        "superseded": 0,
        "not_compared": 0,
        "repeated_names": 0,
    }
    assert found.dropped_tally == Tally()
    assert found.notes == (
        "1 cells are count-identical to cells of dataset heart",
        "3 cells are count-identical to cells of dataset lung",
        "2 cells are count-identical to an earlier cell of the same file",
    )


def test_keep_first_leaves_out_what_is_there(anywhere: Corpus) -> None:
    corpus = added(anywhere, "lung", new_parts(anywhere, "lung", [1, 2], [3]))
    parts = new_parts(corpus, "new", [5, 1, 6], [7, 8], [3, 2], [5, 9])
    found = resolve(parts, corpus, policy="keep_first", dataset_id="new")
    assert found.parts[1] == parts[1], "a part that loses no cell stays as it is"
    assert (found.parts[0].rows, found.parts[2].rows, len(found.parts)) == (2, 1, 3), "an empty part is left out"
    assert found.parts[0].path != parts[0].path
    assert found.dropped.to_pylist() == [
        {"source_row": row, "cell_id": f"cell{row}", "reason": "duplicate_cell", "detail": detail}
        for row, detail in (
            (1, "same counts as a cell of dataset lung"),
            (5, "same counts as a cell of dataset lung"),
            (6, "same counts as a cell of dataset lung"),
            (7, "same counts as another cell of the same file"),
        )
    ]
    corpus = added(corpus, "new", found.parts)
    assert hashes(corpus) == [5, 6, 7, 8, 9]
    assert "4 count-identical cells left out" in found.notes
    again = resolve(parts, corpus, policy="keep_first", dataset_id="new", replaces=True)
    assert again.parts == found.parts, "the same cells go, into files of the same name and content"


def test_the_numbers_add_up_after_cells_are_left_out(empty: Corpus) -> None:
    corpus = added(empty, "lung", new_parts(empty, "lung", [1, 2, 13]))
    cells = [1, 2, 13, 14, 15, 15]
    found = resolved(corpus, "keep_first", cells)

    def tally_of(some: Sequence[int]) -> Tally:
        lengths = rows(some, 0, corpus.vocabulary).column("length").to_numpy()
        bins = {"length_bins": binned(lengths), "depth_bins": binned(lengths * 3.0), "genes_bins": binned(lengths)}
        return Tally(read=len(some), kept=len(some), tokens=int(lengths.sum()), **bins)

    tally, left = tally_of(cells), tally_of([14, 15])
    tally.drop(found.dropped_tally)
    assert (tally.read, tally.kept, tally.dropped) == (6, 2, {"duplicate_cell": 4})
    assert (tally.tokens, tally.length_bins) == (left.tokens, left.length_bins)
    assert (tally.depth_bins, tally.genes_bins) == (left.depth_bins, left.genes_bins)


@pytest.mark.parametrize(
    ("present", "new", "kept"),
    [
        ((1, True), [(1, True)], []),
        ((1, True), [(1, False)], []),
        ((1, False), [(1, False)], []),
        ((1, False), [(1, True)], [1]),
        ((1, None), [(1, True)], []),
        ((1, False), [(1, None)], [1]),
        ((1, False), [(1, True), (1, True), (1, False)], [1]),
        ((9, True), [(1, False), (1, True), (2, False), (2, False)], [1, 2]),
    ],
)
def test_keep_primary_prefers_the_primary_copy(present: Cell, new: list[Cell], kept: list[int], empty: Corpus) -> None:
    corpus = added(empty, "old", new_parts(empty, "old", [present]))
    found = resolved(corpus, "keep_primary", [*new, 100])
    corpus = added(corpus, "new", found.parts)
    assert hashes(corpus) == [*kept, 100]
    beside = bool(kept) and present != (9, True)
    assert (found.to_dict()["superseded"] == 1) == beside
    assert any("stand beside secondary copies" in note for note in found.notes) == beside


def test_the_later_primary_row_is_the_one_kept(empty: Corpus) -> None:
    found = resolved(empty, "keep_primary", [(1, False), (5, True)], [(1, True)])
    assert found.dropped.column("source_row").to_pylist() == [0]


def test_a_replaced_dataset_is_not_compared_with_itself(empty: Corpus) -> None:
    corpus = added(empty, "lung", new_parts(empty, "lung", [1, 2]))
    corpus = added(corpus, "heart", new_parts(corpus, "heart", [2, 3]))
    found = resolved(corpus, "keep_first", [1, 2, 4], name="lung", replaces=True)
    assert found.matches == {"heart": 1}
    corpus = added(corpus, "lung", found.parts, replace=True)
    assert hashes(corpus, "lung") == [1, 4]


def test_cells_without_a_hash_are_counted(empty: Corpus) -> None:
    table = rows([1, 2, 3], 0, empty.vocabulary)
    table = table.set_column(table.schema.get_field_index("content_hash"), "content_hash", pa.array([1, None, None]))
    table = table.cast(part_schema(empty.vocabulary.token_dtype))
    part = write_rows(table, 0, dataset_folder("old"), corpus_uri=empty.uri, store=empty.store)
    found = resolved(added(empty, "old", [part]), "report", [1, 2])
    assert (found.matches, found.to_dict()["not_compared"]) == ({"old": 1}, 2)
    assert "2 cells of the corpus carry no content hash and were not compared" in found.notes


def test_repeated_names_are_told(empty: Corpus) -> None:
    table = rows([1, 2, 3, 4], 0, empty.vocabulary)
    table = table.set_column(0, table.schema.field(0), pa.array(["a", "b", "a", "a"]))
    part = write_rows(table, 0, dataset_folder("new"), corpus_uri=empty.uri, store=empty.store)
    found = resolve([part], empty, policy="keep_first", dataset_id="new")
    assert (found.parts, found.to_dict()["repeated_names"]) == ((part,), 2)
    assert found.notes == ("2 cells share their name with another cell; rows tell them apart",)


def test_off_and_unknown_policies(empty: Corpus) -> None:
    corpus = added(empty, "lung", new_parts(empty, "lung", [1]))
    found = resolved(corpus, "off", [1, 1])
    assert (dict(found.matches), found.n_within, found.dropped.num_rows) == ({}, 0, 0)
    with pytest.raises(SettingsError, match=r"'keep_frist' is no policy for duplicates. Did you mean 'keep_first'"):
        resolved(corpus, "keep_frist", [1])  # type: ignore[arg-type]


def naive(present: list[tuple[int, bool | None]], new: list[tuple[int, bool | None]], policy: str) -> list[int]:
    """Rows to leave out, cell by cell."""
    dropped = []
    for i, (value, primary) in enumerate(new):
        worse = primary is False
        before = [p is False for v, p in present if v == value]
        before += [p is False for j, (v, p) in enumerate(new) if v == value and j < i]
        after = [p is False for j, (v, p) in enumerate(new) if v == value and j > i]
        if policy == "keep_first" and before:
            dropped.append(i)
        if policy == "keep_primary" and (any(b <= worse for b in before) or any(a < worse for a in after)):
            dropped.append(i)
    return dropped


@pytest.mark.parametrize("policy", ["keep_first", "keep_primary"])
@pytest.mark.parametrize("held_bytes", [0, 1 << 20])
def test_random_sources_agree_with_a_comparison_cell_by_cell(
    policy: Policy, held_bytes: int, empty: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "MOST_HELD_BYTES", held_bytes)
    monkeypatch.setattr(duplicates, "PARTS_AT_ONCE", 2)
    rng = np.random.default_rng(7)
    corpus, present = empty, []
    for number in range(6):
        cells = [
            (int(value), (True, False, None)[mark])
            for value, mark in zip(rng.integers(-30, 30, 25), rng.integers(0, 3, 25), strict=True)
        ]
        found = resolved(corpus, policy, cells[:10], cells[10:11], cells[11:], name=f"d{number}")
        expected = naive(present, cells, policy)
        assert found.dropped.column("source_row").to_pylist() == expected
        left = [cell for i, cell in enumerate(cells) if i not in expected]
        if left:
            corpus = added(corpus, f"d{number}", found.parts)
            assert hashes(corpus, f"d{number}") == [value for value, _ in left]
            present += left
    if policy == "keep_first":
        values = [value for value, _ in present]
        assert len(values) == len(set(values)), "every cell once"


@pytest.mark.shared
def test_two_files_of_the_same_real_cells(shared_data: Path, tmp_path: Path, local_store: Store) -> None:
    """One lab's atlas twice: counts in X with Ensembl ids, and counts in raw.X under symbols, with 62 more genes."""
    known = read_vocabulary(str(shared_data / "vocabularies" / "token_dictionary_gc104M.pkl"), local_store)
    corpus = Corpus.create(str(tmp_path / "corpus"), known, local_store)
    found = []
    for name, file in (("a", "pbmc3k_counts_ensembl.h5ad"), ("b", "pbmc3k_lognorm_X_counts_in_raw.h5ad")):
        with open_atlas(str(shared_data / "atlases" / file), local_store) as atlas:
            unit = Unit(uri=atlas.uri, etag=atlas.entry.etag, slot=atlas.slot, start=0, stop=atlas.n_cells)
            answer, _ = write_part(
                unit,
                atlas,
                map_genes(atlas, known, rules=GeneRules()),
                vocabulary=known,
                cell_rules=CellRules(),
                obs_mapping={},
                allow_fractional=False,
                bad_values="refuse",
                corpus_uri=corpus.uri,
                dataset_id=name,
                store=local_store,
            )
        parts = [NewPart(**answer["part"])]
        found.append(resolve(parts, corpus, policy="keep_first", dataset_id=name))
        corpus = added(corpus, name, parts)
    first, second = found
    assert (dict(first.matches), first.n_within) == ({}, 0)
    assert (dict(second.matches), second.n_within, second.parts) == ({"a": 2_638}, 0, ())
    assert second.notes[0] == "2,638 cells are count-identical to cells of dataset a"


def test_what_another_run_committed_meanwhile_counts(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run of hours compares with what stands in the corpus when it commits, not with what stood there at first."""
    for module in (pipeline, plan):
        monkeypatch.setattr(module, "fan_out", lambda items, work: map(work, items))
    known = SimpleNamespace(vocabulary=vocabulary, table=lambda config: None)
    monkeypatch.setattr(pipeline, "_shared", lambda *_: known)
    uri, config, inspect = str(tmp_path / "corpus"), pipeline.IngestConfig(duplicates="keep_first"), plan.inspect_files
    paths = [str(write_atlas(name, counts_of(20))) for name in ("a.h5ad", "b.h5ad")]

    def ingest(path: str) -> Any:
        return pipeline.ingest([path], uri, vocabulary=vocabulary, store=local_store, config=config)

    def beside(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(pipeline, "inspect_files", inspect)
        assert ingest(paths[0]).kept == 20
        return inspect(*arguments, **options)

    Corpus.create(uri, vocabulary, local_store)
    monkeypatch.setattr(pipeline, "inspect_files", beside)
    (source,) = ingest(paths[1]).sources
    forget()
    assert source.duplicates["matches"] == {"a": 20}
    assert Corpus.open(uri, local_store).n_cells == 20
