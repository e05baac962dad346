"""A bundle with heads as a function: from tokenised cells to classes or numbers, of cells or of genes.

Axis suffixes: `n` cells, `g` genes, `t` tokens of one cell, `d` width, `c` classes (1 for a number).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError
from genescale.training.embedder import TOKENS_PER_BATCH, Embedder, Precision
from genescale.training.evaluation.out_of_distribution import Reference
from genescale.training.heads.head import Head
from genescale.training.heads.head_files import heads_of, references_of
from genescale.training.heads.spec import HeadSpec

CELLS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class CellAnswers:
    """What one head says of some cells, in their order."""

    spec: HeadSpec
    answers_nc: np.ndarray
    """(n, c) float32 probabilities, columns as in `classes`; of a number (n, 1), in its own unit."""
    out_of_distribution_n: np.ndarray | None = None
    """(n) share of the head's examples that are nearer to their class than this cell: 0 … 1. None where the bundle does
    not say what its examples look like."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the columns; empty for a number."""
        return self.spec.classes

    @property
    def labels(self) -> tuple[str, ...]:
        """The most probable class of each cell; InputError for a number."""
        return _labels(self.spec, self.answers_nc)

    @property
    def probabilities_nc(self) -> np.ndarray:
        """(n, c) float32; InputError for a number."""
        _check_classes(self.spec)
        return self.answers_nc

    @property
    def numbers_n(self) -> np.ndarray:
        """(n) float32 in the target's unit; InputError for classes."""
        if self.spec.kind != "number":
            raise InputError(f"'{self.spec.label}' has classes, not numbers.", fix="Ask for its probabilities.")
        return self.answers_nc[:, 0]


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneAnswers:
    """What one head says of genes: for each the mean over the cells that it was read in, and how far they differ."""

    spec: HeadSpec
    tokens_g: np.ndarray
    """(g) int64, rising."""
    ids_g: tuple[str, ...]
    probabilities_gc: np.ndarray
    """(g, c) float64."""
    spread_gc: np.ndarray
    """(g, c) standard deviation over the cells, population form."""
    cells_g: np.ndarray
    """(g) int64 cells that the gene was read in."""
    out_of_distribution_g: np.ndarray | None = None
    """(g) mean over the cells, as for cells."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The most probable class of each gene."""
        return _labels(self.spec, self.probabilities_gc)


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadModel:
    """An encoder and its heads."""

    embedder: Embedder
    heads: tuple[Head, ...]
    references: tuple[Reference | None, ...] = ()
    """For each head what its examples look like; empty is as None for every head."""

    @property
    def specs(self) -> tuple[HeadSpec, ...]:
        """What each head reads and answers."""
        return tuple(head.spec for head in self.heads)

    def predict_cells(self, cells: Sequence[np.ndarray]) -> tuple[CellAnswers, ...]:
        """The answers of every head on tokenised cells; the encoder runs once.

        Raises InputError for a model of gene classes, and as `Embedder.embed_cells` does.
        """
        self._check("cells")
        spec = self.specs[0]
        cells_nd = self.embedder.embed_cells(cells, layer=spec.layer, pooling=spec.pooling)
        references = self.references or (None,) * len(self.heads)
        return tuple(
            CellAnswers(
                spec=head.spec,
                answers_nc=head.answer(cells_nd, cells),
                out_of_distribution_n=usual.scores(cells_nd) if usual else None,
            )
            for head, usual in zip(self.heads, references, strict=True)
        )

    def predict_genes(
        self, cells: Iterable[np.ndarray], tokens: Sequence[int] | np.ndarray | None = None
    ) -> GeneAnswers:
        """The class of every gene that occurs in these cells, or of those of `tokens` that do.

        Cells are taken some hundreds at a time, so that they can be read while they are used. Raises InputError for a
        model of cells or when none of the genes occurs.
        """
        self._check("genes")
        vocabulary, head = self.embedder.vocabulary, self.heads[0]
        wanted_t = np.zeros(vocabulary.size, dtype=bool)
        wanted_t[vocabulary.token_ids if tokens is None else np.asarray(tokens, dtype=np.int64)] = True
        sums_tc = np.zeros((vocabulary.size, head.spec.outputs))
        squares_tc, cells_t = np.zeros_like(sums_tc), np.zeros(vocabulary.size, dtype=np.int64)
        unlike_t, usual = np.zeros(vocabulary.size), self.references[0] if self.references else None
        for found_t, vectors_td in self._gene_rows(cells, wanted_t):
            answers_tc = head.answer(vectors_td).astype(np.float64)
            if usual:
                np.add.at(unlike_t, found_t, usual.scores(vectors_td))
            np.add.at(sums_tc, found_t, answers_tc)
            np.add.at(squares_tc, found_t, answers_tc**2)
            np.add.at(cells_t, found_t, 1)
        tokens_g = np.flatnonzero(cells_t)
        if not len(tokens_g):
            raise InputError("none of the genes occurs in the cells.", fix="Give other genes or other cells.")
        cells_g = cells_t[tokens_g]
        mean_gc = sums_tc[tokens_g] / cells_g[:, None]
        # Differences of float64 sums: a tiny negative variance is rounding.
        variance_gc = np.maximum(squares_tc[tokens_g] / cells_g[:, None] - mean_gc**2, 0)
        return GeneAnswers(
            spec=head.spec,
            tokens_g=tokens_g,
            ids_g=tuple(vocabulary.gene_of_token(token) for token in tokens_g.tolist()),
            probabilities_gc=mean_gc,
            spread_gc=np.sqrt(variance_gc),
            cells_g=cells_g,
            out_of_distribution_g=unlike_t[tokens_g] / cells_g if usual else None,
        )

    def _gene_rows(self, cells: Iterable[np.ndarray], wanted_t: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, vectors) of the wanted genes, cell by cell."""
        head = self.heads[0]
        waiting = iter(cells)
        while block := list(itertools.islice(waiting, CELLS_AT_ONCE)):
            for found in self.embedder.hidden(block, layer=head.spec.layer):
                for cell, hidden_td in found.per_cell():
                    tokens_t = np.asarray(block[cell]).astype(np.int64)
                    rows = np.flatnonzero(wanted_t[tokens_t])
                    if len(rows):
                        yield tokens_t[rows], hidden_td.cpu().numpy()[rows]

    def _check(self, unit: str) -> None:
        reads = "genes" if self.specs[0].kind == "gene_classes" else "cells"
        if unit != reads:
            raise InputError(
                f"the model '{self.embedder.bundle.kind}' answers for {reads}, not for {unit}.",
                where=str(self.embedder.bundle.folder),
                fix=f"Ask it about {reads}, or give a model of {unit}.",
            )


def load_heads(
    bundle: Bundle,
    *,
    device: str = "auto",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    attention: str = "auto",
    precision: Precision = "float32",
) -> HeadModel:
    """The model in a verified bundle with heads; InputError for a bundle without one."""
    heads = heads_of(bundle)
    embedder = Embedder.load(
        bundle, device=device, tokens_per_batch=tokens_per_batch, attention=attention, precision=precision
    )
    placed = tuple(head.to(embedder.device) for head in heads)
    return HeadModel(embedder=embedder, heads=placed, references=references_of(bundle))


def _labels(spec: HeadSpec, answers: np.ndarray) -> tuple[str, ...]:
    _check_classes(spec)
    return tuple(spec.classes[code] for code in answers.argmax(axis=1))


def _check_classes(spec: HeadSpec) -> None:
    if spec.kind == "number":
        raise InputError(f"'{spec.label}' is a number and has no classes.", fix="Ask for its numbers.")
