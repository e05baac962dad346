"""Predictions: what is refused, that a table gives them back, and that they reach the obs of an h5ad file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from genescale.platform.errors import InputError
from genescale.platform.storage import Store
from genescale.training.evaluation.predictions import Predictions, joined
from genescale.training.evaluation.predictions_h5ad import annotate_predictions

CLASSES = ("B cell", "monocyte/dendritic", "T cell")


@pytest.fixture
def cells() -> Predictions:
    """Six cells, one without a label, of two donors."""
    probabilities_uc = np.array(
        [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2], [0.0, 0.0, 1.0], [0.5, 0.25, 0.25]],
        dtype=np.float32,
    )
    return Predictions(
        label="cell type",
        unit="cells",
        classes=CLASSES,
        ids_u=np.array([f"cell{i}" for i in range(6)]),
        datasets_u=np.array(["one"] * 6),
        source_rows_u=np.array([0, 1, 2, 4, 5, 7]),
        groups_u=np.array(["d1", "d1", "d2", "d2", "", "d1"]),
        fold_u=np.array([0, 0, 1, 1, 1, 0]),
        true_u=np.array([0, 1, 2, 1, -1, 2]),
        probabilities_uc=probabilities_uc,
        out_of_distribution_u=np.linspace(0, 1, 6),
    )


@pytest.fixture
def genes() -> Predictions:
    """Four genes with a number each."""
    return Predictions(
        label="half life",
        unit="genes",
        ids_u=np.array([f"ENSG{i:011d}" for i in range(4)]),
        names_u=np.array(["A", "B", "C", "D"]),
        fold_u=np.arange(4),
        true_u=np.array([1.0, np.nan, 3.0, 4.0]),
        predicted_u=np.array([1.5, 2.0, 2.5, 4.5]),
        spread_u=np.full(4, 0.1),
        rows_u=np.array([3, 1, 9, 2]),
    )


def same(ours: Predictions, theirs: Predictions) -> bool:
    pairs = [(getattr(ours, name), getattr(theirs, name)) for name in vars(ours)]
    return all(
        np.array_equal(a, b, equal_nan=a.dtype.kind == "f") if isinstance(a, np.ndarray) else a == b for a, b in pairs
    )


@pytest.mark.parametrize("name", ["cells", "genes"])
def test_a_table_gives_the_predictions_back(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    predictions: Predictions = request.getfixturevalue(name)
    pq.write_table(predictions.table(), tmp_path / "predictions.parquet")
    assert same(predictions, Predictions.from_table(pq.read_table(tmp_path / "predictions.parquet")))


def test_the_table_is_readable_by_itself(cells: Predictions) -> None:
    rows = cells.table().to_pylist()
    assert rows[0] == {
        "cell_id": "cell0",
        "dataset_id": "one",
        "source_row": 0,
        "group": "d1",
        "fold": 0,
        "label": "B cell",
        "predicted": "B cell",
        "probability": pytest.approx(0.7),
        "probability.B cell": pytest.approx(0.7),
        "probability.monocyte/dendritic": pytest.approx(0.2),
        "probability.T cell": pytest.approx(0.1),
        "out_of_distribution": 0.0,
    }
    assert rows[4]["label"] is None
    # Of equal probabilities the first class is taken.
    assert rows[3]["predicted"] == "B cell"
    with pytest.raises(InputError, match="no predictions"):
        Predictions.from_table(pa.table({"cell_id": ["a"]}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"true_u": np.array([0, 1, 2, 3, -1, 2])}, "outside -1"),
        ({"true_u": np.zeros(6)}, "not whole"),
        ({"fold_u": np.zeros(5, dtype=np.int64)}, "5 values for 6 cells"),
        ({"probabilities_uc": np.full((6, 3), 0.5)}, "sum to 1"),
        ({"probabilities_uc": np.full((6, 3), np.nan)}, "no numbers"),
        ({"probabilities_uc": np.tile([1.5, -0.5, 0.0], (6, 1))}, "negative"),
        ({"probabilities_uc": np.full((6, 2), 0.5)}, "shape"),
        ({"classes": ("a", "a", "b")}, "same name"),
        ({"probabilities_uc": None}, "give classes with"),
        ({"predicted_u": np.zeros(6)}, "give classes with"),
    ],
)
def test_what_does_not_fit_is_refused(cells: Predictions, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(cells, **changes)


def test_numbers_are_no_classes(cells: Predictions, genes: Predictions) -> None:
    with pytest.raises(InputError, match="no probabilities"):
        _ = genes.probabilities
    with pytest.raises(InputError, match="no numbers"):
        _ = cells.values_u
    with pytest.raises(InputError, match="not finite"):
        replace(genes, predicted_u=np.array([1.0, np.inf, 0, 0]))


def test_folds_are_joined_and_sorted(cells: Predictions, genes: Predictions) -> None:
    parts = [cells.take(cells.fold_u == fold) for fold in (1, 0)]
    assert same(joined(parts).sorted(), cells.sorted())
    assert joined(parts).sorted().ids_u.tolist() == ["cell0", "cell1", "cell5", "cell2", "cell3", "cell4"]
    with pytest.raises(InputError, match="differ in label"):
        joined([cells, genes])
    with pytest.raises(InputError, match="no groups_u"):
        joined([cells, replace(cells, groups_u=None)])
    with pytest.raises(InputError, match="no fold"):
        joined([])


@pytest.fixture
def atlas(tmp_path: Path) -> Path:
    """The file the six cells came from: cells 3 and 6 were dropped by ingestion."""
    names = ["cell0", "cell1", "cell2", "dropped", "cell3", "cell4", "dropped too", "cell5"]
    obs = pandas.DataFrame({"depth": np.arange(8.0), "genescale_cell_type": ["old"] * 8}, index=names)
    data = anndata.AnnData(X=sparse.csr_matrix(np.ones((8, 3), dtype=np.float32)), obs=obs)
    data.write_h5ad(tmp_path / "one.h5ad")
    return tmp_path / "one.h5ad"


def test_predictions_stand_in_obs(cells: Predictions, atlas: Path, tmp_path: Path, local_store: Store) -> None:
    out = tmp_path / "out" / "annotated.h5ad"
    report = annotate_predictions(str(atlas), cells, out, store=local_store)
    assert (report.dataset_id, report.cells, report.embedded, report.missing) == ("one", 8, 6, 2)
    obs = anndata.read_h5ad(out).obs
    assert list(obs.columns) == [
        "depth",
        "genescale_cell_type",
        "genescale_cell_type_probability",
        "genescale_cell_type_out_of_distribution",
    ]
    known = obs.index.isin(cells.ids_u)
    assert obs["genescale_cell_type"][known].tolist() == [CLASSES[code] for code in cells.codes_u]
    assert obs["genescale_cell_type"][~known].isna().all()
    assert np.allclose(obs["genescale_cell_type_probability"][known], cells.probabilities.max(axis=1))
    assert obs["genescale_cell_type_probability"][~known].isna().all()
    assert np.allclose(obs["genescale_cell_type_out_of_distribution"][known], cells.out_of_distribution_u)
    assert obs["depth"].tolist() == list(range(8))


def test_numbers_stand_in_obs(cells: Predictions, atlas: Path, tmp_path: Path, local_store: Store) -> None:
    ages = replace(
        cells, label="age", classes=(), probabilities_uc=None, predicted_u=np.arange(6.0), true_u=np.zeros(6)
    )
    annotate_predictions(str(atlas), ages, tmp_path / "out.h5ad", store=local_store)
    obs = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert obs.loc[cells.ids_u, "genescale_age"].tolist() == list(range(6))
    assert "genescale_age_probability" not in obs


def test_predictions_of_other_cells_do_not_reach_a_file(
    cells: Predictions, genes: Predictions, atlas: Path, tmp_path: Path, local_store: Store
) -> None:
    out = tmp_path / "out.h5ad"
    shifted = replace(cells, source_rows_u=cells.source_rows_u[::-1].copy()).take(np.array([1]))
    with pytest.raises(InputError, match="should be the cell 'cell1'"):
        annotate_predictions(str(atlas), shifted, out, store=local_store)
    with pytest.raises(InputError, match="do not say"):
        annotate_predictions(str(atlas), genes, out, store=local_store)
    with pytest.raises(InputError, match="predictions hold no dataset 'two'"):
        annotate_predictions(str(atlas), cells, out, store=local_store, dataset_id="two")
    with pytest.raises(InputError, match="predicted twice"):
        annotate_predictions(str(atlas), joined([cells, cells]), out, store=local_store)
    assert not out.exists()
