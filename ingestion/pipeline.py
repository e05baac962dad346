"""Ingestion, top to bottom: find the sources, leave out what is committed, inspect, rank and write, commit each source.

A source is committed when all its units are written, in one transaction, in the order of the sources. What fails is
refused with its reason and does not stop the others; what a killed run wrote without committing stays invisible and is
written over by the next run.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from genescale.ingestion.annotation.gene_table import GeneTable
from genescale.ingestion.annotation.genes import gene_table_bytes, map_genes
from genescale.ingestion.annotation.obs_columns import summed_notes
from genescale.ingestion.atlas import Atlas
from genescale.ingestion.config import IngestConfig as IngestConfig
from genescale.ingestion.corpus import Corpus, NewPart
from genescale.ingestion.duplicates import resolve
from genescale.ingestion.fan_out import fan_out
from genescale.ingestion.intake import Wanted, history_details, sorted_out
from genescale.ingestion.intake import dataset_name as dataset_name
from genescale.ingestion.plan import Failure, Inspected, inspect_files
from genescale.ingestion.reports.report import IngestReport, SourceReport
from genescale.ingestion.source_configs import source_configs
from genescale.ingestion.source_facts import check_tally, source_facts
from genescale.ingestion.sources import find_sources
from genescale.ingestion.tokenise import Tally
from genescale.ingestion.unit_work import Known, Work, run_unit, tables_of
from genescale.platform.errors import GenescaleError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

DEFAULTS = IngestConfig()


def ingest(
    sources: Sequence[str],
    corpus_uri: str,
    *,
    vocabulary: Vocabulary,
    store: Store,
    config: IngestConfig = DEFAULTS,
    progress: Progress = SILENT,
) -> IngestReport:
    """Bring atlas files (files, globs, folders, lists; local or s3://) into the corpus, each once; Ray must be running.

    Raises AtlasError when there is no source, CorpusError when the corpus has another vocabulary, ClusterError when
    Ray fails; a file that cannot be ingested is in the report as refused.
    """
    began, started = time.perf_counter(), datetime.datetime.now(tz=datetime.UTC)
    found = find_sources(sources, store)
    configs, tables = source_configs(found.files, config, store)
    corpus = Corpus.find(corpus_uri, vocabulary, store)
    reports, wanted = sorted_out(found.files, configs, corpus, vocabulary, corpus_uri)
    known = _shared(vocabulary, tables)
    judge = functools.partial(_judge, known=known)
    inspected = inspect_files([w.spec for w in wanted], judge, store=store, configs=configs, progress=progress)
    good = _recorded(wanted, inspected, reports)
    if good:
        corpus = corpus or Corpus.create(corpus_uri, vocabulary, store)
        progress.start(sum(file.n_cells for _, file in good), "cells")
        work = Work(configs=configs, known=known, corpus_uri=corpus.uri, store=store)
        for one, file, tasks in _finished(good, work, progress):
            corpus = _committed(corpus, one, file, tasks, reports[one.spec.uri])
    return IngestReport(
        corpus_uri=corpus_uri,
        version=corpus.version if corpus else None,
        sources=tuple(reports[spec.uri] for spec in found.files),
        ignored=found.ignored,
        seconds=time.perf_counter() - began,
        started=started.isoformat(timespec="seconds"),
        recipe=config.recipe(),
        vocabulary={
            "name": vocabulary.name,
            "digest": vocabulary.digest,
            "genes": len(vocabulary.gene_ids),
            "window": vocabulary.window,
        },
    )


def _shared(vocabulary: Vocabulary, tables: Mapping[str, GeneTable]) -> Known:
    import ray

    return Known(ray.put((vocabulary, dict(tables))))


def _judge(atlas: Atlas, config: IngestConfig, *, known: Known) -> tuple[dict[str, Any], bytes]:
    """Whether the genes of a file fit the vocabulary, and what becomes of each; AtlasError when they do not."""
    genes = map_genes(atlas, known.vocabulary, rules=config, table=known.table(config))
    return source_facts(atlas, genes, known.vocabulary, config), gene_table_bytes(genes, known.vocabulary)


def _recorded(
    wanted: Sequence[Wanted], inspected: Sequence[Inspected], reports: Mapping[str, SourceReport]
) -> list[tuple[Wanted, Inspected]]:
    """The files that can be read; what was seen in every file goes into its report."""
    for one, file in zip(wanted, inspected, strict=True):
        report = reports[file.uri]
        report.failure, report.replaced, report.size_bytes = file.failure, one.replaces, one.spec.size_bytes
        report.counts_slot = file.units[0].slot if file.units else ""
        for fact, value in file.facts.items():
            setattr(report, fact, tuple(value) if isinstance(value, list) else value)
    return [(one, file) for one, file in zip(wanted, inspected, strict=True) if not file.failure]


def _finished(
    good: Sequence[tuple[Wanted, Inspected]], work: Work, progress: Progress
) -> Iterator[tuple[Wanted, Inspected, list[dict[str, Any]]]]:
    """Run the units of all files together; yield the files in their order, each when its last unit is done."""
    items = [
        {"unit": dataclasses.asdict(unit), "dataset_id": one.dataset_id} for one, file in good for unit in file.units
    ]
    answers: dict[str, list[dict[str, Any]]] = {file.uri: [] for _, file in good}
    waiting = list(good)
    for answer, payload in fan_out(items, functools.partial(run_unit, work=work)):
        answers[answer["unit"]["uri"]].append({**answer, "quarantine": tables_of(payload)})
        progress.advance(answer["unit"]["stop"] - answer["unit"]["start"], answer["dataset_id"])
        while waiting and len(answers[waiting[0][1].uri]) == len(waiting[0][1].units):
            one, file = waiting.pop(0)
            yield one, file, sorted(answers.pop(file.uri), key=lambda done: done["unit"]["start"])


def _committed(
    corpus: Corpus, one: Wanted, file: Inspected, tasks: Sequence[dict[str, Any]], report: SourceReport
) -> Corpus:
    """Commit a file whose units are all done, or mark it as refused; returns the corpus to go on with."""
    report.seconds = sum(task["seconds"] for task in tasks)
    if failed := [task["failure"] for task in tasks if "failure" in task]:
        report.failure = Failure(**failed[0])
        return corpus
    try:
        corpus = _commit(corpus, one, file, tasks, report)
    except GenescaleError as error:
        report.failure = Failure(code=error.code, message=str(error))
        return corpus
    report.status = "ingested"
    report.version = corpus.version
    return corpus


def _commit(
    corpus: Corpus, one: Wanted, file: Inspected, tasks: Sequence[dict[str, Any]], report: SourceReport
) -> Corpus:
    made = [part for task in tasks for part in task["parts"]]
    for part in made:
        report.tally.add(Tally(**part["tally"]))
    report.notes = (*report.notes, *summed_notes(note for part in made for note in part["notes"]))
    quarantine = [pq.read_table(io.BytesIO(data)) for task in tasks for data in task["quarantine"]]
    parts = [NewPart(**part["part"]) for part in made if part["part"]]
    if one.config.duplicates != "off" and parts:
        # Other runs may have committed since this one began.
        corpus = corpus.at_newest()
        found = resolve(parts, corpus, policy=one.config.duplicates, dataset_id=one.dataset_id, replaces=one.replaces)
        parts, report.duplicates = list(found.parts), found.to_dict()
        report.tally.drop(found.dropped_tally)
        report.notes = (*report.notes, *found.notes)
        quarantine.append(found.dropped)
    report.parts, report.part_bytes = len(parts), sum(part.size_bytes for part in parts)
    report.quarantined = sum(table.num_rows for table in quarantine)
    _reconcile(file, report)
    check_tally(report.tally, one.config, where=file.uri, held_by=list(report.duplicates.get("matches", {})))
    return corpus.commit_source(
        one.source,
        one.dataset_id,
        parts,
        history_details(report),
        files=_side_files(report, file.payload, quarantine),
        replace=one.replaces,
    )


def _side_files(report: SourceReport, genes: bytes, quarantine: Sequence[pa.Table]) -> dict[str, bytes]:
    """What is kept beside the parts of a source: its report, each gene's fate, each cell that was dropped."""
    told = json.dumps(report.to_dict(), indent=1, sort_keys=True).encode()
    files = {"report.json": told, "genes.parquet": genes}
    if dropped := [table for table in quarantine if table.num_rows]:
        sink = io.BytesIO()
        pq.write_table(pa.concat_tables(dropped), sink, compression="zstd", write_page_checksum=True)
        files["quarantine.parquet"] = sink.getvalue()
    return files


def _reconcile(file: Inspected, report: SourceReport) -> None:
    """Fail loudly when a cell of the file is neither kept nor dropped."""
    tally = report.tally
    if not tally.read == file.n_cells == tally.kept + tally.n_dropped:
        raise GenescaleError(
            f"{file.n_cells} cells in the file, {tally.read} read, {tally.kept} kept, {tally.n_dropped} dropped.",
            where=file.uri,
            fix="Please report it.",
        )
