"""The report of heads: one page that stands alone, the same numbers as JSON, and honest words."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genescale.platform.errors import InputError
from genescale.training.evaluation.baselines import Baseline
from genescale.training.evaluation.measures import Evaluation, measure
from genescale.training.evaluation.predictions import Predictions
from genescale.training.evaluation.report import write_report
from genescale.training.labels.balance import BalanceTest
from genescale.training.labels.splits import Split
from genescale.training.labels.splitting import Folds

VOID = {"meta", "br", "rect", "line", "circle", "path"}


class Page(HTMLParser):
    """A page whose tags close in order; its words, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def predictions(
    n: int, n_classes: int, *, strength: float, folds: int = 1, groups: int = 0, unit: str = "cells", noise: int = 1
) -> Predictions:
    generator = np.random.default_rng(0)
    true = generator.integers(n_classes, size=n)
    donors = np.array([f"donor <{i}>" for i in generator.integers(max(groups, 1), size=n)])
    scores = np.random.default_rng(noise).normal(size=(n, n_classes))
    scores[np.arange(n), true] += strength
    odds = np.exp(scores)
    genes = unit == "genes"
    return Predictions(
        label="cell <type>",
        unit=unit,  # type: ignore[arg-type]
        classes=tuple(f"class & {i}" for i in range(n_classes)),
        ids_u=np.array([f"ENSG{i:011d}" if genes else f"cell{i}" for i in range(n)]),
        names_u=np.array([f"GENE{i}" for i in range(n)]) if genes else None,
        fold_u=np.arange(n) % folds,
        groups_u=donors if groups else None,
        true_u=true,
        probabilities_uc=odds / odds.sum(axis=1, keepdims=True),
        spread_u=np.full(n, 0.25) if genes else None,
        rows_u=np.arange(n) if genes else None,
    )


def measured(found: Predictions) -> Evaluation:
    counts = {int(fold): np.bincount(found.true_u, minlength=len(found.classes)) for fold in np.unique(found.fold_u)}
    return measure(found, train_counts_by_fold=counts, bootstrap=100)


def baseline(found: Predictions, name: str = "random_forest") -> Baseline:
    facts = {"folds": [{"fold": 0, "training_units": 321}]}
    return Baseline(
        name=name, features="rank_vectors", evaluation=measure(found, bootstrap=100), predictions=found, facts=facts
    )


ABSENT = Baseline(name="linear_svm", features="log_expression", why_not="one.h5ad: the source is <gone>.")
FOLDS = Folds(
    splits=(Split(train=np.arange(7), validation=np.arange(7, 9), test=np.arange(9, 12)),),
    method="balanced",
    seed=3,
    tried=500,
    statistics=(
        BalanceTest(
            attribute="sex",
            test="chi-square",
            statistic=1.25,
            p_value=0.2636,
            unit="groups",
            parts={"train": {"female": 3, "male": 4}},
        ),
    ),
    notes=("Five donors have no sex.",),
)


def written(folder: Path, *parts: Any, **options: Any) -> tuple[Page, dict[str, Any], str]:
    html, content = write_report(folder, "A title", {"epochs": 5}, *parts, **options)
    raw = html.read_text(encoding="utf-8")
    return Page(raw), json.loads(content.read_text(encoding="utf-8")), raw


def test_a_page_of_cells_says_what_was_measured(tmp_path: Path) -> None:
    head, simple = predictions(600, 3, strength=3.0, groups=12), predictions(600, 3, strength=0.5, groups=12, noise=2)
    evaluation = measured(head)
    history = {0: [{"train_loss": 1.0, "validation_loss": 1.1, "validation_score": 0.5}] * 4}
    page, told, raw = written(
        tmp_path,
        [evaluation],
        [head],
        [[baseline(simple), ABSENT]],
        history,
        FOLDS,
        question="Which type?",
        lineage={"parent": "abc"},
        counts={"left_out": {"no label": 12, "rare": 0}},
        notes=["A small corpus."],
        best_epochs={0: 2},
    )
    for words in (
        "Which type?",
        "A small corpus.",
        f"Macro F1 {evaluation['macro_f1']:.3f}",
        "this head is above it by",
        "95 % percentile bootstrap over 12 groups, 100 draws",
        "not measured: one.h5ad: the source is <gone>.",
        "Most frequent class",
        "fitted on 321 training units",
        "Expected calibration error",
        "12 held-out groups",
        "Epoch kept: 2.",
        "chi-square",
        "The best of 500 assignments.",
        "Five donors have no sex.",
        "no label: 12",
    ):
        assert words in page.text, words
    assert page.fetched == []
    assert "script" not in page.tags
    assert "<gone>" not in raw
    assert "rare" not in page.text
    (shown,) = told["heads"]
    assert shown["estimates"] == pytest.approx(evaluation.estimates())
    assert shown["verdict"]["says"] == "above"
    assert shown["verdict"]["low"] > 0
    assert shown["baselines"][0]["estimates"]["macro_f1"] < shown["estimates"]["macro_f1"]
    assert shown["baselines"][1]["not_measured"].endswith("<gone>.")
    assert told["split"]["folds"] == [{"train": 7, "validation": 2, "test": 3}]
    assert told["split"]["statistics"][0]["p_value"] == 0.2636
    assert told["settings"] == {"epochs": 5}
    assert told["history"]["0"][0]["train_loss"] == 1.0


