"""Which cells and genes every point of a learning curve is fitted and measured on: decided before anything is fitted.

Axis suffixes: `u` labelled units (cells or genes), `n` cells, `g` genes, `r` rows.

Cells: the split is made once over the cells that fulfil `where`, and its test part measures every point. A point takes
its labelled cells from the train and validation parts, in the proportion of the fractions. Cells that fulfil `against`
are dealt to the same parts, a donor always to one, and none of a test donor is trained on. Genes: the labelled genes,
their folds and the cells that test genes are read in are fixed; a point reads its training genes in other cells.

A seed puts the candidates into one order in which every beginning holds the classes in proportion, so the cells of a
smaller point are among those of a larger one, and a point does not depend on which others are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import CorpusError, InputError, SettingsError
from genescale.platform.storage import Store
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.examples import Examples, gene_examples
from genescale.training.fitting.task import Task, prepare
from genescale.training.labels.gene_labels import gene_rows
from genescale.training.labels.selection import select_cells
from genescale.training.labels.splits import Split
from genescale.training.labels.splitting import Folds

LEAST_CELLS = 10
RELEVANT, AGAINST = "relevant", "against"
_TEST_STREAM, _DRAW_STREAM, _DEAL_STREAM = 11, 12, 13


@dataclass(frozen=True, kw_only=True, eq=False)
class CellCurve:
    """A cell task with the candidates of each line and the test cells."""

    task: Task
    train: dict[str, np.ndarray]
    """By line, units that may train."""
    validation: dict[str, np.ndarray]
    test: np.ndarray
    validation_share: float
    """Of the labelled cells of a point."""

    unit = "cells"

    @property
    def test_units(self) -> int:
        """Test cells."""
        return len(self.test)

    def most(self, line: str) -> int:
        """The largest point that the candidates of a line allow."""
        by_train = len(self.train[line]) / (1 - self.validation_share)
        return int(min(by_train, len(self.validation[line]) / self.validation_share))

    def tasks(self, line: str, cells: int, seed: int) -> list[Task]:
        """The task of one point: its cells and the test cells, with one split."""
        n_validation = max(1, round(cells * self.validation_share))
        targets_u = self.task.targets_u()
        train = drawn(self.train[line], targets_u, cells - n_validation, seed)
        validation = drawn(self.validation[line], targets_u, n_validation, seed)
        return [subtask(self.task, train, validation, self.test)]


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneCurve:
    """A gene task whose test genes are read in fixed cells, and the cells that training genes may be read in."""

    task: Task
    """Its cells are the test cells."""
    corpus: Corpus
    cells: dict[str, np.ndarray]
    """By line, global indices of the candidates."""
    max_rows_per_gene: int

    unit = "genes"

    @property
    def test_units(self) -> int:
        """Genes that are tested in one fold or another."""
        return len(np.unique(np.concatenate([split.test for split in self.task.folds.splits])))

    def most(self, line: str) -> int:
        """All candidates."""
        return len(self.cells[line])

    def tasks(self, line: str, cells: int, seed: int) -> list[Task]:
        """One task for each fold: its training genes in the point's cells, its test genes in the test cells."""
        pool = self.cells[line]
        index_n = np.sort(pool[drawn(np.arange(len(pool)), np.zeros(len(pool), dtype=np.int64), cells, seed)])
        read = self._read(index_n, seed)
        made = []
        for split in self.task.folds.splits:
            fitted = [part[np.isin(part, read.unit_r)] for part in (split.train, split.validation)]
            if not all(len(part) for part in fitted):
                raise InputError(
                    f"no training or validation gene occurs in {cells:,} drawn cells.",
                    where=line,
                    fix="Use larger points, or more genes.",
                )
            both = together(read.take(np.concatenate(fitted)), self.task.examples.take(split.test))
            task = replace(
                self.task, examples=both, folds=_one_fold(_split(fitted[0], fitted[1], split.test), self.task.folds)
            )
            made.append(task)
        return made

    def _read(self, index_n: np.ndarray, seed: int) -> Examples:
        """Rows of the labelled genes in these cells."""
        vocabulary = self.corpus.vocabulary
        tokens_g = np.array([vocabulary.token(gene) for gene in self.task.ids_u.tolist()])
        row_cell, row_token, gene_r = gene_rows(self.corpus, index_n, tokens_g, self.max_rows_per_gene, seed)
        used_n, row_cell = np.unique(row_cell, return_inverse=True)
        lengths_n = self.corpus.cells(["length"])["length"].to_numpy()[index_n[used_n]]
        return gene_examples(index_n[used_n], lengths_n, row_cell, row_token, gene_r, self.task.targets_u())


