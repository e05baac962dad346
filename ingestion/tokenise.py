"""One unit of ingestion: read a row range, prove and rank its counts, filter with a counted reason, write its own part.

Axis suffixes: `n` cells of a block, `t` tokens of all its cells.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from genescale.ingestion.annotation.cells import BAD_VALUES, KEPT, CellRules, counts_reasons, obs_reasons
from genescale.ingestion.annotation.genes import FATES, GeneMap
from genescale.ingestion.annotation.obs_columns import harmonised, library_size_notes
from genescale.ingestion.atlas import Atlas, Rows
from genescale.ingestion.counts import explain, fractions, refuse_equal_sums
from genescale.ingestion.plan import Unit, blocks
from genescale.ingestion.ranking.kernel import FAULTS, RankedRows, rank_rows
from genescale.ingestion.schema import TOKEN_COLUMN, part_schema, rows_table
from genescale.ingestion.table.parts import PartWriter
from genescale.ingestion.table.records import dataset_folder
from genescale.ingestion.tally import Tally as Tally
from genescale.ingestion.tally import binned
from genescale.platform.storage import Store, join
from genescale.platform.vocabulary import Vocabulary

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("cell_id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """What holds for all blocks of a unit; reasons_n and obs are those of the whole unit."""

    unit: Unit
    atlas: Atlas
    genes: GeneMap
    vocabulary: Vocabulary
    cell_rules: CellRules
    allow_fractional: bool
    bad_values: Literal["refuse", "quarantine"]
    reasons_n: list[str]
    obs: Mapping[str, pa.Array]
    seconds: dict[str, float]
    notes: list[str]


def write_part(
    unit: Unit,
    atlas: Atlas,
    genes: GeneMap,
    *,
    vocabulary: Vocabulary,
    cell_rules: CellRules,
    obs_mapping: Mapping[str, str],
    allow_fractional: bool,
    bad_values: Literal["refuse", "quarantine"],
    corpus_uri: str,
    dataset_id: str,
    store: Store,
) -> tuple[dict[str, Any], bytes]:
    """Turn the rows of a unit into a part file of the corpus, not yet committed.

    The part is named by its first row and its content, so that a repeated task writes the same file and never changes
    another. Returns an answer with `tally`, `notes` and `part` (None if no cell is kept), and the cells that were
    dropped as a Parquet file (QUARANTINE_SCHEMA; empty if there is none). Raises NotCountsError or AtlasError for
    values that are no counts, unless `bad_values` is `quarantine`: then only their cells are dropped.
    """
    seconds: dict[str, float] = defaultdict(float)
    with _timed(seconds, "obs"):
        obs, notes = harmonised(atlas, unit.start, unit.stop, mapping=obs_mapping, keep_obs=cell_rules.keep_obs)
        reasons = obs_reasons(cell_rules, atlas, unit.start, unit.stop)
    work = _Work(
        unit=unit,
        atlas=atlas,
        genes=genes,
        vocabulary=vocabulary,
        cell_rules=cell_rules,
        allow_fractional=allow_fractional,
        bad_values=bad_values,
        reasons_n=reasons,
        obs={name: _array(values) for name, values in obs.items()},
        seconds=seconds,
        notes=notes,
    )
    tally, dropped, writer = Tally(), [], PartWriter(part_schema(vocabulary.token_dtype))
    for start, stop in blocks(atlas, unit):
        table, of_block, quarantined = _rows(work, start, stop)
        with _timed(seconds, "write"):
            writer.add(table)
        tally.add(of_block)
        dropped.append(quarantined)
    part = _stored(writer, work, tally.kept, corpus_uri, dataset_id, store) if tally.kept else None
    tally.seconds = dict(sorted(seconds.items()))
    return {"tally": dataclasses.asdict(tally), "notes": sorted(notes), "part": part}, _quarantine_bytes(dropped)


def _stored(
    writer: PartWriter, work: _Work, rows: int, corpus_uri: str, dataset_id: str, store: Store
) -> dict[str, Any]:
    with _timed(work.seconds, "write"):
        data = writer.finish()
    with _timed(work.seconds, "hash"):
        digest = hashlib.blake2b(data, digest_size=12).hexdigest()
    path = f"{dataset_folder(dataset_id)}/part-{work.unit.start:010d}-{digest}.parquet"
    with _timed(work.seconds, "write"):
        store.write(join(corpus_uri, path), data)
    return {"path": path, "rows": rows, "size_bytes": len(data)}


def _rows(work: _Work, start: int, stop: int) -> tuple[pa.Table, Tally, pa.Table]:
    """Token rows of the cells start … stop-1 that are kept, what became of all of them, and those that are not kept."""
    with _reading(work):
        rows = work.atlas.read(start, stop)
    with _timed(work.seconds, "rank"):
        ranked = rank_rows(rows, work.genes, work.vocabulary, allow_fractional=work.allow_fractional)
        _check_counts(work, rows, ranked, start)
    with _timed(work.seconds, "obs"):
        work.notes.extend(library_size_notes(work.atlas, start, stop, ranked.totals_n))
    reasons_n = _reasons(work, ranked, start, stop)
    kept_n = reasons_n == KEPT
    table = _table(work, ranked, kept_n, start)
    return table, _tally(ranked, reasons_n, kept_n), _quarantine(work, ranked, reasons_n, start)


def _check_counts(work: _Work, rows: Rows, ranked: RankedRows, start: int) -> None:
    """Raise what is wrong with the values of a block, unless it is to be quarantined cell by cell."""
    faults = {FAULTS[code] for code in np.unique(ranked.faults_n)} - {""}
    # An index out of range says that matrix and gene table do not fit: no cell of the file can be trusted.
    if faults and (work.bad_values == "refuse" or "index" in faults):
        explain(rows, work.atlas, start, allow_fractional=work.allow_fractional)
    if work.allow_fractional and rows.values_z.dtype.kind == "f" and not faults:
        whole = bool((rows.values_z == np.floor(rows.values_z)).all())
        if not whole and not fractions(rows).acceptable:
            explain(rows, work.atlas, start, allow_fractional=True)
    refuse_equal_sums(ranked.totals_n, ranked.n_ones, work.atlas)


def _reasons(work: _Work, ranked: RankedRows, start: int, stop: int) -> npt.NDArray[np.object_]:
    """Why each cell of a block is dropped, an empty text for those that are kept."""
    of_obs = np.array(work.reasons_n[start - work.unit.start : stop - work.unit.start], dtype=object)
    of_counts = counts_reasons(work.cell_rules, ranked.totals_n, ranked.n_genes_n, ranked.mito_n)
    reasons_n = np.where(of_obs == KEPT, of_counts, of_obs)
    reasons_n[ranked.faults_n > 0] = BAD_VALUES
    return reasons_n


def _table(work: _Work, ranked: RankedRows, kept_n: npt.NDArray[np.bool_], start: int) -> pa.Table:
    lengths_n = np.diff(ranked.offsets_n)
    tokens_t, first = ranked.tokens_t, start - work.unit.start
    if not kept_n.all():
        tokens_t = tokens_t[np.repeat(kept_n, lengths_n)]
    offsets = np.concatenate(([0], np.cumsum(lengths_n[kept_n]))).astype(np.int32)
    schema, mask = part_schema(work.vocabulary.token_dtype), pa.array(kept_n)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens_t), type=schema.field(TOKEN_COLUMN).type)
    with _timed(work.seconds, "obs"):
        names = pa.array(work.atlas.cell_ids(start, start + len(kept_n)), pa.string())
        obs = {name: values.slice(first, len(kept_n)).filter(mask) for name, values in work.obs.items()}
    columns = {
        **obs,
        "cell_id": names.filter(mask),
        "source_row": np.flatnonzero(kept_n) + start,
        TOKEN_COLUMN: lists,
        "length": lengths_n[kept_n].astype(np.int32),
        "total_counts": ranked.totals_n[kept_n],
        "n_genes": ranked.n_genes_n[kept_n],
        "content_hash": ranked.content_hash_n[kept_n],
    }
    return rows_table(columns, schema)


def _tally(ranked: RankedRows, reasons_n: npt.NDArray[np.object_], kept_n: npt.NDArray[np.bool_]) -> Tally:
    lengths_n = np.diff(ranked.offsets_n)[kept_n]
    by_fate = dict(zip(FATES, ranked.counts_by_fate.tolist(), strict=True))
    return Tally(
        read=len(reasons_n),
        kept=int(kept_n.sum()),
        dropped=dict(Counter(reasons_n[~kept_n].tolist())),
        tokens=int(lengths_n.sum()),
        cropped=int(ranked.cropped_n[kept_n].sum()),
        explicit_zeros=ranked.explicit_zeros,
        repeated_entries=ranked.repeated_entries,
        n_values=ranked.n_values,
        n_ones=ranked.n_ones,
        largest_count=ranked.largest_count,
        counts_by_fate={fate: counts for fate, counts in by_fate.items() if counts},
        length_bins=binned(lengths_n),
        depth_bins=binned(ranked.totals_n[kept_n]),
        genes_bins=binned(ranked.n_genes_n[kept_n]),
    )


def _quarantine(work: _Work, ranked: RankedRows, reasons_n: npt.NDArray[np.object_], start: int) -> pa.Table:
    """The cells of a block that are dropped, with what was seen of each."""
    dropped_n = np.flatnonzero(reasons_n != KEPT)
    if not dropped_n.size:
        return QUARANTINE_SCHEMA.empty_table()
    names = work.atlas.cell_ids(start, start + len(reasons_n))
    details = [
        FAULTS[ranked.faults_n[n]].replace("_", " ")
        if ranked.faults_n[n]
        else f"{ranked.n_genes_n[n]} genes, {ranked.totals_n[n]:g} counts ({ranked.mito_n[n]:g} mitochondrial)"
        for n in dropped_n
    ]
    columns = [dropped_n + start, [names[n] for n in dropped_n], reasons_n[dropped_n].tolist(), details]
    return pa.table(columns, schema=QUARANTINE_SCHEMA)


def _quarantine_bytes(tables: list[pa.Table]) -> bytes:
    table = pa.concat_tables([QUARANTINE_SCHEMA.empty_table(), *tables])
    if not table.num_rows:
        return b""
    sink = io.BytesIO()
    pq.write_table(table.combine_chunks(), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _array(values: Any) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        return values.combine_chunks()
    return values if isinstance(values, pa.Array) else pa.array(values)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    began = time.process_time()
    yield
    seconds[step] += time.process_time() - began


@contextlib.contextmanager
def _reading(work: _Work) -> Iterator[None]:
    """Time a read, and tell inflating from the rest where the reader knows it."""
    inflated = _inflated(work.atlas)
    with _timed(work.seconds, "read"):
        yield
    spent = min(_inflated(work.atlas) - inflated, work.seconds["read"])
    work.seconds["read"] -= spent
    work.seconds["inflate"] += spent


def _inflated(atlas: Atlas) -> float:
    return float(getattr(atlas.matrix, "seconds", {}).get("inflate", 0.0))
