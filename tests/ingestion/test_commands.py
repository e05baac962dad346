"""The commands of ingestion and vocabulary as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genescale.ingestion.commands import corpus, ingest, medians, simulate
from genescale.platform import cli
from genescale.platform.errors import CorpusError, SettingsError
from genescale.platform.vocabulary_command import vocabulary as vocabulary_command


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
    write_atlas("bad.h5ad", counts_of(5).toarray())
    # The corpus knows its vocabulary; a refused file shows in the exit status and by name.
    assert ingest(["one.h5ad", "bad.h5ad", "--corpus", "corpus"]) == 1
    text = capsys.readouterr().out
    assert "already committed" in text
    assert "refused  [atlas]" in text
    assert "bad.h5ad: X: a dense array" in text

    assert corpus(["show", "corpus", "--json"]) == 0
    assert printed(capsys)["datasets"][0] == {
        "dataset_id": "one", "cells": 20, "source": str(tmp_path / "one.h5ad"), "version": 1,
    }  # fmt: skip
    assert corpus(["remove", "corpus", "one"]) == 0
    assert corpus(["show", "corpus"]) == 0
    assert "0 in 0 parts" in capsys.readouterr().out
    assert corpus(["history", "corpus", "--json"]) == 0
    assert [record["operation"] for record in printed(capsys)] == ["remove", "ingest", "create"]
    assert corpus(["history", "corpus@1"]) == 0
    assert "@1" in capsys.readouterr().out
    with pytest.raises(CorpusError, match="no dataset 'one'"):
        corpus(["remove", "corpus", "one"])


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
