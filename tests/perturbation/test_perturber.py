"""Three lines from a bundle and an AnnData to a table of effects, in this process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import anndata
import numpy as np
import pandas
import polars as pl
import pytest
from scipy import sparse

from genescale.ingestion.config import IngestConfig
from genescale.perturbation.editing.requests import EditRequest
from genescale.perturbation.perturb import perturb_cell
from genescale.perturbation.perturber import Perturber
from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError, SettingsError, UnknownGeneError
from genescale.platform.rank_value import rank_value_tokens
from tests.perturbation.conftest import N_GENES, gene_id, symbol

N_CELLS = 16
OPEN = IngestConfig(min_genes=3)


def atlas() -> anndata.AnnData:
    """16 cells of four donors; monocytes are sick, and gene 0 stands in every second cell only."""
    generator = np.random.default_rng(2)
    counts = generator.poisson(2.0, (N_CELLS, N_GENES)).astype(np.float32)
    counts[:, 0] = np.where(np.arange(N_CELLS) % 2, 0, 40)
    obs = pandas.DataFrame(
        {
            "cell_type": pandas.Categorical(["monocyte", "b_cell"] * (N_CELLS // 2)),
            "condition": ["sick", "well"] * (N_CELLS // 2),
            "donor_id": [f"donor-{i // 4}" for i in range(N_CELLS)],
            "age": np.arange(N_CELLS) + 20,
        },
        index=[f"cell-{i}" for i in range(N_CELLS)],
    )
    var = pandas.DataFrame(index=[gene_id(i) for i in range(N_GENES)])
    return anndata.AnnData(X=sparse.csr_matrix(counts), obs=obs, var=var)


@pytest.fixture(scope="module")
def perturber(framed_bundle: Bundle) -> Perturber:
    return Perturber.open(str(framed_bundle.folder), device="cpu")


def test_a_table_of_effects_from_an_anndata(perturber: Perturber) -> None:
    effects = perturber.screen(
        atlas(), delete=[symbol(0), symbol(3)], cells="cell_type == 'monocyte'", toward=("condition", "well", "sick"),
        controls=3, counts=OPEN, draws=50,
    )  # fmt: skip
    assert set(effects["readout"]) == {"shift", "toward:well", "toward:sick"}
    of_shift = {row["symbol"]: row for row in effects.filter(pl.col("readout") == "shift").iter_rows(named=True)}
    assert set(of_shift) == {symbol(0), symbol(3)}
    assert of_shift[symbol(0)]["n_cells"] == N_CELLS // 2
    assert of_shift[symbol(0)]["n_edited"] == N_CELLS // 2
    assert of_shift[symbol(0)]["mean"] > 0
    assert effects.columns[:3] == ["edit_id", "gene_id", "symbol"]


def test_each_number_is_that_of_the_edited_cell(perturber: Perturber) -> None:
    adata = atlas()
    tables = perturber.tables(adata, delete=symbol(3), controls=0, counts=OPEN, draws=50)
    rows = tables.cell_shifts
    assert rows["cell_id"].to_list() == adata.obs_names.to_list()
    vocabulary = perturber.embedder.vocabulary
    for cell in (0, 5):
        counts = adata.X[cell].toarray().ravel().astype(np.float64)
        found = np.flatnonzero(counts)
        tokens = np.array([vocabulary.token(gene_id(g)) for g in found])
        ranked = rank_value_tokens(tokens, counts[found], vocabulary, window=vocabulary.window).input_ids
        request = EditRequest(kind="delete", genes=(vocabulary.token(symbol(3)),))
        (answer,) = perturb_cell(perturber.embedder, ranked, [request])
        assert rows["shift"][cell] == answer.shift


def test_a_file_gives_the_same_as_the_anndata_in_it(perturber: Perturber, tmp_path: Path) -> None:
    path = tmp_path / "atlas.h5ad"
    atlas().write_h5ad(path)
    options = {"overexpress": symbol(0), "cells": "age > 30", "controls": 2, "counts": OPEN, "draws": 50}
    from_file, from_memory = (perturber.tables(source, **options) for source in (str(path), atlas()))
    columns = [name for name in from_memory.cell_shifts.columns if name != "dataset_id"]
    assert from_file.cell_shifts.select(columns).equals(from_memory.cell_shifts.select(columns))
    assert from_file.cell_shifts["cell_id"].n_unique() == (atlas().obs["age"] > 30).sum()


def test_every_gene_serves_as_a_control_of_the_others(perturber: Perturber) -> None:
    effects = perturber.screen(atlas(), delete="all", max_cells=4, counts=OPEN, draws=50)
    assert effects["control_mean"].is_not_null().sum() > N_GENES // 2
    assert effects["n_cells"].max() <= 4


def test_pairs_come_with_their_singles_and_interactions(perturber: Perturber) -> None:
    tables = perturber.tables(
        atlas(), delete=[symbol(1), symbol(2), symbol(3)], pairs=True, max_cells=6, controls=0, counts=OPEN, draws=50
    )
    assert tables.pairs is not None
    assert set(tables.pairs["symbol"]) == {f"{symbol(a)}+{symbol(b)}" for a, b in ((1, 2), (1, 3), (2, 3))}
    rows = tables.cell_shifts.filter(pl.col("cell_id") == tables.cell_shifts["cell_id"][0])
    assert len(rows) == 6


def test_named_sets_are_edited_together(perturber: Perturber) -> None:
    sets = {"first": [symbol(1), symbol(2)], "second": [symbol(3), "no such gene"]}
    tables = perturber.tables(atlas(), delete=sets, max_cells=3, controls=0, counts=OPEN, draws=50)
    assert set(tables.effects["edit_id"]) == {"first", "second"}
    assert tables.record["left_out"]["genes of sets, not in the vocabulary"] == 1


def test_effects_go_into_uns(perturber: Perturber, tmp_path: Path) -> None:
    adata = atlas()
    effects = perturber.screen(adata, delete=symbol(3), controls=0, counts=OPEN, draws=50)
    perturber.annotate(adata, effects)
    adata.write_h5ad(tmp_path / "out.h5ad")
    found = anndata.read_h5ad(tmp_path / "out.h5ad").uns["genescale_perturbation"]
    assert found["effects"]["symbol"].tolist() == [symbol(3)]
    assert found["screen"]["model_digest"] == perturber.bundle.digest


def test_a_model_that_cannot_be_had_leaves_no_folder(
    framed_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(InputError, match="no head"):
        Perturber.open(str(framed_bundle.folder), head=str(framed_bundle.folder), device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_done_is_refused_with_what_to_do(perturber: Perturber) -> None:
    adata = atlas()
    for options, error, said in (
        ({}, InputError, "no edit is given"),
        ({"delete": "all", "inhibit": "all"}, InputError, "edits of 2 kinds"),
        ({"delete": "GENE61"}, UnknownGeneError, "GENE6"),
        ({"delete": "all", "pairs": True}, InputError, "pairs are made of listed genes"),
        ({"delete": "all", "toward": "well"}, InputError, "names no state"),
        ({"delete": "all", "toward": ("conditoin", "well")}, InputError, "condition"),
        ({"delete": "all", "cells": "celltype = 'x'"}, SettingsError, "cell_type"),
    ):
        with pytest.raises(error, match=said):
            perturber.screen(adata, counts=OPEN, **options)
    with pytest.raises(InputError, match="list is no AnnData"):
        perturber.screen([1, 2], delete="all")  # type: ignore[arg-type]
    logged = atlas()
    logged.X = np.log1p(logged.X.toarray())
    with pytest.raises(Exception, match="no raw counts found"):
        perturber.screen(logged, delete="all", counts=dataclasses.replace(OPEN))
