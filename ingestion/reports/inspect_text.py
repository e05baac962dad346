"""Inspections as text for a terminal of a hundred columns, and as one JSON document."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from genescale.ingestion.reports.distribution import spreads
from genescale.ingestion.reports.inspection import Inspection, Outcome
from genescale.ingestion.reports.report_figures import FATE_NAMES, number, percent, size
from genescale.platform.text_table import text_table
from genescale.platform.vocabulary import Vocabulary

INSPECTION_SCHEMA_VERSION = 1
WIDTH, MARGIN = 100, 11
MOST_EXAMPLES = 2
MOST_COLUMNS = 12
OUTCOMES: dict[Outcome, str] = {
    "would_ingest": "would be ingested",
    "would_replace": "would be ingested in place of the dataset of this name",
    "already_committed": "is in the corpus already and would be left out",
    "would_refuse": "WOULD BE REFUSED",
}


def document(inspections: Sequence[Inspection], ignored: Sequence[str], vocabulary: Vocabulary) -> dict[str, Any]:
    """All inspections as JSON."""
    known = {"name": vocabulary.name, "digest": vocabulary.digest, "genes": len(vocabulary.gene_ids)}
    return {
        "schema_version": INSPECTION_SCHEMA_VERSION,
        "accepted": all(found.accepted for found in inspections),
        "vocabulary": known,
        "sources": [found.to_dict() for found in inspections],
        "ignored_files": list(ignored),
    }


def text(inspections: Sequence[Inspection], ignored: Sequence[str]) -> str:
    """Every inspection, and one line on all of them."""
    parts = ["\n".join(_described(found)) for found in inspections]
    accepted = sum(found.accepted for found in inspections)
    told = f"{accepted:,} of {len(inspections):,} would be accepted"
    cells = sum(found.expected.kept for found in inspections if found.accepted and found.expected)
    told += f", with {_about(inspections)}{cells:,} new cells." if cells else "."
    if ignored:
        told += f" {len(ignored):,} other files were passed over."
    return "\n\n".join([*parts, told])


def _about(inspections: Sequence[Inspection]) -> str:
    return "" if all(found.exact for found in inspections if found.accepted) else "about "


def _described(found: Inspection) -> Iterator[str]:
    source = found.source
    yield f"{_plain(source.uri)}"
    yield from _line("outcome", f"{OUTCOMES[found.outcome]}, dataset '{source.dataset_id}'")
    if found.n_cells:
        told = f"{source.kind}, {size(source.size_bytes)}: {found.n_cells:,} cells × {found.n_genes:,} genes"
        stored = f", {found.stored:,} stored values" if found.stored else ""
        whole = "; read as a whole, by one task" if found.sequential else ""
        yield from _line("file", f"{told}{stored}, {found.dtype}, {found.layout}{whole}")
    elif source.tally.read:
        yield from _line("cells", f"{source.tally.kept:,} of {source.tally.read:,} are in version {source.version}")
    if source.counts_slot and found.n_cells:
        yield from _line(
            "counts", f"{source.counts_slot}: {source.slots_seen.get(source.counts_slot) or source.slot_reason}"
        )
        for name, seen in source.slots_seen.items():
            if name != source.counts_slot:
                yield from _line("", f"not {name}: {seen}")
    if source.gene_column and found.n_cells:
        yield from _genes(found)
    if found.expected:
        yield from _cells(found)
        yield from _expected(found)
    if found.n_cells:
        yield from _obs(found)
    for note in source.notes if found.n_cells else ():
        yield from _line("note", note)
    for finding in found.findings:
        yield from _line(finding.level, finding.what)
        if finding.next:
            yield from _line("", f"-> {finding.next}")


def _genes(found: Inspection) -> Iterator[str]:
    source = found.source
    measured = source.gene_report.get("measured", source.genes_mapped)
    share = source.share_of_counts
    told = f"var {source.gene_column}; {source.species}; {measured:,} vocabulary genes"
    yield from _line("genes", told + (f" hold {percent(share)} of the counts" if share is not None else ""))
    rows = [
        (
            FATE_NAMES.get(fate, fate),
            int(facts["genes"]),
            percent(facts["share_of_genes"]),
            percent(facts["share_of_counts"]) if source.tally.read else "–",
            ", ".join(str(name)[:20] for name in facts["examples"][:MOST_EXAMPLES]),
        )
        for fate, facts in source.fates.items()
        if facts["genes"]
    ]
    columns = ("mapped", "genes", "of genes", "of counts", "such as")
    rows = [(name, genes, share.rjust(8), counts.rjust(9), some) for name, genes, share, counts, some in rows]
    for line in text_table(columns, rows).splitlines():
        yield f"{' ' * MARGIN}{line}"[:WIDTH]


def _cells(found: Inspection) -> Iterator[str]:
    tally = found.source.tally
    looked = "all" if found.exact else f"{tally.read:,} of {found.n_cells:,}, spread over the file, were"
    yield from _line("cells", f"{looked} looked at: {percent(tally.kept / max(tally.read, 1))} kept ({tally.kept:,})")
    for reason, cells in tally.dropped.items():
        yield from _line("", f"dropped {percent(cells / tally.read)} ({cells:,}): {reason}")
    if tally.kept:
        spread = spreads(tally)
        parts = [
            f"{label} {number(round(spread[name].median or 0))} ({_range(spread[name])})"
            for name, label in (("depth", "counts"), ("genes", "genes"), ("length", "tokens"))
        ]
        yield from _line("", f"median (5-95%) per kept cell: {', '.join(parts)}")


def _range(spread: Any) -> str:
    return "-".join(number(round(spread.quantile(share) or 0)) for share in (0.05, 0.95))


def _expected(found: Inspection) -> Iterator[str]:
    expected, about = found.expected, "" if found.exact else "about "
    assert expected is not None
    told = f"{about}{expected.kept:,} cells, {expected.tokens:,} tokens, {size(expected.corpus_bytes)} in the corpus"
    yield from _line("expected", f"{told}, {expected.seconds:,.1f} s of one processor")


def _obs(found: Inspection) -> Iterator[str]:
    filled = found.source.obs_columns
    if filled:
        same = [name for name, column in filled.items() if name == column]
        other = [f"{name} <- {column}" for name, column in filled.items() if name != column]
        yield from _line("obs", f"filled: {', '.join([*same, *other])}")
    missing = [name for name in found.obs_missing if not name.endswith("_ontology_term_id")]
    if missing:
        yield from _line("" if filled else "obs", f"not filled: {', '.join(missing)}")
    if unused := found.obs_unused:
        more = f" and {len(unused) - MOST_COLUMNS:,} more" if len(unused) > MOST_COLUMNS else ""
        yield from _line("", f"not kept: {', '.join(unused[:MOST_COLUMNS])}{more} (--obs, --keep-obs)")


def _line(name: str, told: str) -> list[str]:
    """A named line of at most a hundred columns; addresses and commands in it are never broken."""
    return textwrap.wrap(
        _plain(told),
        WIDTH,
        initial_indent=f"  {name:<{MARGIN - 2}}",
        subsequent_indent=" " * MARGIN,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _plain(told: str) -> str:
    return "".join(character if character.isprintable() else " " for character in told)
