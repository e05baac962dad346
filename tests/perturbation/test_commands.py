"""`genescale perturb` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.cli import main

FAST = ["--device", "cpu", "--max-cells", "4"]


def run(bundle: Bundle, corpus: Corpus, out: Path, *options: str) -> int:
    return main(
        ["perturb", str(bundle.folder), "--corpus", f"{corpus.uri}@{corpus.version}", "--output", str(out), *options]
    )


@pytest.mark.usefixtures("ray_local")
def test_a_screen_from_the_command_line(
    framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figure = tmp_path / "out", tmp_path / "out.png"
    options = ["--genes", "GENE1,gene0+GENE1", "--gene-shifts", "all", "--figure", str(figure), *FAST]
    assert run(framed_bundle, corpus, out, *options) == 0
    shown = capsys.readouterr().out
    assert "8 pairs of 4 cells and 2 edits: 8 edited" in shown
    assert "GENE0+GENE1" in shown
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert pl.read_parquet(out / "cell_shifts" / "*.parquet").height == 8
    assert pl.read_parquet(out / "gene_shifts.parquet")["symbol"].unique().sort().to_list() == ["GENE0+GENE1", "GENE1"]

    assert run(framed_bundle, corpus, out, *options, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["n_pairs"], record["n_units_reused"]) == (8, record["n_units"])
    assert record["identity"]["model_digest"] == framed_bundle.digest
    assert record["identity"]["corpus_version"] == corpus.version
    assert {row["symbol"] for row in record["summary"]} == {"GENE1", "GENE0+GENE1"}


def test_an_unknown_gene_is_refused_with_the_nearest_before_anything_starts(
    framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(framed_bundle, corpus, tmp_path / "out", "--genes", "GENE1,GENEE2", *FAST) == 2
    assert "error [unknown_gene]" in (said := capsys.readouterr().err)
    assert "Did you mean 'GENE2'?" in said
    assert not (tmp_path / "out").exists()


def test_later_kinds_and_missing_choices_are_refused(
    framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(framed_bundle, corpus, tmp_path / "out", "--kind", "inhibit", "--genes", "GENE1") == 2
    assert "not available yet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(framed_bundle, corpus, tmp_path / "out")
    assert "--genes --all --top" in capsys.readouterr().err
