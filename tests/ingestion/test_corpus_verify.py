"""`verify`: whatever is not as it was recorded is found and named, down to the page."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.table.parquet_pages import page_faults
from genescale.ingestion.table.verify import verify
from genescale.platform.errors import SettingsError
from genescale.platform.storage import Store, join

N_CELLS = 5_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, planted: Any, vocabulary: Any) -> Corpus:
    """Two datasets in three parts, one with two row groups, and side files."""
    from genescale.platform.settings import StorageSettings

    store = Store(StorageSettings())
    corpus = Corpus.create(str(tmp_path_factory.mktemp("verify") / "corpus"), vocabulary, store)
    cells = planted.cells(N_CELLS + 700, 1)
    files = {"report.json": b'{"cells": 5000}', "quarantine.parquet": bytes(range(256)) * 20}
    corpus = planted.add(corpus, "a", [cells[:N_CELLS], cells[N_CELLS : N_CELLS + 400]], files=files)
    return planted.add(corpus, "b", [cells[N_CELLS + 400 :]], files={"report.json": b"{}"})


@pytest.fixture
def damaged(tmp_path: Path, whole: Corpus) -> Corpus:
    """A copy of the corpus that a test may damage."""
    copy = str(tmp_path / "copy")
    whole.store.download_folder(whole.uri, Path(copy))
    return Corpus.open(copy, whole.store)


def flipped(data: bytes, bit: int) -> bytes:
    broken = bytearray(data)
    broken[bit // 8] ^= 1 << bit % 8
    return bytes(broken)


def test_a_sound_corpus_has_no_fault(whole: Corpus) -> None:
    report = verify(whole)
    assert report.ok, report.faults
    assert (report.parts, report.cells, report.files, report.unnamed) == (3, N_CELLS + 700, 4, 0)
    assert report.size_bytes == sum(Path(part.uri).stat().st_size for part in whole.parts)
    groups = [pq.read_metadata(part.uri) for part in whole.parts]
    assert report.pages >= sum(group.num_row_groups * group.num_columns for group in groups)


def test_every_flipped_bit_of_a_part_is_found_and_placed(damaged: Corpus) -> None:
    """Random bits, and every bit of the places that have no checksum of their own: header, footer, page headers."""
    path = Path(damaged.parts[0].uri)
    data = path.read_bytes()
    metadata = pq.read_metadata(path)
    rng, n_bits = np.random.default_rng(0), 8 * len(data)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    bits = [
        *rng.integers(0, n_bits, 150),
        *range(32),
        *(8 * start + k for start in _starts(metadata) for k in range(0, 160, 13)),
        *rng.integers(8 * footer, n_bits, 60),
        *range(n_bits - 64, n_bits),
    ]
    without_page = 0
    for bit in map(int, bits):
        path.write_bytes(flipped(data, bit))
        (fault,) = verify(damaged).faults
        assert fault.uri == str(path)
        expected = _place(metadata, bit // 8)
        if expected is None:
            assert "footer" in fault.what or "header" in fault.what, (bit, fault)
        else:
            assert expected in fault.place, (bit, fault)
            without_page += ", page " not in fault.place
    assert without_page < 0.1 * len(bits), "only a header that hides its column leaves the page open"


def _starts(metadata: pq.FileMetaData) -> list[int]:
    """First byte of every column of the first row group: its first page header."""
    columns = [metadata.row_group(0).column(number) for number in range(metadata.num_columns)]
    return [c.dictionary_page_offset if c.has_dictionary_page else c.data_page_offset for c in columns]


def _place(metadata: pq.FileMetaData, byte: int) -> str | None:
    """Row group and column whose pages hold this byte."""
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            first = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
            if first <= byte < first + column.total_compressed_size:
                return f"row group {group}, column {column.path_in_schema}"
    return None


def test_the_page_that_is_damaged_is_named() -> None:
    """Against page boundaries that are found by changing values, not by reading headers."""
    import pyarrow as pa

    rng = np.random.default_rng(0)
    table = pa.table({"x": rng.integers(0, 1 << 60, 50_000), "y": rng.random(50_000)})
    sink = io.BytesIO()
    options: dict[str, Any] = {"use_dictionary": False, "compression": "none", "data_page_size": 64 * 1024}
    pq.write_table(table, sink, write_page_checksum=True, row_group_size=25_000, **options)
    data = sink.getvalue()
    count, faults = page_faults(data)
    assert not faults
    assert count > 8, "several pages in every column"
    values, pages = table["y"].to_numpy(), []
    for row in (26_000, 40_000, 49_999):
        at = data.index(values[row].tobytes())
        (fault,) = page_faults(flipped(data, 8 * at))[1]
        assert (fault.row_group, fault.column) == (1, "y")
        assert fault.offset <= at < fault.offset + 3 * 64 * 1024
        pages.append(fault.page)
    assert pages[0] == 0
    assert pages == sorted(set(pages)), "later rows stand in later pages"


@pytest.mark.parametrize("name", ["report.json", "quarantine.parquet"])
def test_every_flipped_bit_of_a_side_file_is_found(name: str, damaged: Corpus) -> None:
    path = Path(join(damaged.uri, str(damaged.source_files("a")[name]["path"])))
    data = path.read_bytes()
    for bit in np.random.default_rng(1).integers(0, 8 * len(data), 25):
        path.write_bytes(flipped(data, int(bit)))
        (fault,) = verify(damaged).faults
        assert fault.uri == str(path)
    path.unlink()
    (fault,) = verify(damaged).faults
    assert "gone" in fault.what


def test_a_changed_vocabulary_file_is_found(damaged: Corpus) -> None:
    path = Path(damaged.uri) / "_genescale" / "vocabulary.parquet"
    path.write_bytes(flipped(path.read_bytes(), 8 * 100))
    (fault,) = verify(damaged).faults
    assert fault.uri == str(path)


Damage = Callable[[Corpus, Path], None]


def lost(corpus: Corpus, part: Path) -> None:
    part.unlink()


def cut(corpus: Corpus, part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-1])


def another(corpus: Corpus, part: Path) -> None:
    """A sound part with the same number of bytes cannot be made easily; another part of the corpus comes near."""
    part.write_bytes(Path(corpus.parts[1].uri).read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"), [(lost, "is gone"), (cut, "its commit says"), (another, "its commit says")]
)
def test_whole_files_that_are_wrong(damage: Damage, message: str, damaged: Corpus) -> None:
    part = Path(damaged.parts[0].uri)
    damage(damaged, part)
    (fault,) = verify(damaged).faults
    assert message in fault.what
    assert str(part) in str(fault)


def test_several_faults_are_all_named(damaged: Corpus) -> None:
    for part in damaged.parts:
        path = Path(part.uri)
        path.write_bytes(flipped(path.read_bytes(), 8 * 1_000))
    assert [fault.uri for fault in verify(damaged).faults] == [part.uri for part in damaged.parts]


def test_cells_that_are_there_twice_are_found(empty: Corpus, planted: Any) -> None:
    from genescale.ingestion.table.part_files import write_rows
    from genescale.ingestion.table.records import dataset_folder

    tables = [planted.rows(planted.cells(50, 1), "a", 0), planted.rows(planted.cells(50, 2), "a", 40)]
    at = {"corpus_uri": empty.uri, "store": empty.store}
    parts = [write_rows(table, n, dataset_folder("a"), **at) for n, table in enumerate(tables)]
    corpus = empty.commit_source(planted.source("a"), "a", parts, {})
    (fault,) = verify(corpus).faults
    assert "10 cells of dataset 'a' are there more than once (source rows 40, 41, 42, 43, 44 …)" in fault.what


def test_rows_that_cannot_be_are_found(empty: Corpus, planted: Any) -> None:
    """Sound bytes with wrong content: a token beyond the vocabulary, a length that is not that of the tokens."""
    import pyarrow as pa

    from genescale.ingestion.table.part_files import write_rows
    from genescale.ingestion.table.records import dataset_folder

    table = planted.rows(planted.cells(20, 1), "a")
    wrong = planted.rows([np.array([60_000], dtype=np.uint16)] * 20, "a", 20)
    longer = table.set_column(
        table.schema.get_field_index("length"), table.schema.field("length"), pa.array([99] * 20, pa.int32())
    )
    at = {"corpus_uri": empty.uri, "store": empty.store}
    parts = [write_rows(rows, n, dataset_folder("a"), **at) for n, rows in enumerate((longer, wrong))]
    parts[1] = dataclasses.replace(parts[1], rows=21)
    corpus = empty.commit_source(planted.source("a"), "a", parts, {"kept": 41})
    texts = [fault.what for fault in verify(corpus).faults]
    assert any("`length` is not the number of its tokens" in text for text in texts)
    assert any("a token is not in the vocabulary" in text for text in texts)
    assert any("20 rows, its commit says 21" in text for text in texts)


def test_in_object_storage(anywhere: Corpus, planted: Any) -> None:
    corpus = planted.add(anywhere, "a", [planted.cells(300, 1)], files={"report.json": b"{}"})
    assert verify(corpus).ok
    data = corpus.store.read(corpus.parts[0].uri)
    corpus.store.write(corpus.parts[0].uri, flipped(data, 8 * 300))
    (fault,) = verify(corpus).faults
    assert fault.uri == corpus.parts[0].uri
    assert "row group 0" in fault.place


# --- against the sources ---------------------------------------------------------------------------------------------


@pytest.fixture
def ingested(write_atlas: Any, counts_of: Any, tmp_path: Path, vocabulary: Any, local_store: Store) -> Corpus:
    """Two atlases, ingested by the kernel without Ray, in a corpus whose history says how."""
    from genescale.ingestion.annotation.genes import map_genes
    from genescale.ingestion.config import IngestConfig
    from genescale.ingestion.opening import stat_source
    from genescale.ingestion.plan import Unit, opened
    from genescale.ingestion.table.records import NewPart, Source
    from genescale.ingestion.tokenise import write_part

    corpus = Corpus.create(str(tmp_path / "made"), vocabulary, local_store)
    for name, seed in (("one", 1), ("two", 2)):
        uri = str(write_atlas(f"{name}.h5ad", counts_of(40, seed=seed)))
        entry, config = stat_source(uri, local_store), IngestConfig(min_genes=3)
        with opened(uri, entry.etag, "X", config, local_store) as atlas:
            genes = map_genes(atlas, vocabulary, rules=config)
            unit = Unit(uri=uri, etag=entry.etag, slot="X", start=0, stop=40)
            answer, _ = write_part(
                unit,
                atlas,
                genes,
                vocabulary=vocabulary,
                cell_rules=config,
                obs_mapping={},
                allow_fractional=False,
                bad_values="refuse",
                corpus_uri=corpus.uri,
                dataset_id=name,
                store=local_store,
            )
        source = Source(
            uri=uri,
            size_bytes=entry.size_bytes,
            etag=entry.etag,
            vocabulary_digest=vocabulary.digest,
            recipe=config.recipe(),
        )
        parts = [NewPart(**answer["part"])]
        corpus = corpus.commit_source(source, name, parts, {"kept": parts[0].rows, "counts_slot": "X"})
    return corpus


def test_cells_are_made_again_from_their_sources(ingested: Corpus) -> None:
    from genescale.ingestion.table.verify_source import against_source

    sound = verify(ingested)
    report = against_source(ingested, sound, sample=1_000)
    assert report.ok, report.faults
    assert (report.compared, report.not_compared) == (ingested.n_cells, {})
    some = against_source(ingested, sound, sample=10, seed=3)
    assert (some.ok, some.compared) == (True, 10)
    with pytest.raises(SettingsError, match="sample"):
        against_source(ingested, sound, sample=0)


def test_a_cell_that_its_source_does_not_give_is_named(ingested: Corpus, tmp_path: Path, planted: Any) -> None:
    from genescale.ingestion.table.verify_source import against_source

    record = ingested.dataset("one")
    cells = ingested.tokens(range(record.n_cells))
    swapped = [cell.copy() for cell in cells]
    swapped[7][[2, 3]] = swapped[7][[3, 2]]
    other = Corpus.create(str(tmp_path / "other"), ingested.vocabulary, ingested.store)
    rows = planted.rows(swapped, "one")
    names = ingested.cells(["cell_id"])["cell_id"].slice(0, record.n_cells)
    rows = rows.set_column(0, rows.schema.field(0), names.combine_chunks())
    for number, column in enumerate(rows.schema.names):
        if column in ("total_counts", "n_genes", "source_row"):
            values = ingested.cells([column])[column].slice(0, record.n_cells).combine_chunks()
            rows = rows.set_column(number, rows.schema.field(number), values)
    from genescale.ingestion.table.part_files import write_rows
    from genescale.ingestion.table.records import Source, dataset_folder

    part = write_rows(rows, 0, dataset_folder("one"), corpus_uri=other.uri, store=other.store)
    source = Source(**record.details["source"])
    other = other.commit_source(source, "one", [part], {"kept": part.rows, "counts_slot": "X"})
    assert verify(other).ok
    report = against_source(other, verify(other), sample=1_000)
    (fault,) = report.faults
    row = ingested.cells(["source_row"])["source_row"][7].as_py()
    assert f"dataset 'one' (source row {row:,})" in fault.what
    assert "2 of " in fault.what
    assert "the first at rank 2" in fault.what


def test_sources_that_are_gone_or_changed_are_said(ingested: Corpus) -> None:
    from genescale.ingestion.table.verify_source import against_source

    sound = verify(ingested)
    Path(ingested.dataset("one").source_uri).unlink()
    report = against_source(ingested, sound, sample=1_000)
    assert report.ok
    assert list(report.not_compared) == ["one"]
    assert "gone" in report.not_compared["one"]
    changed = Path(ingested.dataset("two").source_uri)
    changed.write_bytes(changed.read_bytes() + b"x")
    report = against_source(ingested, sound, sample=1_000)
    assert "changed since" in report.not_compared["two"]
    (fault,) = report.faults
    assert "no cell could be compared" in fault.what
