"""Ingestion end to end on Ray: each cell once, each loss counted, each bad file refused without stopping the others."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.pipeline import IngestConfig, ingest
from genescale.platform.errors import AtlasError, CorpusError, SettingsError
from genescale.platform.rank_value import rank_value_tokens
from genescale.platform.storage import Store, join
from genescale.platform.vocabulary import Vocabulary

pytestmark = pytest.mark.usefixtures("ray_local")


class Recorder:
    """A Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.phases: list[tuple[int | None, str]] = []
        self.done: Counter[str] = Counter()

    def start(self, total: int | None, unit: str) -> None:
        self.phases.append((total, unit))

    def advance(self, done: int = 1, note: str = "") -> None:
        self.done[self.phases[-1][1]] += done


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_cell_once_with_the_tokens_that_serving_gives(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    counts = {"one": counts_of(150, seed=1), "two": counts_of(90, seed=2)}
    for name, matrix in counts.items():
        write_atlas(f"{name}.h5ad", matrix, folder=tmp_path / "atlas", obs={"donor_id": [f"d{name}"] * matrix.shape[0]})
    progress = Recorder()
    config = IngestConfig(unit_nonzeros=1_000)
    report = ingest(
        [str(tmp_path / "atlas")], str(tmp_path / "corpus"), vocabulary=vocabulary, store=local_store, config=config,
        progress=progress,
    )  # fmt: skip
    assert report.ok
    assert (report.read, report.kept, report.dropped, report.version) == (240, 240, {}, 2)
    assert [(s.dataset_id, s.status, s.tally.kept) for s in report.sources] == [
        ("one", "ingested", 150), ("two", "ingested", 90),
    ]  # fmt: skip
    assert progress.phases == [(2, "files"), (240, "cells")]
    assert progress.done == {"files": 2, "cells": 240}

    corpus = Corpus.open(report.corpus_uri, local_store)
    assert len(corpus.parts) > 4, "small units make several parts"
    table = corpus.cells(["dataset_id", "source_row", "cell_id", "donor_id", "total_counts", "n_genes", "length"])
    assert Counter(table["dataset_id"].to_pylist()) == {"one": 150, "two": 90}
    for row, tokens in zip(table.to_pylist(), corpus.tokens(range(corpus.n_cells)), strict=True):
        cell = counts[row["dataset_id"]][row["source_row"]]
        assert row["cell_id"] == f"cell{row['source_row']}"
        assert row["donor_id"] == f"d{row['dataset_id']}"
        assert row["total_counts"] == cell.sum()
        assert row["n_genes"] == cell.nnz
        alone = rank_value_tokens(vocabulary.token_ids[cell.indices], cell.data, vocabulary)
        assert tokens.tolist() == alone.input_ids.tolist()
        assert row["length"] == tokens.size
    assert report.tokens == sum(table["length"].to_pylist())


def test_a_second_run_changes_nothing(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    write_atlas("one.h5ad", counts_of(40))
    sources, corpus = [str(tmp_path / "*.h5ad")], str(tmp_path / "corpus")
    first = ingest(sources, corpus, vocabulary=vocabulary, store=local_store)
    before = files_below(tmp_path / "corpus")
    second = ingest(sources, corpus, vocabulary=vocabulary, store=local_store)
    assert files_below(tmp_path / "corpus") == before
    assert (second.version, second.read, second.ok) == (first.version, 0, True)
    (report,) = second.sources
    assert report.status == "already_committed"
    assert report.tally == first.sources[0].tally, "what is committed is told from the history"
    assert report.gene_column == first.sources[0].gene_column

    write_atlas("two.h5ad", counts_of(10, seed=5))
    third = ingest(sources, corpus, vocabulary=vocabulary, store=local_store)
    assert [s.status for s in third.sources] == ["already_committed", "ingested"]
    assert Corpus.open(corpus, local_store).n_cells == 50


def test_what_a_killed_run_left_is_invisible_and_the_next_run_finishes(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    path, uri = write_atlas("one.h5ad", counts_of(60)), str(tmp_path / "corpus")
    config = IngestConfig(unit_nonzeros=500)
    whole = ingest([str(path)], str(tmp_path / "undisturbed"), vocabulary=vocabulary, store=local_store, config=config)
    expected = Corpus.open(whole.corpus_uri, local_store)
    # The run died after some units and before the commit: parts are there, one of them half written by another release.
    Corpus.create(uri, vocabulary, local_store)
    for part in expected.parts[:3]:
        local_store.write(join(uri, *part.uri.removeprefix(f"{expected.uri}/").split("/")), b"PAR1 half")
    assert Corpus.open(uri, local_store).n_cells == 0
    report = ingest([str(path)], uri, vocabulary=vocabulary, store=local_store, config=config)
    assert report.ok
    corpus = Corpus.open(uri, local_store)
    assert corpus.n_cells == 60
    assert corpus.cells(["cell_id"]) == expected.cells(["cell_id"])
    for ours, theirs in zip(corpus.tokens(range(60)), expected.tokens(range(60)), strict=True):
        assert np.array_equal(ours, theirs)


def test_rows_do_not_depend_on_the_size_of_units(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    path = write_atlas("one.h5ad", counts_of(70))
    tables = []
    for nonzeros in (300, 100_000):
        uri = str(tmp_path / f"corpus{nonzeros}")
        config = IngestConfig(unit_nonzeros=nonzeros)
        ingest([str(path)], uri, vocabulary=vocabulary, store=local_store, config=config)
        tables.append(pl.scan_delta(uri).sort("source_row").collect())
    assert tables[0].equals(tables[1])


def test_cells_are_dropped_for_a_counted_reason(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    counts = counts_of(10).toarray()
    counts[0] = 0
    counts[1] = 0
    counts[1, 59] = 5  # only the gene that the vocabulary does not know
    counts[2] = 0
    counts[2, :6] = 1  # one gene below the minimum
    counts[3] = 0
    counts[3, :7] = 1
    genes = [*vocabulary.gene_ids[:59], "ENSG77777777777"]
    path = write_atlas("one.h5ad", sparse.csr_matrix(counts), genes=genes)
    report = ingest([str(path)], str(tmp_path / "corpus"), vocabulary=vocabulary, store=local_store)
    assert report.dropped == {"below_min_genes": 1, "empty_cell": 1, "no_vocabulary_gene": 1}
    assert (report.read, report.kept) == (10, 7)
    (source,) = report.sources
    assert (source.genes_mapped, source.genes_dropped) == (59, 1)
    corpus = Corpus.open(report.corpus_uri, local_store)
    table = corpus.cells(["source_row", "n_genes", "total_counts"])
    assert table["source_row"].to_pylist() == list(range(3, 10))
    assert table["n_genes"][0].as_py() == 7
    assert table["total_counts"].to_pylist() == counts[3:].sum(axis=1).tolist(), "library size: all genes of the file"
    record = corpus.history()[0]
    assert (record.details["read"], record.details["kept"]) == (10, 7)
    assert record.details["dropped"] == report.dropped
    lenient = IngestConfig(min_genes=1)
    again = ingest([str(path)], str(tmp_path / "b"), vocabulary=vocabulary, store=local_store, config=lenient)
    assert again.dropped == {"empty_cell": 1, "no_vocabulary_gene": 1}


def test_one_bad_file_does_not_stop_the_others(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    folder = tmp_path / "atlas"
    write_atlas("good.h5ad", counts_of(30), folder=folder)
    write_atlas("mouse.h5ad", counts_of(5), genes=[f"ENSMUSG{i:011d}" for i in range(60)], folder=folder)
    write_atlas("calls.h5ad", (counts_of(20) > 0).astype(np.float32), folder=folder)
    write_atlas("few.h5ad", counts_of(5)[:, :4], genes=vocabulary.gene_ids[:4], folder=folder)
    late = counts_of(9_000)
    late.data[-1] = 0.25  # a slot that is named is not looked at first, so that a unit fails and not the inspection
    write_atlas("late.h5ad", late, folder=folder)
    (folder / "empty.h5ad").write_bytes(b"")
    (folder / "readme.txt").write_text("not an atlas")
    config = IngestConfig(unit_nonzeros=60_000, counts_slot="X")
    report = ingest([str(folder)], str(tmp_path / "corpus"), vocabulary=vocabulary, store=local_store, config=config)
    assert not report.ok
    refused = {s.dataset_id: (s.failure.code, s.failure.message) for s in report.of("refused") if s.failure}
    codes = {name: code for name, (code, _) in refused.items()}
    assert codes == dict.fromkeys(("empty", "few", "mouse"), "atlas") | {
        "calls": "not_counts",
        "late": "not_counts",
    }
    assert "0.25 (cell 8,999" in refused["late"][1]
    assert "only 4 of 60 vocabulary genes are present" in refused["few"][1]
    assert "detection calls" in refused["calls"][1]
    for name, (_, message) in refused.items():
        assert f"{name}.h5ad" in message
    assert [s.dataset_id for s in report.of("ingested")] == ["good"]
    assert [Path(uri).name for uri in report.ignored] == ["readme.txt"]
    corpus = Corpus.open(report.corpus_uri, local_store)
    assert (corpus.version, corpus.n_cells) == (1, 30)
    assert pl.scan_delta(corpus.uri).select(pl.len()).collect().item() == 30


def test_a_run_that_brings_nothing_leaves_no_corpus(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    path = write_atlas("mouse.h5ad", counts_of(5), genes=[f"ENSMUSG{i:011d}" for i in range(60)])
    report = ingest([str(path)], str(tmp_path / "corpus"), vocabulary=vocabulary, store=local_store)
    assert (report.ok, report.version) == (False, None)
    assert not (tmp_path / "corpus").exists()
    with pytest.raises(AtlasError, match=r"no atlas is there"):
        ingest([str(tmp_path / "none")], str(tmp_path / "corpus"), vocabulary=vocabulary, store=local_store)


def test_a_changed_file_becomes_a_new_version_of_its_dataset(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    path, uri = write_atlas("one.h5ad", counts_of(20)), str(tmp_path / "corpus")
    ingest([str(path)], uri, vocabulary=vocabulary, store=local_store)
    write_atlas("one.h5ad", counts_of(25, seed=9))
    report = ingest([str(path)], uri, vocabulary=vocabulary, store=local_store)
    (source,) = report.sources
    assert (source.status, source.replaced, source.version, report.kept) == ("ingested", True, 2, 25)
    newest, old = Corpus.open(uri, local_store), Corpus.open(f"{uri}@1", local_store)
    assert (newest.n_cells, old.n_cells) == (25, 20)
    assert [d.dataset_id for d in newest.datasets()] == ["one"]
    assert len(old.tokens(range(20))) == 20, "the old cells can still be read"
    again = ingest([str(path)], uri, vocabulary=vocabulary, store=local_store)
    assert [s.status for s in again.sources] == ["already_committed"]


def test_other_options_for_the_same_file_are_taken_only_when_asked_for(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    path, uri = write_atlas("one.h5ad", counts_of(20)), str(tmp_path / "corpus")
    ingest([str(path)], uri, vocabulary=vocabulary, store=local_store)
    other = IngestConfig(min_genes=25)
    (refused,) = ingest([str(path)], uri, vocabulary=vocabulary, store=local_store, config=other).sources
    assert refused.failure is not None
    assert refused.failure.code == "corpus"
    assert "--replace" in refused.failure.message
    assert Corpus.open(uri, local_store).version == 1
    asked = IngestConfig(min_genes=25, replace=True)
    (source,) = ingest([str(path)], uri, vocabulary=vocabulary, store=local_store, config=asked).sources
    assert (source.status, source.replaced) == ("ingested", True)
    assert set(source.tally.dropped) == {"below_min_genes"}
    assert Corpus.open(uri, local_store).n_cells == source.tally.kept < 20


def test_each_source_of_a_list_has_its_own_options(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    labels = ["ctrl", "stim"] * 10
    write_atlas("one.h5ad", counts_of(20), obs={"condition": labels, "CellType": ["B"] * 20})
    write_atlas("two.h5ad", counts_of(20, seed=4), layers={"umi": counts_of(20, seed=5)})
    (tmp_path / "list.toml").write_text(
        """
        [[source]]
        uri = "one.h5ad"
        dataset_id = "kang"
        obs = {cell_type = "CellType"}
        keep_obs = ["condition"]
        where = "condition = 'stim'"
        [[source]]
        uri = "two.h5ad"
        counts_slot = "layers/umi"
        """
    )
    uri = str(tmp_path / "corpus")
    report = ingest([str(tmp_path / "list.toml")], uri, vocabulary=vocabulary, store=local_store)
    assert report.ok, [s.failure for s in report.sources]
    assert [(s.dataset_id, s.counts_slot, s.tally.dropped) for s in report.sources] == [
        ("kang", "X", {"where": 10}),
        ("two", "layers/umi", {}),
    ]
    corpus = Corpus.open(uri, local_store)
    rows = corpus.cells(["dataset_id", "cell_type", "labels.condition", "total_counts"]).to_pylist()
    assert {(r["cell_type"], r["labels.condition"]) for r in rows if r["dataset_id"] == "kang"} == {("B", "stim")}
    totals = [r["total_counts"] for r in rows if r["dataset_id"] == "two"]
    assert totals == counts_of(20, seed=5).sum(axis=1).A1.tolist()


def test_equal_cells_of_two_sources_are_reported_or_left_out(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    shared, own = counts_of(20), counts_of(10, seed=8)
    first = write_atlas("a.h5ad", shared)
    second = write_atlas("b.h5ad", sparse.vstack([shared[5:15], own]).tocsr())
    plain, lean = str(tmp_path / "plain"), str(tmp_path / "lean")
    report = ingest([str(first), str(second)], plain, vocabulary=vocabulary, store=local_store)
    assert report.sources[1].duplicates["matches"] == {"a": 10}
    assert Corpus.open(plain, local_store).n_cells == 40
    keep = IngestConfig(duplicates="keep_first")
    report = ingest([str(first), str(second)], lean, vocabulary=vocabulary, store=local_store, config=keep)
    assert report.sources[1].tally.dropped == {"duplicate_cell": 10}
    corpus = Corpus.open(lean, local_store)
    assert corpus.n_cells == 30
    dropped = pq.read_table(io.BytesIO(corpus.read_source_file("b", "quarantine.parquet")))
    assert sorted(dropped["source_row"].to_pylist()) == list(range(10))
    kept = [r["source_row"] for r in corpus.cells(["dataset_id", "source_row"]).to_pylist() if r["dataset_id"] == "b"]
    assert kept == list(range(10, 20))


def test_cells_that_share_a_name_are_told_apart_by_their_row_and_noted(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    import anndata

    path = write_atlas("a.h5ad", counts_of(10))
    data = anndata.read_h5ad(path)
    data.obs_names = ["AAAC-1"] * 4 + [f"cell{i}" for i in range(6)]
    data.write_h5ad(path)
    (source,) = ingest([str(path)], str(tmp_path / "corpus"), vocabulary=vocabulary, store=local_store).sources
    assert source.tally.kept == 10
    assert any("3 cells" in note and "row" in note for note in source.notes), source.notes


def test_cells_with_bad_values_can_be_set_aside_and_too_many_are_refused(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    counts = counts_of(100)
    counts.data[counts.indptr[7]] = -3
    path = write_atlas("a.h5ad", counts)
    uri = str(tmp_path / "corpus")
    strict = IngestConfig(counts_slot="X", bad_values="quarantine")
    (source,) = ingest([str(path)], uri, vocabulary=vocabulary, store=local_store, config=strict).sources
    assert source.failure is not None
    assert "1 of 100 cells hold values that are no counts" in source.failure.message
    borne = IngestConfig(counts_slot="X", bad_values="quarantine", max_bad_cells=0.02)
    (source,) = ingest([str(path)], uri, vocabulary=vocabulary, store=local_store, config=borne).sources
    assert (source.status, source.tally.kept, source.tally.dropped) == ("ingested", 99, {"bad_values": 1})
    dropped = pq.read_table(io.BytesIO(Corpus.open(uri, local_store).read_source_file("a", "quarantine.parquet")))
    assert dropped.select(["source_row", "cell_id", "reason"]).to_pylist() == [
        {"source_row": 7, "cell_id": "cell7", "reason": "bad_values"}
    ]


def test_names_of_datasets_are_not_shared(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    first = write_atlas("same.h5ad", counts_of(20), folder=tmp_path / "a")
    second = write_atlas("same.h5ad", counts_of(30, seed=3), folder=tmp_path / "b")
    uri, named = str(tmp_path / "corpus"), IngestConfig(dataset_id="other")
    report = ingest([str(first), str(second)], uri, vocabulary=vocabulary, store=local_store)
    assert [s.status for s in report.sources] == ["ingested", "refused"]
    assert "Name it with --dataset-id, or in a list" in str(report.sources[1].failure)
    (clash,) = ingest([str(second)], uri, vocabulary=vocabulary, store=local_store).sources
    assert "another --dataset-id, or give --replace" in str(clash.failure)
    with pytest.raises(SettingsError, match="one dataset id for 2 files"):
        ingest([str(first), str(second)], uri, vocabulary=vocabulary, store=local_store, config=named)
    assert ingest([str(second)], uri, vocabulary=vocabulary, store=local_store, config=named).ok
    assert [d.dataset_id for d in Corpus.open(uri, local_store).datasets()] == ["other", "same"]
    mixed = Vocabulary.build(vocabulary.gene_ids, vocabulary.medians, window=32)
    with pytest.raises(CorpusError, match="cannot be mixed"):
        ingest([str(first)], uri, vocabulary=mixed, store=local_store)


def test_symbols_duplicates_and_retired_ids(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    counts = counts_of(12)
    genes = [f"GENE{i + 1}" for i in range(60)]
    genes[1], genes[59] = "oldname", "gene7"  # another name of the second gene; the seventh gene once more
    path = write_atlas("symbols.h5ad", counts, genes=genes)
    report = ingest([str(path)], str(tmp_path / "corpus"), vocabulary=vocabulary, store=local_store)
    assert report.ok
    assert (report.sources[0].genes_mapped, report.sources[0].genes_summed) == (60, 1)
    summed = counts.toarray()
    summed[:, 6] += summed[:, 59]
    corpus = Corpus.open(report.corpus_uri, local_store)
    for row, tokens in zip(summed[:, :59], corpus.tokens(range(12)), strict=True):
        found = np.flatnonzero(row)
        assert (
            tokens.tolist() == rank_value_tokens(vocabulary.token_ids[found], row[found], vocabulary).input_ids.tolist()
        )


def test_from_object_storage_into_object_storage(
    write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, s3_store: tuple[Store, str]
) -> None:
    store, bucket = s3_store
    for name in ("a", "b"):
        store.upload(write_atlas(f"{name}.h5ad", counts_of(40, seed=ord(name))), f"{bucket}/raw/{name}.h5ad")
    store.write(f"{bucket}/raw/bad.h5ad", b"<Error>AccessDenied</Error>")
    sources, uri = [f"{bucket}/raw/*.h5ad"], f"{bucket}/corpus"
    report = ingest(sources, uri, vocabulary=vocabulary, store=store)
    assert [s.status for s in report.sources] == ["ingested", "ingested", "refused"]
    again = ingest([f"{bucket}/raw"], uri, vocabulary=vocabulary, store=store)
    assert (again.version, again.read) == (2, 0)
    corpus = Corpus.open(uri, store)
    assert corpus.n_cells == 80
    assert len(corpus.tokens(range(80))) == 80
    table = pl.scan_delta(uri, storage_options=store.table_options(uri)).collect()
    assert table["length"].sum() == report.tokens
