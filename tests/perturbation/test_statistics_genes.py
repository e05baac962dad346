"""Lists of targets against matched genes, and folds of single genes, where the answer is planted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
import pytest

from genescale.perturbation.statistics.genes import affected_genes, edit_ranks, gene_folds
from genescale.perturbation.statistics.targets import auroc, target_groups, target_summary
from genescale.platform.errors import InputError

N_GENES = 300
DIRECT, INDIRECT = tuple(f"G{i}" for i in range(20)), tuple(f"G{i}" for i in range(20, 40))


def gene_shifts(
    planted: Mapping[str, float], *, n_edits: int = 24, controls: bool = True, module: float = 0.0, seed: int = 0
) -> pl.DataFrame:
    """Genes differ in how easily anything moves them, the listed ones most of all; E0 alone has targets."""
    generator = np.random.default_rng(seed)
    names = [f"G{i}" for i in range(N_GENES)]
    mobility = generator.normal(0, 0.7, N_GENES) + np.where(np.arange(N_GENES) < 40, 1.0, 0.0)
    frames = []
    for edit in range(n_edits):
        logs = mobility + generator.normal(0, 0.2, N_GENES)
        logs[:20] += generator.normal(0, module)
        if edit == 0:
            logs += np.array([planted.get(name, 0.0) for name in names])
        control = mobility + generator.normal(0, 0.1, N_GENES)
        for role, values in (("edit", logs), *([("control", control)] if controls else [])):
            name = f"E{edit}" if role == "edit" else f"controls of E{edit}"
            frames.append(
                pl.DataFrame({"affected_gene_id": names, "mean_shift": np.exp(values - 6)}).with_columns(
                    edit_id=pl.lit(name),
                    gene_id=pl.lit(name),
                    symbol=pl.lit(name.lower()),
                    role=pl.lit(role),
                    control_of=pl.lit(f"E{edit}" if role == "control" else None, pl.String),
                    affected_symbol=pl.col("affected_gene_id").str.to_lowercase(),
                    n_cells=pl.lit(40 if role == "edit" else 400),
                    sd_shift=pl.lit(0.1),
                )
            )
    return pl.concat(frames)


def of_edit(table: pl.DataFrame, name: str, against: str = "unlisted", edit: str = "E0") -> dict[str, object]:
    keys = (pl.col("edit_id") == edit) & (pl.col("list") == name) & (pl.col("against") == against)
    return table.row(by_predicate=keys, named=True)


@pytest.mark.parametrize("controls", [True, False])
def test_direct_targets_are_found_before_indirect_ones(controls: bool) -> None:
    planted = dict.fromkeys(DIRECT, 0.8) | dict.fromkeys(INDIRECT, 0.2)
    found = target_groups(gene_shifts(planted, controls=controls), {"direct": DIRECT, "indirect": INDIRECT})
    direct, indirect, between = (
        of_edit(found, "direct"),
        of_edit(found, "indirect"),
        of_edit(found, "direct", "indirect"),
    )
    assert direct["auroc_matched"] > 0.95  # type: ignore[operator]
    assert 0.6 < indirect["auroc_matched"] < 0.9  # type: ignore[operator]
    assert between["auroc"] > 0.9  # type: ignore[operator]
    assert direct["p"] == pytest.approx(1 / 24)
    assert direct["ci_low"] < direct["auroc_matched"] <= direct["ci_high"] <= 1  # type: ignore[operator]
    assert (direct["n_genes"], direct["n_against"], direct["n_other_edits"]) == (20, N_GENES - 40, 23)


def test_genes_that_anything_moves_are_no_targets() -> None:
    """Raw shifts call every edit's "targets" found, because these genes move under any deletion."""
    row = of_edit(target_groups(gene_shifts({}), {"direct": DIRECT}), "direct")
    assert row["auroc_shift"] > 0.75  # type: ignore[operator]
    assert 0.35 < row["auroc_matched"] < 0.65  # type: ignore[operator]
    assert row["p"] > 0.05  # type: ignore[operator]


def test_genes_that_move_together_do_not_make_a_small_p() -> None:
    """Twenty genes of one module are one witness, not twenty."""
    p, covered = [], []
    for seed in range(6):
        found = target_groups(gene_shifts({}, module=0.6, seed=seed), {"direct": DIRECT}, draws=0)
        p += found["p"].to_list()
        covered += ((found["ci_low"] < 0.5) & (found["ci_high"] > 0.5)).to_list()
    assert np.mean(np.array(p) <= 0.1) < 0.16
    # The interval over genes is of these genes only: it misses one half often, and its column `over` says "gene".
    assert np.mean(covered) < 0.6


