"""Merge the small parts of a corpus into larger ones: the same cells in the same order, in fewer files.

Readers of earlier versions keep the old parts, which stay where they are.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.fan_out import fan_out
from genescale.ingestion.plan import guarded
from genescale.ingestion.schema import part_schema
from genescale.ingestion.table.commits import Change, apply
from genescale.ingestion.table.delta_table import Table, TableFile
from genescale.ingestion.table.part_files import done, read_rows, write_rows
from genescale.ingestion.table.records import dataset_folder
from genescale.platform.errors import CorpusError, SettingsError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store

DEFAULT_PART_MIB = 64
MIB = 1024 * 1024
_NUMBERED = re.compile(r"part-(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompactReport:
    """What was merged; nothing was committed when there was nothing to merge."""

    uri: str
    version: int
    datasets: tuple[str, ...]
    parts_before: int
    parts_after: int
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return dataclasses.asdict(self)


def compact(
    corpus: Corpus, *, dataset_id: str = "", part_mib: int = DEFAULT_PART_MIB, progress: Progress = SILENT
) -> CompactReport:
    """Merge neighbouring parts of a dataset (or of all) into parts of about `part_mib`, in one commit; Ray must run.

    Raises CorpusError when the dataset is not there, or another writer changes it meanwhile.
    """
    if part_mib < 1:
        raise SettingsError(f"{part_mib} is too small.", where="part_mib", fix="Use 1 or more.")
    corpus = corpus.at_newest()
    corpus.refuse_shuffled("its parts have the size they were shuffled to")
    if dataset_id:
        corpus.dataset(dataset_id)
    groups = list(_groups(corpus.files, dataset_id, part_mib * MIB))
    progress.start(sum(file.rows for group in groups for file in group), "cells")
    merged = _merged(corpus, groups, progress)
    old = [file for group in groups for file in group]
    if groups:
        _check_order(corpus, old, merged)
        _commit(corpus, old, merged)
        corpus = corpus.at_newest()
    return CompactReport(
        uri=corpus.uri,
        version=corpus.version,
        datasets=tuple(sorted({file.dataset_id for file in old})),
        parts_before=len(old),
        parts_after=len(merged),
        bytes_before=sum(file.size_bytes for file in old),
        bytes_after=sum(file.size_bytes for file in merged),
    )


def _groups(files: Sequence[TableFile], dataset_id: str, target_bytes: int) -> Iterator[list[TableFile]]:
    """Runs of two or more neighbouring parts of one dataset that together are no larger than the target."""
    group: list[TableFile] = []
    for file in files:
        if dataset_id and file.dataset_id != dataset_id:
            continue
        held = sum(member.size_bytes for member in group)
        if group and (file.dataset_id != group[0].dataset_id or held + file.size_bytes > target_bytes):
            if len(group) > 1:
                yield group
            group = []
        group.append(file)
    if len(group) > 1:
        yield group


def _merged(corpus: Corpus, groups: Sequence[Sequence[TableFile]], progress: Progress) -> list[TableFile]:
    work = functools.partial(
        _merge, corpus_uri=corpus.uri, schema=part_schema(corpus.vocabulary.token_dtype), store=corpus.store
    )
    items = [{"files": [dataclasses.asdict(file) for file in group]} for group in groups]
    made = []
    for answer, _ in fan_out(items, work):
        made.append(TableFile(**done(answer, corpus.uri)["part"]))
        progress.advance(made[-1].rows)
    return sorted(made, key=lambda file: file.path)


def _merge(item: dict[str, Any], *, corpus_uri: str, schema: pa.Schema, store: Store) -> tuple[dict[str, Any], bytes]:
    files = [TableFile(**file) for file in item["files"]]

    def work() -> dict[str, Any]:
        table = pa.concat_tables([read_rows(corpus_uri, file, schema, store) for file in files]).combine_chunks()
        dataset = files[0].dataset_id
        part = write_rows(table, _number(files[0]), dataset_folder(dataset), corpus_uri=corpus_uri, store=store)
        return {"part": {**dataclasses.asdict(part), "dataset_id": dataset}}

    return {**item, **guarded(work, where=corpus_uri)}, b""


def _number(file: TableFile) -> int:
    match = _NUMBERED.match(file.path.rpartition("/")[2])
    return int(match[1]) if match else 0


def _check_order(corpus: Corpus, old: Sequence[TableFile], merged: Sequence[TableFile]) -> None:
    """CorpusError when the merged parts would not sort to where the old ones stood."""
    gone = {file.path for file in old}
    rows_before = [(file.dataset_id, file.rows) for file in corpus.files]
    after = sorted([*(file for file in corpus.files if file.path not in gone), *merged], key=lambda file: file.path)
    ends_before, ends_after = set(_ends(rows_before)), _ends([(file.dataset_id, file.rows) for file in after])
    if not ends_before.issuperset(ends_after):
        raise CorpusError(
            "its parts have names that would not keep their order.", where=corpus.uri, fix="Ingest the dataset again."
        )


def _ends(parts: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    ends, at = [], 0
    for dataset, rows in parts:
        at += rows
        ends.append((dataset, at))
    return ends


def _commit(corpus: Corpus, old: Sequence[TableFile], merged: Sequence[TableFile]) -> None:
    datasets = sorted({file.dataset_id for file in old})

    def decide(table: Table) -> Change:
        if not {file.path for file in old} <= {file.path for file in table.files()}:
            raise CorpusError(
                "a dataset was changed while it was being compacted.", where=corpus.uri, fix="Run it again."
            )
        return Change(
            record={
                "operation": "compact",
                "dataset_id": datasets[0] if len(datasets) == 1 else "",
                "datasets": datasets,
                "parts_before": len(old),
                "parts_after": len(merged),
            },
            added=merged,
            removed=old,
            transactions=[f"genescale/dataset/{dataset}" for dataset in datasets],
            data_change=False,
        )

    apply(corpus.uri, corpus.store, decide)
