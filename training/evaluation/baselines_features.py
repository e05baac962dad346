"""What simple classifiers see of cells and genes: ranks as the corpus has them, and log-normalised expression.

Axis suffixes: `n` cells, `t` tokens of the vocabulary, `u` genes with a label, `s` samples (donors or datasets).

A rank is turned into a number between 0 and 1: the gene at place i (from 0) of a cell with L genes has 1 - i / L, a
gene that is absent has 0. A gene is described by the numbers it has in a seeded sample of cells (one feature a cell).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import InputError
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

if TYPE_CHECKING:
    from scipy import sparse

Features = Literal["rank_vectors", "rank_averages", "log_expression"]
FEATURE_NAMES: dict[str, str] = {
    "rank_vectors": "ranks",
    "rank_averages": "average ranks",
    "log_expression": "log-normalised expression",
}
_CELLS_AT_ONCE = 4_096


def rank_vectors(corpus: Corpus, index_n: npt.NDArray[np.int64]) -> sparse.csr_array:
    """(n, vocabulary size) float32 rank numbers of cells, by token; special tokens have none."""
    from scipy import sparse

    blocks = [sparse.csr_array((0, corpus.vocabulary.size), dtype=np.float32)]
    for start in range(0, len(index_n), _CELLS_AT_ONCE):
        cells = corpus.tokens(index_n[start : start + _CELLS_AT_ONCE].tolist())
        blocks.append(rank_matrix(cells, corpus.vocabulary))
    return sparse.csr_array(sparse.vstack(blocks, format="csr"))


def rank_matrix(cells: list[npt.NDArray[Any]], vocabulary: Vocabulary) -> sparse.csr_array:
    """(n, vocabulary size) float32 rank numbers of cells given as their tokens."""
    from scipy import sparse

    special = np.array(list(vocabulary.special.values()))
    genes = [cell[~np.isin(cell, special)] for cell in cells]
    numbers = [1 - np.arange(len(cell), dtype=np.float32) / max(len(cell), 1) for cell in genes]
    pointers = np.concatenate(([0], np.cumsum([len(cell) for cell in genes])))
    tokens = np.concatenate([np.empty(0, dtype=np.int64), *genes]).astype(np.int64)
    values = np.concatenate([np.empty(0, dtype=np.float32), *numbers])
    return sparse.csr_array((values, tokens, pointers), shape=(len(cells), vocabulary.size))


def cell_features(
    kind: Features, corpus: Corpus, index_n: npt.NDArray[np.int64], store: Store | None = None
) -> sparse.csr_array:
    """(n, vocabulary size) features of cells; CorpusError when expression cannot be read back from the sources."""
    if kind == "rank_vectors":
        return rank_vectors(corpus, index_n)
    if kind == "log_expression":
        from genescale.ingestion.expression import log_normalised

        return log_normalised(corpus, index_n, store)
    raise InputError(f"cells have no features '{kind}'.", where="baselines", fix="Use rank_vectors or log_expression.")


def gene_features(
    kind: Features,
    corpus: Corpus,
    genes: npt.NDArray[Any],
    index_n: npt.NDArray[np.int64],
    store: Store | None = None,
    *,
    sample_column: str = "dataset_id",
) -> sparse.csr_array:
    """Features of genes (Ensembl ids) over some cells: (u, n), or for rank_averages (u, 2 s).

    rank_averages: mean rank number where the gene is present, and share of cells that have it, per value of
    `sample_column`: what is known of a gene without any cell's context.
    """
    from scipy import sparse

    tokens_u = np.array([corpus.vocabulary.token(str(gene)) for gene in genes], dtype=np.int64)
    if kind != "rank_averages":
        return sparse.csr_array(cell_features(kind, corpus, index_n, store)[:, tokens_u].T)
    ranks_nu = sparse.csr_array(rank_vectors(corpus, index_n)[:, tokens_u])
    samples = corpus.cells([sample_column]).take(index_n).column(sample_column).fill_null("").to_pylist()
    sample_n = np.unique(np.array(samples, dtype=str), return_inverse=True)[1]
    member_sn = sparse.csr_array((np.ones(len(sample_n)), (sample_n, np.arange(len(sample_n)))))
    present_su = (member_sn @ (ranks_nu > 0).astype(np.float64)).toarray()
    mean_su = (member_sn @ ranks_nu).toarray() / np.maximum(present_su, 1)
    share_su = present_su / np.bincount(sample_n)[:, None]
    return sparse.csr_array(np.concatenate([mean_su, share_su]).T, dtype=np.float32)
