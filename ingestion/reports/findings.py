"""What a person should look at in a report, with what to do next: every refusal, and what is unusual in the rest."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from genescale.ingestion.reports.distribution import spreads

if TYPE_CHECKING:
    from genescale.ingestion.reports.report import IngestReport, SourceReport

Level = Literal["refused", "warning", "note"]
LEVELS: tuple[Level, ...] = ("refused", "warning", "note")
# Fewer counts in vocabulary genes than this means another reference genome, or genes that were renamed since.
LEAST_SHARE_OF_COUNTS = 0.8
MOST_DROPPED = 0.2
MOST_CROPPED = 0.25
# A source whose median lies three doublings from that of the others was measured or processed in another way.
OUTLIER_FOLD = 8.0
LEAST_SOURCES_TO_COMPARE = 3
# Share of ones among the stored values of raw counts: fewer in deep or summed data, more in nearly empty droplets.
ONES = (0.2, 0.97)
# Whole numbers above 2^24 are no longer exact in single precision, in which most files store counts.
LARGEST_EXACT_COUNT = 2**24

AGAIN = "Then run the same command again: what is committed is left out."
NEXT_BY_CODE = {
    "atlas": f"Mend the file or its options, or leave it out. {AGAIN}",
    "not_counts": f"Find the raw matrix: name it with --counts-slot, or ask its authors for it. {AGAIN}",
    "corpus": "Look at `genescale corpus show` and `history`, then choose another --dataset-id or corpus.",
    "storage": f"Check address, keys and network. {AGAIN}",
    "cluster": f"See the logs of Ray's workers; memory is the usual cause, so try a smaller --unit-nonzeros. {AGAIN}",
    "limit": f"Raise the limit that is named, or cut the file. {AGAIN}",
    "internal": "This is a fault of Genescale: please report it with the message.",
}
NEXT_BY_REASON = {
    "empty_cell": "Empty droplets were not removed: take the filtered matrix.",
    "no_vocabulary_gene": "These cells have counts only in genes that the vocabulary lacks: see the gene report.",
    "below_min_genes": "Lower --min-genes if cells this small are wanted.",
    "below_min_counts": "Lower --min-counts if cells this shallow are wanted.",
    "mitochondrial_share": "Raise --max-mito-share if these cells are wanted; nuclei should have almost none.",
    "not_primary_data": "Their curators name another dataset as the origin; --all-data keeps them.",
    "filter_pass": "The file marks them as failing its own filter; --ignore-filter-pass keeps them.",
    "where": "They do not meet --where.",
    "bad_values": "Their values cannot be counts: look at the quarantine file and ask for a clean matrix.",
    "duplicate_cell": "The same counts stand in another cell of the corpus: see the duplicates of the source.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to look at: what was seen in which dataset, and what to do next."""

    level: Level
    dataset_id: str
    uri: str
    what: str
    next: str = ""


def findings(report: IngestReport) -> list[Finding]:
    """Everything to look at, refusals first; sources that were committed earlier are not judged again."""
    found = [finding for source in report.sources for finding in source_findings(source)]
    found += list(_outliers(report))
    return sorted(found, key=lambda finding: (LEVELS.index(finding.level), finding.dataset_id))


def source_findings(source: SourceReport) -> list[Finding]:
    """What one source should be looked at for; nothing for a source that was committed earlier."""
    if source.status == "already_committed":
        return []
    if source.failure is not None:
        next_step = NEXT_BY_CODE.get(source.failure.code, AGAIN)
        # The address is told beside it.
        message = source.failure.message.replace(f"{source.uri}: ", "", 1)
        return [_finding("refused", source, f"[{source.failure.code}] {message}", next_step)]
    seen = [*_about_cells(source), *_about_genes(source), *_about_values(source)]
    return [*(_finding("warning", source, text) for text in source.warnings), *seen]


def _finding(level: Level, source: SourceReport, what: str, next_step: str = "") -> Finding:
    return Finding(level=level, dataset_id=source.dataset_id, uri=source.uri, what=what, next=next_step)


def _about_cells(source: SourceReport) -> Iterator[Finding]:
    tally = source.tally
    if source.unaccounted:
        text = f"{abs(source.unaccounted):,} cells are unaccounted for: {tally.read:,} read, {tally.kept:,} kept."
        yield _finding("warning", source, text, NEXT_BY_CODE["internal"])
    if tally.read and tally.n_dropped > MOST_DROPPED * tally.read:
        reason, cells = max(tally.dropped.items(), key=lambda item: item[1])
        text = (
            f"{tally.n_dropped / tally.read:.0%} of its cells were dropped, most for the reason {reason} ({cells:,})."
        )
        yield _finding("warning", source, text, NEXT_BY_REASON.get(reason, ""))
    if tally.dropped.get("bad_values"):
        cells = tally.dropped["bad_values"]
        text = f"{cells:,} cells hold values that cannot be counts and were put into quarantine."
        yield _finding("warning", source, text, NEXT_BY_REASON["bad_values"])
    if tally.kept and tally.cropped > MOST_CROPPED * tally.kept:
        text = f"{tally.cropped / tally.kept:.0%} of its cells have more genes than the window holds; the rest is cut."
        yield _finding("note", source, text, "A vocabulary with a wider window would keep them.")
    yield from _about_duplicates(source)
    yield from _about_compared(source)


