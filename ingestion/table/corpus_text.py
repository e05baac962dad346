"""What `genescale corpus` prints: tables for people. The JSON of every action is the report's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from genescale.platform.text_table import text_table

if TYPE_CHECKING:
    from genescale.ingestion.corpus import CommitRecord, Corpus
    from genescale.ingestion.table.compact import CompactReport
    from genescale.ingestion.table.diff import CorpusDiff
    from genescale.ingestion.table.export import ExportReport
    from genescale.ingestion.table.gc import GcReport
    from genescale.ingestion.table.shuffle import ShuffleReport
    from genescale.ingestion.table.verify import VerifyReport

SHOWN_FILES = 20
SHOWN_FAULTS = 50


def size(size_bytes: float) -> str:
    """Bytes for people: `3.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:,.0f} {unit}" if unit == "B" else f"{size_bytes:,.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:,.1f} TiB"


def corpus_facts(corpus: Corpus) -> dict[str, Any]:
    """What `show --json` prints."""
    tokens = int(corpus.cells(["length"]).column(0).to_numpy().sum()) if corpus.n_cells else 0
    return {
        "uri": corpus.uri,
        "version": corpus.version,
        "cells": corpus.n_cells,
        "tokens": tokens,
        "parts": len(corpus.parts),
        "size_bytes": corpus.size_bytes,
        "layout": corpus.layout,
        "schema_version": corpus.schema_version,
        "columns": {field.name: str(field.type) for field in corpus.schema},
        "vocabulary": {
            "name": corpus.vocabulary.name,
            "digest": corpus.vocabulary.digest,
            "genes": len(corpus.vocabulary.gene_ids),
            "window": corpus.vocabulary.window,
        },
        "datasets": [
            {
                "dataset_id": record.dataset_id,
                "cells": record.n_cells,
                "parts": record.n_parts,
                "size_bytes": record.size_bytes,
                "source": record.source_uri,
                "etag": record.source_etag,
                "identity": record.source_identity,
                "counts_slot": str(record.details.get("counts_slot", "")),
                "version": record.added_in_version,
                "files": sorted(record.details.get("files", {})),
            }
            for record in corpus.datasets()
        ],
    }


def show_text(facts: Mapping[str, Any]) -> str:
    """What `show` prints."""
    cells, tokens, size_bytes = facts["cells"], facts["tokens"], facts["size_bytes"]
    per_cell = f", {size_bytes / cells:,.0f} bytes and {tokens / cells:,.0f} tokens per cell" if cells else ""
    vocabulary = facts["vocabulary"]
    rows = [_dataset_row(dataset) for dataset in facts["datasets"]]
    genes = f"{vocabulary['name']}, {vocabulary['genes']:,} genes, window {vocabulary['window']:,}"
    return "\n".join(
        [
            f"corpus      {facts['uri']}@{facts['version']}",
            f"cells       {cells:,} in {facts['parts']:,} parts, {tokens:,} tokens",
            f"size        {size(size_bytes)}{per_cell}",
            f"layout      {facts['layout']}, schema {facts['schema_version']}",
            f"vocabulary  {genes} ({vocabulary['digest'][:12]})",
            text_table(("dataset", "cells", "size", "since", "counts", "source"), rows),
        ]
    )


def _dataset_row(dataset: Mapping[str, Any]) -> tuple[Any, ...]:
    taken = size(dataset["size_bytes"]) if dataset["size_bytes"] else ""
    name, cells, since = dataset["dataset_id"], dataset["cells"], f"@{dataset['version']}"
    return name, cells, taken, since, dataset["counts_slot"], dataset["source"]


def history_facts(records: list[CommitRecord]) -> list[dict[str, Any]]:
    """What `history --json` prints, newest first."""
    return [
        {
            "version": record.version,
            "time": record.time.isoformat(),
            "operation": record.operation,
            "dataset_id": record.dataset_id,
            **record.details,
        }
        for record in records
    ]


def history_text(records: list[CommitRecord]) -> str:
    """What `history` prints."""
    rows = [
        (
            f"@{record.version}",
            record.time.strftime("%Y-%m-%d %H:%M:%S"),
            "replace" if "replaces" in record.details else record.operation,
            record.dataset_id or ", ".join(record.details.get("datasets", ())),
            record.details.get("kept", record.details.get("cells", "")),
            ", ".join(f"{reason}: {n:,}" for reason, n in record.details.get("dropped", {}).items()),
        )
        for record in records
    ]
    return text_table(("version", "time (UTC)", "operation", "dataset", "cells", "dropped"), rows)


def diff_text(diff: CorpusDiff) -> str:
    """What `diff` prints."""
    before, after = diff.cells
    lines = [f"from   {diff.before}: {before:,} cells", f"to     {diff.after}: {after:,} cells ({after - before:+,})"]
    rows: list[tuple[Any, ...]] = [("removed", r.dataset_id, r.n_cells, "", r.source_uri) for r in diff.removed]
    rows += [("added", r.dataset_id, "", r.n_cells, r.source_uri) for r in diff.added]
    rows += [("changed", c.dataset_id, *c.cells, c.reasons) for c in diff.changed]
    if rows:
        lines.append(text_table(("what", "dataset", "cells before", "after", "source or reason"), rows))
    lines.append(f"same   {len(diff.unchanged):,} datasets")
    return "\n".join(lines)


def verify_text(report: VerifyReport) -> str:
    """What `verify` prints."""
    lines = [
        f"corpus    {report.uri}@{report.version}",
        f"checked   {report.cells:,} cells in {report.parts:,} parts ({size(report.size_bytes)}, {report.pages:,} "
        f"pages), {report.files:,} side files",
        f"time      {report.seconds:.1f} s, {size(report.size_bytes / max(report.seconds, 1e-9))}/s",
    ]
    if report.unnamed:
        lines.append(f"note      {report.unnamed:,} parts have no digest in their names: their footers are unproved")
    if report.compared:
        lines.append(f"compared  {report.compared:,} cells with their sources")
    lines += [f"warning   {dataset}: not compared: {why}" for dataset, why in report.not_compared.items()]
    lines += [f"fault     {fault}" for fault in report.faults[:SHOWN_FAULTS]]
    if len(report.faults) > SHOWN_FAULTS:
        lines.append(f"fault     … and {len(report.faults) - SHOWN_FAULTS:,} more (--json lists all)")
    lines.append(f"result    {'everything is as it was recorded' if report.ok else f'{len(report.faults):,} faults'}")
    if not report.ok:
        lines.append("next      restore these files from a copy, or remove the dataset and ingest it again")
    return "\n".join(lines)


def compact_text(report: CompactReport) -> str:
    """What `compact` prints."""
    if not report.parts_before:
        return f"nothing to merge: {report.uri}@{report.version} has no small neighbouring parts"
    return (
        f"merged {report.parts_before:,} parts ({size(report.bytes_before)}) of {', '.join(report.datasets)} into "
        f"{report.parts_after:,} ({size(report.bytes_after)}): version {report.version}\n"
        "earlier versions keep the old parts"
    )


def shuffle_text(report: ShuffleReport) -> str:
    """What `shuffle` prints."""
    if not report.datasets:
        return f"nothing to do: {report.output} holds every dataset of {report.source}"
    return "\n".join(
        [
            f"corpus    {report.output}",
            f"from      {report.source}, seed {report.seed}{', rebuilt' if report.rebuilt else ''}",
            f"shuffled  {report.cells:,} cells of {', '.join(report.datasets)}",
            f"written   {report.parts:,} parts ({size(report.size_bytes)})",
        ]
    )


def gc_text(report: GcReport) -> str:
    """What `gc` prints."""
    verb = "would delete" if report.dry_run else "deleted"
    lines = [f"{verb}  {entry.uri} ({size(entry.size_bytes)})" for entry in report.deleted[:SHOWN_FILES]]
    if len(report.deleted) > SHOWN_FILES:
        lines.append(f"{verb}  … and {len(report.deleted) - SHOWN_FILES:,} more (--json lists all)")
    lines.append(f"{verb} {len(report.deleted):,} files ({size(report.size_bytes)}); {report.named:,} named files stay")
    if report.young:
        lines.append(f"{len(report.young):,} unnamed files are within the grace period and stay")
    return "\n".join(lines)


def export_text(report: ExportReport) -> str:
    """What `export` prints."""
    return (
        f"exported {report.cells:,} cells of {report.source} as {report.format}: "
        f"{len(report.files):,} files ({size(report.size_bytes)}) in {report.output}"
    )
