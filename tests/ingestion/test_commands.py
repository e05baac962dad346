"""The commands of ingestion and vocabulary as a user runs them."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from genescale.ingestion import pipeline
from genescale.ingestion.commands import genes, ingest, medians, simulate
from genescale.ingestion.corpus_commands import corpus
from genescale.ingestion.reports.report import IngestReport, SourceReport
from genescale.platform import cli, cluster
from genescale.platform.errors import CorpusError, SettingsError
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary
from genescale.platform.vocabulary_command import vocabulary as vocabulary_command
from genescale.platform.vocabulary_files import write_vocabulary


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_from_atlas_to_corpus_and_back(
    tmp_path: Path,
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
    write_atlas: Any,
    counts_of: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_atlas("one.h5ad", counts_of(20))
    assert medians(["one.h5ad", "--output", "v.parquet", "--window", "64", "--name", "mine", "--json"]) == 0
    assert printed(capsys)["cells"] == 20
    assert vocabulary_command(["show", "v.parquet", "--gene", "ENSG00000000003", "--json"]) == 0
    shown = printed(capsys)
    assert (shown["name"], shown["window"], shown["tokens"]) == ("mine", 64, 64)
    assert shown["lookups"][0]["token"] == 6

    assert ingest(["one.h5ad", "--corpus", "corpus", "--vocabulary", "v.parquet", "--json"]) == 0
    assert printed(capsys)["total"]["kept"] == 20
    write_atlas("bad.h5ad", counts_of(5), genes=[f"ENSMUSG{i:011d}" for i in range(60)])
    # The corpus knows its vocabulary; a refused file shows in the exit status and by name.
    assert ingest(["one.h5ad", "bad.h5ad", "--corpus", "corpus"]) == 1
    text = capsys.readouterr().out
    assert "already committed" in text
    assert "1 refused" in text
    assert "[atlas]" in text
    assert "bad.h5ad" in text
    assert "Mus musculus" in text

    assert corpus(["show", "corpus", "--json"]) == 0
    shown = printed(capsys)["datasets"][0]
    assert (shown["dataset_id"], shown["cells"], shown["version"]) == ("one", 20, 1)
    assert shown["source"] == str(tmp_path / "one.h5ad")
    assert corpus(["remove", "corpus", "one"]) == 0
    assert corpus(["show", "corpus"]) == 0
    assert "0 in 0 parts" in capsys.readouterr().out
    assert corpus(["history", "corpus", "--json"]) == 0
    assert [record["operation"] for record in printed(capsys)] == ["remove", "ingest", "create"]
    assert corpus(["history", "corpus@1"]) == 0
    assert "@1" in capsys.readouterr().out
    with pytest.raises(CorpusError, match="no dataset 'one'"):
        corpus(["remove", "corpus", "one"])


def test_the_report_lies_in_the_corpus_or_where_it_is_asked_for(
    tmp_path: Path,
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
    write_atlas: Any,
    counts_of: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_atlas("one.h5ad", counts_of(20))
    assert medians(["one.h5ad", "--output", "v.parquet", "--window", "64"]) == 0
    assert "v.histogram.parquet" in capsys.readouterr().out
    base = ["one.h5ad", "--corpus", "corpus", "--vocabulary", "v.parquet"]
    assert ingest(base) == 0
    (report,) = Path("corpus/_genescale/reports").glob("*/report.json")
    assert json.loads(report.read_text())["total"]["kept"] == 20
    assert str(report) in capsys.readouterr().out
    assert "20" in report.with_name("report.html").read_text()
    assert ingest(base) == 0
    assert len(list(Path("corpus/_genescale/reports").iterdir())) == 1, "a run without news writes nothing"
    assert ingest([*base, "--report", "told"]) == 0
    assert json.loads(Path("told/report.json").read_text())["sources"][0]["status"] == "already_committed"


def test_runs_that_begin_in_the_same_second_keep_their_reports(
    tmp_path: Path, vocabulary: Vocabulary, local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_vocabulary(vocabulary, "v.parquet", local_store)
    monkeypatch.setattr(cluster, "ray_cluster", contextlib.nullcontext)

    def run(sources: list[str], uri: str, **_: Any) -> IngestReport:
        source = SourceReport(uri=sources[0], dataset_id=sources[0], status="ingested")
        return IngestReport(corpus_uri=uri, version=1, sources=(source,), started="2026-11-23T10:00:00+00:00")

    monkeypatch.setattr(pipeline, "ingest", run)
    for name in ("one.h5ad", "two.h5ad"):
        assert ingest([name, "--corpus", "corpus", "--vocabulary", "v.parquet", "--no-tracking"]) == 0
    kept = Path("corpus/_genescale/reports").glob("20261123T100000*/report.json")
    assert sorted(json.loads(path.read_text())["sources"][0]["uri"] for path in kept) == ["one.h5ad", "two.h5ad"]


def test_medians_of_more_atlases_without_reading_the_old_ones_again(
    tmp_path: Path,
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
    write_atlas: Any,
    counts_of: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_atlas("one.h5ad", counts_of(40))
    write_atlas("two.h5ad", counts_of(30, seed=4))
    assert medians(["one.h5ad", "two.h5ad", "--output", "both.parquet"]) == 0
    assert medians(["one.h5ad", "--output", "one.parquet"]) == 0
    Path("one.h5ad").unlink()
    assert medians(["two.h5ad", "--earlier", "one.histogram.parquet", "--output", "added.parquet"]) == 0
    assert Path("added.parquet").read_bytes() == Path("both.parquet").read_bytes()
    capsys.readouterr()
    assert medians(["two.h5ad", "--min-observations-for-median", "25", "--output", "few.parquet", "--json"]) == 0
    assert printed(capsys)["cells"] == 30
    origins = pl.read_parquet("few.medians.parquet")
    assert set(origins.filter(pl.col("observations") < 25)["origin"]) == {"none"}
    assert origins.filter(pl.col("observations") >= 25)["median"].null_count() == 0


def test_symbols_are_harvested_and_used(
    tmp_path: Path,
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
    write_atlas: Any,
    counts_of: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"LOCAL{i}" for i in range(60)]
    write_atlas("both.h5ad", counts_of(20), var={"gene_name": names})
    write_atlas("symbols.h5ad", counts_of(20, seed=2), genes=names)
    assert medians(["both.h5ad", "--output", "v.tsv", "--window", "64"]) == 0
    # A vocabulary that knows no symbol; the digest in the first line is of the table before it was edited.
    _, *lines = Path("v.tsv").read_text().splitlines()
    assert any("LOCAL5" in line for line in lines)
    Path("v.tsv").write_text("\n".join(re.sub(r"LOCAL[0-9]+", "", line) for line in lines) + "\n")
    assert genes(["both.h5ad", "--output", "names.parquet", "--json"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert '"symbols": 60' in "".join(told)
    base = ["symbols.h5ad", "--corpus", "corpus", "--vocabulary", "v.tsv", "--no-tracking"]
    assert ingest(base) == 1
    assert "--gene-table" in capsys.readouterr().out
    assert ingest([*base, "--gene-table", "names.parquet", "--json"]) == 0
    assert printed(capsys)["total"]["kept"] == 20


def test_vocabulary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("genes.tsv").write_text(
        "ensembl_id\ttoken_id\tmedian\tgene_name\n<pad>\t0\t\t\n<mask>\t1\t\t\nENSG01\t2\t1.5\tONE\nENSG02\t3\t0.01\tTWO\n"
    )
    assert vocabulary_command(["import", "genes.tsv", "--output", "v.parquet", "--name", "mine"]) == 0
    assert "warning   1 genes have a median below 0.05" in capsys.readouterr().out
    assert vocabulary_command(["export", "v.parquet", "--output", "back.tsv"]) == 0
    assert vocabulary_command(["import", "back.tsv", "--output", "again.parquet"]) == 0
    assert Path("again.parquet").read_bytes() == Path("v.parquet").read_bytes()
    assert cli.main(["vocabulary", "export", "v.parquet", "--output", "v.xlsx"]) == 2
    assert "the ending says no format" in capsys.readouterr().err
    assert cli.main(["vocabulary", "show", "missing.parquet"]) == 2
    assert "error [not_found]" in capsys.readouterr().err


@pytest.mark.shared
def test_published_dictionaries_by_their_own_names(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = shared_data / "vocabularies", tmp_path / "v.parquet"
    arguments = ["import", str(folder / "token_dictionary_gc30M.pkl"), "--output", str(out)]
    assert vocabulary_command(arguments) == 0
    assert "25,426: 25,424 genes; <pad> 0, <mask> 1" in capsys.readouterr().out
    by_name = out.read_bytes()
    for flag, stem in (("medians", "gene_median_dictionary"), ("names", "gene_name_id_dict")):
        arguments += [f"--{flag}", str(folder / f"{stem}_gc30M.pkl")]
    assert vocabulary_command([*arguments, "--name", "gc30M"]) == 0
    assert out.read_bytes() == by_name


def test_simulated_atlas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="KEY=VALUE"):
        simulate(["--output", str(tmp_path / "atlas"), "--set", "seed"])
    with pytest.raises(SettingsError, match="unknown key 'sead'"):
        simulate(["--output", str(tmp_path / "atlas"), "--set", "sead=3"])
    (tmp_path / "small.toml").write_text("files = 1\ncells_per_file = 30\n")
    arguments = ["--output", str(tmp_path / "atlas"), "--config", str(tmp_path / "small.toml"), "--json"]
    assert simulate([*arguments, "--set", "cells_per_file=20"]) == 0
    told = printed(capsys)
    assert told["cells"] == 20
    assert sorted(str(path) for path in (tmp_path / "atlas").iterdir()) == sorted([*told["files"], told["truth"]])
