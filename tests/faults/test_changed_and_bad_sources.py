"""One bad file of many stops nothing; a changed file becomes a new version of its dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genescale.ingestion.commands import ingest as ingest_command
from genescale.ingestion.corpus import Corpus
from genescale.ingestion.pipeline import ingest
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

pytestmark = pytest.mark.usefixtures("ray_local")


def test_one_bad_file_of_many(
    tmp_path: Path,
    write_h5ad: Any,
    vocabulary: Vocabulary,
    local_store: Store,
    rows_of: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    local_store.write(str(tmp_path / "vocabulary.parquet"), vocabulary.to_parquet_bytes())
    for seed, name in enumerate("abcdefg"):
        write_h5ad(tmp_path / "in" / f"{name}.h5ad", 20 + seed, seed)
    whole = (tmp_path / "in" / "d.h5ad").read_bytes()
    (tmp_path / "in" / "d.h5ad").write_bytes(whole[: len(whole) // 2])
    arguments = [str(tmp_path / "in"), "--corpus", str(tmp_path / "corpus")]
    arguments += ["--vocabulary", str(tmp_path / "vocabulary.parquet")]
    assert ingest_command(arguments) == 1
    text = capsys.readouterr().out
    refusals = [line for line in text.splitlines() if "d.h5ad" in line]
    assert any(f"{len(whole) // 2:,} of {len(whole):,} bytes" in line for line in refusals), text
    rows = rows_of(Corpus.open(str(tmp_path / "corpus"), local_store))
    assert {name: len(found) for name, found in rows.items()} == {
        name: 20 + seed for seed, name in enumerate("abcdefg") if name != "d"
    }
    # The file is downloaded again, and only it is ingested.
    (tmp_path / "in" / "d.h5ad").write_bytes(whole)
    assert ingest_command([*arguments, "--json"]) == 0
    statuses = {s["dataset_id"]: s["status"] for s in json.loads(capsys.readouterr().out)["sources"]}
    assert statuses == {name: "ingested" if name == "d" else "already_committed" for name in "abcdefg"}


def test_a_changed_source_is_a_new_version_of_its_dataset(
    tmp_path: Path, write_h5ad: Any, vocabulary: Vocabulary, local_store: Store, rows_of: Any
) -> None:
    path, other = write_h5ad(tmp_path / "a.h5ad", 30, 1), write_h5ad(tmp_path / "b.h5ad", 10, 2)
    uri, sources = str(tmp_path / "corpus"), [str(path), str(other)]
    first = ingest(sources, uri, vocabulary=vocabulary, store=local_store)
    old = rows_of(Corpus.open(uri, local_store))
    write_h5ad(path, 45, 9)
    second = ingest(sources, uri, vocabulary=vocabulary, store=local_store)
    assert {s.dataset_id: s.status for s in second.sources} == {"a": "ingested", "b": "already_committed"}
    new = rows_of(Corpus.open(uri, local_store))
    assert (len(new["a"]), new["b"]) == (45, old["b"])
    assert not set(new["a"].values()) & set(old["a"].values()), "nothing of the old content is left"
    assert rows_of(Corpus.open(f"{uri}@{first.version}", local_store)) == old, "the old version can still be read"
    (record,) = [r for r in Corpus.open(uri, local_store).history() if r.version == second.version]
    assert (record.operation, record.dataset_id) == ("ingest", "a")
    third = ingest(sources, uri, vocabulary=vocabulary, store=local_store)
    assert (third.version, [s.status for s in third.sources]) == (second.version, ["already_committed"] * 2)
