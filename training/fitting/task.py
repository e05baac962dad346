"""A task made ready: which cells or genes have which labels, how they are split, and which heads are to be fitted.

Axis suffixes: `n` cells, `r` rows, `u` labelled units (cells or genes), `g` genes.

All that can be wrong with labels, lists and splits is found here, before any vector is computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError
from genescale.platform.storage import Store
from genescale.training.embed import check_same_vocabulary
from genescale.training.embedder import check_pooling
from genescale.training.fitting.config import FinetuneConfig, TaskTarget
from genescale.training.fitting.examples import Examples, cell_examples, gene_examples
from genescale.training.heads.spec import HeadSpec
from genescale.training.labels.cell_labels import LabelledCells, labelled_cells
from genescale.training.labels.gene_labels import gene_rows, read_gene_lists
from genescale.training.labels.listed_parts import ListedParts, read_id_lists
from genescale.training.labels.selection import select_cells
from genescale.training.labels.splitting import Folds, SplitRequest, Units, make_folds


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Labelled units, their folds, and the heads to fit: all that is fixed before the first step."""

    unit: str
    """`cells` or `genes`."""
    examples: Examples
    folds: Folds
    specs: tuple[HeadSpec, ...]
    ids_u: np.ndarray
    """Texts: cell ids, or Ensembl ids of the genes."""
    groups_u: np.ndarray
    """Texts; empty without a group column."""
    left_out: Mapping[str, int]
    """Units that are not here, by reason."""
    names_u: np.ndarray | None = None
    """Gene symbols."""
    datasets_u: np.ndarray | None = None
    source_rows_u: np.ndarray | None = None
    """Of cells: their dataset, and their row in its source."""

    @property
    def n_units(self) -> int:
        """How many cells or genes have a label."""
        return len(self.ids_u)

    @property
    def n_folds(self) -> int:
        """How many splits there are: 1 without cross-validation."""
        return len(self.folds.splits)

    def targets_u(self, head: int = 0) -> np.ndarray:
        """(u) target of each unit for one head: codes with -1, or numbers with NaN, where there is none."""
        target_r = self.examples.targets[head]
        missing = np.nan if target_r.dtype.kind == "f" else -1
        targets_u = np.full(self.n_units, missing, dtype=target_r.dtype)
        targets_u[self.examples.unit_r] = target_r
        return targets_u

    def digest(self) -> str:
        """sha256 (hex) of the units, their targets and their folds."""
        digest = hashlib.sha256(json.dumps([self.unit, self.ids_u.tolist(), self.examples.rows_digest()]).encode())
        parts = [part for split in self.folds.splits for part in split.parts().values()]
        for values in (*self.examples.targets, *parts):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def counts(self, fold: int = 0) -> dict[str, Any]:
        """Units and groups of each part of one fold, and what was left out by reason."""
        parts = self.folds.splits[fold].parts().items()
        return {
            self.unit: {name: len(part) for name, part in parts},
            "groups": {name: sorted(set(self.groups_u[part].tolist()) - {""}) for name, part in parts},
            "left_out": dict(self.left_out),
        }


def prepare(bundle: Bundle, corpus: Corpus, config: FinetuneConfig, *, store: Store | None = None) -> Task:
    """The labelled units of `corpus`, split, and the heads for them; checks that model, corpus and config fit.

    `store` reads gene lists and id lists (the corpus' own by default). Raises InputError, CorpusError or SettingsError.
    """
    check_same_vocabulary(bundle, corpus)
    check_pooling(config.pooling, bundle.vocabulary)
    width = int(bundle.config["hidden_size"])
    store = corpus.store if store is None else store
    make = _gene_task if config.unit == "genes" else _cell_task
    return make(corpus, config, width, store)


def head_specs(width: int, classes: tuple[tuple[str, ...], ...], config: FinetuneConfig) -> tuple[HeadSpec, ...]:
    """The heads that `config` asks for on vectors of this width; `classes` of each target, empty for a number."""
    return tuple(
        _head_spec(width, names, target, config) for names, target in zip(classes, config.targets, strict=True)
    )


def _head_spec(width: int, classes: tuple[str, ...], target: TaskTarget, config: FinetuneConfig) -> HeadSpec:
    cells = "number" if target.kind == "number" else "cell_classes"
    return HeadSpec(
        label=target.label,
        width=width,
        layer=config.layer,
        pooling=config.pooling,
        classes=classes,
        kind="gene_classes" if config.unit == "genes" else cells,  # type: ignore[arg-type]
        type=config.head,
        hidden=config.hidden,
        depth=config.depth,
        dropout=config.dropout,
        activation=config.activation,
        neighbours=config.neighbours,
        weight=target.weight,
    )


