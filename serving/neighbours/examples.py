"""A few reference cells that can be looked at whole: their tokens, drawn at random for each label.

Drawn, and not chosen for being typical: who learns from them what a cell looks like should see the spread too.

Axis suffixes: `n` reference cells, `e` examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genescale.platform.errors import IntegrityError

MOST_LABELS = 24
"""Labels that get examples: the commonest ones."""
WITHOUT_LABELS = 8
"""Times as many examples as a label gets, where the reference has no label."""
SCHEMA = pa.schema([("row", pa.int64()), ("tokens", pa.list_(pa.int32()))])


def example_rows(labels: pa.ChunkedArray | None, n_cells: int, per_label: int, seed: int) -> np.ndarray:
    """(e) rows of the examples: label by label, commonest first, in rising order within each."""
    generator = np.random.default_rng([seed, n_cells, 2])
    if labels is None or labels.null_count == len(labels):
        return np.sort(generator.choice(n_cells, min(n_cells, WITHOUT_LABELS * per_label), replace=False))
    counted = pc.value_counts(pc.drop_null(labels.cast(pa.string()))).to_pylist()
    order = sorted(counted, key=lambda one: (-one["counts"], one["values"]))[:MOST_LABELS]
    values_n = np.array(labels.to_pylist(), dtype=object)
    drawn = []
    for one in order:
        rows = np.flatnonzero(values_n == one["values"])
        drawn.append(np.sort(generator.choice(rows, min(per_label, len(rows)), replace=False)))
    return np.concatenate(drawn).astype(np.int64)


def write_examples(path: Path, rows_e: np.ndarray, tokens_e: Sequence[np.ndarray]) -> None:
    """Write rows and tokens into a local file."""
    columns = {"row": rows_e.tolist(), "tokens": [tokens.tolist() for tokens in tokens_e]}
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd", write_page_checksum=True)


def read_examples(path: Path, n_cells: int) -> tuple[np.ndarray, list[list[int]]]:
    """Rows (e) and tokens of the examples; IntegrityError when they do not fit the index."""
    try:
        table = pq.read_table(path, schema=SCHEMA)
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError("the examples cannot be read.", where=path.name) from error
    rows_e = table.column("row").to_numpy()
    if table.column("row").null_count or (rows_e < 0).any() or (rows_e >= n_cells).any():
        raise IntegrityError("the examples do not fit the index.", where=path.name, fix="Make the index again.")
    return rows_e, table.column("tokens").to_pylist()
