"""The cells a head is fitted on: their targets, groups and attributes, and which cells were left out and why.

Axis suffixes: `n` labelled cells, `a` all cells of the corpus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import CorpusError
from genescale.training.labels.selection import check_columns, select_cells

NO_LABEL = -1
_IDENTITY = ("cell_id", "dataset_id", "source_row")
_SHOWN_VALUES = 3
TargetKind = Literal["classes", "number"]


class Target(Protocol):
    """A corpus column that a head shall find."""

    @property
    def label(self) -> str:
        """The column."""

    @property
    def kind(self) -> TargetKind:
        """Whether its values are classes or numbers."""


@dataclass(frozen=True, kw_only=True)
class ColumnTarget:
    """The plainest Target."""

    label: str
    kind: TargetKind = "classes"


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetValues:
    """What is true of the labelled cells in one column."""

    label: str
    kind: TargetKind
    classes: tuple[str, ...]
    """Labels in alphabetical order; empty for numbers."""
    values_n: npt.NDArray[Any]
    """int64 positions in `classes` with -1 for no label, or float64 with NaN for none."""

    @property
    def present_n(self) -> npt.NDArray[np.bool_]:
        """Which cells have a value."""
        return self.values_n != NO_LABEL if self.kind == "classes" else ~np.isnan(self.values_n)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledCells:
    """Cells of a corpus with their targets and groups; kept + left out = all cells of the corpus."""

    index_n: npt.NDArray[np.int64]
    """(n) global indices into the corpus."""
    targets: tuple[TargetValues, ...]
    """One for each column that was asked for; every cell has a value in one of them at least."""
    groups_n: npt.NDArray[Any]
    """(n) texts; empty without a group column."""
    ids_n: npt.NDArray[Any]
    """(n) texts, each once: the cell id; with its dataset, or its dataset and source row, where ids repeat."""
    identity: pa.Table
    """cell_id, dataset_id and source_row of the n cells."""
    left_out: Mapping[str, int]
    """Cells that are not here, by reason."""
    attributes: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """(n) values of each column that a split shall balance: texts, or float64 for columns of numbers."""

    @property
    def codes_n(self) -> npt.NDArray[np.int64]:
        """(n) int64 positions in `classes` of the first target."""
        return self.targets[0].values_n

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of the first target."""
        return self.targets[0].classes

    def only(self, keep_n: npt.NDArray[np.bool_], reason: str) -> LabelledCells:
        """The cells of a mask (n), with the classes that these have; the others are counted under `reason`."""
        index_n = np.flatnonzero(keep_n).astype(np.int64)
        return LabelledCells(
            index_n=self.index_n[index_n],
            targets=tuple(_settled(target, index_n) for target in self.targets),
            groups_n=self.groups_n[index_n],
            ids_n=self.ids_n[index_n],
            identity=self.identity.take(pa.array(index_n)),
            left_out={**self.left_out, reason: int((~keep_n).sum())},
            attributes={name: values_n[index_n] for name, values_n in self.attributes.items()},
        )


def labelled_cells(
    corpus: Corpus,
    *,
    label: str = "",
    group: str | None = None,
    targets: Sequence[Target] = (),
    balance: Sequence[str] = (),
    where: str = "",
    min_cells_per_class: int = 1,
    max_cells: int = 0,
    max_cells_per_class: int = 0,
    folds: int = 0,
    seed: int = 0,
) -> LabelledCells:
    """Every cell of `where` with a value in one target at least and, when they are given, in `group` and `balance`.

    `label` alone stands for one target of classes. A cap (0: none) draws at random, so that classes keep their shares.
    Of cells with the same counts only the first stays: a copy of a training cell would be no test. Raises CorpusError
    when a target has one class or one value, a column of numbers holds texts, or fewer cells than `folds` remain.
    """
    wanted = tuple(targets) or (ColumnTarget(label=label),)
    check_columns(corpus, [*(target.label for target in wanted), *([group] if group else []), *balance])
    columns = [*_IDENTITY, "content_hash", *(t.label for t in wanted), *([group] if group else []), *balance]
    sieve = _Sieve(corpus.cells(list(dict.fromkeys(columns))), np.random.default_rng(seed))
    if where.strip():
        inside_a = np.zeros(sieve.table.num_rows, dtype=bool)
        inside_a[select_cells(corpus, where)] = True
        sieve.leave_out("outside the selection", ~inside_a)
    columns_a = [_column(sieve, target, corpus) for target in wanted]
    missing = f"no {' or '.join(target.label for target in wanted)}"
    sieve.leave_out(missing, ~np.any([column.present_n for column in columns_a], axis=0))
    for name in dict.fromkeys([*([group] if group else []), *balance]):
        sieve.leave_out(f"no {name}", _missing(sieve.table, name))
    sieve.leave_out("copy of another cell", sieve.copies())
    columns_a = [_without_rare(sieve, column, min_cells_per_class) for column in columns_a]
    sieve.leave_out("rare class", ~np.any([column.present_n for column in columns_a], axis=0))
    if columns_a[0].kind == "classes":
        sieve.cap_classes(columns_a[0].values_n, max_cells_per_class)
    sieve.cap(max_cells)
    index_n = np.flatnonzero(sieve.keep_a).astype(np.int64)
    kept = tuple(_settled(column, index_n) for column in columns_a)
    for target in kept:
        _refuse_useless(target, sieve, corpus, group)
    _refuse_few(index_n, folds, sieve, corpus)
    identity = sieve.table.select(list(_IDENTITY)).take(pa.array(index_n))
    return LabelledCells(
        index_n=index_n,
        targets=kept,
        groups_n=_texts(sieve.table, group)[index_n] if group else np.full(len(index_n), "", dtype=str),
        ids_n=unit_ids(identity),
        identity=identity,
        left_out=sieve.left_out,
        attributes={name: _values(sieve.table, name)[index_n] for name in balance},
    )


