"""Which cells of a corpus are in which state, by their labels.

Axis suffixes: `n` cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import CorpusError, SettingsError, did_you_mean
from genescale.training.labels.selection import check_columns, select_cells

_SHOWN = 20


def cells_by_state(
    corpus: Corpus, column: str, wanted: Sequence[str] = (), *, where: str = ""
) -> tuple[dict[str, npt.NDArray[np.int64]], int]:
    """Global indices of the cells of each wanted label; of all labels, in alphabetical order, when none is wanted.

    `where` limits the cells (an SQL condition). The second value counts its cells that carry no wanted label. Raises
    CorpusError for an unknown column or label, with the nearest known one.
    """
    check_columns(corpus, [column])
    selected_n = select_cells(corpus, where)
    labels_n = pl.DataFrame(corpus.cells([column])).to_series().cast(pl.String)[selected_n]
    known = sorted(labels_n.drop_nulls().unique().to_list())
    within = f" among those where {where}" if where else ""
    if absent := [name for name in wanted if name not in known]:
        raise CorpusError(
            f"no cell{within} has {column} = '{absent[0]}'.",
            where=f"{corpus.uri}@{corpus.version}",
            fix=did_you_mean(absent[0], known) or f"Values: {', '.join(known[:_SHOWN])}.",
        )
    if not known:
        raise CorpusError(f"no cell{within} has a {column}.", where=f"{corpus.uri}@{corpus.version}")
    members = {name: selected_n[(labels_n == name).fill_null(False).to_numpy()] for name in wanted or known}
    return members, len(selected_n) - sum(len(index_n) for index_n in members.values())


def drawn(index_n: npt.NDArray[np.int64], max_cells: int, seed: int, name: str) -> npt.NDArray[np.int64]:
    """At most `max_cells` of the cells (0: all), in rising order; the draw depends on seed and name.

    By name, so that a state is the same cells whichever others are asked for beside it.
    """
    if max_cells < 0:
        raise SettingsError(f"max_cells is {max_cells}.", where="states", fix="Use a number of cells, or 0 for all.")
    if not max_cells or len(index_n) <= max_cells:
        return index_n
    generator = np.random.default_rng([seed, *name.encode()])
    return np.sort(generator.choice(index_n, size=max_cells, replace=False))
