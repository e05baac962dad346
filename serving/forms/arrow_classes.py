"""What heads say as an Arrow IPC stream. Heads of cells: one row for each cell, beside what `arrow_answers` says of it

    heads    struct<LABEL: struct<predicted: utf8, probabilities: fixed_size_list<float>[c]>>, or struct<number: float>

and probabilities in the order of the head's `classes` in the metadata. A head of genes: one row for each gene, and what
became of the cells under `cells` in the metadata.

    gene, n_cells, predicted    null where no cell has the gene
    probabilities, spread       fixed_size_list<double>[c], null likewise

Axis suffixes: `n` cells, `c` classes of a head (1 for a number).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from genescale.serving.answering.cells import PreparedCell
from genescale.serving.forms.arrow_answers import cell_columns, stream_of
from genescale.serving.schemas import CellFacts, ClassifiedGene, ClassifyFacts, HeadFacts


class _GeneFacts(ClassifyFacts):
    """What an answer of genes says of all of them, its cells included."""

    cells: list[CellFacts]


def render_cells(facts: ClassifyFacts, cells: Sequence[PreparedCell], answers: Sequence[np.ndarray]) -> bytes:
    """The answers `(n, c)` of each head as one record batch."""
    columns = [_head(head, rows_nc) for head, rows_nc in zip(facts.heads, answers, strict=True)]
    heads = pa.StructArray.from_arrays(columns, names=[head.label for head in facts.heads])
    return stream_of({**cell_columns(cells), "heads": heads}, facts)


def render_genes(
    facts: ClassifyFacts, cells: Sequence[PreparedCell], genes: Sequence[ClassifiedGene], head: HeadFacts
) -> bytes:
    """The genes as one record batch."""
    of_classes = pa.list_(pa.float64(), len(head.classes))
    columns = {
        "gene": pa.array([gene.gene for gene in genes], pa.utf8()),
        "n_cells": pa.array([gene.n_cells for gene in genes], pa.int32()),
        "predicted": pa.array([gene.predicted for gene in genes], pa.utf8()),
        "probabilities": pa.array([_in_order(gene.probabilities, head) for gene in genes], of_classes),
        "spread": pa.array([_in_order(gene.spread, head) for gene in genes], of_classes),
    }
    return stream_of(columns, _GeneFacts(**dict(facts), cells=[cell.facts for cell in cells]))


def _head(head: HeadFacts, rows_nc: np.ndarray) -> pa.StructArray:
    rows_nc = np.ascontiguousarray(rows_nc, dtype=np.float32)
    if head.kind == "number":
        return pa.StructArray.from_arrays([pa.array(rows_nc[:, 0])], names=["number"])
    predicted = pa.array(np.array(head.classes, dtype=object)[rows_nc.argmax(axis=1)], pa.utf8())
    probabilities = pa.FixedSizeListArray.from_arrays(pa.array(rows_nc.reshape(-1)), len(head.classes))
    return pa.StructArray.from_arrays([predicted, probabilities], names=["predicted", "probabilities"])


def _in_order(of_class: dict[str, float], head: HeadFacts) -> list[float] | None:
    return [of_class[name] for name in head.classes] if of_class else None
