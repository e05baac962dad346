"""The ingest report as one HTML page: the verdict, what to do next, the sources side by side, and each of them in full.

The page needs no network and no script. Every text that comes from a file or a person is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from genescale.ingestion.reports.distribution import spreads
from genescale.ingestion.reports.findings import Finding, findings
from genescale.ingestion.reports.report import IngestReport, SourceReport, verdict
from genescale.ingestion.reports.report_comparison import cell_bars, distributions, genes, throughput
from genescale.ingestion.reports.report_figures import cell_segments, escaped, legend, number, percent, stacked_bar
from genescale.ingestion.reports.report_source import STATUS_MARKS, source_section
from genescale.ingestion.reports.report_style import STYLE
from genescale.platform.progress import clock

# A page of more sources than this shows the details of a source only when it is asked for.
MOST_OPEN = 4


def html(report: IngestReport) -> str:
    """The whole page."""
    found = findings(report)
    title = f"Ingest report: {report.corpus_uri}"
    parts = [
        _head(report, found),
        _todo(found, report),
        _cells(report),
        _table(report, found),
        distributions(report),
        genes(report),
        throughput(report),
        _details(report, found),
        _recipe(report),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(report: IngestReport, found: Sequence[Finding]) -> str:
    version = "no version yet" if report.version is None else f"version {report.version}"
    known = report.vocabulary
    lead = [version]
    if known.get("name"):
        lead.append(f"vocabulary {known['name']}")
    if report.started:
        lead.append(f"started {report.started}")
    warned = sum(finding.level == "warning" for finding in found)
    asks = f" {warned:,} warning{'s' if warned != 1 else ''}." if warned else ""
    kind = "good" if report.ok else "bad"
    return (
        "<h1>Ingest report</h1>"
        f'<p class="lead">{escaped(report.corpus_uri)}<br>{escaped("; ".join(lead))}</p>'
        f'<div class="verdict {kind}">{escaped(verdict(report) + asks)}</div>'
        f'<div class="tiles">{"".join(_tile(*pair) for pair in _totals(report))}</div>'
    )


def _totals(report: IngestReport) -> list[tuple[str, str]]:
    total = report.total
    spread = spreads(total)
    return [
        (number(total.read), "cells read"),
        (number(total.kept), "cells kept"),
        (number(total.n_dropped), "cells dropped, each for a reason"),
        (number(total.tokens) if total.tokens < 1e8 else f"{total.tokens / 1e6:,.0f} M", "tokens"),
        (number(spread["length"].median), "median tokens per cell"),
        (percent(report.share_of_counts), "of counts in vocabulary genes"),
        (clock(report.seconds), "time (m:ss)"),
        (number(round(report.cells_per_second)), "cells per second"),
    ]


def _tile(value: str, name: str) -> str:
    return f"<div><b>{escaped(value)}</b><span>{escaped(name)}</span></div>"


def _todo(found: Sequence[Finding], report: IngestReport) -> str:
    if not found:
        text = "Nothing: no source was refused, and nothing unusual was seen." if report.of("ingested") else "Nothing."
        return f"<h2>What to do next</h2><p>{text}</p>"
    urgent = "".join(_item(finding, report) for finding in found if finding.level != "note")
    notes = [_item(finding, report) for finding in found if finding.level == "note"]
    listed = f'<ol class="todo">{urgent}</ol>' if urgent else "<p>Nothing is urgent.</p>"
    if notes:
        several = "s" if len(notes) > 1 else ""
        listed += (
            f"<details><summary>{len(notes):,} note{several}</summary><ol class='todo'>{''.join(notes)}</ol></details>"
        )
    return f"<h2>What to do next</h2>{listed}"


def _item(finding: Finding, report: IngestReport) -> str:
    advice = f'<span class="next">{escaped(finding.next)}</span>' if finding.next else ""
    # Files of the same name are told apart by their addresses.
    where = f' <span class="soft">{escaped(finding.uri)}</span>' if finding.level == "refused" else ""
    return (
        f'<li class="{finding.level}"><b class="{finding.level}">{finding.level}</b> '
        f'<a href="#{_anchor(report, finding.uri)}">{escaped(finding.dataset_id)}</a>{where}: {escaped(finding.what)}'
        f"{advice}</li>"
    )


def _cells(report: IngestReport) -> str:
    total = report.total
    if not total.read:
        return ""
    segments = cell_segments(total.kept, total.dropped)
    lost = total.read - total.kept - total.n_dropped
    proof = f"{total.read:,} read = {total.kept:,} kept + {total.n_dropped:,} dropped"
    if lost:
        proof = f"{total.read:,} read, but {total.kept:,} kept and {total.n_dropped:,} dropped: please report it"
    rows = cell_bars(report.of("ingested")) if len(report.of("ingested")) > 1 else ""
    return (
        f"<h2>Cells</h2><p>{escaped(proof)}.</p>{stacked_bar(segments, label='cells of all sources')}"
        f"{legend(segments, values=True)}{rows}"
    )


def _table(report: IngestReport, found: Sequence[Finding]) -> str:
    order = list(STATUS_MARKS)
    rows = sorted(report.sources, key=lambda s: (order.index(s.status), -s.tally.read, s.dataset_id))
    columns = (
        ("outcome", ""), ("dataset", ""), ("format", "minor"), ("cells read", "number"), ("kept", "number minor"),
        ("dropped", "number"), ("genes mapped", "number minor"), ("of counts", "number"),
        ("median counts", "number minor"), ("median tokens", "number minor"), ("warnings", "number"),
    )  # fmt: skip
    head = "".join(f'<th class="{kind}">{name}</th>' for name, kind in columns)
    body = "".join(_row(source, report, found, [kind for _, kind in columns]) for source in rows)
    ignored = ""
    if report.ignored:
        listed = ", ".join(report.ignored[:20]) + (" …" if len(report.ignored) > 20 else "")
        ignored = f'<p class="soft">{len(report.ignored):,} other files were passed over: {escaped(listed)}</p>'
    return (
        f'<h2>Sources</h2><div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{ignored}"
    )


def _row(source: SourceReport, report: IngestReport, found: Sequence[Finding], kinds: Sequence[str]) -> str:
    tally, spread = source.tally, spreads(source.tally)
    warned = sum(f.level == "warning" and f.uri == source.uri for f in found)
    known = bool(tally.read)
    measured = source.genes_mapped + source.genes_dropped
    replaced = " (replaced)" if source.replaced else ""
    mark, words = STATUS_MARKS[source.status].split(" ", 1)
    cells = [
        f'<span class="status {source.status}">{mark} <span class="minor">{words}</span></span>',
        f'<a href="#{_anchor(report, source.uri)}">{escaped(source.dataset_id)}</a>{replaced}',
        escaped(source.kind or "–"),
        number(tally.read) if known else "–",
        number(tally.kept) if known else "–",
        number(tally.n_dropped) if known else "–",
        f"{source.genes_mapped:,} of {measured:,}" if measured else "–",
        percent(source.share_of_counts),
        number(spread["depth"].median),
        number(spread["length"].median),
        f'<b class="warning">{warned}</b>' if warned else "0" if source.status == "ingested" else "–",
    ]
    kinds = ["", "name", *kinds[2:]]
    drawn = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, cells, strict=True))
    return f"<tr>{drawn}</tr>"


def _details(report: IngestReport, found: Sequence[Finding]) -> str:
    if not report.sources:
        return ""
    few = len(report.sources) <= MOST_OPEN
    sections = []
    for source in report.sources:
        own = [finding for finding in found if finding.uri == source.uri]
        sections.append(source_section(source, own, anchor=_anchor(report, source.uri), is_open=few))
    return f"<h2>Each source in full</h2>{''.join(sections)}"


def _recipe(report: IngestReport) -> str:
    facts = {"options that differ from their defaults": dict(report.recipe), "vocabulary": dict(report.vocabulary)}
    return f"<h2>How these rows were made</h2><pre>{escaped(json.dumps(facts, indent=2, default=str))}</pre>"


def _anchor(report: IngestReport, uri: str) -> str:
    """A name for links that no address can break out of."""
    return next((f"source-{number}" for number, source in enumerate(report.sources, 1) if source.uri == uri), "")
