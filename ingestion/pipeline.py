"""Ingestion, top to bottom: find the sources, leave out what is committed, inspect, rank and write, commit each source.

A source is committed when all its units are written, in one transaction. What fails is refused with its reason and does
not stop the others; what a killed run wrote without committing stays invisible and is written over by the next run.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from genescale.ingestion.corpus import Corpus, NewPart, Source
from genescale.ingestion.fan_out import fan_out
from genescale.ingestion.genes import map_to_vocabulary
from genescale.ingestion.h5ad import Atlas, open_atlas
from genescale.ingestion.plan import Failure, Inspected, ReadConfig, Unit, guarded, inspect_files
from genescale.ingestion.report import IngestReport, SourceReport
from genescale.ingestion.sources import ATLAS_SUFFIX, find_sources
from genescale.ingestion.tokenise import Tally, write_part
from genescale.platform.errors import AtlasError, CorpusError, GenescaleError, NotCountsError, SettingsError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Entry, Store
from genescale.platform.vocabulary import Vocabulary

# Below seven genes a mask of 15 % may hide none: such cells are left out (Theodoris et al., Nature 2023).
MIN_GENES = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class IngestConfig(ReadConfig):
    """How atlas files become rows."""

    dataset_id: str = ""
    """Name of the dataset, for a single source; by default the file's name without its ending."""
    min_genes: int = MIN_GENES
    """Cells with fewer detected vocabulary genes are dropped and counted."""
    min_share: float = 0.1
    """Share of a file's Ensembl ids that the vocabulary must know."""
    min_share_of_symbols: float = 0.5
    """Share that it must know when a file names genes by symbols."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_genes < 1:
            raise SettingsError(f"min_genes is {self.min_genes}.", fix="Use 1 or more: a row needs a gene.")
        if not (0 < self.min_share <= 1 and 0 < self.min_share_of_symbols <= 1):
            raise SettingsError("a share of genes lies outside 0 … 1.", fix="Use for example 0.1.")

    def recipe(self) -> dict[str, Any]:
        """The options that change rows, as part of a source's identity."""
        return {"counts_slot": self.counts_slot, "min_genes": self.min_genes}


def ingest(
    sources: Sequence[str],
    corpus_uri: str,
    *,
    vocabulary: Vocabulary,
    store: Store,
    config: IngestConfig = IngestConfig(),
    progress: Progress = SILENT,
) -> IngestReport:
    """Bring atlas files (files, globs, folders; local or s3://) into the corpus, each once; Ray must be running.

    Raises AtlasError when there is no source, CorpusError when the corpus has another vocabulary, ClusterError when
    Ray fails; a file that cannot be ingested is in the report as refused.
    """
    began = time.perf_counter()
    found = find_sources(sources, store)
    if config.dataset_id and len(found.files) > 1:
        raise SettingsError(
            f"one dataset id for {len(found.files)} files.", fix="Ingest them one by one, or leave it out."
        )
    corpus = Corpus.find(corpus_uri, vocabulary, store)
    reports, wanted = _sorted_out(found.files, corpus, vocabulary, corpus_uri, config)
    judge = functools.partial(_judge, vocabulary=vocabulary, config=config)
    inspected = inspect_files([entry for entry, _ in wanted], judge, store=store, config=config, progress=progress)
    chosen = {entry.uri: source for entry, source in wanted}
    good = _recorded(inspected, reports)
    if good:
        corpus = corpus or Corpus.create(corpus_uri, vocabulary, store)
        progress.start(sum(file.n_cells for file in good), "cells")
        for file, tasks in _finished(good, corpus, reports, config, progress):
            corpus = _commit(corpus, chosen[file.uri], file, tasks, reports[file.uri])
    return IngestReport(
        corpus_uri=corpus_uri,
        version=corpus.version if corpus else None,
        sources=tuple(reports[entry.uri] for entry in found.files),
        ignored=found.ignored,
        seconds=time.perf_counter() - began,
    )


