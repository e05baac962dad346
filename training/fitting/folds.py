"""Every fold of a task fitted and predicted, and the fit that goes into the bundle.

Axis suffixes: `r` rows, `u` units, `d` width, `c` classes.

Weights of genes, where they are wanted, are fitted after the network of each fold, on the same parts.

With one split the bundle's fit is the one that was measured. With several folds no fit has seen all units, so one more
is made: of heads alone on all units, for the median of the folds' best epochs; with an encoder that is trained, on all
but one validation part, which chooses the epoch.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median, median_low

import numpy as np

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle, write_bundle
from genescale.platform.progress import Progress
from genescale.platform.storage import Store, join
from genescale.training.embedder import Embedder
from genescale.training.evaluation.out_of_distribution import Reference
from genescale.training.evaluation.predictions import Predictions, joined
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.encoder_fitting import fit_encoder
from genescale.training.fitting.epochs import Epoch, Fitted, OnEpoch
from genescale.training.fitting.examples import Examples
from genescale.training.fitting.frozen import (
    fit_frozen,
    fit_units,
    fold_reference,
    held_out_scores,
    predict_units,
    predictions_of,
    whole_reference,
)
from genescale.training.fitting.gene_weights import MOST_CELLS, with_gene_weights
from genescale.training.fitting.task import Task
from genescale.training.fitting.vectors import PRECISIONS, embed_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Folded:
    """What came of the folds."""

    fits: tuple[Fitted, ...]
    """One for each fold."""
    predictions: tuple[Predictions, ...]
    """One for each head: the test parts of all folds."""
    final: Fitted
    """What goes into the bundle."""
    weights: dict[str, np.ndarray]
    """Encoder weights for the bundle, under their Hugging Face names."""
    note: str
    """What the heads in the bundle were fitted on, in one sentence."""
    references: tuple[Reference, ...] = ()
    """For each final head what its examples look like; none where the encoder was trained."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """The model and the cells that a task is about, and where a run on several nodes keeps its state."""

    bundle: Bundle
    corpus: Corpus
    store: Store
    run_home: str = ""

    def cells_of(self, index_n: np.ndarray) -> list[np.ndarray]:
        """Tokens of the cells with these global indices."""
        return self.corpus.tokens(index_n.tolist())

    def genes(self, examples: Examples, config: FinetuneConfig) -> list[np.ndarray] | None:
        """Tokens of the cell behind each row, where heads with weights of genes want them."""
        return self.cells_of(examples.index_n[examples.row_cell_r]) if config.gene_weights else None


def frozen_folds(
    source: Source, task: Task, vectors_rd: np.ndarray, config: FinetuneConfig, progress: Progress
) -> Folded:
    """Fit and predict every fold on the vectors (r, d) of the task's rows."""
    fits, parts, usual, penalties = [], [], [], []
    heads = range(len(task.specs))
    for fold, split in enumerate(task.folds.splits):
        fitted = fit_frozen(task, vectors_rd, config, fold, on_epoch=_shown(task, fold, config, progress))
        train, validation, test = (task.examples.take(part) for part in (split.train, split.validation, split.test))
        fitted, chosen = _with_genes(source, fitted, train, validation, config)
        fits.append(fitted)
        penalties.append(chosen)
        ask = partial(predict_units, fitted, task, vectors_rd, split.test, fold=fold, cells=source.genes(test, config))
        said = [ask(head=head) for head in heads]
        usual.append([fold_reference(task, vectors_rd, head, fold) for head in heads])
        unlike = [held_out_scores(task, vectors_rd, head, fold, usual=usual[-1][head]) for head in heads]
        parts.append([replace(one, out_of_distribution_u=scores) for one, scores in zip(said, unlike, strict=True)])
    final, fitted_on = fits[0], "train and validation parts" if config.refit else "train part"
    references = usual[0]
    if task.n_folds > 1:
        references = [whole_reference(task, vectors_rd, [of[head] for of in usual], head) for head in heads]
        epochs = median_epoch(fits)
        final = fit_units(task, vectors_rd, config, np.arange(task.n_units), epochs=epochs)
        final, _ = _with_genes(source, final, task.examples, None, config, penalties)
        fitted_on = f"{task.n_units:,} {task.unit} of all folds, for {epochs} epochs, the median of the folds' best"
    return Folded(
        fits=tuple(fits),
        predictions=_joined(parts),
        final=final,
        weights=source.bundle.weights(),
        note=_note(task, final, fitted_on),
        references=tuple(references),
    )