def _about_duplicates(source: SourceReport) -> Iterator[Finding]:
    held = source.duplicates
    matches = {name: int(cells) for name, cells in dict(held.get("matches", {})).items() if cells}
    dropped = int(held.get("dropped", 0))
    for name, cells in sorted(matches.items()):
        text = f"{cells:,} of its cells have the same counts as cells of dataset '{name}'."
        advice = (
            "They were left out." if dropped else "Choose --duplicates keep_first or keep_primary to keep one of each."
        )
        yield _finding("note" if dropped else "warning", source, text, advice)
    if within := int(held.get("within", 0)):
        text = f"{within:,} of its cells have the same counts as another cell of the same file."
        advice = "They were left out." if dropped else "Check whether samples were concatenated twice."
        yield _finding("note" if dropped else "warning", source, text, advice)


def _about_compared(source: SourceReport) -> Iterator[Finding]:
    held = source.duplicates
    if cells := int(held.get("not_compared", 0)):
        text = f"{cells:,} cells of the corpus carry no content hash: copies of them are not seen."
        yield _finding(
            "warning", source, text, "An older release wrote them: ingest their datasets again with --replace."
        )
    if cells := int(held.get("superseded", 0)):
        text = f"{cells:,} of its primary cells stand beside secondary copies that the corpus held before."
        yield _finding(
            "note", source, text, "Remove or replace the dataset with the copies if each cell is to count once."
        )
    if cells := int(held.get("repeated_names", 0)):
        text = f"{cells:,} of its cells share their name with another cell of the file."
        yield _finding(
            "note", source, text, "Their rows tell them apart; were samples joined without renaming barcodes?"
        )


def _about_genes(source: SourceReport) -> Iterator[Finding]:
    share = source.share_of_counts
    if share is not None and share < LEAST_SHARE_OF_COUNTS:
        text = f"only {share:.0%} of its counts stand for vocabulary genes."
        advice = "See the examples in its gene report: another reference or retired names? A --gene-table maps more."
        yield _finding("warning", source, text, advice)
    if ambiguous := source.genes_by_fate.get("ambiguous", 0):
        text = f"{ambiguous:,} gene names mean more than one gene and were dropped."
        yield _finding("note", source, text, "Files with Ensembl ids lose none.")


def _about_values(source: SourceReport) -> Iterator[Finding]:
    tally = source.tally
    if tally.n_values and not ONES[0] <= tally.n_ones / tally.n_values <= ONES[1]:
        text = (
            f"{tally.n_ones / tally.n_values:.0%} of its values are 1; raw counts have {ONES[0]:.0%} to {ONES[1]:.0%}."
        )
        advice = "Check that these are molecules of single cells, neither scaled, rounded nor summed over cells."
        yield _finding("warning", source, text, advice)
    if tally.largest_count >= LARGEST_EXACT_COUNT:
        text = f"its largest count is {tally.largest_count:,.0f}: beyond what single precision holds exactly."
        yield _finding("warning", source, text, "Check that these are molecules or reads of one cell.")


def _outliers(report: IngestReport) -> Iterator[Finding]:
    """Sources whose median depth or number of genes is far from the median of all medians."""
    judged = [source for source in report.of("ingested") if source.tally.kept]
    if len(judged) < LEAST_SOURCES_TO_COMPARE:
        return
    for name, label in (("depth", "counts per cell"), ("genes", "genes per cell")):
        medians = {id(s): median for s in judged if (median := spreads(s.tally)[name].median)}
        if len(medians) < LEAST_SOURCES_TO_COMPARE:
            continue
        middle = statistics.median(medians.values())
        for source in judged:
            value = medians.get(id(source), middle)
            if not middle / OUTLIER_FOLD <= value <= middle * OUTLIER_FOLD:
                fold = f"{value / middle:.0f} times" if value > middle else f"1/{middle / value:.0f} of"
                text = f"its median of {value:,.0f} {label} is {fold} the median of all sources ({middle:,.0f})."
                advice = (
                    "Reads instead of molecules, a targeted panel, or another slot? See how its counts were chosen."
                )
                yield _finding("warning", source, text, advice)
