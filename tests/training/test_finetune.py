"""Fine-tuning: it learns, keeps donors apart, freezes what it says, counts what it leaves out, and can be loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle, open_bundle
from genescale.platform.errors import AlreadyExistsError, CorpusError, InputError, SettingsError
from genescale.platform.tracking import MemoryTracker
from genescale.training.fitting.finetune import FinetuneConfig, FinetuneResult, finetune
from genescale.training.heads.predict import load_heads

FROZEN = FinetuneConfig(
    epochs=20, patience=10, fractions=(0.6, 0.2, 0.2), cells_per_batch=32, device="cpu", learning_rate=3e-2
)
TRAINED = dataclasses.replace(
    FROZEN, encoder="trained", layer="last", epochs=3, encoder_learning_rate=1e-3, frozen_layers=1
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle, tiny_corpus: Corpus) -> FinetuneResult:
    out = tmp_path_factory.mktemp("finetune")
    return finetune(tiny_bundle, tiny_corpus, FROZEN, tracker=MemoryTracker(), out=out)


def test_planted_cell_types_are_learned(fitted: FinetuneResult) -> None:
    assert fitted.macro_f1 > 0.85
    assert fitted.macro_f1 > fitted.majority.macro_f1 + 0.4
    assert fitted.accuracy == pytest.approx(np.trace(fitted.test.confusion_cc) / fitted.test.confusion_cc.sum())


def test_no_donor_stands_in_two_parts(fitted: FinetuneResult, tiny_corpus: Corpus) -> None:
    held = [set(groups) for groups in fitted.counts["groups"].values()]
    assert all(held)
    assert set.union(*held) == set(tiny_corpus.cells(["donor_id"])["donor_id"].to_pylist())
    assert sum(len(groups) for groups in held) == len(set.union(*held))
    assert set(fitted.predictions["group"].to_pylist()) == held[2]


def test_every_cell_is_used_or_counted_with_its_reason(fitted: FinetuneResult, tiny_corpus: Corpus) -> None:
    unlabelled = tiny_corpus.cells(["cell_type"])["cell_type"].null_count
    assert unlabelled > 0
    assert fitted.counts["left_out"]["no cell_type"] == unlabelled
    assert sum(fitted.counts["cells"].values()) + sum(fitted.counts["left_out"].values()) == tiny_corpus.n_cells


def test_the_loaded_bundle_predicts_what_was_reported(fitted: FinetuneResult, tiny_corpus: Corpus) -> None:
    model = load_heads(open_bundle(fitted.bundle.folder), device="cpu")
    ids = tiny_corpus.cells(["cell_id"])["cell_id"].to_pylist()
    wanted = fitted.predictions["cell_id"].to_pylist()
    (answer,) = model.predict_cells(tiny_corpus.tokens([ids.index(cell) for cell in wanted]))
    assert list(answer.labels) == fitted.predictions["predicted"].to_pylist()
    assert np.allclose(answer.probabilities_nc.max(axis=1), fitted.predictions["probability"].to_numpy(), atol=1e-6)


def test_the_best_epoch_is_kept(fitted: FinetuneResult) -> None:
    best = max(fitted.history, key=lambda epoch: (epoch.validation_macro_f1, -epoch.validation_loss))
    assert fitted.best_epoch == best.number


def test_same_seed_same_classifier(
    fitted: FinetuneResult, tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    again = finetune(tiny_bundle, tiny_corpus, FROZEN, tracker=MemoryTracker(), out=tmp_path)
    assert again.bundle.digest == fitted.bundle.digest
    assert torch.equal(torch.get_rng_state(), before), "the global random state was touched"
    other = finetune(
        tiny_bundle, tiny_corpus, dataclasses.replace(FROZEN, seed=1), tracker=MemoryTracker(), out=tmp_path / "other"
    )
    assert other.bundle.digest != fitted.bundle.digest


def test_the_run_is_tracked_and_registered(tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path) -> None:
    tracker = MemoryTracker()
    config = dataclasses.replace(FROZEN, epochs=2)
    result = finetune(
        tiny_bundle, tiny_corpus, config, tracker=tracker, out=tmp_path, model_name="cell-types", aliases=["champion"]
    )
    version = tracker.resolve("models:/cell-types@champion")
    assert version == result.model_version
    assert open_bundle(tracker.download(version, tmp_path / "fetched")).digest == result.bundle.digest
    run = tracker.runs[result.run_id]
    assert [step for step, _ in run.metrics["train_loss"]] == [1, 2]
    assert run.metrics["test_macro_f1"][-1][1] == pytest.approx(result.macro_f1)
    assert run.params["parent"] == tiny_bundle.digest
    assert result.bundle.lineage["parent_bundle"] == tiny_bundle.digest
    assert result.bundle.lineage["corpus_version"] == tiny_corpus.version
    report = json.loads(run.files["evaluation/report.json"])
    assert report["heads"][0]["confusion"] == result.test.confusion_cc.tolist()
    assert {"evaluation/report.html", "evaluation/predictions.parquet", "evaluation/split.parquet"} <= set(run.files)
    # The same again is the same model: no second version of it.
    where = {"tracker": tracker, "out": tmp_path / "again", "model_name": "cell-types", "aliases": ["champion"]}
    again = finetune(tiny_bundle, tiny_corpus, config, **where)
    assert again.model_version == version
    assert len(tracker.list_versions("cell-types")) == 1


def test_training_the_encoder_changes_only_what_is_not_frozen(
    tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    result = finetune(tiny_bundle, tiny_corpus, TRAINED, tracker=MemoryTracker(), out=tmp_path)
    before, after = tiny_bundle.weights(), result.bundle.weights()
    frozen = ("bert.embeddings.", "bert.encoder.layer.0.", "cls.")
    assert all(np.array_equal(before[name], after[name]) for name in before if name.startswith(frozen))
    upper = [name for name in before if name.startswith("bert.encoder.layer.1.")]
    # The gradient of a key's bias is zero: softmax does not see a constant added to all scores of a query.
    assert all(not np.array_equal(before[name], after[name]) for name in upper if not name.endswith("key.bias"))
    assert result.macro_f1 > result.majority.macro_f1


def test_training_everything_changes_the_embeddings_too(
    tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    config = dataclasses.replace(TRAINED, frozen_layers=0, layer="second_to_last", epochs=1)
    result = finetune(tiny_bundle, tiny_corpus, config, tracker=MemoryTracker(), out=tmp_path)
    before, after = tiny_bundle.weights(), result.bundle.weights()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert "bert.embeddings.word_embeddings.weight" in changed
    assert any(name.startswith("bert.encoder.layer.0.") for name in changed)
    assert not any(name.startswith("bert.encoder.layer.1.") for name in changed), "the unused last layer changed"


def test_the_measured_model_is_the_best_epoch_of_the_encoder_too(
    tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    """A run that is stopped at its best epoch and one that goes on with a ruinous learning rate agree."""
    ruinous = {"schedule": "constant", "warmup_fraction": 0.0, "encoder_learning_rate": 0.3}
    config = dataclasses.replace(TRAINED, epochs=3, split="random", max_cells=90, **ruinous)
    longer = finetune(tiny_bundle, tiny_corpus, config, tracker=MemoryTracker(), out=tmp_path / "longer")
    best = longer.best_epoch
    assert best < len(longer.history), "the last epoch is the best: nothing is tested"
    shorter = finetune(
        tiny_bundle,
        tiny_corpus,
        dataclasses.replace(config, epochs=best),
        tracker=MemoryTracker(),
        out=tmp_path / "shorter",
    )
    assert shorter.bundle.digest == longer.bundle.digest


def test_random_split_needs_no_donor(tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path) -> None:
    config = dataclasses.replace(FROZEN, split="random", group="", epochs=2)
    result = finetune(tiny_bundle, tiny_corpus, config, tracker=MemoryTracker(), out=tmp_path)
    assert result.counts["groups"] == {"train": [], "validation": [], "test": []}
    assert sum(result.counts["cells"].values()) == tiny_corpus.n_cells - result.counts["left_out"]["no cell_type"]


def test_caps_and_rare_classes_are_counted(tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path) -> None:
    config = dataclasses.replace(FROZEN, split="random", max_cells=100, min_cells_per_class=90, epochs=1)
    result = finetune(tiny_bundle, tiny_corpus, config, tracker=MemoryTracker(), out=tmp_path)
    labels = tiny_corpus.cells(["cell_type"])["cell_type"].drop_null().value_counts().to_pylist()
    rare = sum(row["counts"] for row in labels if row["counts"] < 90)
    assert rare > 0
    assert result.counts["left_out"]["rare class"] == rare
    assert sum(result.counts["cells"].values()) == 100
    assert sum(result.counts["left_out"].values()) == tiny_corpus.n_cells - 100


def test_another_result_is_not_overwritten(
    fitted: FinetuneResult, tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    out = fitted.bundle.folder.parent
    with pytest.raises(AlreadyExistsError, match="another --output"):
        finetune(tiny_bundle, tiny_corpus, dataclasses.replace(FROZEN, epochs=19), tracker=MemoryTracker(), out=out)
    same = finetune(tiny_bundle, tiny_corpus, FROZEN, tracker=MemoryTracker(), out=out)
    assert same.bundle.digest == fitted.bundle.digest


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"label": "cell_typ"}, CorpusError, "cell_type"),
        ({"label": "tissue"}, CorpusError, "0 class"),
        ({"group": "dataset_id"}, InputError, "2 group"),
        ({"group": "sex"}, CorpusError, "Column 'sex' is empty.*at random"),
        ({"encoder": "trained", "frozen_layers": 1}, SettingsError, "nothing is left to train"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_bundle: Bundle,
    tiny_corpus: Corpus,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        finetune(
            tiny_bundle, tiny_corpus, dataclasses.replace(FROZEN, **changes), tracker=MemoryTracker(), out=tmp_path
        )


def test_a_model_of_another_vocabulary_is_refused(bare_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="vocabulary"):
        finetune(bare_bundle, tiny_corpus, FROZEN, tracker=MemoryTracker(), out=tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"learning_rate": 0.0},
        {"dropout": 1.0},
        {"cells_per_batch": 0},
        {"frozen_layers": 1},
        {"fractions": (0.5, 0.5)},
        {"min_cells_per_class": 0},
        {"group": ""},
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        FinetuneConfig(**changes)
