"""Which cells of a corpus a question is about: a condition in SQL over their columns.

Only one expression is understood, never a statement, so a condition cannot read files or reach other tables.

Axis suffixes: `n` cells of a corpus.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.schema import TOKEN_COLUMN
from genescale.platform.errors import CorpusError, InputError, did_you_mean

if TYPE_CHECKING:
    import polars as pl

PARTS_AT_ONCE = 16
_EXAMPLE = "Write for example \"tissue = 'heart' AND sex = 'male'\"; further obs columns are labels.NAME."
# Texts in quotes stay as they are; a bare labels.NAME is the name of one column.
_QUOTED_OR_LABEL = re.compile(r"""'(?:[^']|'')*'|"[^"]*"|\blabels\.(?:"(?P<quoted>[^"]+)"|(?P<bare>\w+))""")


def select_cells(corpus: Corpus, where: str) -> npt.NDArray[np.int64]:
    """Global indices (int64, rising) of the cells that fulfil `where`; all cells for an empty text.

    `where` is a Polars SQL expression over the corpus' scalar columns and `labels.NAME`; a cell for which it is
    unknown (null) is not selected. Raises InputError for an expression that cannot be read or is no condition, and
    CorpusError for a column that the corpus has not or when no cell is left.
    """
    if not where.strip():
        return np.arange(corpus.n_cells, dtype=np.int64)
    condition = _condition(where)
    columns = list(dict.fromkeys(condition.meta.root_names()))
    check_columns(corpus, columns)
    if not columns:
        raise InputError(f"'{where}' names no column.", where="where", fix=_EXAMPLE)
    index_n, start = [], 0
    for frame in _frames(corpus, columns):
        index_n.append(start + np.flatnonzero(_fulfilled(frame, condition, where)))
        start += frame.height
    found_n = np.concatenate(index_n).astype(np.int64) if index_n else np.zeros(0, dtype=np.int64)
    if not found_n.size:
        raise CorpusError(
            f"none of the {corpus.n_cells:,} cells fulfils '{where}'.",
            where=f"{corpus.uri}@{corpus.version}",
            fix="Look at the values with `genescale corpus show`, and mind upper and lower case.",
        )
    return found_n


def check_columns(corpus: Corpus, columns: Sequence[str]) -> None:
    """CorpusError, with the nearest known name, when the corpus has no scalar column of one of these names."""
    known = [name for name in corpus.schema.names if name not in (TOKEN_COLUMN, "labels")]
    for name in columns:
        if name in known or (name.startswith("labels.") and len(name) > len("labels.")):
            continue
        hint = did_you_mean(name, known) or f"Columns: {', '.join(known)}; further obs columns: labels.NAME."
        raise CorpusError(f"there is no cell column '{name}'.", where=f"{corpus.uri}@{corpus.version}", fix=hint)


def _condition(where: str) -> pl.Expr:
    import polars as pl

    text = _QUOTED_OR_LABEL.sub(_as_one_column, where)
    try:
        return pl.sql_expr(text)
    except pl.exceptions.PolarsError as error:
        raise InputError(f"'{where}' is no condition: {error}.", where="where", fix=_EXAMPLE) from None


def _as_one_column(match: re.Match[str]) -> str:
    name = match["quoted"] or match["bare"]
    return f'"labels.{name}"' if name else match[0]


def _frames(corpus: Corpus, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Columns of the corpus in global order, some parts at a time, so that memory does not grow with the corpus."""
    import polars as pl

    for first in range(0, len(corpus.parts), PARTS_AT_ONCE):
        parts = range(first, min(first + PARTS_AT_ONCE, len(corpus.parts)))
        yield pl.DataFrame(corpus.cells(columns, parts=list(parts)))


def _fulfilled(frame: pl.DataFrame, condition: pl.Expr, where: str) -> npt.NDArray[np.bool_]:
    import polars as pl

    try:
        answer = frame.select(condition.alias("fulfilled")).to_series()
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"'{where}' cannot be worked out: {reason}.", where="where", fix=_EXAMPLE) from None
    if answer.dtype != pl.Boolean or len(answer) != frame.height:
        raise InputError(f"'{where}' is no condition on each cell, but of type {answer.dtype}.", fix=_EXAMPLE)
    return answer.fill_null(False).to_numpy()
