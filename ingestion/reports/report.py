"""What an ingestion did, per source and in total: every cell that was read is kept or dropped for a reason.

`to_dict` is the schema of report.json: names stay as they are, new ones may be added, and `schema_version` rises when
one changes its meaning. `report_page.py` draws the same report, `summary` says it in a terminal.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from genescale.ingestion.annotation.gene_names import COUNTED
from genescale.ingestion.plan import Failure
from genescale.ingestion.reports.distribution import spreads
from genescale.ingestion.tally import Tally
from genescale.platform.storage import Store, join

REPORT_SCHEMA_VERSION = 1
JSON_NAME, PAGE_NAME = "report.json", "report.html"
Status = Literal["ingested", "already_committed", "refused"]
# What a report says of this run, which no history knows.
NOT_RECALLED = ("uri", "status", "failure", "tally", "seconds", "replaced")
# Genes of these fates become tokens.
KEPT_FATES = ("mapped", "renamed", "symbol")
# The tally's seconds by step stand beside the source's own seconds.
STEPS_KEY = "seconds_by_step"


@dataclasses.dataclass(kw_only=True)
class SourceReport:
    """One atlas file: what became of it, of its cells and of its genes."""

    uri: str
    dataset_id: str
    status: Status
    tally: Tally = dataclasses.field(default_factory=Tally)
    failure: Failure | None = None
    kind: str = ""
    """Format: `h5ad`, `zarr`, `loom`, `10x-h5` or `mtx`."""
    size_bytes: int = 0
    counts_slot: str = ""
    slot_reason: str = ""
    slots_seen: dict[str, str] = dataclasses.field(default_factory=dict)
    """What every place that was looked at held."""
    species: str = ""
    gene_column: str = ""
    genes_mapped: int = 0
    genes_dropped: int = 0
    genes_summed: int = 0
    genes_versioned: int = 0
    gene_report: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Genes and counts by fate, with examples; see `genes.gene_report`."""
    duplicates: dict[str, Any] = dataclasses.field(default_factory=dict)
    """`policy`, `within` (cells equal to another cell of this source), `matches` (cells by dataset), `dropped`."""
    quarantined: int = 0
    """Cells listed in the quarantine file that is committed with the source."""
    obs_columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Column of the corpus -> column of the file that it came from."""
    parts: int = 0
    part_bytes: int = 0
    replaced: bool = False
    """True when an earlier version of this dataset left the corpus in the same commit."""
    version: int | None = None
    """Version of the corpus in which the source was committed."""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    """Work time of the tasks of this source, summed."""

    @property
    def unaccounted(self) -> int:
        """Cells read that are neither kept nor dropped: 0 unless ingestion is broken."""
        return self.tally.read - self.tally.kept - self.tally.n_dropped

    @property
    def fates(self) -> dict[str, dict[str, Any]]:
        """The gene report by fate: `genes`, `share_of_genes`, `counts`, `share_of_counts`, `examples`.

        Counts are those of the tally: the genes are known when a file is opened, their counts when it was read.
        """
        counts = self.tally.counts_by_fate
        total = sum(counts.values())
        known: Mapping[str, Mapping[str, Any]] = self.gene_report.get("fates", {})
        told = {fate: dict(facts) for fate, facts in known.items()}
        for fate, facts in told.items():
            if total:
                facts["counts"] = counts.get(fate, 0.0)
                facts["share_of_counts"] = counts.get(fate, 0.0) / total
        return told

    @property
    def counts_by_fate(self) -> dict[str, float]:
        """Counts of each fate."""
        return {fate: float(facts.get("counts", 0.0)) for fate, facts in self.fates.items()}

    @property
    def genes_by_fate(self) -> dict[str, int]:
        """Gene columns of each fate."""
        return {fate: int(facts.get("genes", 0)) for fate, facts in self.fates.items()}

    @property
    def share_of_counts(self) -> float | None:
        """Share of the counts of genes of the right species that belong to vocabulary genes; None when unknown."""
        return mapped_share(self.counts_by_fate)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        plain = dataclasses.asdict(self)
        tally = plain.pop("tally")
        steps = tally.pop("seconds")
        plain["distributions"] = {name: spread.to_dict() for name, spread in spreads(self.tally).items()}
        if self.gene_report:
            plain["gene_report"] = {**self.gene_report, "fates": self.fates}
        return {**tally, **plain, STEPS_KEY: steps}

    def recall(self, details: Mapping[str, Any]) -> None:
        """Take what the corpus's history says of the source (see `to_dict`)."""
        fields = {field.name for field in dataclasses.fields(Tally)} - {"seconds"}
        known = {key: value for key, value in details.items() if key in fields}
        self.tally = Tally(**known, seconds=dict(details.get(STEPS_KEY, {})))
        for field in dataclasses.fields(self):
            if field.name in details and field.name not in NOT_RECALLED:
                value = details[field.name]
                setattr(self, field.name, tuple(value) if isinstance(value, list) else value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IngestReport:
    """The whole run; totals count the sources that were ingested now."""

    corpus_uri: str
    version: int | None
    """Version of the corpus after the run; None when there is none because every source was refused."""
    sources: tuple[SourceReport, ...]
    ignored: tuple[str, ...] = ()
    seconds: float = 0.0
    started: str = ""
    """Start of the run, ISO 8601 in UTC."""
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The options that decide which rows are made."""
    vocabulary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """`name`, `digest`, `genes` and `window` of the vocabulary."""

    def of(self, status: Status) -> list[SourceReport]:
        """The sources with this outcome."""
        return [source for source in self.sources if source.status == status]

    @property
    def ok(self) -> bool:
        """True when no source was refused."""
        return not self.of("refused")

    @property
    def total(self) -> Tally:
        """Counts over the sources that were ingested now."""
        tally = Tally()
        for source in self.of("ingested"):
            tally.add(source.tally)
        return tally

    @property
    def read(self) -> int:
        """Cells read."""
        return self.total.read

    @property
    def kept(self) -> int:
        """Cells that became rows."""
        return self.total.kept

    @property
    def dropped(self) -> dict[str, int]:
        """Cells that did not, by reason."""
        return self.total.dropped

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return self.total.tokens

    @property
    def source_bytes(self) -> int:
        """Sizes of the sources that were ingested now."""
        return sum(source.size_bytes for source in self.of("ingested"))

    @property
    def share_of_counts(self) -> float | None:
        """Share of the counts that belong to vocabulary genes, over all sources that were ingested now."""
        return mapped_share(self.total.counts_by_fate)

    @property
    def cells_per_second(self) -> float:
        """Cells read per second of the whole run, planning and committing included."""
        return self.read / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        from genescale.ingestion.reports.findings import findings

        total = dataclasses.asdict(self.total)
        steps = total.pop("seconds")
        return {
            "schema_version": REPORT_SCHEMA_VERSION,
            "corpus": self.corpus_uri,
            "version": self.version,
            "started": self.started,
            "seconds": round(self.seconds, 3),
            "ok": self.ok,
            "cells_per_second": round(self.cells_per_second, 1),
            "source_bytes": self.source_bytes,
            "share_of_counts": self.share_of_counts,
            "vocabulary": dict(self.vocabulary),
            "recipe": dict(self.recipe),
            "total": {**total, STEPS_KEY: steps},
            "sources": [source.to_dict() for source in self.sources],
            "findings": [dataclasses.asdict(finding) for finding in findings(self)],
            "ignored_files": list(self.ignored),
        }


def mapped_share(counts_by_fate: Mapping[str, float]) -> float | None:
    """Share of the counts of genes of the right species that vocabulary genes hold; None when there are none."""
    total = sum(counts for fate, counts in counts_by_fate.items() if fate in COUNTED)
    return sum(counts_by_fate.get(fate, 0.0) for fate in KEPT_FATES) / total if total else None


def verdict(report: IngestReport) -> str:
    """One sentence on the whole run."""
    ingested, present, refused = (len(report.of(s)) for s in ("ingested", "already_committed", "refused"))
    if report.ok and not ingested:
        return "Nothing to do: every source is already in the corpus."
    parts = [f"{ingested:,} of {len(report.sources):,} sources ingested"]
    parts += [f"{present:,} already in the corpus"] if present else []
    parts += [f"{refused:,} refused"] if refused else []
    return f"{', '.join(parts)}."


def summary(report: IngestReport) -> str:
    """The report for a terminal: a table, what was dropped, and what to do next."""
    from genescale.ingestion.reports.report_text import summary_text

    return summary_text(report)


def as_json(document: Mapping[str, Any]) -> str:
    """A report as JSON that people can read too: indented, with lists of numbers on one line."""
    text = json.dumps(document, indent=2, allow_nan=False)
    # A line break inside a text is escaped in JSON, so this meets lists only.
    return re.sub(
        r"\[\n[0-9\s,.eE+-]*\]", lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text
    )


def write_report(report: IngestReport, uri_folder: str, store: Store) -> list[str]:
    """Write report.html and report.json into a folder (local or s3://) and return their addresses."""
    from genescale.ingestion.reports.report_page import html

    files = {PAGE_NAME: html(report), JSON_NAME: as_json(report.to_dict())}
    return [store.write(join(uri_folder, name), text.encode()).uri for name, text in files.items()]
