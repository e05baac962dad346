"""What there is to see of a reference: its cells in two dimensions, and a few of them whole."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from genescale.serving.neighbours.contract import Example, ExamplesAnswered, MapAnswered, MapLabels
from genescale.serving.neighbours.layout import METHOD
from genescale.serving.neighbours.reference import Reference
from genescale.serving.neighbours.spread import sample

KEPT_MAPS = 4


class ReferenceView:
    """Renders what there is to see of a reference; each map once."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.map = lru_cache(maxsize=KEPT_MAPS)(self._map)
        self.examples = lru_cache(maxsize=1)(self._examples)

    def _map(self, limit: int) -> bytes:
        """JSON of MapAnswered with at most `limit` cells: always the same ones."""
        known = self.reference
        if known.places_n2 is None:
            return _empty_map(known).model_dump_json().encode()
        rows = sample(known.manifest.cells, limit, seed=0)
        table = known.labels(rows, known.manifest.columns)
        xy_n2 = np.round(known.places_n2[rows].astype(np.float64), 3)
        answered = MapAnswered(
            reference=known.facts,
            method=METHOD,
            cells=len(rows),
            x=xy_n2[:, 0].tolist(),
            y=xy_n2[:, 1].tolist(),
            ids=table.column("cell_id").to_pylist(),
            labels={name: _labels(table.column(name)) for name in known.manifest.columns},
        )
        return answered.model_dump_json().encode()

    def _examples(self) -> bytes:
        """JSON of ExamplesAnswered."""
        known, made = self.reference, []
        if known.examples is not None:
            rows_e, columns = known.examples.rows_e, known.manifest.columns
            facts = zip(known.cells(rows_e), known.places(rows_e), known.examples.tokens, strict=True)
            made = [
                Example(
                    id=one["cell_id"],
                    dataset=one["dataset_id"],
                    labels={name: one[name] for name in columns},
                    place=place,
                    tokens=tokens,
                )
                for one, place, tokens in facts
            ]
        return ExamplesAnswered(reference=known.facts, examples=made).model_dump_json().encode()


def _empty_map(known: Reference) -> MapAnswered:
    labels = {name: MapLabels(values=[], codes=[]) for name in known.manifest.columns}
    return MapAnswered(reference=known.facts, method=None, cells=0, x=[], y=[], ids=[], labels=labels)


def _labels(column: pa.ChunkedArray) -> MapLabels:
    """The labels of a column as codes, the commonest label first; of equally common ones by name."""
    found = column.to_pylist()
    named = [label for label in found if label is not None]
    values, counts = np.unique(np.array(named, dtype=str), return_counts=True)
    order = [str(value) for value in values[np.lexsort((values, -counts))]]
    code_of: dict[Any, int] = {value: code for code, value in enumerate(order)}
    return MapLabels(values=order, codes=[code_of.get(label, -1) for label in found])
