"""Fit heads on a pretrained model, measure them on held-out cells or genes, and register the result.

Axis suffixes: `r` rows, `u` units, `d` width, `c` classes.

The course of it: labels and folds are settled first, so that bad input ends here; then vectors (of a frozen encoder
they are computed once and kept), a fit for each fold, the measurement on each fold's test part, the bundle, the report
and the record of the run. The validation part chooses the epoch; the test part is looked at once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle, open_bundle, write_bundle
from genescale.platform.disk import take_away
from genescale.platform.errors import AlreadyExistsError, GenescaleError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.tracking import ModelVersion, Run, Tracker
from genescale.training.evaluation.baselines import Baseline, BaselineConfig, measure_baselines
from genescale.training.evaluation.measures import measure
from genescale.training.evaluation.scores import Scores
from genescale.training.fitting.config import FinetuneConfig as FinetuneConfig
from genescale.training.fitting.epochs import Epoch, Fitted
from genescale.training.fitting.folds import Folded, Source, encoder_folds, frozen_folds
from genescale.training.fitting.frozen import fit_frozen as fit_frozen
from genescale.training.fitting.frozen import fit_units as fit_units
from genescale.training.fitting.frozen import predict_units as predict_units
from genescale.training.fitting.frozen import training_counts, training_means
from genescale.training.fitting.record import HeadResult as HeadResult
from genescale.training.fitting.record import track, write_files
from genescale.training.fitting.task import Task as Task
from genescale.training.fitting.task import prepare as prepare
from genescale.training.fitting.vectors import row_vectors as row_vectors
from genescale.training.heads.head_files import head_files
from genescale.training.heads.spec import bundle_kind

BUNDLE_FOLDER, VECTORS_FOLDER, RUN_FOLDER = "bundle", "vectors", "run"
DEFAULT = FinetuneConfig()


@dataclass(frozen=True, kw_only=True, eq=False)
class FinetuneResult:
    """Fitted heads and what they score on the test parts."""

    bundle: Bundle
    heads: tuple[HeadResult, ...]
    """One for each target, in the order of the config."""
    task: Task
    folds: tuple[Fitted, ...]
    """The fit of each fold."""
    counts: dict[str, Any]
    run_id: str
    report: Path
    model_version: ModelVersion | None = None

    @property
    def test(self) -> Scores:
        """Scores of the first head; InputError when it answers a number."""
        return self.heads[0].scores

    @property
    def majority(self) -> Scores:
        """What always saying the most frequent training class scores on the same units."""
        return self.heads[0].majority

    @property
    def predictions(self) -> pa.Table:
        """One row for each test unit of the first head: id, group, label, predicted, probability and so on."""
        return self.heads[0].predictions.table()

    @property
    def history(self) -> tuple[Epoch, ...]:
        """Epochs of the first fold."""
        return self.folds[0].history

    @property
    def best_epoch(self) -> int:
        """Of the first fold."""
        return self.folds[0].best_epoch

    @property
    def macro_f1(self) -> float:
        """Macro F1 of the first head on the test parts."""
        return self.test.macro_f1

    @property
    def accuracy(self) -> float:
        """Accuracy of the first head on the test parts."""
        return self.test.accuracy


def finetune(
    bundle: Bundle,
    corpus: Corpus,
    config: FinetuneConfig = DEFAULT,
    *,
    tracker: Tracker,
    out: Path,
    store: Store | None = None,
    embeddings_uri: str = "",
    cache_uri: str = "",
    vectors_rd: np.ndarray | None = None,
    baselines: BaselineConfig | None = None,
    title: str = "",
    question: str = "",
    run_home: str = "",
    model_name: str = "",
    aliases: Sequence[str] = (),
    parent_run: str | None = None,
    progress: Progress = SILENT,
) -> FinetuneResult:
    """Fit, measure, write the bundle into `out`/bundle, record the run, and register it when `model_name` is given.

    Vectors of a frozen encoder are kept in `cache_uri` (`out`/vectors by default) and read from there the next time;
    `embeddings_uri` reads a folder that `genescale embed` wrote, `vectors_rd` gives those of the task's rows.
    `baselines` measures simple classifiers in the same folds. `run_home` keeps the checkpoints of an encoder that is
    trained, so that the same call goes on after a kill: a folder that all workers reach (`out`/run by default, which is
    cleared at the end). Raises CorpusError, InputError or SettingsError before any work when inputs do not fit.
    """
    task = prepare(bundle, corpus, config, store=store)
    origin = _origin(bundle, corpus, task, config)
    _refuse_other_bundle(out / BUNDLE_FOLDER, origin)
    home = run_home or str(out.absolute() / RUN_FOLDER)
    source = Source(bundle=bundle, corpus=corpus, store=store or corpus.store, run_home=home)
    params = {**asdict(config), "corpus_uri": corpus.uri, "corpus_version": corpus.version, "parent": bundle.digest}
    with tracker.run(f"finetune {_name(config)}", params=params, tags={"stage": "finetune"}, parent=parent_run) as run:
        if config.encoder == "frozen" and vectors_rd is None:
            vectors_rd = _vectors(source, task, config, embeddings_uri, cache_uri, out, progress)
        if vectors_rd is not None:
            folded = frozen_folds(source, task, vectors_rd, config, progress)
        else:
            folded = encoder_folds(source, task, config, progress)
        heads = _measured(source, task, folded, config, baselines, progress)
        title = title or f"{_name(config)} on {Path(corpus.uri).name}"
        result = _told(run, bundle, task, config, folded, heads, origin, out, title=title, question=question)
        if model_name:
            tags = _tags(result.bundle, heads)
            version = tracker.register(run, BUNDLE_FOLDER, model_name, aliases=aliases, tags=tags)
            result = replace(result, model_version=version)
    if not run_home:
        shutil.rmtree(out / RUN_FOLDER, ignore_errors=True)
    return result


def _vectors(
    source: Source,
    task: Task,
    config: FinetuneConfig,
    embeddings_uri: str,
    cache_uri: str,
    out: Path,
    progress: Progress,
) -> np.ndarray:
    """Vectors (r, d) of the task's rows; without a cache of their own they are kept beside the bundle."""
    return row_vectors(
        source.bundle,
        source.corpus,
        task,
        config,
        store=source.store if cache_uri or embeddings_uri else Store(StorageSettings()),
        cache_uri=cache_uri or str(out.absolute() / VECTORS_FOLDER),
        embeddings_uri=embeddings_uri,
        progress=progress,
    )


