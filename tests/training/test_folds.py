"""Folds: every unit tested once, no group or gene on two sides, classes even, the same for the same seed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genescale.platform.errors import InputError, SettingsError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.training.labels.listed_parts import ListedParts, read_id_lists
from genescale.training.labels.split_file import read_split, split_table, write_split
from genescale.training.labels.splits import Split
from genescale.training.labels.splitting import Folds, SplitRequest, Units, make_folds

FEW = settings(max_examples=20, deadline=None)


def parts_by_id(folds: Folds, ids: Any) -> list[dict[str, str]]:
    names = np.asarray(ids)
    return [{str(names[u]): part for part, at in split.parts().items() for u in at} for split in folds.splits]


def assert_complete(folds: Folds, n: int) -> None:
    for split in folds.splits:
        assert sorted(np.concatenate(list(split.parts().values())).tolist()) == list(range(n))
        assert all(len(part) and (np.diff(part) > 0).all() for part in split.parts().values())
    if len(folds.splits) > 1:
        tested = np.concatenate([split.test for split in folds.splits])
        assert sorted(tested.tolist()) == list(range(n))


@st.composite
def gene_sets(draw: st.DrawFn) -> tuple[Units, int]:
    folds = draw(st.integers(2, 6))
    sizes = draw(st.lists(st.integers(folds + 2, 60), min_size=2, max_size=4))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    ids = np.array([f"ENSG{number:011d}" for number in range(len(labels))])
    order = np.random.default_rng(draw(st.integers(0, 99))).permutation(len(labels))
    return Units(ids_u=ids[order], labels_u=labels[order]), folds


@FEW
@given(gene_sets(), st.integers(0, 50))
def test_gene_folds_are_complete_and_stratified_within_one(made: tuple[Units, int], seed: int) -> None:
    units, folds = made
    found = make_folds(SplitRequest(method="random", folds=folds, seed=seed, unit="genes"), units)
    assert_complete(found, len(units.ids_u))
    sizes = [len(split.test) for split in found.splits]
    assert max(sizes) - min(sizes) <= 1
    for code in np.unique(units.labels_u):
        tested = [int((units.labels_u[split.test] == code).sum()) for split in found.splits]
        assert max(tested) - min(tested) <= 1
        for split in found.splits:
            rest = np.concatenate([split.train, split.validation])
            validated = int((units.labels_u[split.validation] == code).sum())
            assert abs(validated - (units.labels_u[rest] == code).sum() / 9) <= 1
            assert validated >= 1


@st.composite
def donors(draw: st.DrawFn) -> Units:
    sizes = draw(st.lists(st.integers(1, 25), min_size=7, max_size=12))
    groups = np.repeat([f"donor-{number}" for number in range(len(sizes))], sizes)
    draws = np.random.default_rng(draw(st.integers(0, 99)))
    return Units(
        ids_u=np.array([f"cell-{number}" for number in range(len(groups))]),
        labels_u=draws.choice(["a", "b", "c"], size=len(groups)),
        groups_u=groups,
        attributes={"sex": np.where(np.repeat(np.arange(len(sizes)), sizes) % 2, "male", "female")},
    )


@FEW
@given(donors(), st.sampled_from(["grouped", "balanced"]), st.sampled_from([0, 3]), st.integers(0, 20))
def test_no_group_stands_in_two_parts(units: Units, method: Any, folds: int, seed: int) -> None:
    found = make_folds(SplitRequest(method=method, folds=folds, seed=seed, trials=5), units)
    assert_complete(found, len(units.ids_u))
    assert units.groups_u is not None
    for split in found.splits:
        held = [set(units.groups_u[part]) for part in split.parts().values()]
        assert all(not a & b for a, b in itertools.combinations(held, 2))


@FEW
@given(donors(), st.sampled_from(["random", "grouped", "balanced"]), st.sampled_from([0, 3]), st.integers(0, 20))
def test_the_order_of_the_rows_does_not_matter(units: Units, method: Any, folds: int, seed: int) -> None:
    labels = np.where(units.labels_u == "c", "b", units.labels_u)
    labels[:3], labels[-3:] = "a", "b"
    units = Units(**{**vars(units), "labels_u": labels})
    request = SplitRequest(method=method, folds=folds, seed=seed, trials=5)
    order = np.random.default_rng(seed).permutation(len(units.ids_u))
    shuffled = units.take(order)
    first = parts_by_id(make_folds(request, units), units.ids_u)
    assert first == parts_by_id(make_folds(request, units), units.ids_u)
    assert first == parts_by_id(make_folds(request, shuffled), shuffled.ids_u)


def test_another_seed_gives_other_folds() -> None:
    units = Units(ids_u=np.arange(60).astype(str), labels_u=np.arange(60) % 2)
    first, other = (make_folds(SplitRequest(method="random", folds=5, seed=seed), units) for seed in (0, 1))
    assert parts_by_id(first, units.ids_u) != parts_by_id(other, units.ids_u)


def test_numbers_are_spread_over_the_parts() -> None:
    ages = np.random.default_rng(0).permutation(np.linspace(0, 100, 200))
    folds = make_folds(SplitRequest(method="random", folds=4), Units(ids_u=np.arange(200).astype(str), labels_u=ages))
    means = [ages[split.test].mean() for split in folds.splits]
    assert max(means) - min(means) < 6


@pytest.mark.parametrize(
    ("request_of", "n", "labels", "groups", "message"),
    [
        (SplitRequest(method="random", folds=5), 4, "aabb", None, "4 cells cannot fill 5 folds"),
        (SplitRequest(method="random", folds=5), 12, "aaaaaaaaaabb", None, "class 'b' has 2 cells"),
        (SplitRequest(folds=4, group="donor_id"), 6, "ababab", "112233", r"donor_id: 3 group\(s\) \(1, 2, 3\)"),
        (SplitRequest(folds=2), 6, "ababab", "112233", "leaves one group for train and validation"),
        (SplitRequest(), 4, "abab", "1122", r"2 group\(s\)"),
        (SplitRequest(), 4, "abab", None, "4 of 4 cells have no group"),
        (SplitRequest(method="balanced"), 6, "ababab", "112233", "needs attributes"),
    ],
)
def test_too_few_units_are_refused(
    request_of: SplitRequest, n: int, labels: str, groups: str | None, message: str
) -> None:
    units = Units(
        ids_u=np.arange(n).astype(str),
        labels_u=np.array(list(labels)),
        groups_u=None if groups is None else np.array(list(groups)),
    )
    with pytest.raises(InputError, match=message):
        make_folds(request_of, units)


def test_codes_are_named_and_units_without_a_label_do_not_count_as_a_class() -> None:
    codes = np.array([0] * 8 + [1] * 6 + [-1])
    units = Units(ids_u=np.arange(15).astype(str), labels_u=codes, classes=("common", "seldom"))
    assert_complete(make_folds(SplitRequest(method="random", folds=5), units), 15)
    with pytest.raises(InputError, match="class 'seldom' has 6 cells, fewer than the 7 folds"):
        make_folds(SplitRequest(method="random", folds=7), units)


def test_a_unit_under_one_id_twice_is_refused() -> None:
    units = Units(ids_u=np.array(["a", "b", "a", "c"]), labels_u=np.arange(4) % 2)
    with pytest.raises(InputError, match="stand there twice, for example a"):
        make_folds(SplitRequest(method="random", unit="genes"), units)


@pytest.mark.parametrize("changes", [{"folds": 1}, {"method": "lists"}, {"trials": 0}, {"method": "odd"}])
def test_requests_that_mean_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        SplitRequest(**changes)


def balanced_units() -> Units:
    """24 donors of ten cells, half of them old; sex goes with age, so few assignments are balanced in both."""
    donor = np.repeat(np.arange(24), 10)
    return Units(
        ids_u=np.arange(240).astype(str),
        labels_u=np.where(np.arange(240) % 2, "a", "b"),
        groups_u=np.char.add("donor-", donor.astype(str)),
        attributes={"sex": np.where(donor < 12, "male", "female"), "age": 20.0 + 2 * donor},
    )


def test_the_best_of_many_balanced_splits_is_returned() -> None:
    units = balanced_units()
    one, many = (make_folds(SplitRequest(method="balanced", trials=trials), units) for trials in (1, 300))
    p_one, p_many = (min(test.p_value for test in folds.statistics) for folds in (one, many))
    assert (one.tried, many.tried) == (1, 300)
    assert p_many > 0.6
    assert p_many > p_one
    assert many.balanced
    assert "300 splits" in many.notes[0]
    sizes = [len(part) for part in many.splits[0].parts().values()]
    assert sum(abs(size - wish) for size, wish in zip(sizes, (192, 24, 24), strict=True)) <= 0.1 * 240 + 10


def test_the_statistics_are_those_of_scipy_on_the_donors() -> None:
    from scipy import stats

    units = balanced_units()
    folds = make_folds(SplitRequest(method="balanced", trials=20), units)
    parts = list(folds.splits[0].parts().values())
    ages = [np.unique(units.attributes["age"][part]) for part in parts]
    sexes = [[(units.attributes["sex"][part] == sex).sum() // 10 for sex in ("female", "male")] for part in parts]
    by_name = {test.attribute: test for test in folds.statistics}
    assert by_name["age"].p_value == pytest.approx(stats.kruskal(*ages).pvalue)
    assert by_name["age"].test == "Kruskal-Wallis"
    assert by_name["sex"].p_value == pytest.approx(stats.chi2_contingency(sexes).pvalue)
    assert sum(sum(counts.values()) for counts in by_name["sex"].parts.values()) == 24


def test_two_parts_of_numbers_are_compared_by_rank_sum_and_constants_have_p_one() -> None:
    from genescale.training.labels.balance import balance_test

    part = np.repeat([0, 1], 20)
    test = balance_test("age", np.arange(40.0), part, ["fold 0", "fold 1"], "groups")
    assert (test.test, test.balanced) == ("Wilcoxon rank-sum", False)
    assert test.p_value < 1e-6
    assert balance_test("sex", np.full(40, "male"), part, ["fold 0", "fold 1"], "groups").p_value == 1


def test_an_unbalanced_best_is_named_in_the_notes() -> None:
    """One trial for each seed: some are unbalanced, and those say so; the others do not."""
    found = [make_folds(SplitRequest(method="balanced", trials=1, seed=seed), balanced_units()) for seed in range(60)]
    for folds in found:
        worst = min(folds.statistics, key=lambda test: test.p_value)
        assert folds.balanced == (worst.p_value >= 0.1)
        said = f"Unbalanced even in the best of 1 splits: {worst.attribute}" in " ".join(folds.notes)
        assert said == (not folds.balanced)
    assert 0 < sum(not folds.balanced for folds in found) < 60


def listed_units() -> Units:
    return Units(
        ids_u=np.array([f"cell-{number}" for number in range(12)]),
        labels_u=np.arange(12) % 2,
        groups_u=np.repeat(["p1", "p2", "p3", "p4"], 3),
    )


def split_of_file(path: Path) -> Folds:
    listed = read_id_lists(str(path), Store(StorageSettings()))
    return make_folds(SplitRequest(method="lists", listed=listed), listed_units())


def test_listed_ids_stand_where_the_lists_say_and_the_rest_is_counted() -> None:
    listed = ListedParts(ids={"train": ("cell-3", "cell-0"), "validation": ("cell-7",), "test": ("cell-9", "cell-8")})
    folds = make_folds(SplitRequest(method="lists", listed=listed), listed_units())
    assert [part.tolist() for part in folds.splits[0].parts().values()] == [[0, 3], [7], [8, 9]]
    assert "7 labelled cells stand in no list" in folds.notes[0]


def test_the_published_form_of_lists_names_donors(tmp_path: Path) -> None:
    """`attr_key`, and `eval` for what chooses the epoch; without it, whole donors are taken from training."""
    path, store = tmp_path / "split.json", Store(StorageSettings())
    path.write_text(json.dumps({"attr_key": "individual", "train": ["p1", "p4"], "eval": ["p2"], "test": ["p3"]}))
    request = SplitRequest(method="lists", group="individual", listed=read_id_lists(str(path), store))
    split = make_folds(request, listed_units()).splits[0]
    assert [part.tolist() for part in split.parts().values()] == [[0, 1, 2, 9, 10, 11], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(InputError, match="values of 'individual'"):
        make_folds(SplitRequest(method="lists", group="donor_id", listed=request.listed), listed_units())
    path.write_text(json.dumps({"key": "individual", "train": ["p1", "p4", "p2"], "test": ["p3"]}))
    request = SplitRequest(method="lists", group="individual", listed=read_id_lists(str(path), store))
    folds = make_folds(request, listed_units())
    groups = listed_units().groups_u
    assert groups is not None
    assert len(set(groups[folds.splits[0].validation])) == 1
    assert not set(groups[folds.splits[0].validation]) & set(groups[folds.splits[0].train])
    assert any("taken from the training part" in note for note in folds.notes)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"train": ["cell-1"], "test": ["cell-1"]}', "listed twice, for example cell-1"),
        ("a.json", '{"train": ["cell-1", "cell-2"]}', "no ids for the part 'test'"),
        ("a.json", '{"train": ["cell-1"], "trial": ["cell-2"]}', "'trial' is no part"),
        ("a.json", '{"train": 3}', "no list of ids"),
        ("a.json", "[1", "not valid JSON"),
        ("a.csv", "cell_id,part\ncell-1,train\ncell-2,train\nnobody,test\n", r"1 listed id.*nobody"),
        ("a.csv", "name,part\ncell-1,train\n", "the columns are name, part"),
        ("a.csv", "id,part,fold\ncell-1,train,1\n", "no fold 0"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        split_of_file(tmp_path / name)


def test_the_split_is_kept_as_a_file_and_splits_again(tmp_path: Path) -> None:
    units, store, uri = balanced_units(), Store(StorageSettings()), str(tmp_path / "split.parquet")
    folds = make_folds(SplitRequest(method="grouped", folds=4, group="donor_id"), units)
    write_split(folds, units.ids_u.tolist(), uri, store, facts={"corpus": "c@3"})
    assert pq.read_table(uri).num_rows == 4 * len(units.ids_u)
    order = np.random.default_rng(3).permutation(len(units.ids_u))
    again = read_split(uri, units.ids_u[order].tolist(), store)
    assert parts_by_id(again, units.ids_u[order]) == parts_by_id(folds, units.ids_u)
    assert again.method == "grouped by donor_id, 4 folds"
    listed = make_folds(SplitRequest(method="lists", listed=read_id_lists(uri, store, fold=2)), units)
    assert [p.tolist() for p in listed.splits[0].parts().values()] == [
        p.tolist() for p in folds.splits[2].parts().values()
    ]
    with pytest.raises(InputError, match="units are not here"):
        read_split(uri, ["another"], store)


def test_a_split_file_carries_the_tests_of_its_balance() -> None:
    units = balanced_units()
    folds = make_folds(SplitRequest(method="balanced", trials=5), units)
    table = split_table(folds, units.ids_u.tolist())
    facts = json.loads(table.schema.metadata[b"genescale.split"])
    assert {test["attribute"] for test in facts["statistics"]} == {"age", "sex"}
    assert isinstance(folds.splits[0], Split)
    assert table.column_names == ["unit_id", "fold", "part"]
