"""The cells of a screen: which are taken, how often they hold each gene, and at which ranks.

Axis suffixes: `n` chosen cells, `v` token ids of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.editing.median_ranks import MAX_CELLS, median_ranks
from genescale.perturbation.readouts.state_cells import drawn
from genescale.perturbation.screening.spec import CellsConfig
from genescale.platform.errors import CorpusError
from genescale.training.labels.selection import check_columns, select_cells

CELLS_PER_READ = 2_000
CELL_COLUMNS = ("cell_id", "dataset_id", "source_row", "cell_type", "donor_id", "length")


def choose_cells(corpus: Corpus, config: CellsConfig) -> tuple[pl.DataFrame, dict[str, int]]:
    """The cells in corpus order (`cell`, their place in the corpus, and CELL_COLUMNS), and how many were left out why.

    Raises InputError for a condition that cannot be read, CorpusError for an unknown column or when no cell is left.
    """
    index_n = select_cells(corpus, config.where)
    left_out = {"not in where": corpus.n_cells - len(index_n)}
    if config.max_cells_per:
        check_columns(corpus, [config.max_cells_per])
        index_n, without = _drawn_per_value(corpus, index_n, config)
        left_out[f"without {config.max_cells_per}"] = without
    elif 0 < config.max_cells < len(index_n):
        generator = np.random.default_rng(config.seed)
        index_n = np.sort(generator.choice(index_n, size=config.max_cells, replace=False))
    if not len(index_n):
        raise CorpusError(
            "no cell to edit.", where=f"{corpus.uri}@{corpus.version}", fix="Ingest an atlas, or widen the choice."
        )
    left_out["not drawn"] = corpus.n_cells - len(index_n) - sum(left_out.values())
    cells = pl.DataFrame(pl.from_arrow(corpus.cells(CELL_COLUMNS).take(index_n)))
    cells = cells.with_columns(pl.Series("cell", index_n))
    return cells.select("cell", *CELL_COLUMNS), {why: n for why, n in left_out.items() if n}


def _drawn_per_value(corpus: Corpus, index_n: np.ndarray, config: CellsConfig) -> tuple[np.ndarray, int]:
    """At most `max_cells` cells of each value of the column, and how many cells have no value."""
    column = corpus.cells([config.max_cells_per]).column(config.max_cells_per).take(index_n)
    values_n = pl.Series(column).cast(pl.String)
    generator = np.random.default_rng(config.seed)
    of_values = []
    for value in sorted(values_n.drop_nulls().unique().to_list()):
        of_value = index_n[(values_n == value).fill_null(False).to_numpy()]
        size = min(config.max_cells, len(of_value))
        of_values.append(generator.choice(of_value, size=size, replace=False))
    found_n = np.sort(np.concatenate(of_values)) if of_values else index_n[:0]
    return found_n, values_n.null_count()


def read_cells(corpus: Corpus, cells_n: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
    """Token arrays of these cells, some thousands in memory at a time."""
    index = np.asarray(cells_n).tolist()
    for start in range(0, len(index), CELLS_PER_READ):
        yield from corpus.tokens(index[start : start + CELLS_PER_READ])


def detection(corpus: Corpus, cells_n: np.ndarray) -> np.ndarray:
    """Cells (v) int64 among `cells_n` that have each gene; 0 for special tokens."""
    counts_v = np.zeros(corpus.vocabulary.size, dtype=np.int64)
    for tokens_t in read_cells(corpus, cells_n):
        counts_v[np.unique(tokens_t)] += 1
    counts_v[list(corpus.vocabulary.special.values())] = 0
    return counts_v


def most_detected(detected_v: np.ndarray, top: int) -> list[int]:
    """Tokens of the genes that stand in most cells, most first; ties go to the smaller token."""
    order = np.argsort(-detected_v, kind="stable")[:top]
    return [int(token) for token in order[detected_v[order] > 0]]


def ranks_elsewhere(corpus: Corpus, where: str, *, seed: int) -> dict[int, int]:
    """Median rank of each gene over the cells of `where` that have it, of which MAX_CELLS are drawn at most.

    Raises as `select_cells` does.
    """
    index_n = drawn(select_cells(corpus, where), MAX_CELLS, seed, where)
    return median_ranks(read_cells(corpus, index_n), corpus.vocabulary)