def _cell_task(corpus: Corpus, config: FinetuneConfig, width: int, store: Store) -> Task:
    listed = read_id_lists(config.lists, store) if config.split == "lists" else None
    group = config.group if config.split in ("grouped", "balanced") else listed.key if listed else ""
    cells = labelled_cells(
        corpus,
        targets=config.targets,
        group=group or None,
        balance=config.balance if config.split == "balanced" else (),
        where=config.where,
        min_cells_per_class=config.min_cells_per_class,
        max_cells=config.max_cells,
        max_cells_per_class=config.max_cells_per_class,
        folds=config.folds,
        seed=config.drawing_seed,
    )
    if listed is not None:
        cells = _listed_only(cells, listed)
    lengths_a = corpus.cells(["length"])["length"].to_numpy()
    return Task(
        unit="cells",
        examples=cell_examples(
            cells.index_n, lengths_a[cells.index_n], tuple(target.values_n for target in cells.targets)
        ),
        folds=make_folds(_request(config, group, listed), _units(cells, group)),
        specs=head_specs(width, tuple(target.classes for target in cells.targets), config),
        ids_u=cells.ids_n,
        groups_u=cells.groups_n,
        left_out=dict(cells.left_out),
        datasets_u=np.array(cells.identity["dataset_id"].to_pylist(), dtype=str),
        source_rows_u=cells.identity["source_row"].to_numpy().astype(np.int64),
    )


def _listed_only(cells: LabelledCells, listed: ListedParts) -> LabelledCells:
    """The cells that the lists name: a class that only other cells have is none that the head could learn."""
    named_n = listed.names(cells.ids_n, cells.groups_n)
    # Lists that name no cell at all are refused when the split is made, which says what they name instead.
    return cells.only(named_n, "in none of the lists") if named_n.any() else cells


def _units(cells: LabelledCells, group: str) -> Units:
    """The cells as a split sees them; it stratifies by the first target."""
    return Units(
        ids_u=cells.ids_n,
        labels_u=cells.targets[0].values_n,
        groups_u=cells.groups_n if group else None,
        attributes=cells.attributes,
        classes=cells.classes,
    )


def _request(config: FinetuneConfig, group: str, listed: ListedParts | None) -> SplitRequest:
    return SplitRequest(
        method=config.split,
        fractions=config.fractions,
        folds=config.folds,
        seed=config.drawing_seed,
        group=group,
        listed=listed,
        unit=config.unit,
    )


def _gene_task(corpus: Corpus, config: FinetuneConfig, width: int, store: Store) -> Task:
    """Labelled genes and the cells that they are read in; a gene that stands in none of the cells is left out."""
    listed = read_id_lists(config.lists, store) if config.split == "lists" else None
    labels = read_gene_lists(config.genes, store, corpus.vocabulary)
    index_n = select_cells(corpus, config.where)
    if config.max_cells and len(index_n) > config.max_cells:
        index_n = np.sort(np.random.default_rng(config.drawing_seed).permutation(index_n)[: config.max_cells])
    row_cell, row_token, gene_r = gene_rows(
        corpus, index_n, labels.tokens_g, config.max_rows_per_gene, config.drawing_seed
    )
    kept_g, unit_r = np.unique(gene_r, return_inverse=True)
    used_n, row_cell = np.unique(row_cell, return_inverse=True)
    counts = np.bincount(labels.codes_g[kept_g], minlength=len(labels.classes))
    if (counts == 0).any():
        raise InputError(
            f"no gene of class '{labels.classes[int(counts.argmin())]}' occurs in the {len(index_n):,} chosen cells.",
            where=config.genes,
            fix="Choose other cells (where, max_cells) or other genes.",
        )
    lengths_a = corpus.cells(["length"])["length"].to_numpy()
    left_out = {reason: len(names) for reason, names in labels.left_out.items()}
    left_out |= {"listed twice": len(labels.merged), "in none of the cells": len(labels.tokens_g) - len(kept_g)}
    codes_g = labels.codes_g[kept_g]
    ids_u = np.array(labels.ids_g, dtype=str)[kept_g]
    return Task(
        unit="genes",
        examples=gene_examples(index_n[used_n], lengths_a[index_n[used_n]], row_cell, row_token, unit_r, codes_g),
        folds=make_folds(_request(config, "", listed), Units(ids_u=ids_u, labels_u=codes_g, classes=labels.classes)),
        specs=head_specs(width, (labels.classes,), config),
        ids_u=ids_u,
        groups_u=np.full(len(kept_g), "", dtype=str),
        left_out=left_out,
        names_u=np.array(labels.symbols_g, dtype=str)[kept_g],
    )
