"""Pairs that act together, and screens against a null run, where the answer is planted."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genescale.perturbation.screening import results
from genescale.perturbation.statistics.compare_command import compare
from genescale.perturbation.statistics.null_run import against_null_run
from genescale.perturbation.statistics.pairs import pair_effects
from genescale.platform.errors import InputError, SettingsError
from tests.perturbation.planted_shifts import Truth, every_gene


def pairs_screen(
    n_genes: int, *, donors: int = 3, cells: int = 8, together: float = 0.0, combined: float = 0.7, seed: int = 0
) -> pl.DataFrame:
    """Any pair moves a cell `combined` times the sum of its singles; G0+G1 by a factor e^together more."""
    generator = np.random.default_rng(seed)
    strength = np.exp(generator.normal(-5, 0.5, n_genes))
    rows = []
    for donor, cell in itertools.product(range(donors), range(cells)):
        scale = np.exp(generator.normal(0, 0.5))
        single = strength * scale * np.exp(generator.normal(0, 0.1, n_genes))
        edits = [((g,), single[g]) for g in range(n_genes)]
        for a, b in itertools.combinations(range(n_genes), 2):
            factor = combined * np.exp(generator.normal(0, 0.1) + (together if (a, b) == (0, 1) else 0.0))
            edits.append(((a, b), (single[a] + single[b]) * factor))
        for genes, shift in edits:
            name = "+".join(f"G{g}" for g in genes)
            rows.append((f"{donor}-{cell}", f"d{donor}", name, float(shift)))
    table = pl.DataFrame(rows, schema=["cell_id", "donor_id", "edit_id", "shift"], orient="row")
    return table.with_columns(
        dataset_id=pl.lit("planted"),
        source_row=pl.col("cell_id").rank("dense").cast(pl.Int64),
        gene_id=pl.col("edit_id"),
        symbol=pl.col("edit_id"),
        kind=pl.lit("delete"),
        role=pl.lit("edit"),
        control_of=pl.lit(None, pl.String),
        outcome=pl.lit("edited"),
        found=pl.lit(True),
        rank=pl.lit(5),
        n_genes=pl.lit(100),
    )


def test_an_interaction_is_what_is_left_of_the_sum_of_singles() -> None:
    table = pairs_screen(3, donors=2, cells=4)
    row = pair_effects(table, draws=0).row(by_predicate=pl.col("edit_id") == "G0+G2", named=True)
    wide = table.pivot(on="edit_id", index=["cell_id", "donor_id"], values="shift")
    left = wide.with_columns(left=pl.col("G0+G2") - pl.col("G0") - pl.col("G2"))
    assert row["interaction"] == pytest.approx(left.group_by("donor_id").agg(pl.col("left").mean())["left"].mean())
    assert row["combined"] - row["sum_of_singles"] == pytest.approx(row["interaction"])
    assert row["log2_ratio"] == pytest.approx(np.log2(0.7), abs=0.1)
    assert (row["n_edited"], row["n_donors"], row["over"]) == (8, 2, "donor")


def test_a_pair_that_acts_together_stands_out_from_the_other_pairs() -> None:
    """No pair adds up here: against zero every one would be a discovery."""
    found = pair_effects(pairs_screen(8, together=1.0), draws=0)
    assert found["edit_id"][0] == "G0+G1"
    assert found.filter(pl.col("q") < 0.05)["edit_id"].to_list() == ["G0+G1"]
    assert set(found["test"]) == {"calibrated"}
    none = pl.concat([pair_effects(pairs_screen(8, seed=seed), draws=0) for seed in range(6)])
    assert (none["p"] < 0.05).mean() == pytest.approx(0.05, abs=0.05)


def test_few_pairs_are_held_against_additivity_and_say_so() -> None:
    runs = [pair_effects(pairs_screen(3, combined=1.0, together=1.0, donors=4, seed=s), draws=0) for s in range(10)]
    assert {name for found in runs for name in found["test"]} == {"zero"}
    assert [found["edit_id"][0] for found in runs] == ["G0+G1"] * 10
    assert all(found["q"][0] < 0.01 for found in runs)
    others = pl.concat(runs).filter(pl.col("edit_id") != "G0+G1")
    assert (others["p"] < 0.05).sum() <= 4


def test_controls_take_away_what_no_pair_adds_up_to() -> None:
    """Controls of a pair move 0.7 of the sum of the singles' controls, as the pair itself does."""
    table = pairs_screen(3, combined=0.7, donors=4, cells=10)
    level = pl.when(pl.col("gene_id").str.contains("+", literal=True)).then(1.4).otherwise(1.0)
    generator = np.random.default_rng(0)
    controls = [
        table.with_columns(
            role=pl.lit("control"),
            control_of=pl.col("edit_id"),
            gene_id=pl.format("C{}-{}", pl.lit(at), pl.col("edit_id")),
            shift=level * 0.006 * np.exp(generator.normal(0, 0.1, len(table))),
        ).with_columns(edit_id="gene_id")
        for at in range(4)
    ]
    found = pair_effects(pl.concat([table, *controls]), draws=0)
    assert (found["log2_ratio"].abs() < 0.15).all()
    assert found["excess"].is_not_null().all()
    assert (found["interaction"] < 0).all()


