"""Labelled cells: every cell is in or counted under a reason, and what cannot be learned is refused before training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import CorpusError, InputError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary
from genescale.training.labels.cell_labels import ColumnTarget, LabelledCells, labelled_cells
from genescale.training.labels.selection import select_cells
from tests.training.conftest import commit_cells, framed_cell

AGES = ["20", "30.5", None, "nan", "60", "20", "41", "52", "28", "33", "20", "71"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_vocabulary: Vocabulary) -> Corpus:
    """Two datasets of six cells with the same cell ids; cells 0 and 6 have the same counts."""
    made = Corpus.create(str(tmp_path_factory.mktemp("cells") / "corpus"), tiny_vocabulary, Store(StorageSettings()))
    cells = [framed_cell(tiny_vocabulary, [n, n + 1]) for n in range(12)]
    columns: dict[str, list[Any]] = {
        "cell_id": [f"cell-{n % 6}" for n in range(12)],
        "cell_type": ["a", "b", "a", "b", "a", None, "a", "b", "a", "rare", "b", ""],
        "tissue": ["heart"] * 5 + ["lung"] * 4 + [None] * 3,
        "donor_id": ["p1", "p1", "p2", "p2", "p3", "p3", "p4", "p4", "p5", None, "p6", "p6"],
        "sex": ["male", "female"] * 6,
        "is_primary_data": [True, False] * 6,
        "labels": [{"age": age, "note": f"n{n}"} if age is not None else None for n, age in enumerate(AGES)],
        "content_hash": [7, None, 1, 2, 3, 4, 7, None, 8, 9, 10, 11],
    }
    for number, (start, stop) in enumerate(((0, 6), (6, 12))):
        part = {name: values[start:stop] for name, values in columns.items()}
        part["labels"] = [None if row is None else list(row.items()) for row in part["labels"]]
        made = commit_cells(
            made, f"atlas-{number}", cells[start:stop], part | {"cell_id": columns["cell_id"][start:stop]}
        )
    return made


def assert_accounted(cells: LabelledCells, corpus: Corpus) -> None:
    assert len(cells.index_n) + sum(cells.left_out.values()) == corpus.n_cells
    assert len(cells.ids_n) == len(set(cells.ids_n.tolist())) == len(cells.index_n)


@pytest.mark.parametrize(
    ("where", "index"),
    [
        ("", list(range(12))),
        ("tissue = 'heart'", [0, 1, 2, 3, 4]),
        ("tissue IS NULL OR is_primary_data", [0, 2, 4, 6, 8, 9, 10, 11]),
        ("tissue <> 'heart'", [5, 6, 7, 8]),
        ("CAST(labels.age AS DOUBLE) > 50 AND sex IN ('male')", [4]),
        ("labels.\"note\" LIKE 'n1%' AND length = 4", [1, 10, 11]),
        ("dataset_id = 'atlas-1' AND donor_id = 'p4'", [6, 7]),
        ("tissue = 'labels.age' OR donor_id = 'p5'", [8]),
    ],
)
def test_a_condition_selects_cells_by_global_index(corpus: Corpus, where: str, index: list[int]) -> None:
    assert select_cells(corpus, where).tolist() == index


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("tisue = 'heart'", CorpusError, "no cell column 'tisue'.*'tissue'"),
        ("input_ids = 3", CorpusError, "no cell column 'input_ids'"),
        ("tissue =", InputError, "is no condition"),
        ("SELECT * FROM cells", InputError, "is no condition"),
        ("read_csv('/etc/passwd')", InputError, "is no condition"),
        ("length + 1", InputError, "no condition on each cell"),
        ("1 = 1", InputError, "names no column"),
        ("length > 'long'", InputError, "cannot be worked out"),
        ("tissue = 'Heart'", CorpusError, "none of the 12 cells fulfils"),
    ],
)
def test_conditions_that_mean_nothing_are_refused(
    corpus: Corpus, where: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        select_cells(corpus, where)


def test_every_cell_is_in_or_has_a_reason(corpus: Corpus) -> None:
    cells = labelled_cells(
        corpus, label="cell_type", group="donor_id", where="dataset_id <> 'none'", min_cells_per_class=2
    )
    assert cells.index_n.tolist() == [0, 1, 2, 3, 4, 7, 8, 10]
    assert cells.classes == ("a", "b")
    assert cells.codes_n.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    left = {reason: count for reason, count in cells.left_out.items() if count}
    assert left == {"no cell_type": 2, "no donor_id": 1, "copy of another cell": 1}
    assert_accounted(cells, corpus)
    rare = labelled_cells(corpus, label="cell_type", min_cells_per_class=2)
    assert rare.left_out["rare class"] == 1
    assert_accounted(rare, corpus)


def test_ids_name_the_dataset_only_where_ids_repeat(corpus: Corpus) -> None:
    both = labelled_cells(corpus, label="cell_type", where="labels.note IN ('n1', 'n7', 'n8')")
    assert both.ids_n.tolist() == ["atlas-0/cell-1", "atlas-1/cell-1", "atlas-1/cell-2"]
    first = labelled_cells(corpus, label="cell_type", where="dataset_id = 'atlas-0'")
    assert first.ids_n.tolist() == [f"cell-{n}" for n in range(5)]


def test_several_targets_keep_cells_that_have_one_of_them(corpus: Corpus) -> None:
    cells = labelled_cells(
        corpus, targets=[ColumnTarget(label="cell_type"), ColumnTarget(label="labels.age", kind="number")]
    )
    assert cells.index_n.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    kinds, ages = cells.targets
    assert kinds.values_n.tolist() == [0, 1, 0, 1, 0, -1, 1, 0, 2, 1, -1]
    assert np.isnan(ages.values_n).tolist() == [False, False, True, True] + [False] * 7
    assert ages.values_n[[0, 1, 10]].tolist() == [20.0, 30.5, 71.0]
    assert_accounted(cells, corpus)


def test_attributes_come_as_numbers_or_texts(corpus: Corpus) -> None:
    cells = labelled_cells(corpus, label="cell_type", balance=("sex", "labels.age"))
    assert cells.attributes["sex"].dtype.kind == "U"
    assert cells.attributes["labels.age"].dtype.kind == "f"
    assert cells.left_out["no labels.age"] == 2
    assert_accounted(cells, corpus)


@pytest.mark.parametrize(("changes", "left"), [({"max_cells": 4}, 4), ({"max_cells_per_class": 2}, 5)])
def test_caps_draw_by_seed(corpus: Corpus, changes: dict[str, int], left: int) -> None:
    draws = [labelled_cells(corpus, label="cell_type", seed=seed, **changes) for seed in (0, 0, *range(1, 8))]
    assert all(len(cells.index_n) == left for cells in draws)
    assert draws[0].index_n.tolist() == draws[1].index_n.tolist()
    assert len({tuple(cells.index_n.tolist()) for cells in draws}) > 1
    for cells in draws:
        assert_accounted(cells, corpus)
    if "max_cells_per_class" in changes:
        assert np.bincount(draws[0].codes_n).tolist() == [2, 2, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": "cell_tipe"}, "no cell column 'cell_tipe'.*'cell_type'"),
        ({"label": "organism"}, r"'organism' gives 0 class.*12 no organism"),
        ({"label": "tissue", "where": "tissue = 'heart'"}, r"'tissue' gives 1 class"),
        ({"label": "tissue", "group": "suspension_type"}, "'suspension_type' is empty"),
        ({"label": "cell_type", "min_cells_per_class": 50}, r"gives 0 class.*rare class"),
        ({"label": "cell_type", "folds": 20}, "9 cells cannot fill 20 folds"),
        ({"targets": [ColumnTarget(label="sex", kind="number")]}, r"12 values that are no numbers: female, male"),
        (
            {"targets": [ColumnTarget(label="labels.age", kind="number")], "where": "labels.age = '20'"},
            r"gives 1 different number",
        ),
    ],
)
def test_labels_that_teach_nothing_are_refused(corpus: Corpus, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        labelled_cells(corpus, **settings)