class _Sieve:
    """All cells of a corpus, and which of them are still in; every cell that leaves is counted once."""

    def __init__(self, table: pa.Table, draws: np.random.Generator) -> None:
        self.table, self.draws = table, draws
        self.keep_a = np.ones(table.num_rows, dtype=bool)
        self.left_out: dict[str, int] = {}

    def leave_out(self, reason: str, out_a: npt.NDArray[np.bool_]) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + int((self.keep_a & out_a).sum())
        self.keep_a[out_a] = False

    def copies(self) -> npt.NDArray[np.bool_]:
        """Which cells have the counts of an earlier kept cell; cells whose counts were not recorded have none."""
        hashes = self.table.column("content_hash")
        known_a = pc.is_valid(hashes).to_numpy() & self.keep_a
        values_a = pc.fill_null(hashes, 0).to_numpy()
        copy_a = known_a.copy()
        copy_a[np.flatnonzero(known_a)[np.unique(values_a[known_a], return_index=True)[1]]] = False
        return copy_a

    def cap(self, most: int) -> None:
        if most and self.keep_a.sum() > most:
            self._drop("above max_cells", self.draws.permutation(np.flatnonzero(self.keep_a))[most:])

    def cap_classes(self, codes_a: npt.NDArray[np.int64], most: int) -> None:
        if not most:
            return
        members = (np.flatnonzero(self.keep_a & (codes_a == code)) for code in range(int(codes_a.max()) + 1))
        self._drop("above max_cells_per_class", np.concatenate([self.draws.permutation(m)[most:] for m in members]))

    def _drop(self, reason: str, positions: npt.NDArray[np.int64]) -> None:
        out_a = np.zeros_like(self.keep_a)
        out_a[positions] = True
        self.leave_out(reason, out_a)


def _column(sieve: _Sieve, target: Target, corpus: Corpus) -> TargetValues:
    """A target over all cells of the corpus."""
    if target.kind == "classes":
        texts_a = _texts(sieve.table, target.label)
        names, codes_a = np.unique(texts_a[texts_a != ""], return_inverse=True)
        values_a = np.full(len(texts_a), NO_LABEL, dtype=np.int64)
        values_a[texts_a != ""] = codes_a
        return TargetValues(
            label=target.label, kind="classes", classes=tuple(str(name) for name in names), values_n=values_a
        )
    numbers_a = _numbers(sieve.table, target.label)
    wrong_a = np.isnan(numbers_a) & ~_missing(sieve.table, target.label) & sieve.keep_a
    if wrong_a.any():
        examples = np.unique(_texts(sieve.table, target.label)[wrong_a])[:_SHOWN_VALUES]
        raise CorpusError(
            f"column '{target.label}' holds {int(wrong_a.sum()):,} values that are no numbers: {', '.join(examples)}.",
            where=f"{corpus.uri}@{corpus.version}",
            fix="Leave these cells out with --where, choose a column of numbers, or use kind = 'classes'.",
        )
    return TargetValues(label=target.label, kind="number", classes=(), values_n=numbers_a)