Curve = CellCurve | GeneCurve


def plan_curve(
    bundle: Bundle, corpus: Corpus, config: FinetuneConfig, *, against: str, test_cells: int, store: Store
) -> Curve:
    """The candidates and the test units; raises InputError, CorpusError or SettingsError when they do not fit."""
    if len(config.tasks) > 1:
        raise SettingsError("a curve is of one target.", where="tasks", fix="Name one label.")
    if config.max_cells or config.max_cells_per_class:
        raise SettingsError(
            "the points of a curve say how many cells there are.", where="max_cells", fix="Leave it out; use --cells."
        )
    if config.unit == "genes":
        return _gene_curve(bundle, corpus, config, against, test_cells, store)
    return _cell_curve(bundle, corpus, config, against, test_cells, store)


def _cell_curve(
    bundle: Bundle, corpus: Corpus, config: FinetuneConfig, against: str, test_cells: int, store: Store
) -> CellCurve:
    if config.folds:
        raise SettingsError("a curve of cells has one split.", where="folds", fix="Set folds = 0.")
    relevant = prepare(bundle, corpus, config, store=store)
    share = config.fractions[1] / (config.fractions[0] + config.fractions[1])
    # The split is that of the cells in question: the second line must not move a test cell.
    task, part_u = relevant, np.full(relevant.n_units, "", dtype="<U10")
    for name, units in relevant.folds.splits[0].parts().items():
        part_u[units] = name
    allowed = {RELEVANT: np.ones(task.n_units, dtype=bool)}
    if against:
        where = f"({config.where}) OR ({against})" if config.where else ""
        task = prepare(bundle, corpus, replace(config, where=where), store=store)
        index_u, known = cells_of_units(task), cells_of_units(relevant)
        allowed = {RELEVANT: np.isin(index_u, known), AGAINST: np.isin(index_u, select_cells(corpus, against))}
        wider_u = np.full(task.n_units, "", dtype="<U10")
        wider_u[np.searchsorted(index_u, known)] = part_u
        part_u = other_parts(wider_u, task.groups_u, share, config.seed)
    test = np.flatnonzero(allowed[RELEVANT] & (part_u == "test"))
    if test_cells:
        test = drawn(test, task.targets_u(), min(test_cells, len(test)), config.seed, stream=_TEST_STREAM)
    return CellCurve(
        task=task,
        train={line: np.flatnonzero(at & (part_u == "train")) for line, at in allowed.items()},
        validation={line: np.flatnonzero(at & (part_u == "validation")) for line, at in allowed.items()},
        test=test,
        validation_share=share,
    )


def cells_of_units(task: Task) -> np.ndarray:
    """(u) rising global index of the cell of each unit of a cell task."""
    index_u = np.empty(task.n_units, dtype=np.int64)
    index_u[task.examples.unit_r] = task.examples.index_n[task.examples.row_cell_r]
    return index_u


