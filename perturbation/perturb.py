"""A cell before and after its edits: the one path that the screen and the HTTP service both take.

Every variant of every cell goes through the embedder in chunks of a token budget; the unedited cell goes once. On the
CPU an embedder answers a cell with the same bits whatever else is in its batch, so an answer does not depend on who
asked or what was asked beside it. (Nor on the number of threads, from 32 tokens a cell on: below, torch's
matrix products and attention with one and two threads were measured to differ in the last bits.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from genescale.perturbation.answers import EditAnswer as EditAnswer
from genescale.perturbation.answers import Readouts as Readouts
from genescale.perturbation.editing.requests import EditRequest as EditRequest
from genescale.perturbation.variants import Place, Variant, chunks, variants_of
from genescale.platform.bundle import Bundle
from genescale.platform.vocabulary import Vocabulary

if TYPE_CHECKING:
    from genescale.perturbation.comparison import Comparison
    from genescale.training.deletions import Deletions
    from genescale.training.embedder import HeadPooling, HiddenBatch, Layer

# Tokens embedded per chunk: enough to fill a device's batches, few enough that the edited copies fit in memory.
TOKENS_PER_CHUNK = 65_536
COSINE_OF_REMAINING_GENES = Readouts()


class CellEmbedder(Protocol):
    """What a perturbation needs of an embedder (`genescale.training.embedder.Embedder` is one)."""

    @property
    def bundle(self) -> Bundle:
        """The model."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the model."""

    @property
    def width(self) -> int:
        """Length of one embedding."""

    @property
    def window(self) -> int:
        """Longest cell in tokens, special tokens included."""

    def embed_cells(self, cells: Sequence[np.ndarray], *, layer: Layer, pooling: HeadPooling) -> np.ndarray:
        """One vector per cell `(n, d)`."""

    def hidden_of_layers(
        self, cells: Sequence[np.ndarray], layers: Sequence[Layer]
    ) -> Iterator[tuple[HiddenBatch, ...]]:
        """Hidden states of all cells, batch by batch, one entry for each layer."""

    def shares_first_layer(self, layers: Sequence[Layer]) -> bool:
        """Whether `deletions` can be had for these layers."""

    def deletions(self, cell: np.ndarray, layers: Sequence[Layer]) -> Deletions:
        """The cell prepared to be encoded without one of its tokens."""


def perturb_cell(
    embedder: CellEmbedder,
    tokens: np.ndarray,
    requests: Sequence[EditRequest],
    *,
    readouts: Readouts = COSINE_OF_REMAINING_GENES,
    uncropped: np.ndarray | None = None,
) -> list[EditAnswer]:
    """Answers to all `requests` on one cell, in their order.

    `uncropped` holds all genes of the cell in rank order; refilling deletions need it. Raises InputError for what
    cannot be edited or compared.
    """
    whole = {} if uncropped is None else {0: uncropped}
    return perturb_cells(embedder, [tokens], [requests], readouts=readouts, uncropped=whole)[0]


def perturb_cells(
    embedder: CellEmbedder,
    cells: Sequence[np.ndarray],
    requests: Sequence[Sequence[EditRequest]],
    *,
    readouts: Readouts = COSINE_OF_REMAINING_GENES,
    uncropped: Mapping[int, np.ndarray] | None = None,
) -> list[list[EditAnswer]]:
    """As `perturb_cell`, for several cells that each have their own requests; they share the embedder's batches."""
    # Here and not above: who only reads answers (the HTTP side) does without torch.
    from genescale.perturbation.comparison import Comparison, check_framed

    comparison = Comparison(embedder, readouts)
    check_framed(cells, readouts, embedder.vocabulary)
    variants = variants_of(cells, requests, embedder.vocabulary, window=embedder.window, uncropped=uncropped or {})
    answers: dict[Place, EditAnswer] = {}
    moved = _without_unmoved(variants, comparison, answers)
    for variant, answer in _compared(comparison, chunks(moved, TOKENS_PER_CHUNK)):
        answers[variant.place] = answer
    return [[answers[cell, at] for at in range(len(wanted))] for cell, wanted in enumerate(requests)]


def _without_unmoved(
    variants: Iterable[Variant], comparison: Comparison, answers: dict[Place, EditAnswer]
) -> Iterator[Variant]:
    """The variants that need the encoder; the answers to the others are put into `answers`."""
    for variant in variants:
        answer = comparison.answer_without_embedding(variant)
        if answer is None:
            yield variant
        else:
            answers[variant.place] = answer


def _compared(comparison: Comparison, parts: Iterable[list[Variant]]) -> Iterator[tuple[Variant, EditAnswer]]:
    """Answers of every chunk, each taken from the device only after the next was started on it."""
    waiting = None
    for part in parts:
        launched = comparison.launch(part)
        if waiting is not None:
            yield from comparison.finish(waiting)
        waiting = launched
    if waiting is not None:
        yield from comparison.finish(waiting)
