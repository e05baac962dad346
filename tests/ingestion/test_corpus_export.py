"""`export`: the same cells in the same order, in files that other tools open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.table import export as export_module
from genescale.ingestion.table.export import export
from genescale.ingestion.table.shuffle_stages import fan_out as ray_fan_out
from genescale.platform.errors import AlreadyExistsError, ClusterError, CorpusError, SettingsError
from genescale.platform.storage import join
from genescale.platform.vocabulary import read_vocabulary


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def serial(items: Sequence[Any], work: Any) -> Iterator[Any]:
        return (work(item) for item in reversed(items))

    monkeypatch.setattr(export_module, "fan_out", serial)


@pytest.fixture
def two(empty: Corpus, planted: Any) -> Corpus:
    corpus = planted.add(empty, "b", [planted.cells(100, 1), planted.cells(130, 2)])
    return planted.add(corpus, "a", [planted.cells(200, 3), planted.cells(7, 4)])


def tokens(corpus: Corpus) -> list[list[int]]:
    return [cell.tolist() for cell in corpus.tokens(range(corpus.n_cells))]


@pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning")
def test_the_datasets_library_loads_it(two: Corpus, tmp_path: Path) -> None:
    import datasets

    report = export(two, str(tmp_path / "hf"), format="huggingface", file_cells=150)
    assert (report.cells, [cells for _, cells in report.files]) == (437, [200, 237])
    loaded = datasets.load_from_disk(str(tmp_path / "hf"))
    assert loaded.num_rows == 437
    assert loaded["input_ids"][:] == tokens(two)
    assert loaded["length"][:] == [len(cell) for cell in tokens(two)]
    for column in ("cell_id", "dataset_id", "source_row", "cell_type", "total_counts", "sex"):
        assert loaded[column][:] == two.cells([column])[column].to_pylist()
    assert loaded.features["input_ids"].feature.dtype == "int32"
    row = loaded[1]
    assert json.loads(row["labels"]) == {"stim": "dose 1"}
    # What training does with it: shuffle, select, sort by length, turn into tensors.
    assert sorted(loaded.shuffle(seed=0)["source_row"]) == sorted(loaded["source_row"])
    assert loaded.sort("length")["length"][0] == min(loaded["length"])
    assert loaded.filter(lambda cell: cell["dataset_id"] == "a", keep_in_memory=True).num_rows == 207
    assert loaded.with_format("numpy")[0]["input_ids"].tolist() == tokens(two)[0]


def test_plain_parquet_has_every_column(two: Corpus, tmp_path: Path) -> None:
    report = export(two, str(tmp_path / "plain"), format="parquet")
    assert [name for name, _ in report.files] == ["part-00000-of-00001.parquet"]
    table = pq.read_table(tmp_path / "plain" / "part-00000-of-00001.parquet")
    assert table["input_ids"].to_pylist() == tokens(two)
    assert table.schema.field("input_ids").type == pa.list_(pa.field("element", pa.int32()))
    assert set(table.column_names) == set(two.schema.names)
    columns = [name for name in two.schema.names if name not in ("input_ids", "labels")]
    assert table.select(columns).cast(two.cells(columns).schema).equals(two.cells(columns))
    frame = pl.read_parquet(f"{tmp_path}/plain/*.parquet", columns=["input_ids", "dataset_id"])
    assert frame["input_ids"].to_list() == tokens(two)


def test_some_datasets_of_some_version(two: Corpus, tmp_path: Path) -> None:
    export(two, str(tmp_path / "b"), format="parquet", datasets=["b"])
    found = pq.read_table(tmp_path / "b" / "part-00000-of-00001.parquet")
    assert found["dataset_id"].to_pylist() == ["b"] * 230
    old = Corpus.open(two.uri, two.store, version=1)
    assert export(old, str(tmp_path / "old"), format="parquet").cells == 230
    with pytest.raises(CorpusError, match=r"no dataset 'c'\. Datasets: a, b"):
        export(two, str(tmp_path / "c"), format="parquet", datasets=["c"])


def test_a_shuffled_corpus_keeps_its_order(
    two: Corpus, tmp_path: Path, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genescale.ingestion.table import shuffle, shuffle_stages

    monkeypatch.setattr(shuffle_stages, "fan_out", export_module.fan_out)
    shuffle.shuffle(two, str(tmp_path / "mixed"), config=shuffle.ShuffleConfig(part_cells=100))
    mixed = Corpus.open(str(tmp_path / "mixed"), two.store)
    export(mixed, str(tmp_path / "all"), format="parquet", file_cells=120)
    frame = pl.read_parquet(f"{tmp_path}/all/*.parquet")
    assert frame["input_ids"].to_list() == tokens(mixed)
    report = export(mixed, str(tmp_path / "a"), format="parquet", datasets=["a"], file_cells=120)
    assert report.cells == 207
    frame = pl.read_parquet(f"{tmp_path}/a/*.parquet")
    assert frame["source_row"].to_list() == [
        row
        for name, row in mixed.cells(["dataset_id", "source_row"]).to_pandas().itertuples(index=False)
        if name == "a"
    ]


def test_vocabulary_and_manifest_go_with_it(anywhere: Corpus, planted: Any) -> None:
    corpus = planted.add(anywhere, "a", [planted.cells(40, 1)])
    folder = join(corpus.uri.rpartition("/")[0], "exported")
    report = export(corpus, folder, format="huggingface")
    assert read_vocabulary(join(folder, "_genescale", "vocabulary.parquet"), corpus.store) == corpus.vocabulary
    manifest = json.loads(corpus.store.read(join(folder, "_genescale", "export.json")))
    assert manifest["source"] == f"{corpus.uri}@1"
    assert manifest["vocabulary_digest"] == corpus.vocabulary.digest
    assert report.size_bytes == sum(corpus.store.stat(join(folder, name)).size_bytes for name, _ in report.files)
    with pytest.raises(AlreadyExistsError, match="not empty"):
        export(corpus, folder, format="huggingface")


def test_a_damaged_part_ends_the_export(two: Corpus, tmp_path: Path) -> None:
    path = Path(two.parts[0].uri)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ClusterError, match=path.name):
        export(two, str(tmp_path / "out"), format="huggingface")
    assert not (tmp_path / "out" / "_genescale").exists()
    assert not (tmp_path / "out" / "state.json").exists(), "the library refuses a folder without it"


def test_options_are_checked(two: Corpus, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="Use parquet or huggingface"):
        export(two, str(tmp_path / "x"), format="csv")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="file_cells"):
        export(two, str(tmp_path / "x"), format="parquet", file_cells=0)


def test_with_ray(two: Corpus, tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    export(two, str(tmp_path / "serial"), format="parquet", file_cells=100)
    monkeypatch.setattr(export_module, "fan_out", ray_fan_out)
    report = export(two, str(tmp_path / "ray"), format="parquet", file_cells=100)
    for name, _ in report.files:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "serial" / name).read_bytes()
