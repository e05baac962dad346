"""Tables of an anndata file: every encoding of a column is read in its own type, and none stops the cells."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas
import pyarrow as pa
import pytest

from genescale.ingestion.opening import open_atlas
from genescale.platform.storage import Store

TEXT, WHOLE, REAL, TRUTH = pa.string(), pa.int64(), pa.float64(), pa.bool_()
COLUMNS: dict[str, tuple[Any, pa.DataType, list[Any], list[str | None]]] = {
    "texts": (["a", "b", "a"], TEXT, ["a", "b", "a"], ["a", "b", "a"]),
    "categories": (pandas.Categorical(["a", None, "b"]), TEXT, ["a", None, "b"], ["a", None, "b"]),
    "whole categories": (pandas.Categorical([3, 1, 3]), WHOLE, [3, 1, 3], ["3", "1", "3"]),
    "real categories": (pandas.Categorical([0.5, None, 2.0]), REAL, [0.5, None, 2.0], ["0.5", None, "2"]),
    "truth categories": (pandas.Categorical([True, False, None]), TRUTH, [True, False, None], ["True", "False", None]),
    "integers": (np.array([1, 2, 3]), WHOLE, [1, 2, 3], ["1", "2", "3"]),
    "bytes": (np.array([1, 2, 255], dtype="u1"), WHOLE, [1, 2, 255], ["1", "2", "255"]),
    "floats": (np.array([1.0, np.nan, 2.5]), REAL, [1.0, None, 2.5], ["1", None, "2.5"]),
    "booleans": (np.array([True, False, True]), TRUTH, [True, False, True], ["True", "False", "True"]),
    "nullable": (pandas.array([1, None, 3], dtype="Int64"), WHOLE, [1, None, 3], ["1", None, "3"]),
    "maybe": (pandas.array([True, None, False], dtype="boolean"), TRUTH, [True, None, False], ["True", None, "False"]),
    "nullable texts": (pandas.array(["a", None, "c"], dtype="string"), TEXT, ["a", None, "c"], ["a", None, "c"]),
}


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
@pytest.mark.parametrize(("values", "type_", "typed", "texts"), COLUMNS.values(), ids=COLUMNS.keys())
def test_columns_of_every_encoding(
    values: Any,
    type_: pa.DataType,
    typed: list[Any],
    texts: list[str | None],
    kind: str,
    tmp_path: Path,
    counts_of: Any,
    local_store: Store,
) -> None:
    import anndata

    settings = anndata.settings.override(
        allow_write_nullable_strings=True, zarr_write_format=3, auto_shard_zarr_v3=False
    )
    with settings, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = anndata.AnnData(counts_of(3), obs=pandas.DataFrame({"donor_id": values}, index=["a", "b", "c"]))
        path = tmp_path / f"a.{kind}"
        data.write_h5ad(path) if kind == "h5ad" else data.write_zarr(path)
    with open_atlas(str(path), local_store) as atlas:
        found, note = atlas.obs.typed("donor_id")
        assert (found.type, found.to_pylist(), note) == (type_, typed, "")
        assert atlas.obs.typed("donor_id", 1, 3)[0].to_pylist() == typed[1:]
        assert atlas.obs.column("donor_id") == (texts, "")
        assert atlas.obs.column("donor_id", 2, 3) == (texts[2:], "")
        assert atlas.obs.columns == ["donor_id"]


def test_numbers_beyond_signed_64_bits_become_floats(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    path = write_atlas("a.h5ad", counts_of(2), obs={"big": np.array([1, 2**63 + 5], dtype="u8")})
    with open_atlas(str(path), local_store) as atlas:
        assert atlas.obs.typed("big")[0].to_pylist() == [1.0, float(2**63 + 5)]


def test_categories_as_anndata_0_7_kept_them(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    path = write_atlas("a.h5ad", counts_of(3), obs={"tissue": ["x", "y", "x"]})
    with h5py.File(path, "r+") as file:
        del file["obs/tissue"]
        file["obs/__categories/tissue"] = ["lung", "liver"]
        file["obs/tissue"] = np.array([1, 0, -1], dtype="i1")
        file["obs/tissue"].attrs["categories"] = file["obs/__categories/tissue"].ref
    with open_atlas(str(path), local_store) as atlas:
        assert atlas.obs.column("tissue") == (["liver", "lung", None], "")
        assert atlas.obs.columns == ["tissue"]


def outside(file: h5py.File) -> None:
    file["obs/tissue/codes"][0] = 9


def short(file: h5py.File) -> None:
    del file["obs/tissue"]
    file["obs/tissue"] = ["one", "two"]


def long_text(file: h5py.File) -> None:
    del file["obs/tissue"]
    file["obs/tissue"] = ["short", "l" * 1_000, "short"]


def newer(file: h5py.File) -> None:
    file["obs/tissue"].attrs["encoding-version"] = "7.0.0"


def two_columns(file: h5py.File) -> None:
    del file["obs/tissue"]
    file["obs/tissue"] = np.zeros((3, 2))


def no_codes(file: h5py.File) -> None:
    del file["obs/tissue/codes"]


@pytest.mark.parametrize(
    ("damage", "expected", "text"),
    [
        (outside, [None] * 3, "category codes outside -1 … 1"),
        (short, [None] * 3, "2 rows, not 3"),
        (long_text, ["short", None, "short"], "1 values longer than 500 left empty"),
        (newer, [None] * 3, "it uses encoding categorical 7.0.0; this release reads categorical up to 0.2.0"),
        (two_columns, [None] * 3, "not a column this release reads"),
        (no_codes, [None] * 3, "not a column this release reads (encoding categorical 0.2.0)"),
    ],
)
def test_a_column_that_cannot_be_read_is_left_empty_with_a_note(
    damage: Any, expected: list[str | None], text: str, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    path = write_atlas("a.h5ad", counts_of(3), obs={"tissue": pandas.Categorical(["x", "y", "x"])})
    with h5py.File(path, "r+") as file:
        damage(file)
    with open_atlas(str(path), local_store) as atlas:
        values, note = atlas.obs.column("tissue")
        assert values == expected
        assert note.startswith("obs['tissue']")
        assert text in note
        assert atlas.obs.index() == ["cell0", "cell1", "cell2"]
