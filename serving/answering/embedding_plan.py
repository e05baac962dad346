"""A request for embeddings, read and tokenised, and which of the model's rows belong to which cell.

Axis suffixes: `r` rows of all cells (one for each, or one for each gene of each), `d` width, `g` genes of one cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genescale.platform.vocabulary import Vocabulary
from genescale.serving.answering.cells import PreparedCell
from genescale.serving.answering.passes import Rows
from genescale.serving.schemas import FileFacts, Layer, Output, Pooling


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingPlan:
    """A request for embeddings, read and tokenised."""

    layer: Layer
    output: Output
    pooling: Pooling | None
    """How a cell becomes one vector; None for one vector per gene."""
    cells: list[PreparedCell]
    file: FileFacts | None = None
    """That the cells came in."""

    @property
    def rows(self) -> Rows:
        """What the model is asked for."""
        return self.pooling or "genes"

    def parts(self, rows_rd: np.ndarray) -> Sequence[np.ndarray]:
        """The rows of each cell: `(1, d)`, or `(g, d)` for the output `genes`."""
        counts_n = [cell.n_shown if self.output == "genes" else 1 for cell in self.cells]
        return np.split(rows_rd, np.cumsum(counts_n)[:-1])


def gene_ids(cell: PreparedCell, vocabulary: Vocabulary) -> list[str]:
    """Gene ids of a cell's window in rank order."""
    frame = (vocabulary.cls, vocabulary.eos)
    return [vocabulary.gene_of_token(token) for token in cell.tokens.tolist() if token not in frame]