def dataset_name(uri: str) -> str:
    """The name of a dataset from the name of its file: `lung atlas.h5ad` becomes `lung-atlas`."""
    stem = uri.rstrip("/").rpartition("/")[2].removesuffix(ATLAS_SUFFIX)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)[:100].strip("._-")
    return plain or "dataset"


def _sorted_out(
    files: Sequence[Entry], corpus: Corpus | None, vocabulary: Vocabulary, corpus_uri: str, config: IngestConfig
) -> tuple[dict[str, SourceReport], list[tuple[Entry, Source]]]:
    """A report for every file, and the files that are still to be read."""
    present = {record.dataset_id: record.source_uri for record in corpus.datasets()} if corpus else {}
    history = {record.details.get("identity"): record for record in reversed(corpus.history())} if corpus else {}
    reports: dict[str, SourceReport] = {}
    wanted: list[tuple[Entry, Source]] = []
    for entry in files:
        source = Source(
            uri=entry.uri,
            size_bytes=entry.size_bytes,
            etag=entry.etag,
            vocabulary_digest=vocabulary.digest,
            recipe=config.recipe(),
        )
        name = config.dataset_id or dataset_name(entry.uri)
        if corpus and corpus.is_committed(source.identity):
            record = history[source.identity]
            reports[entry.uri] = SourceReport(uri=entry.uri, dataset_id=record.dataset_id, status="already_committed")
            reports[entry.uri].recall(record.details)
            continue
        error = _conflict(entry.uri, name, present, corpus_uri)
        reports[entry.uri] = SourceReport(uri=entry.uri, dataset_id=name, status="refused", failure=error)
        if error is None:
            wanted.append((entry, source))
            present[name] = entry.uri
    return reports, wanted


def _conflict(uri: str, name: str, present: dict[str, str], corpus_uri: str) -> Failure | None:
    """Why a source cannot be added beside what is there: it would double cells, or share a name."""
    held = next((dataset for dataset, origin in present.items() if origin == uri), None)
    if held is not None:
        what = f"the corpus holds this file as dataset '{held}', with other content or other options."
        error = CorpusError(what, where=uri, fix=f"Run `genescale corpus remove {corpus_uri} {held}` first.")
    elif name in present:
        what = f"another file is dataset '{name}': {present[name]}."
        error = CorpusError(what, where=uri, fix="Ingest it on its own with another --dataset-id.")
    else:
        return None
    return Failure(code=error.code, message=str(error))


def _judge(atlas: Atlas, *, vocabulary: Vocabulary, config: IngestConfig) -> dict[str, Any]:
    genes = map_to_vocabulary(
        atlas.gene_columns(),
        vocabulary,
        min_share=config.min_share,
        min_share_of_symbols=config.min_share_of_symbols,
        where=atlas.uri,
    )
    return {
        "gene_column": genes.column,
        "genes_mapped": genes.n_mapped,
        "genes_dropped": genes.n_dropped,
        "genes_summed": genes.n_summed,
        "genes_versioned": genes.n_versioned,
    }


def _recorded(inspected: Sequence[Inspected], reports: dict[str, SourceReport]) -> list[Inspected]:
    """The files that can be read; what was seen in every file goes into its report."""
    for file in inspected:
        reports[file.uri].failure = file.failure
        reports[file.uri].counts_slot = file.units[0].slot if file.units else ""
        for fact, value in file.facts.items():
            setattr(reports[file.uri], fact, value)
    return [file for file in inspected if not file.failure]