def _measured(
    source: Source,
    task: Task,
    folded: Folded,
    config: FinetuneConfig,
    baselines: BaselineConfig | None,
    progress: Progress,
) -> tuple[HeadResult, ...]:
    """Each head measured on the test parts, with its baselines."""
    results = []
    for number, (spec, predictions) in enumerate(zip(task.specs, folded.predictions, strict=True)):
        counts = training_counts(task, number, config) if spec.classes else {}
        evaluation = measure(
            predictions,
            train_counts_by_fold=counts or None,
            train_means_by_fold=None if spec.classes else training_means(task, number, config),
            seed=config.seed,
        )
        simple: tuple[Baseline, ...] = ()
        if baselines is not None:
            simple = measure_baselines(
                task,
                source.corpus,
                baselines,
                head=number,
                store=source.store,
                bootstrap_seed=config.seed,
                progress=progress,
            )
        results.append(
            HeadResult(predictions=predictions, evaluation=evaluation, train_counts=counts, baselines=simple)
        )
    return tuple(results)


def _told(
    run: Run,
    bundle: Bundle,
    task: Task,
    config: FinetuneConfig,
    folded: Folded,
    heads: tuple[HeadResult, ...],
    origin: Mapping[str, Any],
    out: Path,
    *,
    title: str,
    question: str,
) -> FinetuneResult:
    """The finished fit, its bundle and report written into `out` and recorded with its run."""
    written = _write(bundle, folded, {**origin, "run_id": run.id}, out)
    counts = {**task.counts(), "folds": task.n_folds}
    files = write_files(
        out,
        task,
        config,
        heads,
        folded.fits,
        title=title,
        question=question,
        lineage={**origin, "bundle": written.digest, "run_id": run.id},
        counts=counts,
        notes=[folded.note],
    )
    track(run, heads, folded.fits, files)
    run.log_folder(written.folder, BUNDLE_FOLDER)
    return FinetuneResult(
        bundle=written,
        heads=heads,
        task=task,
        folds=folded.fits,
        counts=counts,
        run_id=run.id,
        report=files[0],
    )


def _write(bundle: Bundle, folded: Folded, lineage: Mapping[str, Any], out: Path) -> Bundle:
    """The final heads with their encoder as a bundle, in place of one of the same origin."""
    take_away(out / BUNDLE_FOLDER)
    return write_bundle(
        out / BUNDLE_FOLDER,
        kind=bundle_kind([head.spec for head in folded.final.heads]),
        config=bundle.config,
        weights=folded.weights,
        vocabulary=bundle.vocabulary,
        lineage={**lineage, "parent_lineage": dict(bundle.lineage)},
        extra=head_files(folded.final.heads, folded.references),
    )


def _name(config: FinetuneConfig) -> str:
    return ", ".join(target.label for target in config.targets)


def _tags(bundle: Bundle, heads: Sequence[HeadResult]) -> dict[str, str]:
    """Tags of a registered version: its kind, its digest and the first thing to know of each head."""
    tags = {"kind": bundle.kind, "bundle_digest": bundle.digest}
    for head in heads:
        prefix = f"{head.evaluation.label}." if len(heads) > 1 else ""
        for metric in dict.fromkeys((head.evaluation.headline, "macro_f1" if head.evaluation.classes else "r2")):
            tags[f"{prefix}{metric}"] = f"{head.evaluation[metric]:.4f}"
    return tags


def _origin(bundle: Bundle, corpus: Corpus, task: Task, config: FinetuneConfig) -> dict[str, Any]:
    """What decides the heads, as JSON has it: two runs of one origin may take each other's place."""
    return {
        "parent_bundle": bundle.digest,
        "corpus_uri": corpus.uri,
        "corpus_version": corpus.version,
        "vocabulary_digest": bundle.vocabulary.digest,
        "task_digest": task.digest(),
        "finetune": json.loads(json.dumps(asdict(config))),
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
