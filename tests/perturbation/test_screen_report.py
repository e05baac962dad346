"""The report of a screen: its sentences agree with its tables, each part appears when it has something to say."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import anndata
import numpy as np
import polars as pl
import pytest
from scipy import sparse

from genescale.perturbation.reports.annotate import annotate_h5ad
from genescale.perturbation.reports.report import screen_tables, write_report
from genescale.perturbation.reports.screen_tables import ScreenTables
from genescale.perturbation.reports.sentences import sentence
from genescale.platform.errors import InputError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from tests.perturbation.screen_rows import gene_id, screen_rows

STORE = Store(StorageSettings())
SETTINGS = {"readouts": {"states": {"column": "disease", "start": "sick", "goal": "well"}}, "cells": {"where": "x < 1"}}
RECORD = {"identity": {"model_digest": "d" * 64, "corpus_uri": "s3://<lake>", "config": SETTINGS}}


@pytest.fixture(scope="module")
def rich() -> ScreenTables:
    """States, classes, pairs, and two genes that every cell lacks; GENE1 is strong, GENE1+GENE2 more than their sum."""
    rows = screen_rows(
        n_genes=30,
        n_cells=12,
        strong={1: 4e-3},
        states={"well": {1: 2e-3, 5: -2e-3}, "sick": {1: -2e-3}},
        classes=("a", "b"),
        pairs=(1, 2, 3, 4, 5, 6, 8, 9),
        extra={(1, 2): 3e-3},
        absent=(7, 20),
    )
    return screen_tables("", rows, None, RECORD, draws=200)


def page_of(tables: ScreenTables, folder: Path) -> str:
    made = write_report(dataclasses.replace(tables, uri=str(folder)), STORE)
    return Path(made.html).read_text(encoding="utf-8")


def headings(html: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", html)


def test_the_headline_says_what_the_table_says(rich: ScreenTables) -> None:
    effects = rich.of("shift")
    best = effects.row(0, named=True)
    said = sentence(effects, "shift")
    assert best["symbol"] == "GENE1"
    assert best["q"] < 0.05
    tested = len(effects.filter(pl.col("testable")))
    assert re.match(rf"\d of {tested} tested edits differs? from", said)
    assert (
        f"Deleting GENE1 is furthest above them, by {best['excess']:.3g} (95 %: {best['excess_ci_low']:.3g} to" in said
    )


def test_what_was_not_tested_is_not_called_found() -> None:
    rows = screen_rows(n_genes=1, n_cells=8, n_donors=2)
    tables = screen_tables("", rows, None, {}, draws=100)
    said = sentence(tables.of("shift"), "shift")
    assert "Nothing is tested" in said
    assert "found" not in said
    none = screen_tables("", rows.with_columns(outcome=pl.lit("absent")), None, {}, draws=100)
    assert sentence(none.of("shift"), "shift").startswith("No cell was edited")


def test_each_part_appears_when_it_has_something_to_say(rich: ScreenTables, tmp_path: Path) -> None:
    full = page_of(rich, tmp_path / "rich")
    assert headings(full)[:6] == [
        "Strongest effects",
        "Toward and away from states",
        "Toward &#x27;well&#x27; (goal)",
        "Toward &#x27;sick&#x27; (start)",
        "Classes of the head",
        "Interactions",
    ]
    plain = screen_tables("", screen_rows(n_genes=12, n_cells=6, cell_types=False), None, {}, draws=100)
    assert headings(page_of(plain, tmp_path / "plain")) == [
        "Strongest effects",
        "Effect, detection and rank",
        "What was left out",
        "How it was measured",
        "Files and settings",
    ]


def test_the_page_needs_no_network_and_escapes_what_it_is_given(rich: ScreenTables, tmp_path: Path) -> None:
    html = page_of(rich, tmp_path)
    assert "s3://&lt;lake&gt;" in html
    assert "s3://<lake>" not in html
    assert "where x &lt; 1" in html
    assert not re.search(r"<script|<link|src=|url\(|@import", html)
    assert not re.search(r"\bNaN\b|[>( ]nan\b|\bNone\b(?! of )", html)


def test_genes_that_cells_lack_are_counted_not_dropped(rich: ScreenTables, tmp_path: Path) -> None:
    html = page_of(rich, tmp_path)
    rows = rich.cell_shifts
    absent = rows.filter(pl.col("outcome") == "absent").height
    assert absent == 2 * 12
    assert re.search(rf"Edits: {rows.height:,} pairs of cell and edit.*the cell lacks the gene <b>{absent} \(", html)
    assert re.search(r"\d+ of \d+ edits were not tested", html)
    assert "no cell was edited" in html
    assert "GENE20" in html


def test_the_interaction_of_a_pair_leads_its_part(rich: ScreenTables, tmp_path: Path) -> None:
    assert rich.pairs is not None
    shift = rich.pairs.filter(pl.col("readout") == "shift")
    assert shift.sort("interaction", descending=True)["symbol"][0] == "GENE1+GENE2"
    part = page_of(rich, tmp_path).split("<h2>Interactions</h2>")[1]
    assert "The largest interaction is that of GENE1+GENE2" in part.split("<h3>")[1]


def test_tables_hold_what_the_page_shows_and_the_same_screen_gives_the_same_bytes(
    rich: ScreenTables, tmp_path: Path
) -> None:
    made = write_report(dataclasses.replace(rich, uri=str(tmp_path)), STORE)
    assert {"effects.parquet", "effects.csv", "pairs.parquet", "pairs.csv", "report.html"} <= set(made.files)
    assert pl.read_parquet(tmp_path / "effects.parquet").equals(rich.effects)
    assert len(pl.read_csv(tmp_path / "effects.csv")) == len(rich.effects)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_report(dataclasses.replace(rich, uri=str(tmp_path)), STORE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_lists_of_genes_need_gene_shifts_and_are_held_against_matched_genes(tmp_path: Path) -> None:
    rows = screen_rows(n_genes=24, n_cells=6)
    with pytest.raises(InputError, match="did not record how single genes move"):
        screen_tables("", rows, None, {}, gene_lists={"direct": ["GENE3"]}, draws=50)
    moved = gene_shifts(24, edit=1, targets=range(10, 15))
    lists = {"direct": [f"GENE{g}" for g in range(10, 15)]}
    tables = screen_tables("", rows, moved, {}, gene_lists=lists, draws=50)
    html = page_of(tables, tmp_path)
    part = html.split("<h2>Lists of genes</h2>")[1].split("<h2>")[0]
    assert re.search(r"<svg.*?>GENE1: direct<title>", part, re.S)
    assert "Genes that move" in headings(html)
    assert tables.targets is not None
    best = tables.targets.sort("auroc_matched", descending=True, nulls_last=True).row(0, named=True)
    assert (best["symbol"], best["auroc_matched"]) == ("GENE1", 1.0)


def gene_shifts(n_genes: int, *, edit: int, targets: range) -> pl.DataFrame:
    """Shifts of all genes under every edit, thrice as large for the targets of one."""
    generator = np.random.default_rng(1)
    pairs = [(e, g) for e in range(n_genes) for g in range(n_genes) if e != g]
    shifts = [1e-3 * np.exp(generator.normal(0, 0.2)) * (3 if e == edit and g in targets else 1) for e, g in pairs]
    return pl.DataFrame(
        {
            "edit_id": [gene_id(e) for e, _ in pairs],
            "gene_id": [gene_id(e) for e, _ in pairs],
            "symbol": [f"GENE{e}" for e, _ in pairs],
            "role": "edit",
            "control_of": pl.Series([None] * len(pairs), dtype=pl.String),
            "affected_gene_id": [gene_id(g) for _, g in pairs],
            "affected_symbol": [f"GENE{g}" for _, g in pairs],
            "n_cells": 6,
            "mean_shift": shifts,
            "sd_shift": 1e-4,
        }
    )


def test_results_travel_in_the_uns_of_an_atlas(rich: ScreenTables, tmp_path: Path) -> None:
    source = tmp_path / "atlas.h5ad"
    anndata.AnnData(X=sparse.csr_matrix(np.eye(3, dtype=np.float32)), uns={"kept": "yes"}).write_h5ad(source)
    out = annotate_h5ad(str(source), dataclasses.replace(rich, uri="s3://screen"), tmp_path / "out.h5ad", STORE)
    uns = anndata.read_h5ad(out).uns
    assert uns["kept"] == "yes"
    found = uns["genescale_perturbation"]
    assert found["screen"]["uri"] == "s3://screen"
    assert found["screen"]["model_digest"] == "d" * 64
    np.testing.assert_array_equal(found["effects"]["excess"].to_numpy(), rich.effects["excess"].to_numpy())
    assert found["effects"]["symbol"].tolist() == rich.effects["symbol"].to_list()
    assert "genescale_perturbation" not in anndata.read_h5ad(source).uns
