"""Which cells of an atlas become rows, and for which reason the others do not.

Two kinds of rules: what the file says of a cell (`obs_reasons`), known before its counts are read, and what its counts
say (`counts_reasons`). The reasons are stable words: reports, quarantine tables and programs use them.

Axis suffixes: `n` cells of a block.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from genescale.ingestion.annotation.obs_columns import as_booleans
from genescale.platform.errors import AtlasError, SettingsError, did_you_mean

if TYPE_CHECKING:
    import polars as pl

    from genescale.ingestion.atlas import Atlas
    from genescale.ingestion.tokenise import Tally

KEPT = ""
EMPTY_CELL = "empty_cell"
NO_VOCABULARY_GENE = "no_vocabulary_gene"
BELOW_MIN_GENES = "below_min_genes"
BELOW_MIN_COUNTS = "below_min_counts"
MITOCHONDRIAL_SHARE = "mitochondrial_share"
NOT_PRIMARY_DATA = "not_primary_data"
FILTER_PASS = "filter_pass"
WHERE = "where"
BAD_VALUES = "bad_values"
DUPLICATE_CELL = "duplicate_cell"
REASONS = (
    EMPTY_CELL, NO_VOCABULARY_GENE, BELOW_MIN_GENES, BELOW_MIN_COUNTS, MITOCHONDRIAL_SHARE, NOT_PRIMARY_DATA,
    FILTER_PASS, WHERE, BAD_VALUES, DUPLICATE_CELL,
)  # fmt: skip
# Cells with so little that they say something about the file: droplets without a cell, or genes that do not fit.
EMPTY_REASONS = (EMPTY_CELL, NO_VOCABULARY_GENE, BELOW_MIN_GENES)
# Below seven genes a mask of 15 % may hide none: such cells are left out (Theodoris et al., Nature 2023).
MIN_GENES = 7

# Functions that look at several rows, as Polars writes them: their value would depend on how a file is cut into blocks.
_OF_SEVERAL_ROWS = re.compile(
    r"\.(sum|mean|median|min|max|first|last|count|n_unique|std|var|quantile|corr|cov|over|implode|rank|shift|diff"
    r"|cum_[a-z]+|row_index|reverse|sort[a-z_]*|mode|product|arg_[a-z]+)\(|\blen\(\)|int_range\("
)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellRules:
    """Which cells become rows."""

    min_genes: int = MIN_GENES
    """Cells with fewer detected vocabulary genes are dropped."""
    min_counts: float = 0.0
    """Cells with a smaller library size are dropped."""
    max_mito_share: float = 1.0
    """Cells with a larger share of mitochondrial counts are dropped."""
    primary_only: bool = True
    """Drop cells whose obs['is_primary_data'] is false: the same cells stand in another dataset."""
    filter_pass: bool = True
    """Drop cells whose obs['filter_pass'] is false."""
    where: str = ""
    """Keep cells for which this Polars SQL expression over obs is true, such as `tissue = 'lung' AND age > 40`."""
    keep_obs: tuple[str, ...] = ()
    """Further obs columns to keep, as texts in `labels`."""
    max_empty_share: float = 0.5
    """Share of cells that may be empty or nearly so before the file is refused."""

    def __post_init__(self) -> None:
        if self.min_genes < 1:
            raise SettingsError(f"min_genes is {self.min_genes}.", fix="Use 1 or more: a row needs a gene.")
        if not 0 <= self.min_counts < float("inf"):
            raise SettingsError(f"min_counts is {self.min_counts}.", fix="Use 0 or more.")
        for name in ("max_mito_share", "max_empty_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} is {getattr(self, name)}.", fix="Use a share from 0 to 1.")
        if len(set(self.keep_obs)) != len(self.keep_obs):
            raise SettingsError("keep_obs names a column twice.", fix="Name each column once.")
        if self.where:
            _expression(self.where)

    def recipe(self) -> dict[str, Any]:
        """The rules that change rows."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(CellRules)}


def obs_reasons(rules: CellRules, atlas: Atlas, start: int, stop: int) -> list[str]:
    """Why obs leaves out each of the cells start … stop-1; an empty text for those it keeps.

    A missing value of is_primary_data or filter_pass keeps its cell, as a missing column does; a missing result of
    `where` does not. Raises SettingsError when `where` does not fit the file.
    """
    dropped_n = np.full(stop - start, KEPT, dtype=object)
    if rules.where:
        dropped_n[~_true_where(rules.where, atlas, start, stop)] = WHERE
    if rules.filter_pass:
        dropped_n[_said_false("filter_pass", atlas, start, stop)] = FILTER_PASS
    if rules.primary_only:
        dropped_n[_said_false("is_primary_data", atlas, start, stop)] = NOT_PRIMARY_DATA
    reasons: list[str] = dropped_n.tolist()
    return reasons


