"""The ingest report for a terminal: one table, what was dropped, what to do next, and where the time went."""

from __future__ import annotations

import textwrap

from genescale.ingestion.reports.distribution import spreads
from genescale.ingestion.reports.findings import Finding, findings
from genescale.ingestion.reports.report import IngestReport, SourceReport, verdict
from genescale.ingestion.reports.report_figures import number, percent, size
from genescale.platform.progress import clock
from genescale.platform.text_table import text_table

COLUMNS = ("dataset", "status", "read", "kept", "dropped", "genes", "of counts", "tokens/cell", "warnings")
WIDTH = 100
MOST_NAME = 34


def summary_text(report: IngestReport) -> str:
    """Several lines of plain text; control characters of foreign texts are taken out."""
    found = findings(report)
    lines = [text_table(COLUMNS, _aligned([_row(source, found) for source in report.sources])), ""]
    total = report.total
    for reason, cells in total.dropped.items():
        lines.append(f"dropped  {cells:,} cells: {reason}")
    for note, names in _noted(report).items():
        lines += _wrapped(
            f"note     {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {note}"
        )
    lines += [line for finding in found for line in told(finding)]
    version = "none yet" if report.version is None else f"{report.corpus_uri}@{report.version}"
    lines += ["", f"result   {verdict(report)}", f"corpus   {version}"]
    if total.read:
        lines.append(f"cells    {total.read:,} read = {total.kept:,} kept + {total.n_dropped:,} dropped")
    lines.append(f"time     {clock(report.seconds)} (m:ss), {report.cells_per_second:,.0f} cells/s{_bytes(report)}")
    return "\n".join(_plain(line) for text in lines for line in text.split("\n"))


def told(finding: Finding) -> list[str]:
    """A finding as lines of at most a hundred characters, what to do on a line of its own."""
    if finding.level == "refused":
        # In one piece with the address, so that it can be searched for in a log.
        code, _, message = finding.what.partition(" ")
        lines = [f"{finding.level:<8} {code} {finding.uri}: {' '.join(message.splitlines())}"]
    else:
        lines = _wrapped(f"{finding.level:<8} {finding.dataset_id}: {finding.what}")
    return lines + (_wrapped(f"{'':<8} -> {finding.next}") if finding.next else [])


def _wrapped(text: str) -> list[str]:
    # Addresses and commands are copied from here, so they are never broken.
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False)


def _row(source: SourceReport, found: list[Finding]) -> tuple[str, ...]:
    tally = source.tally
    name = source.dataset_id if len(source.dataset_id) <= MOST_NAME else f"{source.dataset_id[: MOST_NAME - 1]}…"
    status = source.status.replace("_", " ") + (" (replaced)" if source.replaced else "")
    measured = source.genes_mapped + source.genes_dropped
    warned = sum(finding.level == "warning" and finding.uri == source.uri for finding in found)
    if not tally.read:
        return (name, status, "–", "–", "–", "–", "–", "–", "–")
    return (
        name,
        status,
        f"{tally.read:,}",
        f"{tally.kept:,}",
        f"{tally.n_dropped:,}",
        f"{source.genes_mapped:,}/{measured:,}" if measured else "–",
        percent(source.share_of_counts),
        number(round(median)) if (median := spreads(tally)["length"].median) else "–",
        f"{warned:,}",
    )


def _aligned(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Numbers to the right: they stand in columns that also hold dashes."""
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(len(COLUMNS))]
    return [tuple(text if i < 2 else text.rjust(widths[i]) for i, text in enumerate(row)) for row in rows]


def _noted(report: IngestReport) -> dict[str, list[str]]:
    """Notes of the sources that were ingested now, each once, with the datasets that it is about."""
    noted: dict[str, list[str]] = {}
    for source in report.of("ingested"):
        for note in source.notes:
            noted.setdefault(note, []).append(source.dataset_id)
    return noted


def _bytes(report: IngestReport) -> str:
    return f", {size(report.source_bytes)} read" if report.source_bytes else ""


def _plain(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
