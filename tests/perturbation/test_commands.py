"""`genescale perturb screen` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.commands import ACTIONS
from genescale.platform.bundle import Bundle
from genescale.platform.cli import main


@pytest.fixture
def spec(framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A spec of two edits on four cells, in a folder of its own that runs are tracked in."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "spec.toml"
    path.write_text(
        f"""
        model = "{framed_bundle.folder}"
        corpus = "{corpus.uri}@{corpus.version}"
        output = "{tmp_path / "out"}"
        [cells]
        max_cells = 4
        [edits]
        genes = ["GENE1", "gene0+GENE1"]
        controls = 2
        [readouts]
        gene_shifts = "all"
        [compute]
        device = "cpu"
        run_in = "process"
        """
    )
    return path


def test_a_screen_from_the_command_line(
    spec: Path, framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figure = tmp_path / "out", tmp_path / "out.png"
    assert main(["perturb", "screen", str(spec), "--figure", str(figure)]) == 0
    shown = capsys.readouterr()
    assert "8 pairs of 4 cells and 2 edits: 8 edited" in shown.out
    assert "16 control edits of the same cells" in shown.out
    assert "20 not drawn" in shown.out
    assert "GENE0+GENE1" in shown.out
    assert "GFLOP/s of one worker" in shown.err
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert pl.read_parquet(out / "cell_shifts" / "*.parquet").height == 24
    gene_shifts = pl.read_parquet(out / "gene_shifts.parquet")
    assert gene_shifts.filter(role="edit")["symbol"].unique().sort().to_list() == ["GENE0+GENE1", "GENE1"]
    assert (out / "report.html").read_text().lstrip().lower().startswith("<!doctype html")

    assert main(["perturb", "screen", str(spec), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["n_pairs"], record["n_units_reused"]) == (8, record["n_units"])
    assert record["identity"]["model_digest"] == framed_bundle.digest
    assert record["identity"]["corpus_version"] == corpus.version
    assert {row["symbol"] for row in record["effects"]} == {"GENE1", "GENE0+GENE1"}

    # Another seed draws other cells, so it is another screen.
    assert main(["perturb", "screen", str(spec), "--set", "cells.seed=1"]) == 2
    assert "another screen stands there; it differs in config" in capsys.readouterr().err


def test_a_dry_run_says_the_cost_and_leaves_nothing(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--set", "edits.genes=GENE1", "--set", "edits.controls=0", "--set", "cells.max_cells=3"]
    assert main(["perturb", "screen", str(spec), "--dry-run", "--json", *changes]) == 0
    estimate = json.loads(capsys.readouterr().out)["estimate"]
    assert (estimate["cells"], estimate["edits"], estimate["sequences"], estimate["controls"]) == (3, 3, 6, 0)
    assert estimate["forward_flops"] > 0
    assert estimate["seconds"] > 0
    assert estimate["measured_sequences"] >= 6
    assert main(["perturb", "screen", str(spec), "--dry-run"]) == 0
    assert "time " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said_before_anything_starts(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*options: str) -> str:
        assert main(["perturb", "screen", *options]) == 2
        return capsys.readouterr().err

    assert "Did you mean 'GENE2'?" in said(str(spec), "--set", "edits.genes=GENE1,GENEE2")
    assert "unknown key 'gens'. Did you mean 'genes'?" in said(str(spec), "--set", "edits.gens=GENE1")
    assert "is no kind of edit" in said(str(spec), "--set", "edits.kind=knock") or "not one of" in said(
        str(spec), "--set", "edits.kind=knock"
    )
    assert "missing model" in said("--corpus", "c", "--output", "o", "--set", "edits.all=true")
    assert "is not KEY=VALUE" in said(str(spec), "--set", "edits.all")
    assert "no such file" in said("nowhere.toml")
    assert not (tmp_path / "out").exists()


def test_the_actions_are_there_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["perturb", "--help"]) == 0
    shown = capsys.readouterr().out
    for action in ACTIONS:
        assert f"  {action}" in shown
        with pytest.raises(SystemExit) as ended:
            main(["perturb", action, "--help"])
        assert ended.value.code == 0
        assert f"genescale perturb {action}" in capsys.readouterr().out
    assert main(["perturb", "scren"]) == 2
    assert "Did you mean 'screen'?" in capsys.readouterr().err