def test_pairs_of_one_donor_speak_of_their_cells_and_a_lone_cell_is_not_tested() -> None:
    one_donor = pair_effects(pairs_screen(3, donors=1), draws=50)
    assert set(one_donor["over"]) == {"cell"}
    assert "says nothing of other donors" in one_donor["reason"][0]
    one_cell = pair_effects(pairs_screen(3, donors=1, cells=1), draws=50)
    assert one_cell["p"].is_null().all()
    assert set(one_cell["reason"]) == {"seen in one cell only"}
    with pytest.raises(InputError, match="no edit has several genes"):
        pair_effects(every_gene(Truth(), 0))


def shifted(table: pl.DataFrame, seed: int, *, donors: str = "") -> pl.DataFrame:
    """The same genes and cells with new noise, and new donors where a name is given."""
    noise = np.exp(np.random.default_rng(seed).normal(0, 0.5, len(table)))
    return table.with_columns(shift=pl.col("shift") * noise, donor_id=pl.lit(donors) + pl.col("donor_id"))


@pytest.mark.parametrize(("donors", "other"), [(2, ""), (3, ""), (3, "x"), (1, "")])
def test_a_null_run_of_the_same_truth_makes_no_discoveries(donors: int, other: str) -> None:
    p, discoveries = [], 0
    for seed in range(4):
        table = every_gene(Truth(donors=donors, cells=24 // donors), seed)
        found = against_null_run(table, shifted(table, seed + 50, donors=other), draws=0)
        p.append(found["p"].drop_nulls().to_numpy())
        discoveries += int((found["q"] < 0.05).sum())
    assert (np.concatenate(p) < 0.05).mean() < 0.08
    assert discoveries <= 2


def test_a_gene_that_matters_only_here_is_found_whatever_moves_the_cells() -> None:
    """All cells of the null run move twice as far, which is nothing about any gene."""
    table = every_gene(Truth(donors=3, cells=12), 0)
    null = shifted(table, 1).with_columns(shift=pl.col("shift") * 2)
    screen = table.with_columns(shift=pl.when(pl.col("edit_id") == "G7").then(8.0).otherwise(1.0) * pl.col("shift"))
    found = against_null_run(screen, null, draws=0)
    assert found.filter(pl.col("q") < 0.05)["edit_id"].to_list() == ["G7"]
    row = found.row(0, named=True)
    assert (row["compared"], row["n_donors_paired"]) == ("excess", 3)
    assert row["log2_ratio"] == pytest.approx(3.0, abs=0.8)
    assert row["difference"] == pytest.approx(row["screen"] - row["null_run"], rel=0.2)


def test_what_cannot_be_compared_says_why() -> None:
    table = every_gene(Truth(donors=3, cells=6), 0)
    null = table.filter(pl.col("edit_id") != "G1", (pl.col("edit_id") != "G2") | (pl.col("donor_id") == "d0"))
    found = against_null_run(table, null.with_columns(donor_id="y" + pl.col("donor_id")), draws=0)
    for edit, reason in (("G1", "no cell of the null run"), ("G2", "null run saw it in one donor only")):
        row = found.row(by_predicate=pl.col("edit_id") == edit, named=True)
        assert (row["p"], row["testable"]) == (None, False)
        assert reason in row["reason"]
    with pytest.raises(InputError, match="share no edit"):
        against_null_run(table, table.with_columns(edit_id="other " + pl.col("edit_id")))
    with pytest.raises(InputError, match="is delete in the screen and overexpress in the null run"):
        against_null_run(table, table.with_columns(kind=pl.lit("overexpress")))


def test_the_command_writes_the_table_and_prints_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = every_gene(Truth(donors=3, cells=12), 0)
    strong = table.with_columns(shift=pl.when(pl.col("edit_id") == "G7").then(9.0).otherwise(1.0) * pl.col("shift"))
    screens = {"screen": strong, "null": shifted(table, 1)}

    class Finished:
        def __init__(self, uri: str, store: object) -> None:
            self.cell_shifts = screens[uri]

    monkeypatch.setattr(results, "read_screen", Finished)
    assert compare(["screen", "null", "--output", str(tmp_path), "--draws", "0"]) == 0
    said = capsys.readouterr().out
    assert "1 differ (q < 0.05)" in said
    assert "G7" in said
    written = pl.read_parquet(tmp_path / "comparison.parquet")
    assert written["edit_id"][0] == "G7"
    assert pl.read_csv(tmp_path / "comparison.csv").columns == written.columns
    assert compare(["screen", "null", "--output", str(tmp_path), "--draws", "0", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == len(written)
    with pytest.raises(SettingsError, match="confidence"):
        compare(["screen", "null", "--output", str(tmp_path), "--confidence", "95"])
