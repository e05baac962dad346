"""One unit of ingestion: read a row range, validate, filter with a counted reason, rank, and write its own part.

Axis suffixes: `n` cells of a block, `t` tokens of all its cells.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from genescale.ingestion.corpus import dataset_folder
from genescale.ingestion.genes import gathered, library_sizes
from genescale.ingestion.h5ad import Atlas, open_atlas
from genescale.ingestion.parts import part_bytes
from genescale.ingestion.plan import Unit, blocks
from genescale.ingestion.schema import TOKEN_COLUMN, part_schema
from genescale.platform.rank_value import rank_value_tokens
from genescale.platform.storage import Store, join
from genescale.platform.vocabulary import Vocabulary

EMPTY_CELL = "empty_cell"
NO_VOCABULARY_GENE = "no_vocabulary_gene"
BELOW_MIN_GENES = "below_min_genes"
KEPT = ""


@dataclasses.dataclass
class Tally:
    """What became of the cells of a unit or a source; read = kept + all dropped."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Cells by reason."""
    tokens: int = 0
    cropped: int = 0
    explicit_zeros: int = 0
    largest_count: float = 0.0

    def add(self, other: Tally) -> None:
        """Take in the counts of another unit."""
        self.read += other.read
        self.kept += other.kept
        self.dropped = dict(sorted((Counter(self.dropped) + Counter(other.dropped)).items()))
        self.tokens += other.tokens
        self.cropped += other.cropped
        self.explicit_zeros += other.explicit_zeros
        self.largest_count = max(self.largest_count, other.largest_count)

    @property
    def n_dropped(self) -> int:
        """Cells dropped for any reason."""
        return sum(self.dropped.values())


def write_part(
    unit: Unit,
    targets_g: npt.NDArray[np.int64],
    *,
    vocabulary: Vocabulary,
    min_genes: int,
    corpus_uri: str,
    dataset_id: str,
    store: Store,
) -> dict[str, Any]:
    """Turn the rows of a unit into a part file of the corpus, not yet committed.

    targets_g: token id of each gene column, -1 for none. The part is named by its first row and its content, so that a
    repeated task writes the same file and never changes another. Returns tally, notes and the part (None if no cell
    is kept).
    """
    tally, notes, tables = Tally(), set[str](), []
    with open_atlas(unit.uri, store, counts_slot=unit.slot, etag=unit.etag) as atlas:
        for start, stop in blocks(atlas, unit):
            table, of_block, said = _rows(atlas, start, stop, targets_g, vocabulary, min_genes)
            tables.append(table)
            tally.add(of_block)
            notes.update(said)
    answer: dict[str, Any] = {"tally": dataclasses.asdict(tally), "notes": sorted(notes), "part": None}
    if tally.kept:
        data = part_bytes(pa.concat_tables(tables).combine_chunks())
        name = f"part-{unit.start:010d}-{hashlib.blake2b(data, digest_size=12).hexdigest()}.parquet"
        path = f"{dataset_folder(dataset_id)}/{name}"
        store.write(join(corpus_uri, path), data)
        answer["part"] = {"path": path, "rows": tally.kept, "size_bytes": len(data)}
    return answer


def _rows(
    atlas: Atlas, start: int, stop: int, targets_g: npt.NDArray[np.int64], vocabulary: Vocabulary, min_genes: int
) -> tuple[pa.Table, Tally, list[str]]:
    """Token rows of the cells start … stop-1 that are kept, with what became of all of them."""
    block = atlas.read_rows(start, stop)
    totals_n = library_sizes(block)
    counts_ng = gathered(block, targets_g, vocabulary.size)
    genes_n = np.diff(counts_ng.indptr)
    reasons_n = np.select(
        [totals_n == 0, genes_n == 0, genes_n < min_genes], [EMPTY_CELL, NO_VOCABULARY_GENE, BELOW_MIN_GENES], KEPT
    )
    kept_n = np.flatnonzero(reasons_n == KEPT)
    ranked = [
        rank_value_tokens(
            counts_ng.indices[counts_ng.indptr[i] : counts_ng.indptr[i + 1]],
            counts_ng.data[counts_ng.indptr[i] : counts_ng.indptr[i + 1]],
            vocabulary,
        )
        for i in kept_n
    ]
    metadata, notes = atlas.metadata(start, stop)
    names = atlas.cell_ids(start, stop)
    lengths = np.array([cell.input_ids.size for cell in ranked], dtype=np.int32)
    columns: dict[str, Any] = {
        "cell_id": [names[i] for i in kept_n],
        "source_row": kept_n.astype(np.int64) + start,
        "length": lengths,
        "total_counts": totals_n[kept_n],
        "n_genes": genes_n[kept_n].astype(np.int32),
        **{name: [values[i] for i in kept_n] for name, values in metadata.items()},
    }
    tally = Tally(
        read=stop - start,
        kept=len(ranked),
        dropped=dict(Counter(reasons_n[reasons_n != KEPT].tolist())),
        tokens=int(lengths.sum()),
        cropped=sum(cell.cropped for cell in ranked),
        explicit_zeros=block.explicit_zeros,
        largest_count=float(block.counts.max(initial=0.0)),
    )
    return _table(columns, [cell.input_ids for cell in ranked], lengths, vocabulary), tally, notes


def _table(
    columns: dict[str, Any], cells: list[npt.NDArray[Any]], lengths: npt.NDArray[np.int32], vocabulary: Vocabulary
) -> pa.Table:
    schema = part_schema(vocabulary.token_dtype)
    tokens_t = np.concatenate(cells) if cells else np.empty(0, dtype=vocabulary.token_dtype)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int32))).astype(np.int32)
    field = schema.field(TOKEN_COLUMN)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens_t), type=field.type)
    arrays = [lists if f.name == TOKEN_COLUMN else pa.array(columns[f.name], f.type) for f in schema]
    return pa.table(arrays, schema=schema)