def other_parts(part_u: np.ndarray, groups_u: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The part of every unit when some have one: units of a group go where the group already stands.

    The remaining groups are dealt to train and validation, about `share` of their units to the latter; where there is
    one such group (or none: the units have no groups), its units are dealt one by one.
    """
    part_u = part_u.copy()
    for part in ("test", "validation", "train"):
        there = set(groups_u[part_u == part].tolist()) - {""}
        part_u[(part_u == "") & np.isin(groups_u, sorted(there))] = part
    left = np.flatnonzero(part_u == "")
    if not len(left):
        return part_u
    names = groups_u[left] if len(set(groups_u[left].tolist())) > 1 else left.astype(str)
    found, codes, counts = np.unique(names, return_inverse=True, return_counts=True)
    order = np.random.default_rng([seed, _DEAL_STREAM]).permutation(len(found))
    before = np.cumsum(counts[order]) - counts[order]
    chosen = order[before < share * len(left)][: max(1, len(found) - 1)]
    part_u[left] = np.where(np.isin(codes, chosen), "validation", "train")
    return part_u


def _gene_curve(
    bundle: Bundle, corpus: Corpus, config: FinetuneConfig, against: str, test_cells: int, store: Store
) -> GeneCurve:
    task = prepare(bundle, corpus, replace(config, max_cells=test_cells), store=store)
    # Cells that were drawn for the test but hold no labelled gene stay candidates: they hold no answer either.
    lines = {RELEVANT: select_cells(corpus, config.where)}
    if against:
        lines[AGAINST] = select_cells(corpus, against)
    cells = {line: np.setdiff1d(index_n, task.examples.index_n) for line, index_n in lines.items()}
    if not len(cells[RELEVANT]):
        raise CorpusError(
            "all cells are test cells.", where="test_cells", fix="Use fewer test cells, or a wider condition."
        )
    return GeneCurve(task=task, corpus=corpus, cells=cells, max_rows_per_gene=config.max_rows_per_gene)


def drawn(units: np.ndarray, targets_u: np.ndarray, count: int, seed: int, *, stream: int = _DRAW_STREAM) -> np.ndarray:
    """`count` of the units, rising, the classes in proportion; a smaller count gives a part of a larger one."""
    codes = targets_u[units]
    if codes.dtype.kind == "f":
        codes = np.zeros(len(units), dtype=np.int64)
    generator = np.random.default_rng([seed, stream])
    keys, order = generator.random(len(units)), np.empty(len(units))
    for code in np.unique(codes):
        members = np.flatnonzero(codes == code)
        place = np.argsort(np.argsort(keys[members], kind="stable"), kind="stable")
        # Evenly spread over 0 … 1 with a jitter, so that every beginning holds each class in proportion.
        order[members] = (place + generator.random(len(members))) / len(members)
    return np.sort(units[np.argsort(order, kind="stable")[:count]])


def subtask(task: Task, train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> Task:
    """The task of some units only, numbered anew, with one split."""
    units = np.sort(np.concatenate([train, validation, test]))
    examples = task.examples.take(units)

    def chosen(values_u: np.ndarray | None) -> np.ndarray | None:
        return None if values_u is None else values_u[units]

    train, validation, test = (np.searchsorted(units, part) for part in (train, validation, test))
    split = _split(train, validation, test)
    return replace(
        task,
        examples=replace(examples, unit_r=np.searchsorted(units, examples.unit_r)),
        folds=_one_fold(split, task.folds),
        ids_u=task.ids_u[units],
        groups_u=task.groups_u[units],
        names_u=chosen(task.names_u),
        datasets_u=chosen(task.datasets_u),
        source_rows_u=chosen(task.source_rows_u),
    )


def together(one: Examples, other: Examples) -> Examples:
    """The rows of both, in the order of their cells; a cell of both stands there once."""
    index_n, place = np.unique(np.concatenate([one.index_n, other.index_n]), return_inverse=True)
    lengths_n = np.empty(len(index_n), dtype=np.int64)
    lengths_n[place] = np.concatenate([one.lengths_n, other.lengths_n])
    row_cell_r = place[np.concatenate([one.row_cell_r, len(one.index_n) + other.row_cell_r])]
    row_token_r = np.concatenate([one.row_token_r, other.row_token_r])
    order = np.lexsort((row_token_r, row_cell_r))
    pairs: Sequence[tuple[np.ndarray, np.ndarray]] = list(zip(one.targets, other.targets, strict=True))
    return Examples(
        index_n=index_n,
        lengths_n=lengths_n,
        row_cell_r=row_cell_r[order].astype(np.int64),
        row_token_r=row_token_r[order],
        targets=tuple(np.concatenate(pair)[order] for pair in pairs),
        unit_r=np.concatenate([one.unit_r, other.unit_r])[order],
    )


def _split(train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> Split:
    return Split(train=train, validation=validation, test=test)


def _one_fold(split: Split, folds: Folds) -> Folds:
    return Folds(splits=(split,), method=folds.method, seed=folds.seed)
