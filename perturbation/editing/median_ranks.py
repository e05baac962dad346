"""The median rank of each gene in the cells of a state: what `replace` gives a gene of a cell in another state.

Legend: `t` tokens of a cell, `r` occurrences of a gene in a cell.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.editing.cell import gene_span
from genescale.perturbation.readouts.state_cells import cells_by_state, drawn
from genescale.platform.errors import InputError
from genescale.platform.vocabulary import Vocabulary

CELLS_AT_ONCE = 2_048
MAX_CELLS = 10_000
"""Cells that the medians are taken over, unless asked otherwise."""


def median_ranks(cells: Iterable[np.ndarray], vocabulary: Vocabulary, *, min_cells: int = 1) -> dict[int, int]:
    """Token to median rank (0 = first gene) over the cells that have the gene; the lower one of two middle ranks.

    Cells that lack a gene say nothing of its rank and do not count. Genes that fewer than `min_cells` have are left
    out. Ranks are places in a cell, not shares of it.
    """
    tokens, ranks = [], []
    for tokens_t in cells:
        genes = np.asarray(tokens_t)[gene_span(np.asarray(tokens_t), vocabulary)]
        tokens.append(genes.astype(np.int32))
        ranks.append(np.arange(len(genes), dtype=np.int32))
    if not tokens:
        raise InputError("there are no cells to take ranks from.", fix="Give one cell at least.")
    token_r, rank_r = np.concatenate(tokens), np.concatenate(ranks)
    order = np.lexsort((rank_r, token_r))
    genes, starts, counts = np.unique(token_r[order], return_index=True, return_counts=True)
    middle = rank_r[order][starts + (counts - 1) // 2]
    wanted = counts >= min_cells
    return dict(zip(genes[wanted].tolist(), middle[wanted].tolist(), strict=True))


def median_ranks_of_corpus(
    corpus: Corpus,
    column: str,
    state: str,
    *,
    where: str = "",
    max_cells: int = MAX_CELLS,
    min_cells: int = 1,
    seed: int = 0,
) -> dict[int, int]:
    """As `median_ranks`, over the cells whose label in `column` is `state`; at most `max_cells` of them (0: all).

    Raises CorpusError for an unknown column or label.
    """
    members, _ = cells_by_state(corpus, column, [state], where=where)
    index_n = drawn(members[state], max_cells, seed, state)
    blocks = (index_n[start : start + CELLS_AT_ONCE] for start in range(0, len(index_n), CELLS_AT_ONCE))
    cells = (tokens_t for block in blocks for tokens_t in corpus.tokens(block.tolist()))
    return median_ranks(cells, corpus.vocabulary, min_cells=min_cells)
