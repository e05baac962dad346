"""Which cells are dropped and for which reason; expressions over obs; files of empty cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from genescale.ingestion.annotation.cells import REASONS, CellRules, check_enough_cells, counts_reasons, obs_reasons
from genescale.ingestion.atlas import Atlas
from genescale.ingestion.tally import Tally
from genescale.platform.errors import AtlasError, SettingsError

MakeAtlas = Callable[..., Atlas]
OBS = {
    "tissue": pa.array(["lung", "heart", None, "lung", "lung"]).dictionary_encode(),
    "age": pa.array([50, 30, 60, None, 41], pa.int64()),
    "score": pa.array([0.5, 0.1, 0.9, 0.7, None]),
    "healthy": pa.array([True, True, None, False, True]),
    "cell type": pa.array(["T cell", "B cell", "T cell", "x.sum()", "T cell"]),
}


def reasons(atlas: Atlas, start: int = 0, stop: int | None = None, **rules: Any) -> list[str]:
    return obs_reasons(CellRules(**rules), atlas, start, atlas.n_cells if stop is None else stop)


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("tissue = 'lung'", [0, 3, 4]),
        ("tissue = 'lung' AND age > 40", [0, 4]),
        ("tissue IN ('lung', 'heart')", [0, 1, 3, 4]),
        ("tissue NOT IN ('lung')", [1]),
        ("healthy", [0, 1, 4]),
        ("NOT healthy", [3]),
        ("healthy OR healthy IS NULL", [0, 1, 2, 4]),
        ("score BETWEEN 0.4 AND 0.8", [0, 3]),
        ("\"cell type\" LIKE 'T%'", [0, 2, 4]),
        ("\"cell type\" = 'x.sum()'", [3]),
        ("age > 40 OR age IS NULL", [0, 2, 3, 4]),
        ("CASE WHEN age > 40 THEN TRUE ELSE FALSE END", [0, 2, 4]),
        ("TRUE", [0, 1, 2, 3, 4]),
    ],
)
def test_an_expression_chooses_cells(where: str, kept: list[int], table_atlas: MakeAtlas) -> None:
    found = reasons(table_atlas(obs=OBS, cells=5), where=where)
    assert [i for i, reason in enumerate(found) if not reason] == kept
    assert set(found) <= {"", "where"}


def test_blocks_agree_with_the_whole(table_atlas: MakeAtlas) -> None:
    atlas = table_atlas(obs=OBS, cells=5)
    whole = reasons(atlas, where="age > 40")
    assert [r for i in range(5) for r in reasons(atlas, i, i + 1, where="age > 40")] == whole


@pytest.mark.parametrize(
    ("where", "what", "fix"),
    [
        ("tisue = 'lung'", "obs has no column 'tisue'", "Did you mean 'tissue'?"),
        ("age", "yields Int64, not true or false", "Compare it"),
        ("tissue > 3", "does not fit obs: cannot compare string with numeric type (i32) (tissue is String)", "Change"),
    ],
)
def test_an_expression_that_does_not_fit_the_file(where: str, what: str, fix: str, table_atlas: MakeAtlas) -> None:
    with pytest.raises(SettingsError) as caught:
        reasons(table_atlas(obs=OBS, cells=5), where=where)
    assert what in caught.value.what
    assert caught.value.where == "lung.h5ad"
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("age >", "'age >' is no SQL expression: unable to parse"),
        ("SELECT age", "is no SQL expression"),
        ("age > avg(age)", r"looks at several cells at once \(mean\)"),
        ("count(*) > 3", "looks at several cells at once"),
        ("row_number() OVER (ORDER BY age) > 3", "looks at several cells at once"),
        ("max(age) > 3", r"looks at several cells at once \(max\)"),
    ],
)
def test_an_expression_is_checked_when_it_is_given(where: str, what: str) -> None:
    with pytest.raises(SettingsError, match=what):
        CellRules(where=where)


def test_a_column_that_cannot_be_read_does_not_drop_all_cells(table_atlas: MakeAtlas) -> None:
    atlas = table_atlas(obs={"age": pa.array([1, 2])[:0]}, cells=4)
    with pytest.raises(AtlasError, match=r"--where asks for a column that cannot be read: obs\['age'\] left empty"):
        reasons(atlas, where="age > 1")


@pytest.mark.parametrize(
    "values",
    [
        pa.array([True, False, None]),
        pa.array(["True", "False", None]),
        pa.array(["true", "FALSE", "unknown"]).dictionary_encode(),
        pa.array([1, 0, None], pa.int64()),
        pa.array([1.0, 0.0, None]),
        pa.array(["primary", "SECONDARY", ""]),
    ],
)
def test_primary_data_and_filter_pass_are_honoured(values: pa.Array, table_atlas: MakeAtlas) -> None:
    primary = table_atlas(obs={"is_primary_data": values}, cells=3)
    assert reasons(primary) == ["", "not_primary_data", ""], "a missing mark keeps its cell, as a missing column does"
    assert reasons(primary, primary_only=False) == ["", "", ""]
    passed = table_atlas(obs={"filter_pass": values}, cells=3)
    assert reasons(passed) == ["", "filter_pass", ""]
    assert reasons(passed, filter_pass=False) == ["", "", ""]
    assert reasons(table_atlas(cells=3)) == ["", "", ""]


def test_reasons_of_counts_and_their_order() -> None:
    rules = CellRules(min_genes=7, min_counts=20, max_mito_share=0.2)
    cells = {
        # (library size, vocabulary genes, mitochondrial counts): reason
        (0.0, 0, 0.0): "empty_cell",
        (50.0, 0, 0.0): "no_vocabulary_gene",
        (50.0, 6, 50.0): "below_min_genes",
        (19.0, 7, 19.0): "below_min_counts",
        (100.0, 50, 21.0): "mitochondrial_share",
        (100.0, 50, 20.0): "",
        (20.0, 7, 0.0): "",
    }
    totals, genes, mito = (np.array(column) for column in zip(*cells, strict=True))
    assert counts_reasons(rules, totals, genes, mito).tolist() == list(cells.values())
    assert set(cells.values()) - {""} <= set(REASONS)


@pytest.mark.parametrize("dropped", [{"empty_cell": 20, "below_min_genes": 31}, {"no_vocabulary_gene": 51}])
def test_a_file_of_empty_cells_is_refused(dropped: dict[str, int]) -> None:
    tally = Tally(read=100, kept=49, dropped=dropped)
    with pytest.raises(AtlasError) as caught:
        check_enough_cells(tally, CellRules(), where="raw.h5")
    assert caught.value.what.startswith("51 of 100 cells are empty or nearly so (")
    assert "50% are allowed" in caught.value.what
    assert "unfiltered matrix of all barcodes" in caught.value.fix
    check_enough_cells(tally, CellRules(max_empty_share=0.51), where="raw.h5")
    chosen = Tally(read=100, kept=10, dropped={"where": 80, "empty_cell": 10})
    check_enough_cells(chosen, CellRules(), where="raw.h5")


@pytest.mark.parametrize(
    "options",
    [
        {"min_genes": 0},
        {"min_counts": -1},
        {"min_counts": float("nan")},
        {"max_mito_share": 1.1},
        {"max_empty_share": -0.1},
        {"keep_obs": ("a", "a")},
    ],
)
def test_rules_have_ranges(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        CellRules(**options)


def test_the_recipe_holds_every_rule() -> None:
    assert CellRules(where="age > 1").recipe() == {
        "min_genes": 7,
        "min_counts": 0.0,
        "max_mito_share": 1.0,
        "primary_only": True,
        "filter_pass": True,
        "where": "age > 1",
        "keep_obs": (),
        "max_empty_share": 0.5,
    }