def _without_rare(sieve: _Sieve, column: TargetValues, least: int) -> TargetValues:
    if column.kind == "number":
        return column
    counts = np.bincount(column.values_n[sieve.keep_a & column.present_n], minlength=len(column.classes))
    values_a = np.where(np.isin(column.values_n, np.flatnonzero(counts < least)), NO_LABEL, column.values_n)
    return TargetValues(label=column.label, kind="classes", classes=column.classes, values_n=values_a)


def _settled(column: TargetValues, index_n: npt.NDArray[np.int64]) -> TargetValues:
    """The target of the kept cells, with the classes that are left."""
    values_n = column.values_n[index_n]
    if column.kind == "number":
        return TargetValues(label=column.label, kind="number", classes=(), values_n=values_n)
    used, codes_n = np.unique(values_n[values_n != NO_LABEL], return_inverse=True)
    settled_n = np.full(len(values_n), NO_LABEL, dtype=np.int64)
    settled_n[values_n != NO_LABEL] = codes_n
    classes = tuple(column.classes[code] for code in used)
    return TargetValues(label=column.label, kind="classes", classes=classes, values_n=settled_n)


def _refuse_useless(target: TargetValues, sieve: _Sieve, corpus: Corpus, group: str | None) -> None:
    """CorpusError unless there is something to learn: two classes, or two different numbers."""
    if target.kind == "classes":
        found = len(target.classes)
        what = "1 class" if found == 1 else f"{found} classes"
        fix = "A head needs two classes or more: choose another label column, or a wider selection of cells."
    else:
        found = len(np.unique(target.values_n[target.present_n]))
        what = "1 different number" if found == 1 else f"{found} numbers"
        fix = "A head needs numbers that differ: choose another column, or a wider selection of cells."
    if found > 1:
        return
    if group and sieve.left_out.get(f"no {group}", 0) > sieve.keep_a.sum():
        fix = f"Column '{group}' is empty in most cells: group by another column, or split at random."
    raise CorpusError(
        f"column '{target.label}' gives {what} in {sieve.table.num_rows:,} cells ({_reasons(sieve)}).",
        where=f"{corpus.uri}@{corpus.version}",
        fix=fix,
    )


def _refuse_few(index_n: npt.NDArray[np.int64], folds: int, sieve: _Sieve, corpus: Corpus) -> None:
    if len(index_n) < folds:
        raise CorpusError(
            f"{len(index_n)} cells cannot fill {folds} folds ({_reasons(sieve)}).",
            where=f"{corpus.uri}@{corpus.version}",
            fix="Use fewer folds or more cells.",
        )


def _reasons(sieve: _Sieve) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sieve.left_out.items() if count) or "all kept"


def unit_ids(identity: pa.Table) -> npt.NDArray[Any]:
    """A text for each cell, each once: its id; with its dataset where ids repeat; and its source row where those do."""
    texts = [np.array(identity.column(name).cast(pa.string()).to_pylist(), dtype=object) for name in _IDENTITY]
    cell_n, dataset_n, row_n = texts
    for ids_n in (cell_n, dataset_n + "/" + cell_n):
        if len(set(ids_n)) == len(ids_n):
            return ids_n.astype(str)
    return (dataset_n + "/" + cell_n + "/" + row_n).astype(str)


def _texts(table: pa.Table, column: str) -> npt.NDArray[Any]:
    """Values as texts; empty where there is none, which dataframes also write as `nan`."""
    values = (value.strip() for value in table.column(column).cast(pa.string()).fill_null("").to_pylist())
    return np.array(["" if value.lower() == "nan" else value for value in values], dtype=str)


def _numbers(table: pa.Table, column: str) -> npt.NDArray[np.float64]:
    """Finite numbers of a column; NaN where there is none."""
    values = table.column(column)
    if pa.types.is_floating(values.type) or pa.types.is_integer(values.type):
        numbers_a = pc.fill_null(values.cast(pa.float64()), np.nan).to_numpy()
    else:
        numbers_a = np.array([_number(text) for text in _texts(table, column).tolist()], dtype=np.float64)
    return np.where(np.isfinite(numbers_a), numbers_a, np.nan)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _missing(table: pa.Table, column: str) -> npt.NDArray[np.bool_]:
    return _texts(table, column) == ""


def _values(table: pa.Table, column: str) -> npt.NDArray[Any]:
    """Numbers where every value of the column is one or missing, else texts."""
    numbers_a = _numbers(table, column)
    are_numbers = not (np.isnan(numbers_a) & ~_missing(table, column)).any()
    return numbers_a if are_numbers else _texts(table, column)
