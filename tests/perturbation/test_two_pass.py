"""Which genes the second pass deletes, and what a screen of two passes says of those that it did not."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genescale.perturbation.screening.two_pass import TwoPassConfig, cell_rng, choose
from genescale.perturbation.screening.two_pass_effects import gene_means, recall_estimate
from genescale.platform.errors import InputError, SettingsError

CONFIG = TwoPassConfig(top_fraction=0.1, control_fraction=0.05)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"first_pass": "cotangent"}, "cotangents"),
        ({"rank_by": "shifts"}, "shift"),
        ({"probes": 0}, "probes is 0"),
        ({"top_fraction": 1.5}, "top_fraction is 1.5"),
        ({"control_fraction": -0.1}, "control_fraction"),
        ({"top_fraction": 0.0, "control_fraction": 0.0}, "no gene would be deleted"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(SettingsError, match=says) as refused:
        TwoPassConfig(**wrong)  # type: ignore[arg-type]
    assert "two_pass" in str(refused.value)


@given(
    scores=st.lists(st.floats(-5, 5), min_size=1, max_size=80),
    top=st.floats(0, 1),
    random=st.floats(0.01, 1),
    seed=st.integers(0, 9),
)
def test_the_highest_scores_are_deleted_and_a_sample_of_the_others(
    scores: list[float], top: float, random: float, seed: int
) -> None:
    config = TwoPassConfig(top_fraction=top, control_fraction=random, seed=seed)
    scores_g = np.array(scores)
    chosen = choose(scores_g, config, cell_rng(config, 7))
    again = choose(scores_g, config, cell_rng(config, 7))
    np.testing.assert_array_equal(chosen.positions, again.positions)
    assert (np.diff(chosen.positions) > 0).all()
    is_top = chosen.roles == "top"
    tops, others = chosen.positions[is_top], np.delete(np.arange(len(scores_g)), chosen.positions[is_top])
    assert len(tops) == int(np.ceil(top * len(scores_g) - 1e-9))
    if len(tops) and len(others):
        assert scores_g[tops].min() >= scores_g[others].max()
    # Each random deletion stands for 1 / chance of the genes that are not at the top.
    assert np.isclose((1 / chosen.chances[~is_top]).sum(), len(others))
    assert (chosen.chances[is_top] == 1.0).all()


def test_cells_draw_differently() -> None:
    scores_g = np.arange(200.0)
    drawn = [tuple(choose(scores_g, CONFIG, cell_rng(CONFIG, cell)).positions.tolist()) for cell in range(5)]
    assert len(set(drawn)) == 5
    other = dataclasses.replace(CONFIG, seed=1)
    assert tuple(choose(scores_g, other, cell_rng(other, 0)).positions.tolist()) != drawn[0]


def test_ties_go_to_the_higher_rank_and_scores_must_be_finite() -> None:
    chosen = choose(np.ones(20), CONFIG, cell_rng(CONFIG, 0))
    assert chosen.positions[chosen.roles == "top"].tolist() == [0, 1]
    with pytest.raises(InputError, match="not finite"):
        choose(np.array([0.0, np.nan]), CONFIG, cell_rng(CONFIG, 0))


N_CELLS, N_GENES = 60, 200


def screened(error: float, config: TwoPassConfig = CONFIG, seed: int = 0) -> tuple[pl.DataFrame, ...]:
    """A screen of two passes: `first_pass`, `cell_shifts`, and the exact shifts of all pairs."""
    draws = np.random.default_rng(seed)
    gene_g = draws.lognormal(0.0, 0.7, N_GENES)
    scored, made, exact = [], [], []
    for cell in range(N_CELLS):
        shift_g = gene_g * draws.lognormal(0.0, 0.5, N_GENES) * 1e-4
        score_g = 3.0 * shift_g * draws.lognormal(0.0, error, N_GENES)
        chosen = choose(score_g, config, cell_rng(config, cell))
        role_g = np.full(N_GENES, None, dtype=object)
        role_g[chosen.positions] = chosen.roles
        ids = [f"gene {gene}" for gene in range(N_GENES)]
        keys = {"dataset_id": pl.lit("d"), "cell_id": pl.lit(str(cell)), "source_row": pl.lit(cell)}
        table = pl.DataFrame({"gene_id": ids, "score": score_g, "chosen": role_g.tolist(), "exact": shift_g})
        scored.append(table.select("gene_id", "score", "chosen").with_columns(**keys))
        exact.append(table.select("gene_id", "exact").with_columns(**keys))
        deleted = table[chosen.positions.tolist()].select("gene_id", "chosen", shift="exact")
        made.append(deleted.with_columns(chance=pl.Series(chosen.chances), outcome=pl.lit("edited"), **keys))
    return pl.concat(scored), pl.concat(made), pl.concat(exact)


def recall(first_pass: pl.DataFrame, exact: pl.DataFrame, share: float) -> float:
    """Of the strongest `share` of each cell, how many are chosen."""
    both = first_pass.join(exact, on=["dataset_id", "cell_id", "source_row", "gene_id"])
    strongest = both.sort("exact", descending=True).group_by("cell_id").head(int(share * N_GENES))
    return float(strongest["chosen"].is_not_null().mean())  # type: ignore[arg-type]


def test_means_take_exact_shifts_and_scaled_estimates_elsewhere() -> None:
    first_pass, cell_shifts, exact = screened(0.1)
    found = gene_means(first_pass, cell_shifts)
    assert found["n_cells"].to_list() == [N_CELLS] * N_GENES
    assert int(found["n_exact"].sum()) == len(cell_shifts)
    truth = exact.group_by("gene_id").agg(truth=pl.col("exact").mean())
    both = found.join(truth, on="gene_id")
    # Scores are three times the shifts: the random deletions say so.
    assert np.allclose(both["mean"], both["truth"], rtol=0.1)
    strongest = set(truth.sort("truth", descending=True)["gene_id"][:20])
    assert len(strongest & set(found["gene_id"][:20])) >= 19


def test_a_screen_estimates_its_own_recall() -> None:
    good, poor = (screened(error) for error in (0.05, 1.0))
    for first_pass, cell_shifts, exact in (good, poor):
        true = recall(first_pass, exact, 0.05)
        said = recall_estimate(first_pass, cell_shifts, share=0.05)
        assert said.at_least <= said.recall <= true + 0.08
        assert said.at_least <= true
        assert said.n_random == cell_shifts.filter(pl.col("chosen") == "random").height
    assert recall(good[0], good[2], 0.05) > 0.95
    assert recall_estimate(*good[:2], share=0.05).recall > 0.9
    assert recall_estimate(*poor[:2], share=0.05).recall < 0.7


def test_without_random_deletions_nothing_is_said_of_the_others() -> None:
    first_pass, cell_shifts, _ = screened(0.1, dataclasses.replace(CONFIG, control_fraction=0.0))
    with pytest.raises(InputError, match="too few deletions"):
        recall_estimate(first_pass, cell_shifts, share=0.05)
    with pytest.raises(InputError, match="cannot be turned into shifts"):
        gene_means(first_pass, cell_shifts)
    first_pass, cell_shifts, _ = screened(0.1)
    with pytest.raises(InputError, match="smaller share"):
        recall_estimate(first_pass, cell_shifts, share=0.5)
