"""One source of an ingest report in full: what was done and why, its cells, genes, duplicates, notes and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genescale.ingestion.reports.distribution import spreads
from genescale.ingestion.reports.findings import Finding
from genescale.ingestion.reports.report import SourceReport, Status
from genescale.ingestion.reports.report_figures import (
    FATE_NAMES,
    cell_segments,
    escaped,
    fate_segments,
    legend,
    number,
    percent,
    size,
    stacked_bar,
)

STATUS_MARKS: dict[Status, str] = {
    "refused": "✕ refused",
    "ingested": "✓ ingested",
    "already_committed": "= already there",
}
MOST_EXAMPLES = 12


def source_section(source: SourceReport, found: Sequence[Finding], *, anchor: str, is_open: bool) -> str:
    """A collapsible section, which a link to `anchor` opens; refused sources are always open."""
    opened = " open" if is_open or source.status == "refused" else ""
    told = f"{source.tally.kept:,} of {source.tally.read:,} cells" if source.tally.read else source.uri
    parts = [
        _findings(found),
        _done(source),
        _cells(source),
        _genes(source.fates),
        _duplicates(source),
        _notes(source),
    ]
    return (
        f"<details{opened}><summary><b>{escaped(source.dataset_id)}</b> "
        f'<span class="status {source.status}">{STATUS_MARKS[source.status]}</span> '
        f'<span class="soft">{escaped(told)}</span></summary>'
        f'<div class="inside" id="{anchor}">{"".join(parts)}</div></details>'
    )


def _findings(found: Sequence[Finding]) -> str:
    items = "".join(
        f'<li class="{finding.level}"><b class="{finding.level}">{finding.level}</b> {escaped(finding.what)}'
        + (f'<span class="next">{escaped(finding.next)}</span></li>' if finding.next else "</li>")
        for finding in found
    )
    return f'<ol class="todo">{items}</ol>' if items else ""


def _done(source: SourceReport) -> str:
    """What was decided, with the reasons, as pairs of terms and texts."""
    tally = source.tally
    pairs: list[tuple[str, str]] = [("file", source.uri)]
    pairs.append(
        (
            "format",
            " ".join(part for part in (source.kind, (size(source.size_bytes) if source.size_bytes else "")) if part),
        )
    )
    seen = dict(source.slots_seen)
    pairs.append(
        ("counts from", f"{source.counts_slot}: {seen.pop(source.counts_slot, source.slot_reason)}".rstrip(": "))
    )
    pairs += [(f"not from {name}", text) for name, text in seen.items()]
    pairs.append(("genes named by", f"var {source.gene_column}" if source.gene_column else ""))
    pairs.append(("species", source.species))
    pairs.append(
        (
            "genes summed",
            f"{source.genes_summed:,} columns share their gene with another" if source.genes_summed else "",
        )
    )
    if source.obs_columns:
        pairs.append(("obs columns", ", ".join(f"{to} ← {of}" for to, of in source.obs_columns.items())))
    if tally.read:
        pairs.append(("stored values", _values(source)))
        pairs.append(("tokens", _tokens(source)))
    pairs.append(("in the corpus", _place(source)))
    pairs.append(("work time", f"{source.seconds:,.1f} s" if source.seconds else ""))
    return f"<dl>{''.join(f'<dt>{escaped(term)}</dt><dd>{escaped(text)}</dd>' for term, text in pairs if text)}</dl>"


def _values(source: SourceReport) -> str:
    tally = source.tally
    parts = [f"largest count {number(tally.largest_count)}"]
    if tally.explicit_zeros:
        parts.append(f"{tally.explicit_zeros:,} explicit zeros left out")
    if repeated := tally.repeated_entries:
        parts.append(f"{repeated:,} repeated entries summed")
    return ", ".join(parts)


def _tokens(source: SourceReport) -> str:
    tally, length = source.tally, spreads(source.tally)["length"]
    text = f"{tally.tokens:,}"
    if length.total:
        text += f"; median {number(round(length.median or 0))} per cell"
    return f"{text}; {percent(tally.cropped / tally.kept)} of cells cropped to the window" if tally.kept else text


def _place(source: SourceReport) -> str:
    if not source.parts:
        return f"version {source.version}" if source.version is not None else ""
    told = f"{source.parts:,} part file{'s' if source.parts > 1 else ''}, {size(source.part_bytes)}"
    told = told if source.version is None else f"version {source.version}: {told}"
    return f"{told}; takes the place of an earlier version" if source.replaced else told


def _cells(source: SourceReport) -> str:
    tally = source.tally
    if not tally.read:
        return ""
    segments = cell_segments(tally.kept, tally.dropped)
    listed = f" The quarantine file lists all {source.quarantined:,} with their rows." if source.quarantined else ""
    return (
        f"<h3>Cells</h3><p>{tally.read:,} read = {tally.kept:,} kept + {tally.n_dropped:,} dropped.{listed}</p>"
        f"{stacked_bar(segments, label=f'{source.dataset_id}, cells')}{legend(segments, values=True)}"
    )


def _genes(fates: Mapping[str, Mapping[str, Any]]) -> str:
    fates = {fate: facts for fate, facts in fates.items() if facts.get("genes")}
    if not fates:
        return ""
    genes = fate_segments({fate: float(facts["genes"]) for fate, facts in fates.items()}, unit="genes")
    counts = fate_segments({fate: float(facts.get("counts", 0)) for fate, facts in fates.items()}, unit="counts")
    rows = "".join(
        f"<tr><td>{escaped(FATE_NAMES.get(fate, fate))}</td>"
        f'<td class="number">{int(facts["genes"]):,}</td><td class="number">{percent(facts.get("share_of_genes"))}</td>'
        f'<td class="number">{number(facts.get("counts"))}</td>'
        f'<td class="number">{percent(facts.get("share_of_counts"))}</td><td>{_examples(facts)}</td></tr>'
        for fate, facts in fates.items()
    )
    heads = ("genes", "share", "counts", "share")
    head = "".join(f'<th class="number">{name}</th>' for name in heads)
    return (
        f"<h3>Genes</h3><p class='soft'>above: gene columns; below: their counts</p>{stacked_bar(genes, label='genes')}"
        f"{stacked_bar(counts, label='counts')}{legend(genes)}"
        f'<div class="wide"><table><thead><tr><th>fate</th>{head}<th>examples</th></tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    )


def _examples(facts: Mapping[str, Any]) -> str:
    examples = [str(name) for name in facts.get("examples", ()) if name]
    shown = ", ".join(name if len(name) <= 40 else f"{name[:39]}…" for name in examples[:MOST_EXAMPLES])
    more = " …" if shown and int(facts["genes"]) > MOST_EXAMPLES else ""
    return escaped(f"{shown}{more}")


def _duplicates(source: SourceReport) -> str:
    held = source.duplicates
    matches = {name: cells for name, cells in dict(held.get("matches", {})).items() if cells}
    within = int(held.get("within", 0))
    if not matches and not within:
        return ""
    rows = [(f"in dataset {name}", cells) for name, cells in sorted(matches.items())]
    rows += [("in this source itself", within)] if within else []
    body = "".join(f'<tr><td>{escaped(name)}</td><td class="number">{cells:,}</td></tr>' for name, cells in rows)
    return (
        f"<h3>Cells with the same counts as another cell</h3><p>Policy {escaped(held.get('policy', ''))}: "
        f"{int(held.get('dropped', 0)):,} were left out.</p><table><tbody>{body}</tbody></table>"
    )


def _notes(source: SourceReport) -> str:
    items = "".join(f"<li>{escaped(note)}</li>" for note in source.notes)
    return f"<h3>Notes</h3><ul>{items}</ul>" if items else ""