def counts_reasons(
    rules: CellRules,
    totals_n: npt.NDArray[np.float64],
    n_genes_n: npt.NDArray[np.integer[Any]],
    mito_n: npt.NDArray[np.float64],
) -> npt.NDArray[np.object_]:
    """Why its counts leave out each cell (n), an empty text for those that are kept; the first rule that applies."""
    share_n = np.divide(mito_n, totals_n, out=np.zeros(len(totals_n)), where=totals_n > 0)
    rules_n = {
        EMPTY_CELL: totals_n <= 0,
        NO_VOCABULARY_GENE: n_genes_n == 0,
        BELOW_MIN_GENES: n_genes_n < rules.min_genes,
        BELOW_MIN_COUNTS: totals_n < rules.min_counts,
        MITOCHONDRIAL_SHARE: share_n > rules.max_mito_share,
    }
    reasons_n = np.full(len(totals_n), KEPT, dtype=object)
    for reason, applies_n in reversed(rules_n.items()):
        reasons_n[applies_n] = reason
    return reasons_n


def check_enough_cells(tally: Tally, rules: CellRules, *, where: str) -> None:
    """AtlasError when more of the cells are empty or nearly so than `max_empty_share` allows."""
    counts = {reason: tally.dropped.get(reason, 0) for reason in EMPTY_REASONS}
    empty = sum(counts.values())
    if not tally.read or empty <= rules.max_empty_share * tally.read:
        return
    named = {
        EMPTY_CELL: "without any count",
        NO_VOCABULARY_GENE: "without a vocabulary gene",
        BELOW_MIN_GENES: f"with fewer than {rules.min_genes} vocabulary genes",
    }
    parts = ", ".join(f"{count:,} {named[reason]}" for reason, count in counts.items() if count)
    raise AtlasError(
        f"{empty:,} of {tally.read:,} cells are empty or nearly so ({parts}); {rules.max_empty_share:.0%} are allowed.",
        where=where,
        fix="If this is the unfiltered matrix of all barcodes, give the filtered one; else raise --max-empty-share.",
    )


def repeated_names(names: list[str]) -> int:
    """Cells whose name another cell before them has: they are told apart by their row."""
    return len(names) - len(set(names))


def _said_false(name: str, atlas: Atlas, start: int, stop: int) -> npt.NDArray[np.bool_]:
    if name not in atlas.obs.columns:
        return np.zeros(stop - start, dtype=np.bool_)
    values, _ = as_booleans(atlas.obs.typed(name, start, stop)[0])
    return ~values.fill_null(True).to_numpy(zero_copy_only=False).astype(np.bool_)


def _expression(text: str) -> pl.Expr:
    """The parsed expression; SettingsError when it is no expression, or one that looks at several rows at once."""
    import polars as pl

    try:
        expression = pl.sql_expr(text)
    except pl.exceptions.PolarsError as error:
        raise SettingsError(
            f"'{text}' is no SQL expression: {_first_line(error)}.",
            where="where",
            fix="Write for example: tissue = 'lung' AND age > 40.",
        ) from error
    if match := _OF_SEVERAL_ROWS.search(_QUOTED.sub("", str(expression))):
        raise SettingsError(
            f"'{text}' looks at several cells at once ({match[0].strip('.(')}); cells are judged one by one.",
            where="where",
            fix="Compute the value beforehand and put it into obs.",
        )
    return expression


def _true_where(text: str, atlas: Atlas, start: int, stop: int) -> npt.NDArray[np.bool_]:
    import polars as pl

    expression = _expression(text)
    columns: dict[str, pl.Series] = {}
    for name in dict.fromkeys(expression.meta.root_names()):
        if name not in atlas.obs.columns:
            known = ", ".join(atlas.obs.columns[:20]) or "none"
            raise SettingsError(
                f"obs has no column '{name}', which --where asks for.",
                where=atlas.uri,
                fix=did_you_mean(name, atlas.obs.columns) or f"Columns: {known}.",
            )
        values, note = atlas.obs.typed(name, start, stop)
        if note and values.null_count == len(values):
            raise AtlasError(
                f"--where asks for a column that cannot be read: {note}.", where=atlas.uri, fix="Use another column."
            )
        columns[name] = pl.Series(name, plain(values))
    frame = pl.DataFrame({"": np.arange(stop - start), **columns})
    try:
        result = frame.with_columns(expression.alias("")).get_column("")
    except pl.exceptions.PolarsError as error:
        types = ", ".join(f"{name} is {series.dtype}" for name, series in columns.items())
        raise SettingsError(
            f"'{text}' does not fit obs: {_first_line(error)} ({types}).", where=atlas.uri, fix="Change --where."
        ) from error
    if result.dtype != pl.Boolean:
        raise SettingsError(
            f"'{text}' yields {result.dtype}, not true or false.", where=atlas.uri, fix="Compare it with a value."
        )
    return result.fill_null(False).to_numpy().astype(np.bool_)


def plain(values: pa.Array) -> pa.Array:
    """An array without dictionary encoding."""
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
