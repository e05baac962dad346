"""The cells a head is fitted on: which have a label and a group, and which were left out and why.

Axis suffixes: `n` labelled cells, `d` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import CorpusError, InputError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store
from genescale.training.embedder import Embedder, Layer, Pooling
from genescale.training.embeddings import read_embeddings, read_manifest

CELLS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledCells:
    """Cells of a corpus with their class and group; kept + left out = all cells of the corpus."""

    index_n: np.ndarray
    """(n) int64 global indices into the corpus."""
    codes_n: np.ndarray
    """(n) int64 positions in `classes`."""
    groups_n: np.ndarray
    """(n) texts; empty without a group column."""
    classes: tuple[str, ...]
    """Labels in alphabetical order."""
    identity: pa.Table
    """cell_id and dataset_id of the n cells."""
    left_out: Mapping[str, int]
    """Cells that are not here, by reason."""


def labelled_cells(
    corpus: Corpus, *, label: str, group: str | None, min_cells_per_class: int = 1, max_cells: int = 0, seed: int = 0
) -> LabelledCells:
    """Every cell with a value in `label` (and in `group`, when one is given), at most `max_cells` of them (0: all).

    A cap draws at random, so that classes keep their shares. Raises CorpusError when fewer than two classes remain.
    """
    columns = ["cell_id", "dataset_id", label, *([group] if group else [])]
    table = corpus.cells(list(dict.fromkeys(columns)))
    labels_n, groups_n = _texts(table, label), _texts(table, group) if group else None
    keep_n = np.ones(table.num_rows, dtype=bool)
    left_out: dict[str, int] = {}

    def leave_out(reason: str, out_n: np.ndarray) -> None:
        left_out[reason] = int((keep_n & out_n).sum())
        keep_n[out_n] = False

    leave_out(f"no {label}", labels_n == "")
    if groups_n is not None:
        leave_out(f"no {group}", groups_n == "")
    names, counts = np.unique(labels_n[keep_n], return_counts=True)
    leave_out("rare class", np.isin(labels_n, names[counts < min_cells_per_class]))
    if max_cells and keep_n.sum() > max_cells:
        drawn = np.random.default_rng(seed).permutation(np.flatnonzero(keep_n))[max_cells:]
        leave_out("above max_cells", np.isin(np.arange(len(keep_n)), drawn))
    index_n = np.flatnonzero(keep_n).astype(np.int64)
    classes, codes_n = np.unique(labels_n[index_n], return_inverse=True)
    if len(classes) < 2:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
        raise CorpusError(
            f"column '{label}' gives {len(classes)} class(es) in {table.num_rows:,} cells ({reasons or 'all kept'}).",
            where=f"{corpus.uri}@{corpus.version}",
            fix=_advice(left_out, label, group),
        )
    return LabelledCells(
        index_n=index_n,
        codes_n=codes_n.astype(np.int64),
        groups_n=np.full(len(index_n), "", dtype=str) if groups_n is None else groups_n[index_n],
        classes=tuple(str(name) for name in classes),
        identity=table.select(["cell_id", "dataset_id"]).take(pa.array(index_n)),
        left_out=left_out,
    )


def _advice(left_out: Mapping[str, int], label: str, group: str | None) -> str:
    """What helps, by what took away most cells."""
    if group and left_out[f"no {group}"] > left_out[f"no {label}"]:
        return f"Column '{group}' is empty: group by another column, or split at random."
    return "A head needs two classes or more: choose another label column."


def _texts(table: pa.Table, column: str) -> np.ndarray:
    values = table.column(column).cast(pa.string()).fill_null("")
    return np.array([value.strip() for value in values.to_pylist()], dtype=str)


def cell_vectors(
    embedder: Embedder,
    corpus: Corpus,
    cells: LabelledCells,
    *,
    layer: Layer,
    pooling: Pooling,
    progress: Progress = SILENT,
) -> np.ndarray:
    """Embeddings of the labelled cells, (n, d) float32, computed here."""
    progress.start(len(cells.index_n), "cells embedded")
    vectors_nd = np.empty((len(cells.index_n), embedder.width), dtype=np.float32)
    for start in range(0, len(cells.index_n), CELLS_AT_ONCE):
        tokens = corpus.tokens(cells.index_n[start : start + CELLS_AT_ONCE].tolist())
        vectors_nd[start : start + len(tokens)] = embedder.embed_cells(tokens, layer=layer, pooling=pooling)
        progress.advance(len(tokens))
    return vectors_nd


def stored_vectors(
    uri: str,
    store: Store,
    corpus: Corpus,
    cells: LabelledCells,
    *,
    bundle_digest: str,
    layer: Layer,
    pooling: Pooling,
) -> np.ndarray:
    """Embeddings of the labelled cells, (n, d) float32, from a folder that `genescale embed` wrote.

    Raises InputError when the folder was made from another model, corpus version, layer or pooling.
    """
    manifest = read_manifest(uri, store)
    wanted = {
        "model": (manifest.bundle_digest, bundle_digest),
        "corpus": (f"{manifest.corpus_uri}@{manifest.corpus_version}", f"{corpus.uri}@{corpus.version}"),
        "layer": (manifest.layer, layer),
        "pooling": (manifest.pooling, pooling),
    }
    for name, (stored, asked) in wanted.items():
        if stored != asked:
            raise InputError(
                f"the embeddings are of another {name}: {stored}, not {asked}.",
                where=uri,
                fix="Embed again with the same settings, or leave the embeddings out.",
            )
    return read_embeddings(uri, store)[1][cells.index_n]
