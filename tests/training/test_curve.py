"""Learning curves: same test cells at every point, nested draws, points that are kept, and a page to read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError, IntegrityError, SettingsError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.tracking import MemoryTracker
from genescale.training.evaluation.curve import learning_curve
from genescale.training.evaluation.curve_draws import AGAINST, RELEVANT, drawn, plan_curve
from genescale.training.evaluation.curve_lines import CurveConfig, CurveResult
from genescale.training.fitting.config import FinetuneConfig

TASK = FinetuneConfig(
    where="dataset_id = 'atlas-0'",
    epochs=8,
    patience=8,
    learning_rate=3e-2,
    cells_per_batch=32,
    fractions=(0.5, 0.25, 0.25),
    device="cpu",
)
CURVE = CurveConfig(
    cells=(20, 60), seeds=2, against="dataset_id = 'atlas-1'", baselines=("logistic_regression",), test_cells=30
)


def run(bundle: Bundle, corpus: Corpus, out: Path, config: CurveConfig, task: FinetuneConfig = TASK) -> CurveResult:
    store = Store(StorageSettings())
    return learning_curve(bundle, corpus, task, config, tracker=MemoryTracker(), out_uri=str(out), store=store)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curve")


@pytest.fixture(scope="module")
def curved(folder: Path, tiny_bundle: Bundle, tiny_corpus: Corpus) -> CurveResult:
    return run(tiny_bundle, tiny_corpus, folder, CURVE)


def test_every_size_seed_and_line_is_measured_on_the_same_cells(curved: CurveResult) -> None:
    wanted = {(line, cells, seed) for line in (RELEVANT, AGAINST) for cells in (20, 60) for seed in (0, 1)}
    assert {(point.line, point.cells, point.seed) for point in curved.points} == wanted
    assert {point.test_units for point in curved.points} == {curved.test_units}
    assert curved.test_units <= 30
    assert {line.fit for line in curved.lines} == {"model", "logistic_regression of rank_vectors", "majority"}
    model = next(line for line in curved.lines if line.fit == "model" and line.line == RELEVANT)
    majority = next(line for line in curved.lines if line.fit == "majority" and line.line == RELEVANT)
    # Cell types are planted: sixty cells tell more than the most frequent class.
    assert model.points[-1].mean > majority.points[-1].mean + 0.3
    assert model.points[0].low <= model.points[0].mean <= model.points[0].high


def test_points_are_disjoint_from_the_test_cells_and_nested(tiny_bundle: Bundle, tiny_corpus: Corpus) -> None:
    store = Store(StorageSettings())
    plan = plan_curve(tiny_bundle, tiny_corpus, TASK, against=CURVE.against, test_cells=30, store=store)
    tests, labelled = [], {}
    for line in (RELEVANT, AGAINST):
        for cells in (20, 60):
            (task,) = plan.tasks(line, cells, 1)
            split = task.folds.splits[0]
            both = np.concatenate([split.train, split.validation])
            assert len(both) == cells
            assert not set(task.groups_u[both]) & set(task.groups_u[split.test])
            tests.append(tuple(task.ids_u[split.test]))
            labelled[line, cells] = set(task.ids_u[both])
            assert set(task.datasets_u[both]) == {"atlas-0" if line == RELEVANT else "atlas-1"}
            assert set(task.datasets_u[split.test]) == {"atlas-0"}
    assert len(set(tests)) == 1
    assert labelled[RELEVANT, 20] < labelled[RELEVANT, 60]


def test_a_second_run_fits_only_what_is_missing(
    curved: CurveResult, folder: Path, tiny_bundle: Bundle, tiny_corpus: Corpus
) -> None:
    assert (curved.computed, curved.reused) == (8, 0)
    gone = sorted((folder / "points").glob("*-relevant-60-1.json"))
    assert len(gone) == 1
    before = json.loads(gone[0].read_text())
    gone[0].unlink()
    again = run(tiny_bundle, tiny_corpus, folder, CURVE)
    assert (again.computed, again.reused) == (1, 7)
    after = json.loads(gone[0].read_text())
    assert after["scores"] == before["scores"]
    assert [line.points for line in again.lines] == [line.points for line in curved.lines]
    gone[0].write_text("{", encoding="utf-8")
    with pytest.raises(IntegrityError, match="no point"):
        run(tiny_bundle, tiny_corpus, folder, CURVE)
    gone[0].write_text(json.dumps(before), encoding="utf-8")


def test_the_report_shows_what_was_measured(curved: CurveResult, folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 1
    assert "atlas-1" in page
    for line in curved.lines:
        for point in line.points:
            assert f"{point.mean:.3f}" in page
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert len(report["points"]) == 8
    assert report["metric"] == "macro_f1"


def test_sizes_that_cannot_be_had_are_said_and_none_at_all_is_an_error(
    tmp_path: Path, tiny_bundle: Bundle, tiny_corpus: Corpus
) -> None:
    config = CurveConfig(cells=(20, 100_000), seeds=1, baselines=("none",))
    found = run(tiny_bundle, tiny_corpus, tmp_path / "a", config)
    assert {point.cells for point in found.points} == {20}
    assert any("100,000" in note for note in found.notes)
    with pytest.raises(InputError, match="smallest point"):
        run(tiny_bundle, tiny_corpus, tmp_path / "b", CurveConfig(cells=(100_000,), baselines=("none",)))
    with pytest.raises(SettingsError, match="cells"):
        CurveConfig(cells=(5,))


def test_a_gene_curve_reads_test_genes_in_the_same_cells(
    tmp_path: Path, tiny_bundle: Bundle, tiny_corpus: Corpus
) -> None:
    names = tiny_corpus.vocabulary.symbols
    lists = tmp_path / "genes.json"
    # Markers stand first in the cells of their type, the others later.
    lists.write_text(json.dumps({"marker": list(names[:24]), "other": list(names[40:120])}), encoding="utf-8")
    task = FinetuneConfig(
        unit="genes", genes=str(lists), label="kind", split="random", folds=3, epochs=8, learning_rate=3e-2,
        fractions=(0.5, 0.25, 0.25), device="cpu",
    )  # fmt: skip
    config = CurveConfig(cells=(40, 80), seeds=1, baselines=("none",), test_cells=60)
    found = run(tiny_bundle, tiny_corpus, tmp_path / "out", config, task)
    assert found.metric == "roc_auc"
    assert found.unit == "genes"
    assert {point.test_units for point in found.points} == {found.test_units}
    assert found.test_units > 60
    assert found.lines[0].points[-1].mean > 0.6


def test_every_beginning_of_a_draw_holds_the_classes_in_proportion() -> None:
    targets = np.repeat([0, 1], [900, 100])
    units = np.arange(1_000)
    for count in (100, 300):
        share = (targets[drawn(units, targets, count, seed=4)] == 1).mean()
        assert share == pytest.approx(0.1, abs=0.02)
    assert set(drawn(units, targets, 100, 4)) < set(drawn(units, targets, 300, 4))
    assert set(drawn(units, targets, 100, 4)) != set(drawn(units, targets, 100, 5))
