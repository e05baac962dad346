"""Effects of edits on tables whose truth is known: what is estimated, false discoveries, power, and what is refused."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from scipy import stats

from genescale.perturbation.statistics.effects import effects, effects_table
from genescale.platform.errors import InputError, SettingsError
from tests.perturbation.planted_shifts import Truth, every_gene, listed

NULL = Truth()


def by_edit(table: pl.DataFrame, edit: str) -> dict[str, object]:
    return table.row(by_predicate=pl.col("edit_id") == edit, named=True)


def p_values(tables: list[pl.DataFrame]) -> npt.NDArray[np.float64]:
    return np.concatenate([effects(table, draws=0)["p"].drop_nulls().to_numpy() for table in tables])


def test_means_are_balanced_over_donors_and_controls_are_of_the_same_cells() -> None:
    table = listed(Truth(donors=2, cells=[12, 3]), 0, n_edits=4)
    row = by_edit(effects(table, draws=0), "G2")
    edits = table.filter(pl.col("role") == "edit", pl.col("outcome") == "edited", pl.col("edit_id") == "G2")
    mine = table.filter(pl.col("control_of") == "G2").group_by("cell_id").agg(control=pl.col("shift").mean())
    joined = edits.join(mine, on="cell_id").with_columns(excess=pl.col("shift") - pl.col("control"))
    wanted = joined.group_by("donor_id").agg(pl.col("shift", "control", "excess").mean()).sort("donor_id")
    assert len(wanted) == 2
    for column, name in (("mean", "shift"), ("control_mean", "control"), ("excess", "excess")):
        assert row[column] == pytest.approx(wanted[name].mean())
    low, high = stats.t.interval(0.95, df=1, loc=wanted["excess"].mean(), scale=stats.sem(wanted["excess"].to_numpy()))
    assert (row["excess_ci_low"], row["excess_ci_high"]) == pytest.approx((low, high))
    assert (row["over"], row["n_donors"], row["n_edited"]) == ("donor", 2, len(edits))
    assert row["n_cells"] == 15
    assert row["n_absent"] == 15 - len(edits)
    assert row["detection_rate"] == pytest.approx(len(edits) / 15)
    assert row["n_controls"] == len(table.filter(pl.col("control_of") == "G2"))


@pytest.mark.parametrize(("donors", "cells"), [(1, 20), (2, 12), (3, 10), (6, 6)])
def test_p_is_uniform_when_every_gene_is_ordinary(donors: int, cells: int) -> None:
    """Donors differ, genes differ, and genes differ between donors; yet no gene stands out."""
    tables = [effects(every_gene(Truth(donors=donors, cells=cells), seed), draws=0) for seed in range(8)]
    p = np.concatenate([table["p"].drop_nulls().to_numpy() for table in tables])
    # Four standard errors of the share of 1,600 tests.
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.022)
    assert (p < 0.01).mean() < 0.02
    assert sum((table["q"] < 0.05).any() for table in tables) <= 2


@pytest.mark.parametrize("donors", [1, 2, 3])
def test_listed_edits_with_named_controls_make_no_more_false_discoveries_than_promised(donors: int) -> None:
    p = p_values([listed(Truth(donors=donors, cells=18 // donors, genes=150), seed) for seed in range(25)])
    # The 20 tests of one screen share their controls, so the share varies more than that of 500 lone tests.
    assert (p < 0.05).mean() < 0.085
    assert (p < 0.01).mean() < 0.03


def test_cells_of_one_donor_are_no_independent_witnesses() -> None:
    """Genes that happen to matter in single donors: a test over cells calls many, ours its promised share."""
    truth = Truth(donors=3, cells=40, between_genes=0.0, gene_by_donor=0.5, genes=120)
    table = every_gene(truth, 5)
    found = effects(table, draws=0)
    pool = table["shift"].log().to_numpy()
    naive = [
        stats.ranksums(part["shift"].log().to_numpy(), pool).pvalue
        for part in table.partition_by("edit_id", include_key=True)
    ]
    assert np.mean(stats.false_discovery_control(naive) < 0.05) > 0.2
    assert (found["p"] < 0.05).mean() < 0.1  # type: ignore[operator]
    assert (found["q"] < 0.05).sum() <= 1


@pytest.mark.parametrize("donors", [1, 3, 10])
def test_power_grows_with_the_effect_and_discoveries_are_mostly_true(donors: int) -> None:
    found, false = [], []
    for size in (0.0, 1.0, 3.0):
        tables = [
            effects(every_gene(Truth(donors=donors, cells=20 // donors, hits=10, size=size), s), draws=0)
            for s in range(3)
        ]
        called = [table.filter(pl.col("q") < 0.05)["edit_id"].to_list() for table in tables]
        hits = {f"G{i}" for i in range(10)}
        found.append(np.mean([len(hits & set(names)) / 10 for names in called]))
        false.append(np.mean([len(set(names) - hits) / max(1, len(names)) for names in called]))
    assert found[0] <= 0.05
    assert found[0] <= found[1] < found[2]
    assert found[2] > 0.9
    assert false[2] < 0.1


def test_a_rank_that_moves_cells_does_not_pass_for_the_gene_that_holds_it() -> None:
    """Top genes move cells ten times as far here, whoever they are."""
    truth = Truth(slope=-2.5, order_noise=0.0, between_genes=0.05, gene_by_donor=0.05, noise=0.2)
    found = effects(every_gene(truth, 1), draws=0).filter(pl.col("testable"))
    moved = found.sort("mean", descending=True)
    assert moved["mean"][0] > 5 * moved["mean"][-1]
    assert stats.spearmanr(moved["mean"].to_numpy(), moved["log2_fold"].to_numpy()).statistic < 0.6
    assert found["log2_fold"].abs().median() < 0.2  # type: ignore[operator]
    assert (found["q"] < 0.05).mean() < 0.05  # type: ignore[operator]


def test_few_listed_edits_are_ranked_among_their_control_genes() -> None:
    found = effects(listed(Truth(hits=1, size=4.0), 3, n_edits=3), draws=0)
    row = by_edit(found, "G0")
    assert row["test"] == "rank"
    assert row["p"] == pytest.approx(1 / (1 + row["n_references"]))  # type: ignore[operator]
    assert found["p"].min() >= 1 / (1 + row["n_references"])  # type: ignore[operator]


def test_a_list_of_genes_is_no_control_for_itself() -> None:
    """Forty alike genes, edited without controls: held against each other none would stand out, so nothing is said."""
    table = every_gene(Truth(hits=40, size=2.0), 0)
    alone = effects(table.filter(pl.col("edit_id").str.slice(1).cast(pl.Int64) < 40), draws=0)
    assert alone["excess"].is_null().all()
    assert alone["p"].is_null().all()
    assert "screen it with controls" in alone["reason"][0]


def test_controls_that_never_repeat_leave_only_a_bound() -> None:
    found = effects(listed(Truth(genes=4000, cells=1, donors=3, hits=2, size=2.0), 0, n_edits=2, controls=3), draws=0)
    assert set(found["test"].drop_nulls()) <= {"bound"}
    assert found["p"].drop_nulls().min() > 1e-4  # type: ignore[operator]


def test_what_cannot_be_tested_says_why() -> None:
    table = listed(Truth(donors=2, cells=12), 0, n_edits=6)
    only_first = (pl.col("edit_id") != "G1") | (pl.col("donor_id") == "d0") | (pl.col("role") == "control")
    table = table.filter(only_first, pl.col("control_of").is_null() | (pl.col("control_of") != "G2"))
    absent = pl.when(pl.col("edit_id") == "G3").then(pl.lit("absent")).otherwise("outcome")
    table = table.with_columns(outcome=pl.when(pl.col("role") == "edit").then(absent).otherwise("outcome"))
    found = effects(table, draws=200)
    for edit, reason in (("G1", "one donor only"), ("G2", "no control edits"), ("G3", "no cell was edited")):
        row = by_edit(found, edit)
        assert not row["testable"]
        assert reason in str(row["reason"])
        assert (row["p"], row["q"], row["test"]) == (None, None, None)
    assert by_edit(found, "G1")["over"] == "cell"
    assert by_edit(found, "G2")["mean"] is not None
    assert by_edit(found, "G3")["mean"] is None
    assert "2 donors" in str(by_edit(found, "G0")["reason"])


@pytest.mark.parametrize("named", [True, False])
def test_one_donor_or_none_named_speaks_of_its_cells_alone(named: bool) -> None:
    table = every_gene(Truth(donors=1 if named else 4, cells=30), 0)
    if not named:
        table = table.with_columns(donor_id=pl.lit(None, pl.String))
    found = effects(table, draws=100).filter(pl.col("testable"))
    assert set(found["over"]) == {"cell"}
    assert set(found["n_donors"]) == {1}
    assert all("says nothing of other donors" in reason for reason in found["reason"])


def test_cells_that_a_first_pass_chose_are_described_but_not_tested() -> None:
    table = every_gene(NULL, 0).with_columns(
        chosen=pl.when(pl.col("rank") % 5 == 0).then(pl.lit("random")).otherwise(pl.lit("top"))
    )
    found = effects(table, draws=0)
    assert found["excess"].is_not_null().any()
    assert found["p"].is_null().all()
    assert "first pass" in found["reason"][0]


def test_every_readout_is_tested_by_itself() -> None:
    generator = np.random.default_rng(0)
    table = every_gene(NULL, 0)
    toward = generator.normal(0, 0.01, len(table)) + np.where(table["edit_id"] == "G7", 0.1, 0.0)
    table = table.with_columns(pl.Series("toward:healthy", toward), pl.Series("class:b", -toward))
    found = effects_table(table, draws=0)
    assert found["readout"].unique(maintain_order=True).to_list() == ["shift", "toward:healthy", "class:b"]
    assert found.filter(pl.col("q") < 0.05)["edit_id"].unique().to_list() == ["G7"]
    forth, back = (by_edit(found.filter(pl.col("readout") == name), "G7") for name in ("toward:healthy", "class:b"))
    assert forth["excess"] == pytest.approx(-float(back["excess"]))  # type: ignore[arg-type]
    assert forth["p"] == pytest.approx(back["p"])
    assert forth["log2_fold"] is None


def test_the_same_table_gives_the_same_numbers_in_any_order_of_rows() -> None:
    table = listed(NULL, 0, n_edits=5)
    first, again = effects(table, draws=200), effects(table.sample(fraction=1.0, shuffle=True, seed=1), draws=200)
    numbers = [name for name, kind in first.schema.items() if kind == pl.Float64]
    for name in numbers:
        np.testing.assert_allclose(
            first.sort("edit_id")[name].to_numpy(), again.sort("edit_id")[name].to_numpy(), rtol=1e-9, atol=1e-12
        )


def test_wrong_input_is_refused_with_the_reason() -> None:
    table = every_gene(NULL, 0)
    with pytest.raises(InputError, match=r"no column 'toward:helthy'.*Did you mean 'toward:healthy'"):
        effects(table.with_columns(pl.lit(0.0).alias("toward:healthy")), readout="toward:helthy")
    with pytest.raises(InputError, match="no row has the role 'edit'"):
        effects(table.with_columns(role=pl.lit("control")))
    two_kinds = pl.concat([table, table.with_columns(kind=pl.lit("overexpress"))])
    with pytest.raises(InputError, match="more than one kind"):
        effects(two_kinds)
    with pytest.raises(SettingsError, match=r"confidence is 95"):
        effects(table, confidence=95)
