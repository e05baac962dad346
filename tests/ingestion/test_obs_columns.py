"""Metadata of cells: found by name, by mapping and by schema, coerced to its type, and never in the way of a cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from genescale.ingestion.annotation.obs_columns import (
    LONGEST_TEXT,
    as_booleans,
    harmonised,
    library_size_notes,
    summed_notes,
)
from genescale.ingestion.atlas import Atlas
from genescale.ingestion.opening import open_atlas
from genescale.ingestion.schema import part_schema, rows_table
from genescale.platform.errors import SettingsError
from genescale.platform.storage import Store

MakeAtlas = Callable[..., Atlas]


def read(atlas: Atlas, start: int = 0, stop: int | None = None, **options: Any) -> tuple[dict[str, Any], list[str]]:
    found, notes = harmonised(atlas, start, atlas.n_cells if stop is None else stop, **options)
    return {name: values.to_pylist() for name, values in found.items()}, notes


def test_the_cellxgene_schema_gives_labels_and_terms(table_atlas: MakeAtlas) -> None:
    obs = {
        "cell_type": ["T cell", "B cell", "unknown", None],
        "cell_type_ontology_term_id": ["CL:0000084", "CL:0000236", "unknown", None],
        "disease_ontology_term_id": ["MONDO:1 || MONDO:2", "PATO:0000461", "na", "flu"],
        "tissue_ontology_term_id": ["UBERON:0002048", "CVCL_0023", "UBERON:0000955 (organoid)", "lung"],
        "suspension_type": ["cell", "nucleus", "na", "cell"],
        "is_primary_data": [True, False, True, True],
    }
    found, notes = read(table_atlas(obs=obs))
    assert found["cell_type"] == ["T cell", "B cell", "unknown", None]
    assert found["cell_type_ontology_term_id"] == ["CL:0000084", "CL:0000236", "unknown", None]
    assert found["disease_ontology_term_id"] == ["MONDO:1 || MONDO:2", "PATO:0000461", None, None]
    assert found["disease"] == ["MONDO:1 || MONDO:2", "PATO:0000461", None, "flu"], "a term is better than nothing"
    assert found["tissue_ontology_term_id"] == ["UBERON:0002048", "CVCL_0023", "UBERON:0000955 (organoid)", None]
    assert found["suspension_type"] == ["cell", "nucleus", None, "cell"]
    assert found["is_primary_data"] == [True, False, True, True]
    assert "donor_id" not in found
    assert sorted(notes) == [
        "obs['disease_ontology_term_id'] expected an ontology term: 1 values such as 'flu' set to null",
        "obs['tissue_ontology_term_id'] expected an ontology term: 1 values such as 'lung' set to null",
    ]


@pytest.mark.parametrize(
    ("obs", "texts"),
    [
        ({}, {"organism_ontology_term_id": "NCBITaxon:9606"}),
        ({"organism_ontology_term_id": ["NCBITaxon:9606"] * 4}, {}),
        ({"organism": ["human"] * 4}, {}),
    ],
)
def test_the_organism_stands_in_obs_or_in_uns(
    obs: dict[str, Any], texts: dict[str, str], table_atlas: MakeAtlas
) -> None:
    found, notes = read(table_atlas(obs=obs, texts=texts))
    assert found["organism"] == ["Homo sapiens"] * 4
    assert found.get("organism_ontology_term_id", ["NCBITaxon:9606"] * 4) == ["NCBITaxon:9606"] * 4
    assert notes == []


def test_other_spellings_and_a_mapping(table_atlas: MakeAtlas) -> None:
    obs = {
        "Cell Type": ["a"] * 4,
        "donor": [1, 2, 2, None],
        "Tissue": ["x"] * 4,
        "TISSUE": ["y"] * 4,
        "stage": ["P7"] * 4,
    }
    found, notes = read(table_atlas(obs=obs), mapping={"development_stage": "stage", "sex": "gander"})
    assert (found["cell_type"], found["donor_id"]) == (["a"] * 4, ["1", "2", "2", None])
    assert found["development_stage"] == ["P7"] * 4
    assert not {"tissue", "sex"} & set(found)
    assert notes == [
        "obs['Cell Type'] taken as cell_type",
        "obs has 'Tissue', 'TISSUE': none taken as tissue",
        "obs has no column 'gander' for sex: left empty.",
    ]
    with pytest.raises(SettingsError, match=r"no column 'celltype' to fill.*Did you mean 'cell_type'"):
        read(table_atlas(obs=obs), mapping={"celltype": "Cell Type"})


@pytest.mark.parametrize(
    ("values", "expected", "bad"),
    [
        (pa.array([True, None, False]), [True, None, False], {}),
        (pa.array(["True", "no", "1", "nan", "maybe", "maybe"]), [True, False, True, None, None, None], {"maybe": 2}),
        (pa.array(["T", None, "F", "T"]).dictionary_encode(), [True, None, False, True], {}),
        (pa.array([1, 0, 7, None], pa.int64()), [True, False, None, None], {"7": 1}),
        (pa.array([1.0, 0.0, 0.5]), [True, False, None], {"0.5": 1}),
        (pa.nulls(2), [None, None], {}),
    ],
)
def test_booleans_in_many_coats(values: pa.Array, expected: list[bool | None], bad: dict[str, int]) -> None:
    found, counted = as_booleans(values)
    assert (found.to_pylist(), dict(counted)) == (expected, bad)


def test_unfit_values_become_null_and_are_counted_over_blocks(table_atlas: MakeAtlas) -> None:
    long = "x" * (LONGEST_TEXT + 1)
    atlas = table_atlas(obs={"is_primary_data": ["maybe", "True", "3", "perhaps"], "cell_type": ["a", long, "b", "c"]})
    whole, notes = read(atlas)
    assert whole["is_primary_data"] == [None, True, None, None]
    assert whole["cell_type"] == ["a", None, "b", "c"]
    halves = [read(atlas, 0, 2), read(atlas, 2, 4)]
    assert [half["is_primary_data"] for half, _ in halves] == [[None, True], [None, None]]
    summed = summed_notes([note for _, said in halves for note in said])
    assert [note.split(" values")[0] for note in summed] == [note.split(" values")[0] for note in sorted(notes)]
    assert "obs['is_primary_data'] expected true or false: 3 values such as '3' set to null" in notes
    assert summed_notes(["a", "b", "a"]) == ["a", "b"]


def test_stated_library_sizes_are_compared(table_atlas: MakeAtlas) -> None:
    totals = np.full(200, 1000.0)
    stated = totals.copy()
    stated[:2] = 712
    close = table_atlas(cells=200, obs={"n_counts": stated})
    assert library_size_notes(close, 0, 200, totals) == [], "in no more than 1 % of the cells"
    stated[2] = 650
    stated[3:] *= 1.0099
    off = library_size_notes(table_atlas(cells=200, obs={"total_counts": stated}), 0, 200, totals)
    assert off == [
        "obs['total_counts'] differs by more than 1 % from the sums over all genes, which are used: "
        "3 cells such as '712' for a sum of 1000"
    ]
    assert summed_notes(off * 2)[0].startswith(off[0].split("3 cells")[0] + "6 cells")
    missing = table_atlas(cells=200, obs={"n_counts": [None] * 200, "nUMI": stated})
    assert library_size_notes(missing, 0, 200, totals) == []
    assert library_size_notes(table_atlas(cells=200), 0, 200, totals) == []


def test_columns_to_keep_become_labels(table_atlas: MakeAtlas) -> None:
    obs = {
        "age": pa.array([30, None, 41, 50], pa.int64()),
        "score": [0.5, 2.0, None, 1.25],
        "batch": pa.array(["b1", "b2", "b1", None]).dictionary_encode(),
        "ok": [True, False, None, True],
    }
    found, notes = harmonised(table_atlas(obs=obs), 0, 4, keep_obs=("batch", "age", "score", "ok", "bach"))
    assert [dict(cell) for cell in found["labels"].to_pylist()] == [
        {"batch": "b1", "age": "30", "score": "0.5", "ok": "true"},
        {"batch": "b2", "score": "2", "ok": "false"},
        {"batch": "b1", "age": "41"},
        {"age": "50", "score": "1.25", "ok": "true"},
    ]
    assert notes == ["obs has no column 'bach' to keep. Did you mean 'batch'?"]


def test_what_comes_out_fits_a_row(table_atlas: MakeAtlas) -> None:
    obs = {"cell_type": pa.array(["a", "b", "a", None]).dictionary_encode(), "is_primary_data": [1, 0, 1, None]}
    found, _ = harmonised(table_atlas(obs=obs, texts={"organism": "human"}), 1, 4, keep_obs=("cell_type",))
    columns = {
        "cell_id": ["x", "y", "z"],
        "source_row": [1, 2, 3],
        "input_ids": [[1], [2], [3]],
        "length": [1, 1, 1],
        "total_counts": [1.0, 1.0, 1.0],
        "n_genes": [1, 1, 1],
        **found,
    }
    table = rows_table(columns, part_schema(np.uint16))
    assert table.column("cell_type").to_pylist() == ["b", "a", None]
    assert table.column("organism").to_pylist() == ["Homo sapiens"] * 3
    assert table.column("is_primary_data").to_pylist() == [False, True, None]


def test_a_column_that_cannot_be_read_leaves_a_note(table_atlas: MakeAtlas) -> None:
    found, notes = read(table_atlas(obs={"cell_type": pa.array(["a"])}), keep_obs=("cell_type",))
    assert found["cell_type"] == [None] * 4
    assert all(note.startswith("obs['cell_type'] left empty: ") for note in notes)
    assert notes


@pytest.mark.parametrize("kind", ["category", "object", "boolean", "Int64", "float"])
def test_columns_as_anndata_writes_them(kind: str, write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    import pandas

    values: Any = {
        "category": pandas.Categorical(["a", "b", None, "a"]),
        "object": np.array(["a", "b", "c", "a"], dtype=object),
        "boolean": pandas.array([True, None, False, True], dtype="boolean"),
        "Int64": pandas.array([1, None, 3, 4], dtype="Int64"),
        "float": [1.0, np.nan, 2.5, 4.0],
    }[kind]
    expected = {
        "category": ["a", "b", None, "a"],
        "object": ["a", "b", "c", "a"],
        "boolean": ["true", None, "false", "true"],
        "Int64": ["1", None, "3", "4"],
        "float": ["1", None, "2.5", "4"],
    }[kind]
    path: Path = write_atlas("a.h5ad", counts_of(4), obs={"donor_id": values})
    with open_atlas(str(path), local_store) as atlas:
        found, notes = read(atlas)
        part, _ = read(atlas, 1, 3)
    assert (found["donor_id"], part["donor_id"], notes) == (expected, expected[1:3], [])


@pytest.mark.shared
def test_a_real_cellxgene_file(shared_data: Path, local_store: Store) -> None:
    path = shared_data / "odd" / "cellxgene_schema" / "example_with_labels_1.1MB.h5ad"
    with open_atlas(str(path), local_store) as atlas:
        found, notes = read(atlas)
        n_cells = atlas.n_cells
    assert {"cell_type", "tissue", "disease", "assay", "sex", "organism"} <= set(found)
    assert set(found["organism"]) == {"Homo sapiens", "Mus musculus"}
    assert {len(values) for values in found.values()} == {n_cells}
    assert all(":" in (term or ":") for term in found["tissue_ontology_term_id"])
    assert not any("left empty" in note for note in notes)
