"""Make random cells of a corpus again from their source files, and compare their tokens with the stored ones.

Axis suffixes: `n` cells that were drawn, `p` parts, `t` tokens of a cell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.ingestion.annotation.gene_table import GeneTable
from genescale.ingestion.annotation.genes import GeneMap, map_genes
from genescale.ingestion.atlas import Atlas
from genescale.ingestion.config import IngestConfig
from genescale.ingestion.corpus import Corpus
from genescale.ingestion.opening import stat_source
from genescale.ingestion.plan import opened
from genescale.ingestion.ranking.kernel import rank_rows
from genescale.ingestion.table.records import DatasetRecord
from genescale.ingestion.table.verify import Fault, VerifyReport
from genescale.platform.errors import CorpusError, GenescaleError, NotFoundError, SettingsError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store

_STREAM = 11
Row = Mapping[str, Any]


def against_source(
    corpus: Corpus,
    report: VerifyReport,
    *,
    sample: int,
    seed: int = 0,
    table: GeneTable | None = None,
    progress: Progress = SILENT,
) -> VerifyReport:
    """The report, with `sample` random cells made again from their sources; cells that differ are faults.

    table: the gene table that sources were ingested with, where they were. A source that is gone or has changed is no
    fault of the corpus and is listed as not compared; it is one when no cell at all could be compared.
    """
    if sample < 1:
        raise SettingsError(f"{sample} is too small.", where="sample", fix="Use 1 or more.")
    rows = _drawn(corpus, {fault.uri for fault in report.faults}, sample, seed)
    progress.start(len(rows), "cells")
    records = {record.dataset_id: record for record in corpus.datasets()}
    faults, skipped, compared = list(report.faults), dict(report.not_compared), 0
    for dataset in sorted({row["dataset_id"] for row in rows}):
        mine = [row for row in rows if row["dataset_id"] == dataset]
        try:
            faults += _differing(corpus, records[dataset], mine, table)
            compared += len(mine)
        except GenescaleError as error:
            skipped[dataset] = str(error)
        progress.advance(len(mine))
    if rows and not compared:
        faults.append(Fault(uri=corpus.uri, what="no cell could be compared with its source"))
    return dataclasses.replace(report, faults=tuple(faults), not_compared=skipped, compared=compared)


def unchanged_source(record: DatasetRecord, store: Store) -> Mapping[str, Any]:
    """What the history says of a dataset's source; CorpusError when it says nothing, or it is gone or has changed."""
    source: Mapping[str, Any] = record.details.get("source", {})
    if not source:
        raise CorpusError("the history does not say where it came from.", where=record.dataset_id)
    uri = str(source["uri"])
    try:
        entry = stat_source(uri, store)
    except NotFoundError:
        raise CorpusError("the source is gone.", where=uri) from None
    if entry.etag != source["etag"]:
        raise CorpusError("the source changed since it was ingested.", where=uri)
    return source


def _drawn(corpus: Corpus, damaged: set[str], sample: int, seed: int) -> list[dict[str, Any]]:
    """Random cells of sound parts in global order, with measurements and tokens; only their parts are read."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _STREAM])))
    rows_p = np.array([part.rows for part in corpus.parts], dtype=np.int64)
    sound_p = np.array([0 if part.uri in damaged else part.rows for part in corpus.parts], dtype=np.int64)
    # Cells are drawn by their number among those of sound parts, and then placed among all.
    ends_p, starts_p = np.cumsum(sound_p), np.cumsum(rows_p) - rows_p
    total = int(sound_p.sum())
    drawn_n = np.sort(generator.choice(total, min(sample, total), replace=False)) if total else np.empty(0, np.int64)
    part_n = np.searchsorted(ends_p, drawn_n, side="right")
    within_n = drawn_n - (ends_p - sound_p)[part_n]
    columns = ["cell_id", "dataset_id", "source_row", "total_counts", "n_genes"]
    rows: list[dict[str, Any]] = []
    for part in np.unique(part_n).tolist():
        rows += corpus.cells(columns, parts=[part]).take(within_n[part_n == part]).to_pylist()
    for row, tokens_t in zip(rows, corpus.tokens((starts_p[part_n] + within_n).tolist()), strict=True):
        row["tokens"] = tokens_t
    return rows


def _differing(corpus: Corpus, record: DatasetRecord, rows: Sequence[Row], table: GeneTable | None) -> list[Fault]:
    """Faults of the drawn cells of one dataset; GenescaleError when its source cannot be read as it was."""
    source = unchanged_source(record, corpus.store)
    uri = str(source["uri"])
    recipe = dict(source.get("recipe", {}))
    digest = recipe.pop("gene_table_digest", "")
    if digest and (table is None or table.digest != digest):
        what = f"it was ingested with {'a' if table is None else 'another'} gene table ({digest[:12]})."
        raise CorpusError(what, where=uri, fix="Give that table as --gene-table.")
    config = IngestConfig().changed(recipe, where=f"recipe of {record.dataset_id}")
    slot = str(record.details.get("counts_slot") or config.counts_slot)
    with opened(uri, str(source["etag"]), slot, config, corpus.store) as atlas:
        genes = map_genes(atlas, corpus.vocabulary, rules=config, table=table if digest else None)
        return [fault for row in rows for fault in _compare(corpus, atlas, genes, row, config.allow_fractional)]


def _compare(corpus: Corpus, atlas: Atlas, genes: GeneMap, row: Row, allow_fractional: bool) -> list[Fault]:
    at, where = row["source_row"], f"cell '{row['cell_id']}' of dataset '{row['dataset_id']}' (source row"
    where = f"{where} {row['source_row']:,})"
    if not 0 <= at < atlas.n_cells:
        return [Fault(uri=atlas.uri, what=f"{where} is not in its source, which has {atlas.n_cells:,} cells")]
    name = atlas.cell_ids(at, at + 1)[0]
    if name != row["cell_id"]:
        return [Fault(uri=atlas.uri, what=f"{where} is named '{name}' in its source")]
    ranked = rank_rows(atlas.read(at, at + 1), genes, corpus.vocabulary, allow_fractional=allow_fractional)
    if ranked.fault:
        return [Fault(uri=atlas.uri, what=f"{where} holds no counts in its source ({ranked.fault})")]
    if not np.array_equal(ranked.tokens_t, row["tokens"]):
        return [Fault(uri=atlas.uri, what=f"{where}: {_difference(row['tokens'], ranked.tokens_t)}")]
    measured = {"total_counts": float(ranked.totals_n[0]), "n_genes": int(ranked.n_genes_n[0])}
    return [
        Fault(uri=atlas.uri, what=f"{where}: {column} is {row[column]:,} in the corpus and {value:,} by its source")
        for column, value in measured.items()
        if row[column] != value
    ]


def _difference(stored_t: npt.NDArray[Any], made_t: npt.NDArray[Any]) -> str:
    shared = min(len(stored_t), len(made_t))
    differing = np.flatnonzero(stored_t[:shared] != made_t[:shared])
    first = int(differing[0]) if differing.size else shared
    count = differing.size + abs(len(stored_t) - len(made_t))
    return f"{count:,} of {len(stored_t):,} tokens differ from what its source gives, the first at rank {first:,}"
