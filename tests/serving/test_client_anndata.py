"""AnnData objects through both clients, against the real HTTP side of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from genescale.client import GenescaleClient, cells_of
from genescale.client.sources import BLOCK_CELLS, ObjectCells
from genescale.platform import errors
from tests.serving.client_wire import ARROW, Wire, call, object_of

BOTH = pytest.mark.parametrize("kind", ["sync", "async"])


@BOTH
@pytest.mark.parametrize("bodies", ["arrow", "json"])
def test_an_object_gets_the_embeddings_of_its_cells_in_order(
    kind: str, bodies: str, wire: Callable[..., Wire], counts_ng: np.ndarray, expected_nd: np.ndarray
) -> None:
    adata, line, seen = object_of(counts_ng), wire(max_cells=4), []
    found = call(kind, line, "embed_anndata", adata, bodies=bodies, progress=lambda *at: seen.append(at))
    assert np.allclose(adata.obsm["X_genescale"], expected_nd, atol=1e-5)
    assert adata.obsm["X_genescale"].dtype == np.float32
    assert (found.embeddings == adata.obsm["X_genescale"]).all()
    assert found.n_genes.tolist() == (counts_ng > 0).sum(axis=1).tolist()
    assert found.cropped.tolist() == (found.n_genes + 2 > found.n_tokens).tolist()
    assert 0 < found.cropped.sum() < len(counts_ng)
    assert adata.uns["X_genescale"]["digest"] == found.model.digest
    assert adata.uns["X_genescale"]["corpus_version"] == 7
    assert {request.headers["content-type"] for request in line.posted} == {
        ARROW if bodies == "arrow" else "application/json"
    }
    assert len(line.posted) == found.requests == 6
    assert seen[0] == (0, len(counts_ng))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (len(counts_ng), len(counts_ng))


@pytest.mark.parametrize(
    "form", [np.asarray, sp.csc_matrix, sp.csr_array, lambda x: sp.csr_matrix(x.astype(np.float32))], ids=str
)
def test_every_form_of_a_matrix_gives_the_same(
    form: Callable[[np.ndarray], Any], wire: Callable[..., Wire], counts_ng: np.ndarray, expected_nd: np.ndarray
) -> None:
    adata = object_of(counts_ng, form)
    adata.layers["raw"], adata.X = adata.X.copy(), np.log1p(counts_ng)
    call("sync", wire(), "embed_anndata", adata, key="X_e", counts_layer="raw", gene_column="symbol")
    assert np.allclose(adata.obsm["X_e"], expected_nd, atol=1e-5)
    assert adata.uns["X_e"]["counts"] == "layers['raw']"


def test_a_backed_object_is_read_in_parts_and_a_file_can_hold_the_result(
    wire: Callable[..., Wire], counts_ng: np.ndarray, expected_nd: np.ndarray, tmp_path: Path
) -> None:
    object_of(counts_ng).write_h5ad(tmp_path / "cells.h5ad")
    adata = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    call("sync", wire(max_cells=5), "embed_anndata", adata)
    adata.to_memory().write_h5ad(tmp_path / "embedded.h5ad")
    adata.file.close()
    again = anndata.read_h5ad(tmp_path / "embedded.h5ad")
    assert np.allclose(again.obsm["X_genescale"], expected_nd, atol=1e-5)
    assert again.uns["X_genescale"]["layer"] == "second_to_last"


def test_columns_of_one_name_are_one_gene(
    wire: Callable[..., Wire], counts_ng: np.ndarray, expected_nd: np.ndarray
) -> None:
    half_ng = counts_ng // 2
    twice = anndata.AnnData(
        X=sp.csr_matrix(np.hstack([half_ng, counts_ng - half_ng])),
        obs=pd.DataFrame(index=[str(i) for i in range(len(counts_ng))]),
        var=pd.DataFrame(
            {"symbol": [f"GENE{i}" for i in range(counts_ng.shape[1])] * 2},
            index=[f"column-{i}" for i in range(2 * counts_ng.shape[1])],
        ),
    )
    for bodies in ("arrow", "json"):
        found = call("sync", wire(), "embed_anndata", twice, gene_column="symbol", bodies=bodies)
        assert np.allclose(found.embeddings, expected_nd, atol=1e-5)


@pytest.mark.parametrize("value", [0.5, -1.0, np.nan, np.inf])
def test_values_that_are_no_raw_counts_are_refused_before_anything_is_sent(
    value: float, wire: Callable[..., Wire], counts_ng: np.ndarray
) -> None:
    wrong_ng = counts_ng.astype(np.float64)
    wrong_ng[17, 5] = value
    adata, line = object_of(wrong_ng), wire()
    adata.layers["raw"] = counts_ng
    with pytest.raises(errors.NotCountsError, match=r"ENSG00000000005.*barcode-17.*row 17.*layers: raw"):
        call("sync", line, "embed_anndata", adata)
    assert line.requests == []
    assert "X_genescale" not in adata.obsm


def test_the_row_of_a_wrong_value_is_right_in_later_blocks_too() -> None:
    counts_ng = np.zeros((BLOCK_CELLS + 40, 3))
    counts_ng[:, 0] = 1
    counts_ng[BLOCK_CELLS + 7, 2] = 0.25
    with pytest.raises(errors.NotCountsError, match=rf"row {BLOCK_CELLS + 7}\)"):
        ObjectCells(object_of(counts_ng))


@BOTH
def test_a_cell_of_no_use_is_named_as_the_object_names_it_or_becomes_nan(
    kind: str, wire: Callable[..., Wire], counts_ng: np.ndarray, expected_nd: np.ndarray
) -> None:
    counts_ng[[3, 11]] = 0
    names = [f"GENE{i}" for i in range(counts_ng.shape[1])] + ["NOGENE"]
    strange_ng = np.hstack([counts_ng, np.zeros((len(counts_ng), 1), dtype=np.int64)])
    strange_ng[11, -1] = 4
    adata = object_of(strange_ng)
    adata.var["symbol"] = names
    with pytest.raises(errors.InputError, match=r"1 cells have no counts.*barcode-3"):
        call(kind, wire(), "embed_anndata", adata, gene_column="symbol")
    others = adata[[i for i in range(len(counts_ng)) if i != 3]].copy()
    with pytest.raises(errors.InputError, match=r"cell 'barcode-11' \(row 10\)\.\w+: no gene of the cell"):
        call(kind, wire(max_cells=4), "embed_anndata", others, gene_column="symbol")
    assert "X_genescale" not in others.obsm
    seen: list[tuple[int, int]] = []
    found = call(
        kind,
        wire(max_cells=4),
        "embed_anndata",
        adata,
        gene_column="symbol",
        unusable="nan",
        progress=lambda *at: seen.append(at),
    )
    assert set(found.unusable) == {3, 11}
    assert "no counts" in found.unusable[3]
    assert "no gene of the cell" in found.unusable[11]
    assert np.isnan(adata.obsm["X_genescale"][[3, 11]]).all()
    usable = [i for i in range(len(counts_ng)) if i not in (3, 11)]
    assert np.allclose(adata.obsm["X_genescale"][usable], expected_nd[usable], atol=1e-5)
    assert adata.uns["X_genescale"]["n_unusable"] == 2
    assert seen[-1] == (len(counts_ng), len(counts_ng))


def test_objects_that_cannot_be_used_are_refused_before_anything_is_sent(
    wire: Callable[..., Wire], counts_ng: np.ndarray
) -> None:
    adata, line = object_of(counts_ng), wire()
    adata.var["some"] = [None, *adata.var["symbol"][1:]]
    for wrong, more, match in (
        (adata[:4], {}, r"view.*copy\(\)"),
        (counts_ng, {}, "no AnnData"),
        (adata, {"counts_layer": "raw"}, "no layer 'raw'"),
        (adata, {"gene_column": "name"}, "no column 'name'.*symbol"),
        (adata, {"gene_column": "some"}, "1 genes have no name"),
        (adata, {"at_once": 0}, "at_once"),
        (adata, {"unusable": "skip"}, "unusable"),
    ):
        with pytest.raises(errors.InputError, match=match):
            call("sync", line, "embed_anndata", wrong, **more)
    assert line.posted == []


def test_cells_of_an_object_are_cells_of_every_question(wire: Callable[..., Wire], counts_ng: np.ndarray) -> None:
    adata = object_of(counts_ng)
    with GenescaleClient("http://service", transport=wire()) as client:
        answer = client.perturbations(cells_of(adata[:2]), [{"kind": "delete", "genes": ["GENE1"]}])
    assert [cell.report.id for cell in answer.cells] == ["barcode-0", "barcode-1"]
    assert [cell.report.n_genes for cell in answer.cells] == (counts_ng[:2] > 0).sum(axis=1).tolist()
