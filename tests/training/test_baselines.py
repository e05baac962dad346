"""Baselines see what they are said to see, in the folds of the head, and say what could not be measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import InputError, SettingsError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.evaluation.baselines import BaselineConfig, measure_baselines
from genescale.training.evaluation.baselines_features import gene_features, rank_matrix, rank_vectors
from genescale.training.evaluation.baselines_models import CLASSIFIERS, REGRESSORS, Part, fit_and_predict
from genescale.training.labels.splits import Split

QUICK = BaselineConfig(features=("rank_vectors",), trees=20)


def split_by(part_u: np.ndarray, *parts: list[int]) -> Split:
    train, validation, test = (np.flatnonzero(np.isin(part_u, part)) for part in parts)
    return Split(train=train, validation=validation, test=test)


@pytest.fixture(scope="module")
def task(tiny_corpus: Corpus) -> Any:
    """The labelled cells of the tiny corpus in two folds by donor, as `prepare` would make them ready."""
    table = tiny_corpus.cells(["cell_type", "donor_id", "cell_id", "dataset_id", "source_row"])
    labels = np.array(table["cell_type"].fill_null("").to_pylist())
    index_n = np.flatnonzero(labels != "")
    classes, codes_u = np.unique(labels[index_n], return_inverse=True)
    groups_u = np.array(table["donor_id"].to_pylist())[index_n]
    part_u = np.array([int(name[-1]) % 4 for name in groups_u])
    n = len(index_n)
    splits = [split_by(part_u, train, [2], test) for train, test in (([0, 3], [1]), ([1, 3], [0]))]
    # The rows of the examples stand in another order than the units.
    unit_r = np.arange(n)[::-1].copy()
    return SimpleNamespace(
        unit="cells",
        n_units=n,
        examples=SimpleNamespace(index_n=index_n[::-1].copy(), row_cell_r=np.arange(n), unit_r=unit_r),
        folds=SimpleNamespace(splits=tuple(splits)),
        specs=(SimpleNamespace(label="cell_type", classes=tuple(classes.tolist())),),
        ids_u=np.array(table["cell_id"].to_pylist())[index_n],
        names_u=None,
        datasets_u=np.array(table["dataset_id"].to_pylist())[index_n],
        source_rows_u=table["source_row"].to_numpy()[index_n],
        groups_u=groups_u,
        targets_u=lambda head=0: codes_u.astype(np.int64),
    )


def changed(task: Any, **changes: Any) -> Any:
    return SimpleNamespace(**{**vars(task), **changes})


def test_ranks_become_numbers_that_fall_from_one(tiny_vocabulary: Vocabulary) -> None:
    specials = tiny_vocabulary.special
    tokens = [tiny_vocabulary.token(f"GENE{i}") for i in (7, 3, 9, 1)]
    cells = [np.array([specials["<cls>"], *tokens, specials["<eos>"]]), np.array(tokens[:1]), np.array([], dtype=int)]
    found = rank_matrix(cells, tiny_vocabulary).toarray()
    assert found[0, tokens].tolist() == [1.0, 0.75, 0.5, 0.25]
    assert found[1, tokens].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert found.sum() == pytest.approx(3.5)


def test_a_gene_is_its_ranks_over_cells(tiny_corpus: Corpus) -> None:
    genes = np.array(tiny_corpus.vocabulary.gene_ids[:3])
    tokens = [tiny_corpus.vocabulary.token(gene) for gene in genes]
    index_n = np.arange(0, tiny_corpus.n_cells, 7)
    wanted = rank_vectors(tiny_corpus, index_n).toarray()[:, tokens]
    assert np.array_equal(gene_features("rank_vectors", tiny_corpus, genes, index_n).toarray(), wanted.T)
    datasets = np.array(tiny_corpus.cells(["dataset_id"])["dataset_id"].to_pylist())[index_n]
    averages = gene_features("rank_averages", tiny_corpus, genes, index_n).toarray()
    assert averages.shape == (3, 4)
    for place, dataset in enumerate(np.unique(datasets)):
        mine = wanted[datasets == dataset]
        present = mine > 0
        assert np.allclose(averages[:, place], mine.sum(axis=0) / np.maximum(present.sum(axis=0), 1))
        assert np.allclose(averages[:, 2 + place], present.mean(axis=0))


def test_every_classifier_is_measured_in_the_folds_of_the_head(task: Any, tiny_corpus: Corpus) -> None:
    found = measure_baselines(task, tiny_corpus, QUICK, bootstrap=20)
    assert [baseline.name for baseline in found] == list(CLASSIFIERS)
    tests = np.concatenate([split.test for split in task.folds.splits])
    for baseline in found:
        assert baseline.evaluation is not None
        assert baseline.predictions is not None
        assert baseline.predictions.ids_u.tolist() == task.ids_u[tests].tolist()
        assert baseline.predictions.true_u.tolist() == task.targets_u()[tests].tolist()
        assert [row["units"] for row in baseline.evaluation.per_fold] == [len(s.test) for s in task.folds.splits]
        # A type shows in its eight marker genes: whoever looks at the right rows finds it.
        assert baseline.evaluation["macro_f1"] > 0.95
        assert [fold["training_units"] for fold in baseline.facts["folds"]] == [
            len(split.train) for split in task.folds.splits
        ]


def test_the_test_part_is_not_learnt_from(task: Any, tiny_corpus: Corpus) -> None:
    """Labels of the test part are turned round: a baseline that saw them would follow them."""
    codes_u = task.targets_u().copy()
    turned = codes_u.copy()
    test = task.folds.splits[0].test
    turned[test] = (codes_u[test] + 1) % 3
    one = changed(task, folds=SimpleNamespace(splits=task.folds.splits[:1]), targets_u=lambda head=0: turned)
    for baseline in measure_baselines(one, tiny_corpus, QUICK, bootstrap=0):
        assert baseline.evaluation is not None
        assert baseline.evaluation["accuracy"] < 0.05


def test_what_cannot_be_measured_is_said(task: Any, tiny_corpus: Corpus) -> None:
    # The sources of the tiny corpus never were on disk.
    config = BaselineConfig(features=("log_expression",))
    found = measure_baselines(task, tiny_corpus, config)
    assert [baseline.name for baseline in found] == list(CLASSIFIERS)
    assert all("cells of dataset 'atlas-" in baseline.why_not and "gone" in baseline.why_not for baseline in found)
    assert "gone" in found[0].to_json()["not_measured"]
    codes_u = np.where(np.isin(np.arange(task.n_units), task.folds.splits[0].train), 0, task.targets_u())
    one_class = changed(task, targets_u=lambda head=0: codes_u)
    assert all("one class only" in b.why_not for b in measure_baselines(one_class, tiny_corpus, QUICK))


def test_the_training_part_is_capped_within_classes(task: Any, tiny_corpus: Corpus) -> None:
    config = BaselineConfig(models=("random_forest",), features=("rank_vectors",), max_train_units=40, trees=20)
    (found,) = measure_baselines(task, tiny_corpus, config, bootstrap=0)
    assert all(37 <= fold["training_units"] <= 40 for fold in found.facts["folds"])
    assert found.predictions is not None
    assert len(found.predictions) == sum(len(split.test) for split in task.folds.splits)
    again = measure_baselines(task, tiny_corpus, config, bootstrap=0)[0].predictions
    assert again is not None
    assert np.array_equal(again.probabilities, found.predictions.probabilities)


def test_units_without_a_label_are_left_out(task: Any, tiny_corpus: Corpus) -> None:
    codes_u = task.targets_u().copy()
    codes_u[::5] = -1
    config = BaselineConfig(models=("linear_svm",), features=("rank_vectors",))
    (found,) = measure_baselines(changed(task, targets_u=lambda head=0: codes_u), tiny_corpus, config, bootstrap=0)
    tests = np.concatenate([split.test for split in task.folds.splits])
    assert found.predictions is not None
    assert len(found.predictions) == (codes_u[tests] >= 0).sum()


def test_numbers_are_regressed(task: Any, tiny_corpus: Corpus) -> None:
    generator = np.random.default_rng(0)
    ages_u = 10.0 * task.targets_u() + generator.normal(size=task.n_units)
    ages_u[::9] = np.nan
    ages = changed(task, specs=(SimpleNamespace(label="age", classes=()),), targets_u=lambda head=0: ages_u)
    found = measure_baselines(ages, tiny_corpus, QUICK, bootstrap=10)
    assert [baseline.name for baseline in found] == list(REGRESSORS)
    assert all(baseline.evaluation is not None and baseline.evaluation["r2"] > 0.9 for baseline in found)


def test_genes_are_classified(tiny_corpus: Corpus) -> None:
    """Markers of one type against those of another: their ranks over cells tell them apart."""
    numbers = [*range(8), *range(8, 16)]
    codes_u = np.array([0] * 8 + [1] * 8)
    part_u = np.arange(16) % 4
    split = split_by(part_u, [0, 1], [2], [3])
    genes = SimpleNamespace(
        unit="genes",
        n_units=16,
        examples=SimpleNamespace(index_n=np.arange(tiny_corpus.n_cells)),
        folds=SimpleNamespace(splits=(split,)),
        specs=(SimpleNamespace(label="marker of", classes=("b_cell", "monocyte")),),
        ids_u=np.array([tiny_corpus.vocabulary.gene_ids[i] for i in numbers]),
        names_u=np.array([f"GENE{i}" for i in numbers]),
        datasets_u=None,
        source_rows_u=None,
        groups_u=np.full(16, ""),
        targets_u=lambda head=0: codes_u,
    )
    config = BaselineConfig(models=("logistic_regression",), gene_cells=50)
    averages, vectors, expression = measure_baselines(genes, tiny_corpus, config, bootstrap=10)
    assert [b.features for b in (averages, vectors, expression)] == ["rank_averages", "rank_vectors", "log_expression"]
    assert vectors.evaluation is not None
    assert vectors.evaluation["roc_auc"] == 1.0
    assert vectors.facts["cells"] == 50
    assert vectors.predictions is not None
    assert vectors.predictions.names_u is not None
    assert expression.why_not


def test_odd_parts_and_names_are_refused() -> None:
    features = np.eye(4)
    part = Part(features_uk=features, targets_u=np.array([0, 1, 1, 1]))
    empty = Part(features_uk=features[:0], targets_u=np.array([], dtype=np.int64))
    with pytest.raises(InputError, match="calibration needs two"):
        fit_and_predict("linear_svm", part, part, features, n_classes=2, seed=0)
    with pytest.raises(InputError, match="no baseline 'ridge_regression' for 2 classes"):
        fit_and_predict("ridge_regression", part, part, features, n_classes=2, seed=0)
    with pytest.raises(InputError, match="no training unit has any feature"):
        fit_and_predict(
            "random_forest",
            Part(features_uk=0 * features, targets_u=part.targets_u),
            part,
            features,
            n_classes=2,
            seed=0,
        )
    # Without a validation part the middle penalty is taken; a class that training lacks has probability 0.
    found = fit_and_predict("logistic_regression", part, empty, features, n_classes=3, seed=0)
    assert found.facts["penalty"] == 0.1
    assert found.values[:, 2].tolist() == [0.0] * 4
    assert np.allclose(found.values.sum(axis=1), 1)
    with pytest.raises(SettingsError, match="'svm' is unknown"):
        BaselineConfig(models=("svm",))
    with pytest.raises(SettingsError, match="trees"):
        BaselineConfig(trees=0)