def encoder_folds(source: Source, task: Task, config: FinetuneConfig, progress: Progress) -> Folded:
    """Fit the encoder with the heads in every fold, each time from the pretrained weights, and predict with both."""
    fits, parts = [], []
    weights: dict[str, np.ndarray] = {}
    for fold, split in enumerate(task.folds.splits):
        examples = task.examples
        on_epoch = _shown(task, fold, config, progress)
        fitted, tuned = _fit(
            source, task, examples.take(split.train), examples.take(split.validation), config, f"fold-{fold}", on_epoch
        )
        weights = weights or tuned
        test = examples.take(split.test)
        vectors_rd = tuned_vectors(source, tuned, test, config)
        fits.append(fitted)
        answers = [head.answer(vectors_rd, source.genes(test, config)) for head in fitted.heads]
        parts.append([predictions_of(task, answers_rc, test, head, fold) for head, answers_rc in enumerate(answers)])
    final, fitted_on = fits[0], "train part"
    if task.n_folds > 1:
        kept = task.folds.splits[0].validation
        others = np.setdiff1d(np.arange(task.n_units), kept)
        train, validation = task.examples.take(others), task.examples.take(kept)
        final, weights = _fit(source, task, train, validation, config, "all", _shown(task, 0, config, progress))
        fitted_on = f"{len(others):,} {task.unit}: all but the validation part of the first fold, which chose the epoch"
    return Folded(
        fits=tuple(fits),
        predictions=_joined(parts),
        final=final,
        weights={**source.bundle.weights(), **weights},
        note=_note(task, final, fitted_on),
    )


def _with_genes(
    source: Source,
    fitted: Fitted,
    train: Examples,
    validation: Examples | None,
    config: FinetuneConfig,
    by_fold: Sequence[Sequence[float]] = (),
) -> tuple[Fitted, tuple[float, ...]]:
    """The fit with weights of genes, where `config` wants them, and each head's penalty.

    by_fold: the penalties that were chosen in the folds, for a fit without validation cells.
    """
    if not config.gene_weights:
        return fitted, ()
    chosen = [(median_low(of_head),) for of_head in zip(*by_fold, strict=True)]
    heads, penalties = with_gene_weights(fitted.heads, source.corpus, train, validation, config, chosen)
    return replace(fitted, heads=heads), penalties


def tuned_vectors(
    source: Source, weights: dict[str, np.ndarray], examples: Examples, config: FinetuneConfig
) -> np.ndarray:
    """Vectors (r, d) float32 of rows under other encoder weights of the same shape."""
    with tempfile.TemporaryDirectory(prefix="genescale-") as scratch:
        tuned = write_bundle(
            Path(scratch) / "b",
            kind="masked_gene_model",
            config=source.bundle.config,
            weights={**source.bundle.weights(), **weights},
            vocabulary=source.bundle.vocabulary,
            lineage={},
        )
        embedder = Embedder.load(
            tuned,
            device=config.device,
            tokens_per_batch=config.tokens_per_batch,
            precision=PRECISIONS[config.precision],
        )
        return embed_rows(embedder, source.corpus, examples, config)


def _note(task: Task, final: Fitted, fitted_on: str) -> str:
    beside = ""
    if any(head.spec.genes for head in final.heads):
        beside = " The scores are those of network and weights of genes together, the course of training the network's."
        if max(len(split.train) for split in task.folds.splits) > MOST_CELLS:
            beside += f" Weights of genes were fitted on {MOST_CELLS:,} cells of a training part, drawn by class."
    if task.n_folds == 1:
        return f"The bundle holds the fit on the {fitted_on}, which was measured on the test part.{beside}"
    measured = f"The scores are those of each fold's fit on its test part.{beside}"
    return f"The bundle holds one more fit, on {fitted_on}. {measured}"


def median_epoch(fits: list[Fitted]) -> int:
    """The median of the folds' best epochs, rounded up."""
    return math.ceil(median(fitted.best_epoch for fitted in fits))


def _fit(
    source: Source,
    task: Task,
    train: Examples,
    validation: Examples,
    config: FinetuneConfig,
    name: str,
    on_epoch: OnEpoch,
) -> tuple[Fitted, dict[str, np.ndarray]]:
    fitted, weights = fit_encoder(
        source.bundle,
        source.cells_of,
        train,
        validation,
        task.specs,
        config,
        run_home=join(source.run_home, name) if source.run_home else "",
        store=source.store,
        corpus=source.corpus,
        on_epoch=on_epoch,
        workers=config.workers,
    )
    fitted, _ = _with_genes(source, fitted, train, validation, config)
    return fitted, weights


def _joined(parts: list[list[Predictions]]) -> tuple[Predictions, ...]:
    return tuple(joined(of_head) for of_head in zip(*parts, strict=True))


def _shown(task: Task, fold: int, config: FinetuneConfig, progress: Progress) -> Callable[[Epoch], None]:
    """What moves the progress line of a fold."""
    name = f"epochs of fold {fold + 1}/{task.n_folds}" if task.n_folds > 1 else "epochs"
    progress.start(config.epochs, name)
    return lambda epoch: progress.advance(
        1, f"loss {epoch.train_loss:.3f}, validation score {epoch.validation_score:.3f}"
    )
