"""Every kind of head learns what was planted, over folds too, and vectors are computed once.

A marker gene of the tiny corpus stands before all others of its cell, so its rank tells it from them; `age` is planted
as a number for each cell type.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle, open_bundle
from genescale.platform.errors import CorpusError, InputError, IntegrityError, SettingsError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.tracking import MemoryTracker
from genescale.training.fitting.config import FinetuneConfig, TaskTarget
from genescale.training.fitting.finetune import FinetuneResult, finetune, prepare, row_vectors
from genescale.training.fitting.vector_cache import VectorKey, read_vectors, write_vectors
from genescale.training.heads.predict import load_heads
from tests.training.conftest import CELL_TYPES, commit_cells

CELLS = FinetuneConfig(
    epochs=15, patience=0, fractions=(0.6, 0.2, 0.2), cells_per_batch=32, device="cpu", learning_rate=3e-2
)
AGES = {"b_cell": 20.0, "monocyte": 45.0, "t_cell": 70.0}


def run(bundle: Bundle, corpus: Corpus, config: FinetuneConfig, out: Path, **more: Any) -> FinetuneResult:
    return finetune(bundle, corpus, config, tracker=MemoryTracker(), out=out, **more)


@pytest.fixture(scope="module")
def genes(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """24 markers of cell types against all other genes, and one gene that stands in no cell."""
    path = tmp_path_factory.mktemp("genes") / "genes.csv"
    rows = [f"GENE{number},{'marker' if number < 24 else 'other'}" for number in (*range(24), *range(30, 200))]
    path.write_text("\n".join(["gene,class", *rows, "GENE24,other", "NOT_A_GENE,marker"]), encoding="utf-8")
    return dataclasses.replace(CELLS, unit="genes", label="marker", genes=str(path), split="random", group="")


@pytest.fixture(scope="module")
def aged_corpus(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Corpus) -> Corpus:
    """The cells of the tiny corpus with a sex, which every third cell lacks, and an age, which others lack."""
    table = tiny_corpus.cells(["cell_type", "donor_id"]).to_pandas()
    generator = np.random.default_rng(3)
    corpus = Corpus.create(
        str(tmp_path_factory.mktemp("aged") / "corpus"), tiny_corpus.vocabulary, Store(StorageSettings())
    )
    ages = [
        None if kind is None or i % 5 == 1 else f"{AGES[kind] + generator.normal():.2f}"
        for i, kind in enumerate(table["cell_type"])
    ]
    sexes = [None if i % 3 == 0 or kind is None else ("f" if kind == "t_cell" else "m")
             for i, kind in enumerate(table["cell_type"])]  # fmt: skip
    columns = {"donor_id": table["donor_id"].tolist(), "cell_type": table["cell_type"].tolist()}
    cells = tiny_corpus.tokens(list(range(tiny_corpus.n_cells)))
    return commit_cells(corpus, "aged", cells, {**columns, "development_stage": ages, "sex": sexes})


def test_genes_are_told_apart_and_answered_by_their_mean_over_cells(
    tiny_bundle: Bundle, tiny_corpus: Corpus, genes: FinetuneConfig, tmp_path: Path
) -> None:
    result = run(tiny_bundle, tiny_corpus, dataclasses.replace(genes, folds=4), tmp_path)
    (head,) = result.heads
    assert head.evaluation["roc_auc"] > 0.85
    assert result.macro_f1 > result.majority.macro_f1 + 0.2
    # Every gene that occurs is tested once, in its fold; the one that does not, and the unknown one, are counted.
    assert sorted(head.predictions.ids_u.tolist()) == sorted(result.task.ids_u.tolist())
    left_out = result.counts["left_out"]
    assert left_out["outside the vocabulary"] == 1
    assert left_out["in none of the cells"] + result.task.n_units == 195
    assert (head.predictions.rows_u >= 1).all()
    assert (head.predictions.spread_u >= 0).all()
    assert head.predictions.spread_u.max() > 0
    # The bundle answers as it was fitted: on all genes, from the same cells.
    assert result.bundle.kind == "gene_classifier"
    model = load_heads(open_bundle(result.bundle.folder), device="cpu")
    cells = tiny_corpus.tokens(result.task.examples.index_n.tolist())
    tokens = [tiny_corpus.vocabulary.token(gene) for gene in result.task.ids_u.tolist()]
    answers = model.predict_genes(cells, tokens)
    truth = dict(zip(result.task.ids_u.tolist(), result.task.targets_u().tolist(), strict=True))
    right = [
        answers.spec.classes.index(label) == truth[gene]
        for gene, label in zip(answers.ids_g, answers.labels, strict=True)
    ]
    assert np.mean(right) > 0.9


def test_a_number_is_learned_and_answered_in_its_unit(tiny_bundle: Bundle, aged_corpus: Corpus, tmp_path: Path) -> None:
    config = dataclasses.replace(CELLS, label="development_stage", kind="number", hidden=16)
    result = run(tiny_bundle, aged_corpus, config, tmp_path)
    evaluation = result.heads[0].evaluation
    assert evaluation["r2"] > 0.7
    assert evaluation["mae"] < 0.5 * evaluation.majority["mae"]
    assert result.bundle.kind == "cell_regressor"
    (answer,) = load_heads(result.bundle, device="cpu").predict_cells(
        aged_corpus.tokens(result.task.examples.index_n[result.task.folds.splits[0].test].tolist())
    )
    predicted = dict(
        zip(result.heads[0].predictions.ids_u, result.heads[0].predictions.predicted_u.tolist(), strict=True)
    )
    wanted = result.task.ids_u[result.task.folds.splits[0].test]
    assert answer.numbers_n == pytest.approx([predicted[cell] for cell in wanted], abs=1e-4)
    with pytest.raises(InputError, match="numbers were predicted"):
        _ = result.test


def test_several_targets_share_cells_and_miss_labels(tiny_bundle: Bundle, aged_corpus: Corpus, tmp_path: Path) -> None:
    tasks = (
        TaskTarget(label="cell_type", weight=2.0),
        TaskTarget(label="sex", weight=0.5),
        TaskTarget(label="development_stage", kind="number"),
    )
    result = run(tiny_bundle, aged_corpus, dataclasses.replace(CELLS, tasks=tasks, epochs=20), tmp_path)
    kinds, sex, age = (head.evaluation for head in result.heads)
    assert kinds["macro_f1"] > kinds.majority["macro_f1"] + 0.4
    assert sex["macro_f1"] > sex.majority["macro_f1"] + 0.3
    assert age["r2"] > 0.6
    # Cells without one label are measured where they have another.
    assert sex.unlabelled > 0
    assert age.unlabelled > 0
    assert sex.units + sex.unlabelled == kinds.units + kinds.unlabelled == len(result.task.folds.splits[0].test)
    assert result.bundle.kind == "multi_task"
    answers = load_heads(open_bundle(result.bundle.folder), device="cpu").predict_cells(aged_corpus.tokens([0, 1]))
    assert [answer.spec.label for answer in answers] == ["cell_type", "sex", "development_stage"]
    assert {path.name for path in tmp_path.glob("*.parquet")} == {
        "predictions-cell_type.parquet",
        "predictions-sex.parquet",
        "predictions-development_stage.parquet",
        "split.parquet",
    }


def test_neighbours_vote_without_training(tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path) -> None:
    config = dataclasses.replace(CELLS, head="nearest", neighbours=7)
    result = run(tiny_bundle, tiny_corpus, config, tmp_path)
    assert result.macro_f1 > result.majority.macro_f1 + 0.4
    assert len(result.history) == 1
    stored = open_bundle(result.bundle.folder).tensors("head.safetensors")
    assert len(stored["0.reference_kd"]) == result.counts["cells"]["train"]


def test_folds_hold_every_donor_out_once(tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path) -> None:
    result = run(tiny_bundle, tiny_corpus, dataclasses.replace(CELLS, folds=4, epochs=8), tmp_path)
    (head,) = result.heads
    assert result.macro_f1 > result.majority.macro_f1 + 0.4
    assert len(head.predictions) == result.task.n_units
    tested = [set(head.predictions.groups_u[head.predictions.fold_u == fold].tolist()) for fold in range(4)]
    assert sum(len(donors) for donors in tested) == len(set.union(*tested)) == 8
    written = pq.read_table(tmp_path / "split.parquet").to_pandas()
    assert len(written) == 4 * result.task.n_units
    for fold, part in written[written["part"] == "test"].groupby("fold"):
        assert set(part["unit_id"]) == set(head.predictions.ids_u[head.predictions.fold_u == fold].tolist())
    # The bundle's head has seen all folds, and the report says so.
    assert "of all folds" in (tmp_path / "report.html").read_text(encoding="utf-8")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert len(report["heads"][0]["per_fold"]) == 4


def test_a_refit_takes_in_the_validation_part(tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path) -> None:
    config = dataclasses.replace(CELLS, head="nearest")
    plain = run(tiny_bundle, tiny_corpus, config, tmp_path / "a")
    again = run(tiny_bundle, tiny_corpus, dataclasses.replace(config, refit=True), tmp_path / "b")
    sizes = [len(result.bundle.tensors("head.safetensors")["0.targets_k"]) for result in (plain, again)]
    assert sizes[1] - sizes[0] == plain.counts["cells"]["validation"]
    assert again.heads[0].predictions.ids_u.tolist() == plain.heads[0].predictions.ids_u.tolist()


def test_vectors_that_two_runs_store_at_once_are_those_of_one_of_them(local_store: Store, tmp_path: Path) -> None:
    """Two machines may differ in the last bits."""
    uri, first_rd = str(tmp_path), np.ones((3, 2), dtype=np.float32)
    key = VectorKey(
        bundle_digest="b", corpus_uri="c", corpus_version=1, layer="last", pooling="cls", precision="fp32",
        rows_digest="r",
    )  # fmt: skip

    class Overtaken(Store):
        """Another run stores all of its entry between two writes of this one."""

        def write(self, uri: str, data: bytes, **options: Any) -> Any:
            if uri.endswith(".json"):
                write_vectors(str(tmp_path), key, np.nextafter(first_rd, 2), local_store)
            return super().write(uri, data, **options)

    write_vectors(uri, key, first_rd, Overtaken(local_store.settings))
    found_rd = read_vectors(uri, key, local_store)
    assert found_rd is not None
    assert np.array_equal(found_rd, first_rd)


def test_vectors_are_computed_once_and_belong_to_one_model(
    tiny_bundle: Bundle,
    bare_bundle: Bundle,
    tiny_corpus: Corpus,
    genes: FinetuneConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []
    tokens = Corpus.tokens

    def counted(self: Corpus, indices: Any) -> Any:
        read.append(len(indices))
        return tokens(self, indices)

    cache = str(tmp_path / "cache")
    task = prepare(tiny_bundle, tiny_corpus, CELLS)
    monkeypatch.setattr(Corpus, "tokens", counted)
    first_rd = row_vectors(tiny_bundle, tiny_corpus, task, CELLS, cache_uri=cache)
    assert sum(read) == task.n_units
    # Other heads, classes and splits of the same cells read what is there.
    other = dataclasses.replace(CELLS, hidden=8, seed=4, split="random", class_weights="balanced")
    again_rd = row_vectors(tiny_bundle, tiny_corpus, prepare(tiny_bundle, tiny_corpus, other), other, cache_uri=cache)
    assert np.array_equal(first_rd, again_rd)
    assert sum(read) == task.n_units
    last = dataclasses.replace(CELLS, layer="last")
    assert not np.array_equal(row_vectors(tiny_bundle, tiny_corpus, task, last, cache_uri=cache), first_rd)
    assert sum(read) == 2 * task.n_units
    # An entry under a false name is refused, and so is a damaged one.
    entries = sorted((tmp_path / "cache").glob("*.json"), key=lambda path: path.stat().st_mtime)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / entries[0].name).write_bytes(entries[1].read_bytes())
    with pytest.raises(InputError, match="of another layer: last, not second_to_last"):
        row_vectors(tiny_bundle, tiny_corpus, task, CELLS, cache_uri=str(tmp_path / "other"))
    damaged = entries[0].with_name(json.loads(entries[0].read_text(encoding="utf-8"))["file"])
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(IntegrityError, match="not those that were written"):
        row_vectors(tiny_bundle, tiny_corpus, task, CELLS, cache_uri=cache)


def test_bad_input_ends_before_anything_runs(
    tiny_bundle: Bundle, tiny_corpus: Corpus, genes: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("the encoder ran")

    monkeypatch.setattr("genescale.training.fitting.vectors.Embedder.load", refused)
    tracker = MemoryTracker()
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps({"a": ["GENE1", "GENE2"], "b": ["GENE2", "GENE3"]}), encoding="utf-8")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"label": "cell_typ"}, CorpusError, "cell_type"),
        ({"kind": "number"}, CorpusError, "no numbers"),
        ({"where": "cell_type = 'b_cell'"}, CorpusError, "1 class"),
        ({"where": "donor_id ="}, InputError, "no condition"),
        ({"folds": 9}, InputError, "8 group"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            finetune(tiny_bundle, tiny_corpus, dataclasses.replace(CELLS, **changes), tracker=tracker, out=tmp_path)
    with pytest.raises(InputError, match="two classes"):
        finetune(tiny_bundle, tiny_corpus, dataclasses.replace(genes, genes=str(twice)), tracker=tracker, out=tmp_path)
    assert not tracker.runs


@pytest.mark.parametrize(
    "changes",
    [
        {"folds": 1},
        {"label_smoothing": 1.0},
        {"neighbours": 0},
        {"depth": 0},
        {"encoder": "trained", "head": "nearest"},
        {"encoder": "trained", "refit": True},
        {"workers": 2},
        {"unit": "genes"},
        {"unit": "genes", "genes": "x.csv", "kind": "number"},
        {"split": "balanced"},
        {"split": "lists"},
        {"split": "lists", "lists": "x.json", "folds": 3},
        {"tasks": (TaskTarget(label="a"), TaskTarget(label="a"))},
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        FinetuneConfig(**changes)


def test_only_cells_that_were_asked_for_are_used(tiny_bundle: Bundle, tiny_corpus: Corpus) -> None:
    config = dataclasses.replace(CELLS, where="dataset_id = 'atlas-1'", split="random", max_cells_per_class=10)
    task = prepare(tiny_bundle, tiny_corpus, config)
    assert set(task.datasets_u.tolist()) == {"atlas-1"}
    assert np.bincount(task.targets_u()).tolist() == [10] * len(CELL_TYPES)
    assert task.n_units + sum(task.left_out.values()) == tiny_corpus.n_cells


def test_lists_leave_out_other_cells_and_the_classes_that_only_those_have(
    tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    table = tiny_corpus.cells(["cell_id", "cell_type"]).to_pandas().dropna()
    ids = table[table["cell_type"] != CELL_TYPES[0]]["cell_id"].tolist()
    path = tmp_path / "lists.json"
    path.write_text(json.dumps({"train": ids[:40], "validation": ids[40:60], "test": ids[60:80]}), encoding="utf-8")
    task = prepare(tiny_bundle, tiny_corpus, dataclasses.replace(CELLS, split="lists", lists=str(path), group=""))
    assert task.specs[0].classes == tuple(sorted(CELL_TYPES[1:]))
    assert {name: set(task.ids_u[part]) for name, part in task.folds.splits[0].parts().items()} == {
        "train": set(ids[:40]), "validation": set(ids[40:60]), "test": set(ids[60:80])
    }  # fmt: skip
    codes = dict(zip(table["cell_id"], table["cell_type"], strict=True))
    assert [task.specs[0].classes[code] for code in task.targets_u()] == [codes[cell] for cell in task.ids_u]
    assert task.n_units + sum(task.left_out.values()) == tiny_corpus.n_cells