def test_a_head_below_its_baseline_is_said_to_be(tmp_path: Path) -> None:
    head, better = predictions(400, 2, strength=0.2), predictions(400, 2, strength=3.0)
    page, told, raw = written(tmp_path / "below", [measured(head)], [head], [[baseline(better)]])
    assert "this head is below it by" in page.text
    assert told["heads"][0]["verdict"]["says"] == "below"
    assert 'class="verdict bad"' in raw
    close = predictions(400, 2, strength=0.25, noise=5)
    page, told, raw = written(tmp_path / "close", [measured(head)], [head], [[baseline(close)]])
    assert "which may be chance" in page.text
    assert told["heads"][0]["verdict"]["says"] == "undecided"
    page, told, raw = written(tmp_path / "alone", [measured(head)], [head])
    assert "No baseline was measured beside it." in page.text
    page, told, raw = written(tmp_path / "absent", [measured(head)], [head], [[ABSENT]])
    assert "No baseline could be measured." in page.text


def test_folds_and_many_classes(tmp_path: Path) -> None:
    head = predictions(1_000, 20, strength=2.5, folds=5, groups=60)
    page, told, raw = written(tmp_path, [measured(head)], [head])
    assert "ROC AUC and PR AUC are means over folds" in page.text
    assert "fold 5" in page.text
    assert "standard deviation" in page.text
    assert "Drawn are 40 of them" in page.text
    assert raw.count("true class &amp; ") == 0 or "of true class &amp; 3 predicted as" in raw
    assert len(told["heads"][0]["per_group"]) == 60
    many = predictions(500, 45, strength=2.0)
    page, _, raw = written(tmp_path, [measured(many)], [many])
    assert "confusion matrix of" not in raw
    assert "Largest confusions" in page.text


def test_every_gene_has_a_row(tmp_path: Path) -> None:
    head = predictions(50, 2, strength=1.0, folds=5, unit="genes")
    page, _, raw = written(tmp_path, [measured(head)], [head])
    assert all(f"GENE{i} " in page.text + " " for i in range(50))
    assert raw.count('class="wrong"') == int((head.codes_u != head.true_u).sum())
    assert "0.250" in page.text
    assert "50 genes" in page.text


def test_numbers_and_several_heads(tmp_path: Path) -> None:
    cells = predictions(100, 3, strength=1.0)
    true = np.linspace(0, 50, 100)
    ages = replace(
        cells, label="age", classes=(), probabilities_uc=None, true_u=true, predicted_u=true + np.sin(np.arange(100))
    )
    age = measure(ages, train_means_by_fold={0: 20.0}, bootstrap=50)
    page, told, _ = written(tmp_path, [measured(cells), age], [cells, ages])
    assert [head["label"] for head in told["heads"]] == ["cell <type>", "age"]
    assert "R² 0.99" in page.text
    assert "Predicted against true" in page.text
    assert "Mean of training" in page.text
    with pytest.raises(InputError, match="not of the same heads"):
        write_report(tmp_path, "A title", {}, [age], [cells, ages])


def test_metrics_without_a_value_do_not_break_the_page(tmp_path: Path) -> None:
    one = predictions(30, 2, strength=1.0)
    one = replace(one, true_u=np.zeros(30, dtype=np.int64))
    page, told, _ = written(tmp_path, [measured(one)], [one], [[baseline(one)]])
    assert told["heads"][0]["estimates"]["roc_auc"] is None
    assert "there are no curves" in page.text
    assert "All 30 held-out cells are 'class & 0'" in page.text
    assert "best baseline" not in page.text
    constant = replace(one, probabilities_uc=np.tile([0.5, 0.5], (30, 1)), true_u=np.arange(30) % 2)
    page, _, _ = written(tmp_path, [measured(constant)], [constant])
    assert "ROC AUC 0.500" in page.text
