"""Tables of an h5ad file: every encoding of a column becomes texts, and none stops the cells from being read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas
import pytest

from genescale.ingestion.h5ad import open_atlas
from genescale.platform.storage import Store


def metadata(path: Path, store: Store) -> tuple[dict[str, list[str | None]], list[str]]:
    with open_atlas(str(path), store) as atlas:
        return atlas.metadata(0, atlas.n_cells)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a", "b", "a"], ["a", "b", "a"]),
        (pandas.Categorical(["a", None, "b"]), ["a", None, "b"]),
        (pandas.Categorical([3, 1, 3]), ["3", "1", "3"]),
        (np.array([1, 2, 3]), ["1", "2", "3"]),
        (np.array([1.0, np.nan, 2.5]), ["1", None, "2.5"]),
        (np.array([True, False, True]), ["True", "False", "True"]),
        (pandas.array([1, None, 3], dtype="Int64"), ["1", None, "3"]),
        (pandas.array([True, None, False], dtype="boolean"), ["True", None, "False"]),
    ],
    ids=["texts", "categories", "numbers as categories", "integers", "floats", "booleans", "nullable", "maybe"],
)
def test_columns_of_every_encoding(
    values: Any, expected: list[str | None], write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    columns, notes = metadata(write_atlas("a.h5ad", counts_of(3), obs={"donor_id": values}), local_store)
    assert columns["donor_id"] == expected
    assert notes == []
    assert columns["tissue"] == [None] * 3


def test_names_of_the_public_schema(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    obs = {
        "cell_type_ontology_term_id": ["CL:1", "CL:2"],
        "sex": ["female", "male"],
        "sex_ontology_term_id": ["PATO:1", "PATO:2"],
    }
    path = write_atlas("a.h5ad", counts_of(2), obs=obs, uns={"organism": "Homo sapiens"})
    columns, _ = metadata(path, local_store)
    assert columns["cell_type"] == ["CL:1", "CL:2"]
    assert columns["sex"] == ["female", "male"], "a label is better than its ontology term"
    assert columns["organism"] == ["Homo sapiens"] * 2


def test_categories_as_anndata_0_7_kept_them(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    path = write_atlas("a.h5ad", counts_of(3), obs={"tissue": ["x", "y", "x"]})
    with h5py.File(path, "r+") as file:
        del file["obs/tissue"]
        file["obs/__categories/tissue"] = ["lung", "liver"]
        file["obs/tissue"] = np.array([1, 0, -1], dtype="i1")
        file["obs/tissue"].attrs["categories"] = file["obs/__categories/tissue"].ref
    columns, notes = metadata(path, local_store)
    assert columns["tissue"] == ["liver", "lung", None]
    assert notes == []


def test_a_column_that_cannot_be_read_is_left_empty_with_a_note(
    write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    obs = {"tissue": pandas.Categorical(["x", "y", "x"]), "disease": ["d"] * 3, "assay": ["a"] * 3}
    path = write_atlas("a.h5ad", counts_of(3), obs=obs)
    with h5py.File(path, "r+") as file:
        file["obs/tissue/codes"][0] = 9
        del file["obs/disease"], file["obs/assay"]
        file["obs/disease"] = ["one", "two"]
        file["obs/assay"] = ["short", "l" * 1_000, "short"]
    columns, notes = metadata(path, local_store)
    assert columns["tissue"] == columns["disease"] == [None] * 3
    assert columns["assay"] == ["short", None, "short"]
    assert len(notes) == 3
    assert any("category codes outside" in note for note in notes)
    assert any("2 rows, not 3" in note for note in notes)
    assert any("1 values longer than 500" in note for note in notes)
