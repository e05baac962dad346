"""A fitted head on the cells of a corpus: what `genescale predict` writes, and how two sets of cells compare.

Axis suffixes: `n` cells, `g` genes, `c` classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import InputError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store
from genescale.training.embed import check_same_vocabulary
from genescale.training.embeddings import place_in_file
from genescale.training.evaluation.predictions import NO_LABEL, Predictions
from genescale.training.heads.predict import CellAnswers, HeadModel
from genescale.training.labels.concordance import Concordance, concordance
from genescale.training.labels.selection import select_cells

CELLS_AT_ONCE = 256
_IDENTITY = ("cell_id", "dataset_id", "source_row")


def predict_corpus(
    model: HeadModel,
    corpus: Corpus,
    *,
    where: str = "",
    max_cells: int = 0,
    genes: Sequence[str] = (),
    seed: int = 0,
    progress: Progress = SILENT,
) -> tuple[Predictions, ...]:
    """What every head says of the cells that fulfil `where` (empty: all), or of genes read in them.

    At most `max_cells` of them, drawn with `seed` (0: all); `genes` (ids or symbols) narrows a head of genes. Labels of
    the corpus are not looked at. Raises CorpusError when no cell is left or the corpus has another vocabulary, and
    UnknownGeneError for a gene that the vocabulary has not.
    """
    check_same_vocabulary(model.embedder.bundle, corpus)
    of_genes = model.specs[0].kind == "gene_classes"
    if genes and not of_genes:
        raise InputError("the model answers for cells, not for genes.", where="genes", fix="Leave the genes out.")
    tokens = list(dict.fromkeys(corpus.vocabulary.token(gene) for gene in genes))
    index_n = select_cells(corpus, where)
    if max_cells and len(index_n) > max_cells:
        index_n = np.sort(np.random.default_rng(seed).choice(index_n, max_cells, replace=False))
    progress.start(len(index_n), "cells")
    if of_genes:
        return (_of_genes(model, corpus, index_n, tokens, progress),)
    return _of_cells(model, corpus, index_n, progress)


def check_uses(model: HeadModel, *, against: bool, annotate: bool) -> None:
    """InputError when the answers of this model cannot be used so; found before anything is computed.

    against: compared in two sets of cells, which only genes can be; annotate: put beside cells, which genes cannot be.
    """
    of_genes = model.specs[0].kind == "gene_classes"
    if against and not of_genes:
        raise InputError(
            "only genes can be read in other cells.", where="--against", fix="Give a model of gene classes."
        )
    if annotate and of_genes:
        raise InputError(
            "the answers are those of genes, and obs has a row for each cell.",
            where="--h5ad",
            fix="Give a model of cells, or leave --h5ad out.",
        )


def check_file(source_uri: str, corpus: Corpus, where: str, *, dataset_id: str, store: Store) -> None:
    """InputError when the atlas file does not hold the cells of `where`; found before anything is computed."""
    identity = corpus.cells(_IDENTITY).take(select_cells(corpus, where))
    place_in_file(source_uri, identity, store, dataset_id=dataset_id, what="chosen cells")


def compare(first: Predictions, second: Predictions, *, confidence: float, seed: int = 0) -> Concordance:
    """How far one classifier agrees on the same genes in two sets of cells.

    Raises InputError when no gene is in both.
    """
    scores = [one.probabilities.astype(np.float64) for one in (first, second)]
    ids = [[str(name) for name in one.ids_u] for one in (first, second)]
    return concordance(ids[0], scores[0], ids[1], scores[1], first.classes, confidence=confidence, seed=seed)


def _cells_of(corpus: Corpus, index_n: np.ndarray, progress: Progress) -> Iterator[list[np.ndarray]]:
    """The cells' tokens in runs, each counted when the next is asked for."""
    for start in range(0, len(index_n), CELLS_AT_ONCE):
        cells = corpus.tokens(index_n[start : start + CELLS_AT_ONCE].tolist())
        yield cells
        progress.advance(len(cells))


def _of_cells(model: HeadModel, corpus: Corpus, index_n: np.ndarray, progress: Progress) -> tuple[Predictions, ...]:
    found = [model.predict_cells(cells) for cells in _cells_of(corpus, index_n, progress)]
    identity = corpus.cells(_IDENTITY).take(index_n)
    columns = {name: identity.column(name).to_numpy(zero_copy_only=False) for name in identity.column_names}
    return tuple(_joined(answers, columns) for answers in zip(*found, strict=True))


def _joined(answers: Sequence[CellAnswers], columns: dict[str, np.ndarray]) -> Predictions:
    """One head's answers on all cells."""
    spec, answers_nc = answers[0].spec, np.concatenate([one.answers_nc for one in answers])
    number = spec.kind == "number"
    scores = [one.out_of_distribution_n for one in answers if one.out_of_distribution_n is not None]
    made = Predictions(
        label=spec.label,
        unit="cells",
        ids_u=columns["cell_id"],
        fold_u=np.zeros(len(answers_nc), dtype=np.int64),
        true_u=np.full(len(answers_nc), np.nan if number else NO_LABEL),
        classes=spec.classes,
        probabilities_uc=None if number else answers_nc,
        predicted_u=answers_nc[:, 0].astype(np.float64) if number else None,
        datasets_u=columns["dataset_id"],
        source_rows_u=columns["source_row"].astype(np.int64),
        out_of_distribution_u=np.concatenate(scores) if scores else None,
    )
    return made if number else replace(made, true_u=made.true_u.astype(np.int64))


def _of_genes(
    model: HeadModel, corpus: Corpus, index_n: np.ndarray, tokens: Sequence[int], progress: Progress
) -> Predictions:
    vocabulary = corpus.vocabulary
    cells = (cell for cells in _cells_of(corpus, index_n, progress) for cell in cells)
    found = model.predict_genes(cells, tokens or None)
    called_g = found.probabilities_gc.argmax(axis=1)
    return Predictions(
        label=found.spec.label,
        unit="genes",
        ids_u=np.array(found.ids_g, dtype=object),
        names_u=np.array([vocabulary.symbol_of(gene) for gene in found.ids_g], dtype=object),
        fold_u=np.zeros(len(found.ids_g), dtype=np.int64),
        true_u=np.full(len(found.ids_g), NO_LABEL, dtype=np.int64),
        classes=found.spec.classes,
        probabilities_uc=found.probabilities_gc,
        spread_u=found.spread_gc[np.arange(len(called_g)), called_g],
        rows_u=found.cells_g,
        out_of_distribution_u=found.out_of_distribution_g,
    )