def test_too_few_edits_give_an_area_but_no_p() -> None:
    row = of_edit(target_groups(gene_shifts(dict.fromkeys(DIRECT, 1.0), n_edits=5), {"direct": DIRECT}), "direct")
    assert row["auroc_matched"] > 0.9  # type: ignore[operator]
    assert (row["p"], row["testable"]) == (None, False)
    assert "4 other edits" in str(row["reason"])


def test_lists_of_single_edits_and_their_summary() -> None:
    lists = pl.DataFrame({"edit_id": ["E0"] * 20 + ["E1"] * 20, "list": "direct", "gene_id": [*DIRECT, *INDIRECT]})
    found = target_groups(gene_shifts(dict.fromkeys(DIRECT, 0.8)), lists)
    assert found["edit_id"].to_list() == ["E0", "E1"]
    summary = target_summary(found).row(by_predicate=pl.col("measure") == "auroc", named=True)
    assert summary["mean"] == pytest.approx(found["auroc"].mean())
    assert summary["n_edits"] == 2
    symbols = target_groups(gene_shifts(dict.fromkeys(DIRECT, 0.8)), {"direct": [name.lower() for name in DIRECT]})
    assert of_edit(symbols, "direct")["auroc"] == pytest.approx(found["auroc"][0], abs=0.05)


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"direct": []}, "'direct' is empty"),
        ({"direct": ["NOPE"]}, "no gene of the list 'direct'"),
        ({}, "no list of genes"),
        (pl.DataFrame({"edit_id": ["E99"], "list": ["a"], "gene_id": ["G1"]}), "'E99' was not screened"),
        (pl.DataFrame({"list": ["a"]}), "no column 'gene_id'"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(lists: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        target_groups(gene_shifts({}, n_edits=2), lists)  # type: ignore[arg-type]


def test_folds_and_genes_over_all_edits() -> None:
    table = gene_shifts({"G50": 2.0})
    folds = gene_folds(table)
    row = folds.row(by_predicate=(pl.col("edit_id") == "E0") & (pl.col("affected_gene_id") == "G50"), named=True)
    assert row["log2_fold"] == pytest.approx(2 / np.log(2), abs=0.8)
    assert row["log2_fold"] == pytest.approx(np.log2(row["mean_shift"] / row["control_mean"]))
    assert (row["baseline"], row["n_control_cells"]) == ("controls", 400)
    genes = affected_genes(table)
    assert genes.row(by_predicate=pl.col("affected_gene_id") == "G50", named=True)["top_edit"] == "E0"
    assert genes["n_edits"].to_list() == [24] * N_GENES
    with pytest.raises(InputError, match="no column 'n_cells'"):
        gene_folds(table.drop("n_cells"))


def test_other_edits_of_near_rank_are_the_baseline_where_there_are_no_controls() -> None:
    """Edits of even number sit at top ranks and move everything twice as far."""
    table = gene_shifts({}, n_edits=60, controls=False)
    even = pl.col("edit_id").str.slice(1).cast(pl.Int64) % 2 == 0
    table = table.with_columns(mean_shift=pl.col("mean_shift") * pl.when(even).then(2.0).otherwise(1.0))
    cells = pl.DataFrame(
        {"edit_id": [f"E{i}" for i in range(60)], "rank": [0 if i % 2 == 0 else 90 for i in range(60)]}
    )
    ranks = edit_ranks(cells.with_columns(role=pl.lit("edit")))
    near = gene_folds(table, edit_ranks=ranks).filter(even)["log2_fold"].mean()
    everything = gene_folds(table).filter(even)["log2_fold"].mean()
    assert near == pytest.approx(0.0, abs=0.05)
    assert everything == pytest.approx(0.5, abs=0.1)


def test_the_area_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(0)
    more, less = np.round(generator.normal(0.5, 1, 30), 1), np.round(generator.normal(size=50), 1)
    wanted = roc_auc_score(np.repeat([1, 0], [30, 50]), np.concatenate([more, less]))
    assert auroc(more, less) == pytest.approx(wanted)
