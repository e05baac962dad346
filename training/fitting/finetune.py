"""Fit a cell-class head on a pretrained model, measure it on held-out donors, and register the classifier.

Axis suffixes: `n` labelled cells, `d` width, `c` classes.

With `encoder = "frozen"` every cell is embedded once and the head is trained on the vectors: minutes on a CPU. With
`encoder = "trained"` the layers above the first `frozen_layers` are trained with it; freezing one layer or more freezes
the embeddings too (the published code goes on training them). The validation part chooses the epoch; the test part is
looked at once, with the bundle that was written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle, open_bundle, write_bundle
from genescale.platform.errors import AlreadyExistsError, GenescaleError, SettingsError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store
from genescale.platform.tracking import ModelVersion, Run, Tracker
from genescale.training.embed import check_same_vocabulary
from genescale.training.embedder import Embedder, Layer, Pooling, check_pooling, pick_device
from genescale.training.evaluation.scores import Scores, majority_scores, score
from genescale.training.fitting.head_fitting import Epoch, FitConfig, Fitted, TokenCells, Vectors, fit_encoder, fit_head
from genescale.training.heads.cell_classes import KIND, HeadSpec, head_of, load_classifier
from genescale.training.labels.cell_labels import LabelledCells, cell_vectors, labelled_cells, stored_vectors
from genescale.training.labels.splits import Split, check_fractions, grouped_split, random_split
from genescale.training.weights import load_model, to_hf

BUNDLE_FOLDER, PREDICTIONS, SCORES = "bundle", "predictions.parquet", "scores.json"


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(FitConfig):
    """What is fitted on which cells, and how; the fields of FitConfig say the last."""

    label: str = "cell_type"
    """Corpus column with the classes."""
    group: str = "donor_id"
    """Corpus column whose values never stand in two parts; used when `split` is 'grouped'."""
    split: Literal["grouped", "random"] = "grouped"
    fractions: tuple[float, ...] = (0.8, 0.1, 0.1)
    """Train, validation and test parts of the cells."""
    min_cells_per_class: int = 1
    """Classes with fewer cells are left out, and counted."""
    max_cells: int = 0
    """Labelled cells used at most, drawn at random; 0 means all."""
    layer: Layer = "second_to_last"
    pooling: Pooling = "mean_genes"
    encoder: Literal["frozen", "trained"] = "frozen"
    frozen_layers: int = 0
    """With a trained encoder: its first so many layers (and the embeddings) stay as they are."""
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self.fractions)
        for name, least in (("min_cells_per_class", 1), ("max_cells", 0), ("frozen_layers", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"{getattr(self, name)} is too small.", where=name, fix=f"Use {least} or more.")
        if self.encoder == "frozen" and self.frozen_layers:
            raise SettingsError(
                "the whole encoder is frozen already.", where="frozen_layers", fix="Set encoder = 'trained' as well."
            )
        if self.split == "grouped" and not self.group:
            raise SettingsError(
                "a grouped split needs a group column.", where="group", fix="Name one, or split at random."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Labelled cells, their split, and the head to fit: all that is fixed before the first step."""

    cells: LabelledCells
    split: Split
    spec: HeadSpec

    def counts(self) -> dict[str, Any]:
        """Cells and groups of each part, and cells left out by reason."""
        parts = self.split.parts().items()
        return {
            "cells": {name: len(part) for name, part in parts},
            "groups": {name: sorted(set(self.cells.groups_n[part].tolist()) - {""}) for name, part in parts},
            "left_out": dict(self.cells.left_out),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class FinetuneResult:
    """A fitted classifier and what it scores on the test part."""

    bundle: Bundle
    test: Scores
    majority: Scores
    """What predicting the most frequent training class scores on the same cells."""
    predictions: pa.Table
    """One row per test cell: cell_id, dataset_id, group, label, predicted, probability."""
    history: tuple[Epoch, ...]
    best_epoch: int
    counts: dict[str, Any]
    run_id: str
    model_version: ModelVersion | None

    @property
    def macro_f1(self) -> float:
        """Macro F1 on the test part."""
        return self.test.macro_f1

    @property
    def accuracy(self) -> float:
        """Accuracy on the test part."""
        return self.test.accuracy


def finetune(
    bundle: Bundle,
    corpus: Corpus,
    config: FinetuneConfig = FinetuneConfig(),
    *,
    tracker: Tracker,
    out: Path,
    store: Store | None = None,
    embeddings_uri: str = "",
    vectors_nd: np.ndarray | None = None,
    model_name: str = "",
    aliases: Sequence[str] = (),
    parent_run: str | None = None,
    progress: Progress = SILENT,
) -> FinetuneResult:
    """Fit, measure, write the bundle into `out`/bundle, record the run, and register it when `model_name` is given.

    `embeddings_uri` reuses a folder that `genescale embed` wrote (`store` reads it); `vectors_nd` the vectors of the
    labelled cells themselves. Raises CorpusError, InputError or SettingsError when corpus, model and config do not fit.
    """
    task = prepare(bundle, corpus, config)
    origin = _origin(bundle, corpus, config)
    _refuse_other_bundle(out / BUNDLE_FOLDER, origin)
    params = {**asdict(config), "corpus_uri": corpus.uri, "corpus_version": corpus.version, "parent": bundle.digest}
    with tracker.run(f"finetune {config.label}", params=params, tags={"stage": "finetune"}, parent=parent_run) as run:
        if config.encoder == "frozen":
            if vectors_nd is None:
                vectors_nd = task_vectors(bundle, corpus, task, config, store, embeddings_uri, progress)
            fitted, weights = fit_frozen(task, vectors_nd, config, progress), bundle.weights()
        else:
            fitted, weights = _fit_trained(bundle, corpus, task, config, progress)
        shutil.rmtree(out / BUNDLE_FOLDER, ignore_errors=True)
        written = write_bundle(
            out / BUNDLE_FOLDER,
            kind=KIND,
            config=bundle.config,
            weights=weights,
            vocabulary=bundle.vocabulary,
            lineage={**origin, "parent_lineage": dict(bundle.lineage), "run_id": run.id},
            extra=fitted.head.to_files(),
        )
        result = _measure(
            written, corpus, task, fitted, vectors_nd if config.encoder == "frozen" else None, config, run
        )
        _record(run, result, config, out)
        if model_name:
            tags = {"kind": KIND, "macro_f1": f"{result.macro_f1:.4f}", "bundle_digest": written.digest}
            version = tracker.register(run, BUNDLE_FOLDER, model_name, aliases=aliases, tags=tags)
            result = FinetuneResult(**{**vars(result), "model_version": version})
    return result


def prepare(bundle: Bundle, corpus: Corpus, config: FinetuneConfig) -> Task:
    """The labelled cells of `corpus`, split, and the head for them; checks that model, corpus and config fit."""
    check_same_vocabulary(bundle, corpus)
    check_pooling(config.pooling, bundle.vocabulary)
    cells = labelled_cells(
        corpus,
        label=config.label,
        group=config.group if config.split == "grouped" else None,
        min_cells_per_class=config.min_cells_per_class,
        max_cells=config.max_cells,
        seed=config.seed,
    )
    labels = np.array(cells.classes)[cells.codes_n]
    if config.split == "grouped":
        split = grouped_split(cells.groups_n.tolist(), config.fractions, config.seed, labels=labels.tolist())
    else:
        split = random_split(labels.tolist(), config.fractions, config.seed)
    return Task(cells=cells, split=split, spec=head_spec(int(bundle.config["hidden_size"]), cells.classes, config))


def head_spec(width: int, classes: tuple[str, ...], config: FinetuneConfig) -> HeadSpec:
    """The head that `config` asks for on a model of this width."""
    return HeadSpec(
        classes=classes,
        label=config.label,
        width=width,
        layer=config.layer,
        pooling=config.pooling,
        hidden=config.hidden,
        dropout=config.dropout,
    )


def task_vectors(
    bundle: Bundle,
    corpus: Corpus,
    task: Task,
    config: FinetuneConfig,
    store: Store | None = None,
    embeddings_uri: str = "",
    progress: Progress = SILENT,
) -> np.ndarray:
    """Vectors of the task's cells, (n, d): computed here, or read from the folder `embeddings_uri`."""
    layer, pooling = config.layer, config.pooling
    if embeddings_uri:
        reader = corpus.store if store is None else store
        return stored_vectors(
            embeddings_uri, reader, corpus, task.cells, bundle_digest=bundle.digest, layer=layer, pooling=pooling
        )
    embedder = Embedder.load(bundle, device=config.device, tokens_per_batch=config.tokens_per_batch)
    return cell_vectors(embedder, corpus, task.cells, layer=layer, pooling=pooling, progress=progress)


def fit_frozen(task: Task, vectors_nd: np.ndarray, config: FinetuneConfig, progress: Progress = SILENT) -> Fitted:
    """Fit the head alone on the vectors of the task's cells."""
    vectors = Vectors(cells_nd=vectors_nd, codes_n=task.cells.codes_n)
    progress.start(config.epochs, "epochs")
    train, validation = vectors.take(task.split.train), vectors.take(task.split.validation)
    return fit_head(task.spec, train, validation, config, on_epoch=lambda epoch: progress.advance(1, _note(epoch)))


def _fit_trained(
    bundle: Bundle, corpus: Corpus, task: Task, config: FinetuneConfig, progress: Progress
) -> tuple[Fitted, dict[str, np.ndarray]]:
    model = load_model(bundle).to(pick_device(config.device))
    progress.start(config.epochs, "epochs")
    fitted = fit_encoder(
        model.encoder,
        task.spec,
        _token_cells(corpus, task, task.split.train),
        _token_cells(corpus, task, task.split.validation),
        config,
        frozen_layers=config.frozen_layers,
        specials=list(bundle.vocabulary.special.values()),
        on_epoch=lambda epoch: progress.advance(1, _note(epoch)),
    )
    return fitted, to_hf(model)


def _token_cells(corpus: Corpus, task: Task, positions_n: np.ndarray) -> TokenCells:
    tokens = corpus.tokens(task.cells.index_n[positions_n].tolist())
    return TokenCells(cells=tokens, codes_n=task.cells.codes_n[positions_n])


def _note(epoch: Epoch) -> str:
    return f"loss {epoch.train_loss:.3f}, validation macro F1 {epoch.validation_macro_f1:.3f}"


def _measure(
    bundle: Bundle,
    corpus: Corpus,
    task: Task,
    fitted: Fitted,
    vectors_nd: np.ndarray | None,
    config: FinetuneConfig,
    run: Run,
) -> FinetuneResult:
    """Scores of the written bundle on the test part: what is measured is what is shipped."""
    test_n, classes = task.split.test, task.cells.classes
    if vectors_nd is not None:
        probabilities_nc = head_of(bundle).probabilities(vectors_nd[test_n])
    else:
        classifier = load_classifier(bundle, device=config.device, tokens_per_batch=config.tokens_per_batch)
        probabilities_nc = classifier.predict(_token_cells(corpus, task, test_n).cells).probabilities_nc
    true_n, predicted_n = task.cells.codes_n[test_n], probabilities_nc.argmax(axis=1)
    names = np.array(classes)
    predictions = task.cells.identity.take(pa.array(test_n))
    for name, values in (
        ("group", task.cells.groups_n[test_n]),
        ("label", names[true_n]),
        ("predicted", names[predicted_n]),
        ("probability", probabilities_nc.max(axis=1)),
    ):
        predictions = predictions.append_column(name, pa.array(values))
    return FinetuneResult(
        bundle=bundle,
        test=score(true_n, predicted_n, classes),
        majority=majority_scores(task.cells.codes_n[task.split.train], true_n, classes),
        predictions=predictions,
        history=fitted.history,
        best_epoch=fitted.best_epoch,
        counts=task.counts(),
        run_id=run.id,
        model_version=None,
    )


def _origin(bundle: Bundle, corpus: Corpus, config: FinetuneConfig) -> dict[str, Any]:
    """What decides the classifier: two runs of one origin may take each other's place."""
    return {
        "parent_bundle": bundle.digest,
        "corpus_uri": corpus.uri,
        "corpus_version": corpus.version,
        "vocabulary_digest": bundle.vocabulary.digest,
        "finetune": {**asdict(config), "fractions": list(config.fractions)},
    }


def _refuse_other_bundle(folder: Path, origin: Mapping[str, Any]) -> None:
    """AlreadyExistsError, before any work, when `folder` holds anything but an earlier run of the same origin."""
    if not folder.exists():
        return
    try:
        lineage = open_bundle(folder).lineage
    except GenescaleError:
        lineage = {}
    if any(lineage.get(key) != value for key, value in origin.items()):
        raise AlreadyExistsError("something else is here.", where=str(folder), fix="Choose another --output folder.")


def _record(run: Run, result: FinetuneResult, config: FinetuneConfig, out: Path) -> None:
    """Log what the run found, and leave the same files beside the bundle."""
    report = {
        "label": config.label,
        "classes": [score.name for score in result.test.per_class],
        "best_epoch": result.best_epoch,
        **result.counts,
        "test": _scores_json(result.test),
        "majority": _scores_json(result.majority),
    }
    (out / SCORES).write_text(json.dumps(report, indent=2), encoding="utf-8")
    pq.write_table(result.predictions, out / PREDICTIONS)
    run.log_metric_rows([(epoch.number, epoch.metrics()) for epoch in result.history])
    run.log_metrics(
        {
            "test_macro_f1": result.macro_f1,
            "test_accuracy": result.accuracy,
            "test_majority_macro_f1": result.majority.macro_f1,
            "test_majority_accuracy": result.majority.accuracy,
            "best_epoch": float(result.best_epoch),
        }
    )
    run.log_file(out / SCORES, "evaluation")
    run.log_file(out / PREDICTIONS, "evaluation")
    run.log_folder(result.bundle.folder, BUNDLE_FOLDER)


def _scores_json(scores: Scores) -> dict[str, Any]:
    return {
        "accuracy": scores.accuracy,
        "macro_f1": scores.macro_f1,
        "per_class": [asdict(row) for row in scores.per_class],
        "confusion": scores.confusion_cc.tolist(),
    }
