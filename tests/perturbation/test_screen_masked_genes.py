"""Masked genes in a screen: the read-out's own numbers, averaged over cells, counted, and held against lists."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.editing.edits import apply
from genescale.perturbation.editing.requests import EditRequest
from genescale.perturbation.readouts.masked_gene import masked_gene_changes
from genescale.perturbation.reports.report import report
from genescale.perturbation.screening.estimate import estimate
from genescale.perturbation.screening.plan import make_plan
from genescale.perturbation.screening.results import read_screen
from genescale.perturbation.screening.screen import screen
from genescale.perturbation.screening.screen_readouts import readouts_of
from genescale.perturbation.screening.spec import CellsConfig, ComputeConfig, EditsConfig, ReadoutsConfig, ScreenConfig
from genescale.perturbation.statistics.targets import target_groups, target_summary
from genescale.platform.bundle import Bundle
from genescale.platform.errors import SettingsError, UnknownGeneError
from genescale.platform.storage import Store
from genescale.training.embedder import Embedder
from genescale.training.weights import load_model

GENES = tuple(f"GENE{number}" for number in range(1, 13))


def config_of(*masked: str) -> ScreenConfig:
    """Two deletions with two controls each, in units of a few cells."""
    return ScreenConfig(
        edits=EditsConfig(genes=("GENE0", "GENE1"), controls=2),
        cells=CellsConfig(max_cells=14),
        readouts=ReadoutsConfig(masked_genes=masked),
        compute=ComputeConfig(device="cpu", run_in="process", tokens_per_unit=8_000),
    )


def test_a_screen_averages_the_changes_of_masked_genes_beside_those_of_the_controls(
    framed_bundle: Bundle, framed: Embedder, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    out, config = str(tmp_path / "out"), config_of(*GENES)
    plan = make_plan(framed_bundle, corpus, config, store=local_store)
    done = screen(framed_bundle, corpus, config, out_uri=out, store=local_store, plan=plan)
    found = read_screen(out, local_store)
    assert found.masked_genes is not None
    assert done.n_units > 1
    assert done.n_masked_pairs == len(found.masked_genes)
    assert not (tmp_path / "out" / "masked_moments").exists()

    vocabulary, model = framed.vocabulary, load_model(framed_bundle)
    wanted = [vocabulary.token(gene) for gene in GENES]
    cells = dict(zip(plan.cells["cell_id"], corpus.tokens(plan.cells["cell"].to_list()), strict=True))
    of_pair: dict[tuple[str, str | None, str], list[float]] = {}
    for row in found.cell_shifts.filter(pl.col("outcome") == "edited").iter_rows(named=True):
        edit = apply(EditRequest(kind="delete", genes=tuple(row["tokens"])), cells[row["cell_id"]], vocabulary)
        (change,) = masked_gene_changes(model, [edit], vocabulary, genes=wanted)
        edit_id = row["edit_id"] if row["role"] == "edit" else f"controls of {row['control_of']}"
        for token, value in zip(change.genes_k.tolist(), change.change_k, strict=True):
            of_pair.setdefault((edit_id, row["control_of"], vocabulary.gene_of_token(token)), []).append(float(value))
    assert len(of_pair) == len(found.masked_genes) > 40
    for row in found.masked_genes.iter_rows(named=True):
        values = of_pair[row["edit_id"], row["control_of"], row["affected_gene_id"]]
        assert row["n_cells"] == len(values)
        assert row["mean_change"] == pytest.approx(np.mean(values), abs=1e-5)
        if len(values) > 1:
            assert row["sd_change"] == pytest.approx(np.std(values, ddof=1), abs=1e-5)
    assert max(abs(np.mean(values)) for values in of_pair.values()) > 1e-2

    # What it costs is known before: every variant of a cell once more for each group of hidden genes.
    plain = make_plan(framed_bundle, corpus, config_of("none"), store=local_store)
    costs = [estimate(one, corpus, framed, readouts_of(config, one, None, None), probe_s=0.01) for one in (plain, plan)]
    assert costs[0].masked_sequences == 0
    assert 4 * costs[1].sequences <= costs[1].masked_sequences <= 8 * costs[1].sequences
    assert costs[1].forward_flops > 4 * costs[0].forward_flops
    assert plan.n_tokens > 4 * plain.n_tokens
    assert plan.digest != plain.digest

    # Lists are held against the hidden genes that stand in none of them.
    made = report(out, local_store, gene_lists={"first": GENES[3:7]}, draws=50)
    assert made.tables.targets is not None
    assert made.tables.targets["readout"].unique().to_list() == ["masked gene"]
    assert made.tables.targets["n_genes"].to_list() == [4, 4]
    assert made.tables.targets["auroc_matched"].null_count() == 0
    assert "Read-out: masked gene" in local_store.read(made.html).decode()


def test_masked_genes_may_be_named_in_a_file_of_lists_whose_unknown_names_are_counted(
    framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    lists = tmp_path / "lists.json"
    lists.write_text(json.dumps({"direct": ["GENE3", "NOGENE"], "indirect": ["GENE4", "GENE3"]}))
    plan = make_plan(framed_bundle, corpus, config_of(str(lists)), store=local_store)
    assert plan.masked == tuple(framed_bundle.vocabulary.token(gene) for gene in ("GENE3", "GENE4"))
    assert plan.left_out["genes of masked_genes, not in the vocabulary"] == 1
    before = plan.digest
    lists.write_text(json.dumps({"direct": ["GENE3"]}))
    assert make_plan(framed_bundle, corpus, config_of(str(lists)), store=local_store).digest != before


def test_masked_genes_are_refused_before_work_starts(framed_bundle: Bundle, corpus: Corpus, local_store: Store) -> None:
    fitted = dataclasses.replace(framed_bundle, kind="cell_classifier")
    with pytest.raises(SettingsError, match="has no head for masked genes"):
        make_plan(fitted, corpus, config_of("GENE3"), store=local_store)
    make_plan(fitted, corpus, config_of("none"), store=local_store)
    with pytest.raises(UnknownGeneError, match="NOGENE"):
        make_plan(framed_bundle, corpus, config_of("GENE3", "NOGENE"), store=local_store)
    with pytest.raises(SettingsError, match="masked_genes is"):
        ReadoutsConfig(masked_genes=("all", "GENE1"))


def planted(*, seed: int, of: str = "E0", controls: bool = True) -> pl.DataFrame:
    """Changes of 120 genes under 24 edits; all fall or rise by their own measure, ten fall further under one edit."""
    generator = np.random.default_rng(seed)
    genes = [f"G{gene}" for gene in range(120)]
    own = generator.normal(0, 0.5, 120) - np.where(np.arange(120) < 10, 1.0, 0.0)
    frames = []
    for edit in (f"E{number}" for number in range(24)):
        for role in ("edit", "control") if controls else ("edit",):
            change = own + generator.normal(0, 0.1, 120)
            if (edit, role) == (of, "edit"):
                change[:10] -= 0.5
            name = edit if role == "edit" else f"controls of {edit}"
            texts = {"edit_id": name, "gene_id": name, "symbol": name, "role": role}
            frames.append(
                pl.DataFrame({"affected_gene_id": genes, "affected_symbol": genes, "mean_change": change}).with_columns(
                    control_of=pl.lit(edit if role == "control" else None, pl.String),
                    n_cells=pl.lit(30),
                    **{column: pl.lit(value) for column, value in texts.items()},
                )
            )
    return pl.concat(frames)


@pytest.mark.parametrize("controls", [True, False])
def test_a_list_that_falls_beyond_its_controls_is_found_and_one_that_always_falls_is_not(controls: bool) -> None:
    found = target_groups(planted(seed=0, controls=controls), {"targets": [f"G{gene}" for gene in range(10)]}, draws=50)
    rows = {row["edit_id"]: row for row in found.iter_rows(named=True)}
    assert rows["E0"]["auroc_matched"] > 0.95
    assert rows["E0"]["p"] < 0.05
    assert rows["E0"]["median_fall"] == pytest.approx(0.5, abs=0.15)
    assert rows["E0"]["median_log2_fold"] is None
    # Under any other edit the raw fall is as large as that of true targets elsewhere, and says nothing.
    assert rows["E5"]["auroc_shift"] > 0.8
    assert rows["E5"]["q"] > 0.05
    assert target_summary(found)["readout"].unique().to_list() == ["masked gene"]
