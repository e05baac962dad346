"""The heads of a bundle on its encoder, as the passes of a replica ask for them. Imports torch: for replicas only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genescale.perturbation.readouts.class_change import model_of_classes
from genescale.platform.bundle import Bundle
from genescale.serving.answering.passes import Classified
from genescale.training.embedder import Embedder
from genescale.training.heads.head import Head
from genescale.training.heads.head_files import heads_of
from genescale.training.heads.predict import HeadModel
from genescale.training.heads.spec import HEAD_BUNDLES


class ServedHeads:
    """All heads of a bundle; they read the same vectors."""

    def __init__(self, embedder: Embedder, heads: Sequence[Head]) -> None:
        self._embedder, self._heads, self._spec = embedder, heads, heads[0].spec
        self._specials = np.array(sorted(embedder.vocabulary.special.values()), dtype=np.int64)

    def classify(self, cells: Sequence[np.ndarray], genes: frozenset[int] | None) -> Classified:
        """Answers of every head: a row for each cell, or for each wanted gene of each cell, in order.

        Heads answer cell by cell, because a product of matrices rounds differently with other rows beside it: what a
        cell is answered must not depend on its company.
        """
        if self._spec.kind == "gene_classes":
            return self._classify_genes(cells, genes)
        rows_nd = self._embedder.embed_cells(cells, layer=self._spec.layer, pooling=self._spec.pooling)
        found = [
            np.concatenate(
                [head.answer(row_1d, [cell]) for row_1d, cell in zip(np.split(rows_nd, len(cells)), cells, strict=True)]
            )
            for head in self._heads
        ]
        return Classified(tokens_r=np.zeros(0, dtype=np.int64), answers=tuple(found))

    def of_classes(self, label: str) -> HeadModel:
        """The one head of cell classes that answers `label`; raises InputError for none."""
        return model_of_classes(HeadModel(embedder=self._embedder, heads=tuple(self._heads)), label)

    def _classify_genes(self, cells: Sequence[np.ndarray], genes: frozenset[int] | None) -> Classified:
        wanted = None if genes is None else np.array(sorted(genes), dtype=np.int64)
        tokens: list[np.ndarray] = []
        answers: list[np.ndarray] = []
        for cell, rows_td in zip(cells, self._embedder.embed_genes(cells, layer=self._spec.layer), strict=True):
            tokens_t = cell.astype(np.int64)
            kept_t = ~np.isin(tokens_t, self._specials) if wanted is None else np.isin(tokens_t, wanted)
            tokens.append(tokens_t[kept_t])
            answers.append(self._heads[0].answer(rows_td)[kept_t])
        return Classified(tokens_r=np.concatenate(tokens), answers=(np.concatenate(answers),))


def heads_on(embedder: Embedder, bundle: Bundle) -> ServedHeads | None:
    """The heads of a verified bundle on its embedder; None for a bundle without heads."""
    if bundle.kind not in HEAD_BUNDLES:
        return None
    return ServedHeads(embedder, [head.to(embedder.device) for head in heads_of(bundle)])