def _finished(
    good: Sequence[Inspected],
    corpus: Corpus,
    reports: dict[str, SourceReport],
    config: IngestConfig,
    progress: Progress,
) -> Iterator[tuple[Inspected, list[dict[str, Any]]]]:
    """Run the units of all files together; yield a file with its answers when its last unit is done."""
    import ray

    vocabulary = ray.put(corpus.vocabulary)
    work = functools.partial(
        _run_unit, vocabulary=vocabulary, corpus_uri=corpus.uri, min_genes=config.min_genes, store=corpus.store
    )
    files = {file.uri: file for file in good}
    items = [
        {
            "unit": dataclasses.asdict(unit),
            "gene_column": reports[file.uri].gene_column,
            "dataset_id": reports[file.uri].dataset_id,
        }
        for file in good
        for unit in file.units
    ]
    answers: dict[str, list[dict[str, Any]]] = {uri: [] for uri in files}
    for answer, _ in fan_out(items, work):
        uri = answer["unit"]["uri"]
        answers[uri].append(answer)
        progress.advance(answer["unit"]["stop"] - answer["unit"]["start"], answer["dataset_id"])
        if len(answers[uri]) == len(files[uri].units):
            yield files[uri], sorted(answers.pop(uri), key=lambda done: done["unit"]["start"])


def _run_unit(
    item: dict[str, Any], *, vocabulary: Any, corpus_uri: str, min_genes: int, store: Store
) -> tuple[dict[str, Any], bytes]:
    """One Ray task: a unit becomes a part, or a failure as data."""
    import ray

    unit = Unit(**item["unit"])

    def work() -> dict[str, Any]:
        known: Vocabulary = ray.get(vocabulary)
        with open_atlas(unit.uri, store, counts_slot=unit.slot, etag=unit.etag) as atlas:
            targets_g = known.map_ids(atlas.gene_columns()[item["gene_column"]]).astype(np.int64)
        return write_part(
            unit,
            targets_g,
            vocabulary=known,
            min_genes=min_genes,
            corpus_uri=corpus_uri,
            dataset_id=item["dataset_id"],
            store=store,
        )

    return {**item, **guarded(work, where=unit.uri)}, b""


def _commit(
    corpus: Corpus, source: Source, file: Inspected, tasks: Sequence[dict[str, Any]], report: SourceReport
) -> Corpus:
    """Commit a file whose units are all done, or mark it as refused; returns the corpus to go on with."""
    report.seconds = sum(task["seconds"] for task in tasks)
    if failed := [task["failure"] for task in tasks if "failure" in task]:
        report.failure = Failure(**failed[0])
        return corpus
    for task in tasks:
        report.tally.add(Tally(**task["tally"]))
    report.notes = tuple(sorted({note for task in tasks for note in task["notes"]}))
    try:
        _reconcile(file, report)
        parts = [NewPart(**task["part"]) for task in tasks if task["part"]]
        corpus = corpus.commit_source(source, report.dataset_id, parts, _details(report))
    except (AtlasError, CorpusError) as error:
        report.failure = Failure(code=error.code, message=str(error))
        return corpus
    report.status = "ingested"
    return corpus


def _reconcile(file: Inspected, report: SourceReport) -> None:
    """Refuse a source that brings nothing or no real counts; fail loudly when a cell is unaccounted for."""
    tally = report.tally
    if not tally.read == file.n_cells == tally.kept + tally.n_dropped:
        raise GenescaleError(
            f"{file.n_cells} cells in the file, {tally.read} read, {tally.kept} kept, {tally.n_dropped} dropped.",
            where=file.uri,
            fix="Please report it.",
        )
    if not tally.kept:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(tally.dropped.items()))
        raise AtlasError(f"no cell is left of {tally.read:,} ({reasons}).", where=file.uri)
    if tally.largest_count < 2:
        raise NotCountsError("no count exceeds 1: these are detection calls.", where=file.uri, fix="Give raw counts.")


def _details(report: SourceReport) -> dict[str, Any]:
    """What the corpus's history says of a source."""
    left_out = ("uri", "dataset_id", "status", "failure")
    return {key: value for key, value in report.to_dict().items() if key not in left_out}
